"""Labels for the acceptance head: what they are, which text they are of, and what each row is for.

`specdec/training/labelling.py` makes them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from specdec.engine.engine import Engine
from specdec.lossless.sampling import SamplingBatch
from specdec.measure.calibration import Array
from specdec.model.decoder import PackedDecoder
from specdec.request import Completion, Request, SamplingParams
from specdec.training.examples import Example
from specdec.training.judging import Judged, Verification

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
    verification: Verification = "rejection"
    mixing: float = 0.15

    def for_draft(self, draft: PackedDecoder) -> LabelSettings:
        """What of these counts with a draft: text is not mixed for one that reads features."""
        return replace(self, mixing=0.0) if draft.reads_features else self


@dataclass(frozen=True, slots=True)
class Labels:
    """One candidate at each of n output positions; positions of a row are in order.

    Attributes:
        hidden: float16 [n, H], the draft's last hidden states that the candidates are drawn from.
        signals: float32 [n, 3], their LOG_Q, LOG_TOP and ENTROPY.
        accepted: float32 [n], the probability of acceptance.
        knowable: float32 [n, 2], the most that can be known of it, before and after the draw; see
            specdec/training/judging.py.
        position: int32 [n], output tokens before the candidate.
        row: int32 [n], number of the row.
        part: int8 [n], the row's `Part`.
    """

    hidden: Tensor
    signals: Tensor
    accepted: Tensor
    knowable: Tensor
    position: Tensor
    row: Tensor
    part: Tensor

    def __len__(self) -> int:
        return len(self.accepted)

    @classmethod
    def of_judged(
        cls,
        judged: Judged,
        hidden: Tensor,
        signals: Tensor,
        position: Tensor,
        row: Tensor,
        part: Tensor,
    ) -> Labels:
        """What was judged, in the types that labels are kept in, on the host.

        Args:
            hidden: [n, H], in any dtype; signals: [n, 3]; the others: [n].
        """
        return cls(
            hidden=hidden.float().clamp(-_LARGEST, _LARGEST).half().cpu(),
            signals=signals.cpu(),
            accepted=judged.accepted.cpu(),
            knowable=judged.knowable.cpu(),
            position=position.int().cpu(),
            row=row.int().cpu(),
            part=part.to(torch.int8).cpu(),
        )

    @classmethod
    def none(cls, width: int) -> Labels:
        """No labels, of a draft with states of this width."""
        nothing = Judged(torch.empty(0), torch.empty(0), torch.empty(0, 2))
        empty = torch.empty(0)
        return cls.of_judged(nothing, torch.empty(0, width), torch.empty(0, 3), *[empty] * 3)

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


def row_sampling(
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
