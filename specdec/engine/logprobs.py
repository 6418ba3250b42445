"""How likely the tokens of an output were: read off the logits that verify them anyway."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.engine.scheduler import LiveRow
from specdec.lossless.sampling import NO_TOKEN, SamplingBatch, probabilities
from specdec.measure.clock import PhaseClock
from specdec.model.cache import SlotCache
from specdec.model.decoder import PackedDecoder
from specdec.model.prefill import feed_shared
from specdec.model.rows import upload
from specdec.model.sharing import SharedCaches
from specdec.request import PROCESSED, TokenLogprob


class LogprobReader:
    """Reads the log-probabilities that rows ask for; one more transfer to the host a round.

    Args:
        rows: the live rows, by slot; at least one of them asks.
    """

    def __init__(self, rows: Sequence[LiveRow]) -> None:
        self._wanted = [row.sampling.logprobs for row in rows]
        self._processed = [row.sampling.logprobs_mode == PROCESSED for row in rows]

    def read(
        self,
        raw: Tensor,
        adjusted: Tensor,
        parameters: SamplingBatch,
        judged: Sequence[Sequence[int]],
        committed: Sequence[Sequence[int]],
    ) -> dict[int, list[TokenLogprob]]:
        """The log-probabilities of a round's committed tokens, by slot.

        Args:
            raw, adjusted: the target's logits [M, V] at the scored positions, and as rows ask for.
            parameters: of the M positions.
            judged: of each row, at which of these positions its committed tokens are judged.
            committed: the rows' committed tokens.
        """
        read = [
            (slot, place, token)
            for slot, (places, tokens) in enumerate(zip(judged, committed, strict=True))
            if self._wanted[slot] is not None and tokens
            for place, token in zip(places, tokens, strict=True)
            if token != NO_TOKEN
        ]
        if not read:
            return {}
        slots, places, tokens = zip(*read, strict=True)
        processed = [self._processed[slot] for slot in slots]
        index, token, flags = upload(raw.device, places, tokens, processed)
        log_p = torch.log_softmax(raw[index].float(), -1)
        if any(processed):
            asked = _processed(adjusted[index], parameters, index)
            log_p = torch.where(flags[:, None] > 0, asked, log_p)
        counts = [self._wanted[slot] or 0 for slot in slots]
        told: dict[int, list[TokenLogprob]] = {}
        for slot, each in zip(slots, _told(log_p, token, counts), strict=True):
            told.setdefault(slot, []).append(each)
        return told


class PromptReader:
    """Reads the log-probabilities of tokens that are there, of prompts and of given completions.

    The target computes their rows whole, in chunks.

    Args:
        target: the model.
        cache: its cache.
        chunk: most tokens of a row in one forward.
        vocab_size: tokens that count.
        clock: books what it takes as `prefill`.

    Attributes:
        chunk: as given.
    """

    def __init__(
        self,
        target: PackedDecoder,
        cache: SlotCache,
        chunk: int,
        vocab_size: int,
        clock: PhaseClock,
    ) -> None:
        self._target, self._cache, self.chunk = target, cache, chunk
        self._vocab, self._clock = vocab_size, clock

    def read(self, slot: int, row: LiveRow) -> None:
        """Set the row's `prompt_logprobs`. Its slot then holds the whole chunks of its prompt.

        The last chunk is computed again with the row's first round, as in rows that ask for
        nothing: what follows has the same bits.
        """
        prompt, count = row.tokens[: row.output_start], row.sampling.prompt_logprobs or 0
        self._cache.rollback(slot, 0)
        told, _ = self._tell([_Read(slot, prompt, 1, count)])
        row.prompt_logprobs = (None, *told[slot])
        self._cache.rollback(slot, (len(prompt) - 1) // self.chunk * self.chunk)

    def feed_shared(
        self, live: Sequence[LiveRow], slots: Sequence[int], shared: SharedCaches
    ) -> list[int]:
        """Feed what rows in `slots` have in common with others; returns tokens of each forward."""
        with self._clock.phase({"prefill": 1.0}):
            return feed_shared(self._target, self._cache, shared, live, slots, self.chunk)

    def score(self, rows: Mapping[int, LiveRow]) -> list[int]:
        """Set the `logprobs` of rows, by slot, whose completions are given.

        Returns:
            Tokens of each forward.
        """
        reads = []
        for slot, row in rows.items():
            # What the slot has taken over of others may stay, up to the token before the first.
            kept = min(self._cache.lengths[slot], row.output_start - 1)
            if self._target.invariant:
                kept = kept // self.chunk * self.chunk
            self._cache.rollback(slot, kept)
            reads.append(_Read(slot, row.tokens, row.output_start, row.sampling.logprobs or 0))
        told, forwards = self._tell(reads)
        for slot, row in rows.items():
            row.logprobs = told[slot]
        return forwards

    def _tell(self, reads: Sequence[_Read]) -> tuple[dict[int, list[TokenLogprob]], list[int]]:
        """What each of them reads, by slot, and the tokens of each forward.

        Many short rows share a forward.
        """
        told: dict[int, list[TokenLogprob]] = {read.slot: [] for read in reads}
        forwards: list[int] = []
        left = deque(read for read in reads if len(read.tokens) > 1)
        with self._clock.phase({"prefill": 1.0}):
            while left:
                fed: list[_Fed] = []
                while left and sum(each.end - each.begin for each in fed) < self.chunk:
                    read = left.popleft()
                    begin = self._cache.lengths[read.slot]
                    # The last token tells nothing: none stands behind it.
                    end = min(begin + self.chunk, len(read.tokens) - 1)
                    fed.append(_Fed(read, begin, end))
                for slot, more in self._forward(fed).items():
                    told[slot] += more
                forwards.append(sum(each.end - each.begin for each in fed))
                left.extendleft(
                    each.read for each in reversed(fed) if each.end < len(each.read.tokens) - 1
                )
        return told, forwards

    def _forward(self, fed: Sequence[_Fed]) -> dict[int, list[TokenLogprob]]:
        """Feed parts of rows in one forward; what it tells of the tokens behind them, by slot."""
        tokens: list[int] = []
        scored: list[int] = []
        following: list[int] = []
        counts: list[int] = []
        slots: list[int] = []
        for read, begin, end in fed:
            first = min(end, max(begin, read.first - 1))  # of the positions that tell something
            scored += range(len(tokens) + first - begin, len(tokens) + end - begin)
            following += read.tokens[first + 1 : end + 1]
            counts += [read.top] * (end - first)
            slots += [read.slot] * (end - first)
            tokens += read.tokens[begin:end]
        packed, places, targets = upload(self._cache.device, tokens, scored, following)
        rows = [(read.slot, end - begin) for read, begin, end in fed]
        hidden = self._target.forward(self._cache, rows, packed)
        told: dict[int, list[TokenLogprob]] = {}
        if scored:
            logits = self._target.logits(hidden[places])[:, : self._vocab]
            log_p = torch.log_softmax(logits.float(), -1)
            for slot, each in zip(slots, _told(log_p, targets, counts), strict=True):
                told.setdefault(slot, []).append(each)
        return told


class _Read(NamedTuple):
    """Tokens of a slot of which those from index `first` on are told, with the `top` likeliest."""

    slot: int
    tokens: Sequence[int]
    first: int
    top: int


class _Fed(NamedTuple):
    """Which of its tokens are fed in a forward."""

    read: _Read
    begin: int
    end: int


def _told(log_p: Tensor, tokens: Tensor, counts: Sequence[int]) -> list[TokenLogprob]:
    """How likely tokens int64 [m] were by log_p [m, V], with `counts` of the likeliest each."""
    own, top = log_p.gather(1, tokens[:, None]), log_p.topk(max(counts))
    values: list[list[float]] = torch.cat([own, top.values], 1).tolist()
    return [
        TokenLogprob(token, value, tuple(zip(ids[:count], others[:count], strict=True)))
        for token, (value, *others), ids, count in zip(
            tokens.tolist(), values, top.indices.tolist(), counts, strict=True
        )
    ]


def _processed(adjusted: Tensor, parameters: SamplingBatch, index: Tensor) -> Tensor:
    """Log-probabilities [m, V] of what is sampled from; of greedy rows, of the adjusted logits."""
    whole = torch.log_softmax(adjusted.float(), -1)
    if parameters.all_greedy:
        return whole
    own = parameters.rows(index)
    drawn = probabilities(adjusted, replace(own, any_greedy=False)).log()
    return torch.where(own.greedy[:, None], whole, drawn) if own.any_greedy else drawn
