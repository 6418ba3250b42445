"""How well a draft predicts its target, on text that it has not learned from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.model.decoder import PackedDecoder
from specdec.training.examples import Example
from specdec.training.scores import LOGIT_ROWS, target_states
from specdec.training.student import Student

ALL = "all"
"""The name of the figures over all groups."""

Batch = tuple[list[Example], Tensor]
"""A few examples and the target's hidden states [n, hidden] at their output positions."""


@dataclass(slots=True)
class Agreement:
    """Sums over output positions.

    Attributes:
        tokens: positions.
        agreed: where target and draft have the same likeliest token.
        overlap: of Σ min(p, q), the probability that a candidate drawn from q is accepted.
    """

    tokens: int = 0
    agreed: int = 0
    overlap: float = 0.0

    def add(self, tokens: int, agreed: int, overlap: float) -> None:
        """Add the sums of some more positions."""
        self.tokens += tokens
        self.agreed += agreed
        self.overlap += overlap

    @property
    def greedy_agreement(self) -> float:
        """Share of positions where both have the same likeliest token."""
        return self.agreed / self.tokens

    @property
    def mean_overlap(self) -> float:
        """Mean Σ min(p, q) at temperature 1."""
        return self.overlap / self.tokens

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "tokens": self.tokens,
            "greedy_agreement": self.greedy_agreement,
            "mean_overlap": self.mean_overlap,
        }


Agreements = dict[str, Agreement]
"""By group of examples, `ALL` first."""


def batches(target: PackedDecoder, examples: Sequence[Example]) -> Iterator[Batch]:
    """Examples with the target's states, computed when asked for."""
    for pack, states in target_states(target, examples):
        yield [examples[i] for i in pack], states


@torch.inference_mode()
def evaluate(
    target: PackedDecoder, students: Mapping[str, Student], examples: Iterable[Batch]
) -> dict[str, Agreements]:
    """Compare drafts with the target's exact distribution at temperature 1.

    Args:
        target: the target.
        students: drafts by name; they share the target's forward.
        examples: from `batches`.

    Returns:
        Each draft's agreements.
    """
    results: dict[str, Agreements] = {name: {ALL: Agreement()} for name in students}
    for chosen, states in examples:
        drafted = {name: student.states(chosen) for name, student in students.items()}
        sums: dict[str, list[Tensor]] = {name: [] for name in students}
        for begin in range(0, len(states), LOGIT_ROWS):
            rows = slice(begin, begin + LOGIT_ROWS)
            logits = target.logits(states[rows])
            for name, student in students.items():
                theirs = student.model.get_output_embeddings()(drafted[name][rows])
                sums[name].append(_compare(logits, theirs))
        counts = [len(e.output_ids) for e in chosen]
        for name, agreements in results.items():
            per_example = torch.split(torch.cat(sums[name]), counts)
            for example, figures in zip(chosen, per_example, strict=True):
                agreed, overlap = figures.sum(0).tolist()
                for group in dict.fromkeys((ALL, example.group or ALL)):
                    agreement = agreements.setdefault(group, Agreement())
                    agreement.add(len(figures), round(agreed), overlap)
    return results


def _compare(target: Tensor, draft: Tensor) -> Tensor:
    """float64 [n, 2]: same argmax (0 or 1) and Σ min(p, q), of logits [n, V], padding cut off."""
    vocab = min(target.shape[1], draft.shape[1])
    p = torch.softmax(target[:, :vocab].float(), -1)
    q = torch.softmax(draft[:, :vocab].float(), -1)
    agreed = p.argmax(-1) == q.argmax(-1)
    return torch.stack([agreed.double(), torch.minimum(p, q).sum(-1).double()], 1)
