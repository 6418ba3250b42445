"""What rows ask of their logits: one step between a model and the probabilities of verification.

`Adjuster` is called for draft and target alike, with the row and the output position that each
row of logits predicts. What it does there depends on the tokens before that position, and drafted
ones are among them as if they stood: that is what makes the output the target's own. The order is
vLLM's: what is allowed, bans, biases, then penalties.

Only tokens that stand in a row's text or in its lists are touched, so that the cost grows with
these and not with the vocabulary. All is done on the device, and nothing waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from specdec.lossless.prefixes import Prefixes, ends_of_words, repeated_ngrams
from specdec.request import SamplingParams


class AskingRow(Protocol):
    """What is needed of a row: its tokens, where the output begins in them, what it asks for."""

    sampling: SamplingParams
    tokens: list[int]
    output_start: int


class Adjuster:
    """What the rows of a batch ask of their logits, as tensors, and their tokens on the device.

    Args:
        rows: the B live rows, by slot.
        eos_token_ids: the model's end-of-sequence tokens.
        vocab_size: V.
        before: the adjuster of the batch before this one, whose tokens are taken over.
    """

    def __init__(
        self,
        rows: Sequence[AskingRow],
        eos_token_ids: Iterable[int],
        vocab_size: int,
        device: torch.device,
        before: Adjuster | None = None,
    ) -> None:
        asked = [row.sampling for row in rows]
        self._vocab, self._device = vocab_size, device

        def numbers(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        # What no row asks for is None, and is skipped.
        self._allowed = self._restricted = self._least = self._biased = self._words = None
        if any(p.allowed_token_ids is not None for p in asked):
            self._allowed = self._lists([p.allowed_token_ids or () for p in asked])
            self._restricted = numbers([p.allowed_token_ids is not None for p in asked], torch.bool)
        if any(p.min_tokens for p in asked):
            self._least = numbers([p.min_tokens for p in asked], torch.int64)
            eos = tuple(eos_token_ids)
            ends = [(*p.stop_token_ids, *(() if p.ignore_eos else eos)) for p in asked]
            # A tokenizer may have an end that its model never says.
            said = [[token for token in each if 0 <= token < vocab_size] for each in ends]
            self._ends = self._lists(said)
        if any(p.logit_bias for p in asked):
            self._biased = self._lists([tuple(p.logit_bias) for p in asked])
            values = [tuple(p.logit_bias.values()) for p in asked]
            self._bias = self._lists(values, 0.0, torch.float32)
        self._prefixes = None
        if any(p.reads_prefix for p in asked):
            self._prefixes = Prefixes(
                rows, vocab_size, device, before._prefixes if before else None
            )
            self._repetition = numbers([p.repetition_penalty for p in asked])
            self._frequency = numbers([p.frequency_penalty for p in asked])
            self._presence = numbers([p.presence_penalty for p in asked])
            self._repeats = any(p.repetition_penalty != 1 for p in asked)
            self._counts = any(p.frequency_penalty or p.presence_penalty for p in asked)
            self._ngram = numbers([p.no_repeat_ngram_size for p in asked], torch.int64)
            self._most_ngram = max(p.no_repeat_ngram_size for p in asked)
        if any(p.bad_words for p in asked):
            words = [[word for word in p.bad_words if not isinstance(word, str)] for p in asked]
            self._words = self._lists([[word[-1] for word in each] for each in words])
            self._beginnings = self._tables([[word[:-1] for word in each] for each in words])

    def follow(self) -> None:
        """Send to the device what the rows' tokens have become."""
        if self._prefixes is not None:
            self._prefixes.follow()

    def __call__(self, logits: Tensor, owner: Tensor, at: Tensor, behind: Tensor) -> Tensor:
        """Adjusted logits float32 [n, V].

        Args:
            logits: float [n, V], which stay as they are.
            owner: int64 [n], the slots they belong to.
            at: int64 [n], the output positions they predict.
            behind: int64 [n, k], candidates behind the rows' tokens; up to `at` they count.
        """
        nowhere = self._vocab  # one more column, for what lists of different lengths do not have
        out = logits.new_empty(len(logits), nowhere + 1, dtype=torch.float32)
        out[:, :nowhere], out[:, nowhere] = logits, 0.0
        if self._allowed is not None and self._restricted is not None:
            allowed = self._allowed[owner]
            kept = out.gather(1, allowed)
            out.masked_fill_(self._restricted[owner, None], -math.inf)
            out.scatter_(1, allowed, kept)
        bans = []
        if self._least is not None:
            early = (at < self._least[owner])[:, None]
            bans.append(torch.where(early, self._ends[owner], nowhere))
        prefix = self._prefixes.before(owner, at, behind) if self._prefixes is not None else None
        if prefix is not None and self._words is not None:
            ends = ends_of_words(prefix, self._beginnings[owner])
            bans.append(torch.where(ends, self._words[owner], nowhere))
        if prefix is not None and self._most_ngram:
            again = repeated_ngrams(prefix, self._ngram[owner], self._most_ngram)
            bans.append(torch.where(again, prefix.tokens, nowhere))
        if bans:
            out.scatter_(1, torch.cat(bans, 1), -math.inf)
        if self._biased is not None:
            out.scatter_add_(1, self._biased[owner], self._bias[owner])
        # A token that stands twice in a text is written twice with the same number.
        if prefix is not None and self._repeats:
            x, penalty = out.gather(1, prefix.tokens), self._repetition[owner, None]
            out.scatter_(1, prefix.tokens, torch.where(x > 0, x / penalty, x * penalty))
        if prefix is not None and self._counts:
            output = prefix.output
            each = -self._frequency[owner, None].expand(output.shape)
            out.scatter_add_(1, output, each)  # equal summands: their order changes no bit
            out.scatter_(1, output, out.gather(1, output) - self._presence[owner, None])
        return out[:, :nowhere]

    def _lists(
        self,
        lists: Sequence[Sequence[float]],
        fill: float | None = None,
        dtype: torch.dtype = torch.int64,
    ) -> Tensor:
        """Lists of B rows as one tensor [B, longest], filled up with `fill` or `nowhere`."""
        fill = self._vocab if fill is None else fill
        longest = max(map(len, lists))
        filled = [[*each, *[fill] * (longest - len(each))] for each in lists]
        return torch.tensor(filled, dtype=dtype, device=self._device)

    def _tables(self, words: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """What words of B rows begin with, as int64 [B, W, X]; the last token stands last.

        In front of them stands -1, which any token may take the place of.
        """
        most = max(map(len, words))
        longest = max((len(word) for each in words for word in each), default=0)
        table = torch.full((len(words), most, longest), -1)
        for slot, each in enumerate(words):
            for number, word in enumerate(each):
                table[slot, number, longest - len(word) :] = torch.tensor(word)
        return table.to(self._device)
