"""Labels for the acceptance head: draft candidates along the target's text, and their acceptance.

SpecDec++ (arXiv 2405.19715, §3.2): at each output position of a text z the draft draws a candidate
y ~ q(. | z_<i); its label is the probability that verification accepts it, min(1, p(y) / q(y)). To
show the head prefixes with draft tokens too, z takes a draft token instead of the target's with
probability r. That is for training only: a candidate is judged in the engine only after an accepted
prefix, which is distributed as the target's own text, so what is tuned and measured is unmixed.

p and q are the distributions after temperature, top-k, top-p and min-p, from the code that the
engine samples with. So are the random numbers: keyed by a seed of the example and of what is done,
the position and what the number is for, each drawn once. There are no rounds here.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from specdec.engine.admission import Pair
from specdec.engine.engine import Engine
from specdec.lossless.sampling import (
    Draw,
    SamplingBatch,
    coupled_choice,
    probabilities,
    sample,
    uniform,
)
from specdec.measure.calibration import Array
from specdec.model.decoder import PackedDecoder
from specdec.policies.base import TOKEN_SIGNALS
from specdec.policies.signals import read_signals
from specdec.request import Completion, Request, SamplingParams
from specdec.training.examples import Example
from specdec.training.scores import target_states

_WANTED = frozenset(TOKEN_SIGNALS)

_LOGIT_ROWS = 128
"""Positions whose logits and distributions are in memory at once: 80 MB each at 150,000 tokens.

Raised, labelling takes more memory and hardly less time.
"""

_LARGEST = torch.finfo(torch.float16).max
"""What hidden states are kept within: they are stored in float16."""


class Part(IntEnum):
    """What a row is for. All positions of a row, and all rows of a prompt, have the same part."""

    TRAIN = 0
    TUNE = 1  # early stopping and calibration
    HELD_OUT = 2
    OTHER = 3  # another kind of text: measured only


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """How candidates are drawn and judged: the settings of the jobs that the head is for.

    Attributes:
        sampling: temperature, top-k, top-p and min-p, but for examples that have their own; and
            the seed of everything random here.
        verification: "rejection", whose labels are probabilities; or "coupled", whose labels are 1
            where draft and target choose the same token, else 0. Greedy ones are 0 or 1 in both.
        mixing: r, the share of draft tokens in training text.
    """

    sampling: SamplingParams
    verification: Literal["rejection", "coupled"] = "rejection"
    mixing: float = 0.15


@dataclass(frozen=True, slots=True)
class Labels:
    """One candidate at each of n output positions; positions of a row are in order.

    Attributes:
        hidden: float16 [n, H], the draft's last hidden states that the candidates are drawn from.
        signals: float32 [n, 3], their LOG_Q, LOG_TOP and ENTROPY.
        accepted: float32 [n], the probability of acceptance.
        position: int32 [n], output tokens before the candidate.
        row: int32 [n], number of the row.
        part: int8 [n], the row's `Part`.
    """

    hidden: Tensor
    signals: Tensor
    accepted: Tensor
    position: Tensor
    row: Tensor
    part: Tensor

    def __len__(self) -> int:
        return len(self.accepted)

    @staticmethod
    def cat(parts: Sequence[Labels]) -> Labels:
        """All of the labels, copied into tensors that may take part in training."""
        columns = [f.name for f in fields(Labels)]
        return Labels(*(torch.cat([getattr(each, name) for each in parts]) for name in columns))

    def where(self, chosen: Tensor) -> Labels:
        """The labels that bool [n] chooses."""
        return Labels(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def of(self, *parts: Part) -> Labels:
        """The labels of these parts."""
        return self.where(torch.isin(self.part, torch.tensor([int(part) for part in parts])))

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(torch.unique(self.row))

    @property
    def acceptance(self) -> Array:
        """`accepted` as float64 [n] on the host."""
        return self.accepted.numpy().astype(np.float64)


# ----------------------------------------------------------------- continuations


def continuations(engine: Engine, requests: Sequence[Request]) -> Iterator[Completion]:
    """The target's own outputs, in the order of the requests.

    Those that are done early wait for their turn: the first ones would else be the shortest.

    Args:
        engine: with the policy `none`.
        requests: their ids must differ; errors come back as completions.
    """
    for request in requests:
        engine.submit(request)
    done: dict[str, Completion] = {}
    waiting = deque(request.id for request in requests)
    while engine.has_work:
        done.update((completion.id, completion) for completion in engine.step())
        while waiting and waiting[0] in done:
            yield done.pop(waiting.popleft())


def assign_parts(
    prompts: Sequence[tuple[int, ...]], tune: float = 0.15, held_out: float = 0.15
) -> list[Part]:
    """Split rows by a hash of their prompts: equal prompts are on the same side.

    Prompts are ranked by their hashes and cut at the shares, so that three different prompts are
    enough to have all parts.

    Raises:
        ValueError: there are fewer than three different prompts.
    """
    digests = [hashlib.sha256(str(prompt).encode()).hexdigest() for prompt in prompts]
    ranked = sorted(set(digests))
    if len(ranked) < 3:
        raise ValueError(
            f"{len(ranked)} different prompts cannot be split into rows to train on, to tune on "
            "and to hold out; give at least 3"
        )
    least = max(1, round(held_out * len(ranked)))
    most = least + max(1, round(tune * len(ranked)))
    rank = {digest: i for i, digest in enumerate(ranked)}
    return [
        Part.HELD_OUT if rank[d] < least else Part.TUNE if rank[d] < most else Part.TRAIN
        for d in digests
    ]


# ------------------------------------------------------------------------ labels


def collect(
    pair: Pair,
    examples: Iterable[tuple[Example, Part]],
    settings: LabelSettings,
    *,
    batch: int = 32,
    first_row: int = 0,
) -> Iterator[Labels]:
    """Label every output position of the examples, some examples at a time.

    Args:
        pair: both models; a few forwards of each per batch of examples.
        examples: what the target continued, and what each row is for. Consumed as it goes, so they
            may be generated meanwhile.
        settings: how candidates are drawn and judged.
        batch: examples taken at a time; they share forwards.
        first_row: number of the first row; the others count on.

    Yields:
        The labels of each batch. A prompt that the context cannot hold has none.
    """
    source, rows = iter(examples), first_row
    # The draft must have room for every position that it proposes at.
    most = min(pair.context_length, pair.draft_context_length)
    while taken := list(islice(source, batch)):
        fitting = [(_cut(example, most), part) for example, part in taken]
        kept = [(example, part) for example, part in fitting if example is not None]
        if kept:
            yield _label(pair, kept, settings, rows)
        rows += len(kept)


def _cut(example: Example, positions: int) -> Example | None:
    room = positions + 1 - len(example.prompt_ids)
    return replace(example, output_ids=example.output_ids[:room]) if room > 0 else None


@torch.inference_mode()
def _label(
    pair: Pair, batch: Sequence[tuple[Example, Part]], settings: LabelSettings, first_row: int
) -> Labels:
    draft = pair.draft
    if draft is None or draft.reads_features:
        raise ValueError("labels need a pair with a draft that is a language model")
    mixed = _mixed(draft, pair.vocab_size, batch, settings)
    done: list[Labels] = []
    # Both models pack the same lengths the same way, so their positions correspond.
    forwards = zip(target_states(draft, mixed), target_states(pair.target, mixed), strict=True)
    for (pack, draft_hidden), (_, target_hidden) in forwards:
        owner, at = _positions([mixed[i] for i in pack], draft.device)
        params = _row_sampling([mixed[i] for i in pack], settings.sampling, "label", draft.device)
        for chunk in torch.split(torch.arange(len(owner), device=draft.device), _LOGIT_ROWS):
            hidden = draft_hidden[chunk]
            draft_logits = draft.logits(hidden)[:, : pair.vocab_size]
            judged = target_hidden[chunk.to(target_hidden.device)]
            target_logits = pair.target.logits(judged)[:, : pair.vocab_size]
            candidates, accepted = judge(
                target_logits.to(draft.device),
                draft_logits,
                params.rows(owner[chunk]),
                at[chunk],
                settings.verification,
            )
            signals = read_signals(draft_logits, candidates, hidden, _WANTED)
            rows = torch.tensor(pack)[owner[chunk].cpu()]
            parts = torch.tensor([int(batch[i][1]) for i in pack], dtype=torch.int8)
            done.append(
                Labels(
                    hidden=hidden.float().clamp(-_LARGEST, _LARGEST).half().cpu(),
                    signals=signals[:, list(TOKEN_SIGNALS)].cpu(),
                    accepted=accepted.float().cpu(),
                    position=at[chunk].int().cpu(),
                    row=(rows + first_row).int(),
                    part=parts[owner[chunk].cpu()],
                )
            )
    return Labels.cat(done)


def judge(
    target_logits: Tensor,
    draft_logits: Tensor,
    params: SamplingBatch,
    at: Tensor,
    verification: Literal["rejection", "coupled"],
) -> tuple[Tensor, Tensor]:
    """Draw a candidate at each of n positions, and say how probably it is accepted.

    Args:
        target_logits, draft_logits: [n, V], raw.
        params: sampling parameters of the n positions; at: int64 [n], output positions.
        verification: as in `LabelSettings`.

    Returns:
        Candidates int64 [n] and probabilities float32 [n].
    """
    p, q = probabilities(target_logits, params), probabilities(draft_logits, params)
    if verification == "coupled" and not params.all_greedy:
        candidates = coupled_choice(q, params.seed, at).clamp(min=0)
        return candidates, (coupled_choice(p, params.seed, at) == candidates).float()
    candidates = sample(q, uniform(params.seed, at, Draw.CANDIDATE)).clamp(min=0)
    chosen = candidates[:, None]
    alpha = (p.gather(1, chosen) / q.gather(1, chosen)).clamp(max=1)[:, 0]
    return candidates, alpha.nan_to_num(0.0)  # no distribution accepts nothing


def _mixed(
    draft: PackedDecoder,
    vocab_size: int,
    batch: Sequence[tuple[Example, Part]],
    settings: LabelSettings,
) -> list[Example]:
    """The examples, those to train on with some output tokens replaced by draws of the draft."""
    result = [example for example, _ in batch]
    trained = [i for i, (_, part) in enumerate(batch) if part is Part.TRAIN]
    if not settings.mixing or not trained:
        return result
    examples = [result[i] for i in trained]
    for pack, states in target_states(draft, examples):
        packed = [examples[i] for i in pack]
        owner, at = _positions(packed, draft.device)
        params = _row_sampling(packed, settings.sampling, "mix", draft.device)
        replaced = uniform(params.seed[owner], at, Draw.ACCEPT) < settings.mixing
        index = replaced.nonzero()[:, 0]
        if not len(index):
            continue
        drawn = []
        for chunk in torch.split(index, _LOGIT_ROWS):
            rows = params.rows(owner[chunk])
            q = probabilities(draft.logits(states[chunk])[:, :vocab_size], rows)
            drawn.append(sample(q, uniform(rows.seed, at[chunk], Draw.CANDIDATE)).clamp(min=0))
        tokens = torch.tensor([t for e in packed for t in e.output_ids], device=draft.device)
        tokens[index] = torch.cat(drawn)
        outputs = torch.split(tokens, [len(e.output_ids) for e in packed])
        for i, output in zip(pack, outputs, strict=True):
            result[trained[i]] = replace(examples[i], output_ids=tuple(output.tolist()))
    return result


def _positions(examples: Sequence[Example], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [n] each: the example that each output position belongs to, and its number in it."""
    counts = [len(example.output_ids) for example in examples]
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    at = torch.cat([torch.arange(count) for count in counts])
    return owner.to(device), at.to(device)


def _row_sampling(
    examples: Sequence[Example], sampling: SamplingParams, purpose: str, device: torch.device
) -> SamplingBatch:
    """The sampling of each example, with a seed that depends on its prompt, id and purpose.

    An example's own sampling goes before `sampling`, whose seed counts all the same.
    """
    seeded = []
    for example in examples:
        key = f"{purpose}:{sampling.seed}:{example.id}:{example.prompt_ids}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
        seeded.append(replace(example.sampling or sampling, seed=seed))
    return SamplingBatch.of(seeded, device)
