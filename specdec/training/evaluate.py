"""How well a draft predicts its target, on text that it has not learned from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.model.decoder import PackedDecoder
from specdec.training.examples import Example, packs
from specdec.training.scores import (
    LOGIT_ROWS,
    PACK_TOKENS,
    lengths_of,
    output_positions,
    read_states,
)

ALL = "all"
"""The name of the figures over all groups."""

DEPTH = 8
"""Candidates of a chain that are judged. Raised, evaluations take longer."""

JUDGED = 4
"""Candidates by whose accepted length drafts are ranked; the usual number of a round."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A few examples and what the target made of them.

    Attributes:
        examples: the examples.
        states: its last hidden states [n, hidden] at their output positions.
        inputs: what goes into some of its layers, [N, hidden] at all of their tokens.
    """

    examples: Sequence[Example]
    states: Tensor
    inputs: Mapping[int, Tensor]


class Draft(Protocol):
    """What can be evaluated.

    Attributes:
        name: how it was made.
        layers: the target's layers whose inputs it reads.
        vocab_size: the target's tokens that count.
    """

    name: str

    @property
    def layers(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    def predicted(self, batch: Batch) -> list[Tensor]:
        """States [n, hidden] that the n output tokens are proposed from.

        One tensor for each place in a chain of candidates, at most DEPTH; where that makes no
        difference, one for all.
        """

    def logits(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [m, own], and int64 [own], which tokens they are of; None: the first ones."""


@dataclass(slots=True)
class Chains:
    """How far chains of candidates hold that begin at each output position.

    Attributes:
        tried: of each place in a chain, the chains that got there, or their expected number.
        kept: of those, the ones whose candidate holds.
    """

    tried: list[float] = field(default_factory=lambda: [0.0] * DEPTH)
    kept: list[float] = field(default_factory=lambda: [0.0] * DEPTH)

    def add(self, matches: Tensor) -> None:
        """Add the chains of a row.

        Args:
            matches: [DEPTH, n], the probability that the target accepts the draft's candidate for
                output token t at place d of a chain, those before it being accepted.
        """
        alive = torch.ones(matches.shape[1], dtype=matches.dtype)
        for place in range(min(DEPTH, matches.shape[1])):
            alive = alive[: matches.shape[1] - place]
            self.tried[place] += float(alive.sum())
            alive = alive * matches[place, place:]
            self.kept[place] += float(alive.sum())

    @property
    def acceptance(self) -> list[float]:
        """Share of candidates accepted at each place, of those whose predecessors were."""
        return [k / t if t else 0.0 for k, t in zip(self.kept, self.tried, strict=True)]

    @property
    def lengths(self) -> list[float]:
        """Expected tokens of a round with 1, 2, ... candidates, the target's own included."""
        expected, reached, lengths = 1.0, 1.0, []
        for share in self.acceptance:
            reached *= share
            expected += reached
            lengths.append(expected)
        return lengths


@dataclass(slots=True)
class Agreement:
    """Sums over output positions.

    Attributes:
        tokens: positions.
        agreed: where target and draft have the same likeliest token.
        overlap: of Σ min(p, q), the probability that a candidate drawn from q is accepted.
        greedy, sampled: chains of likeliest tokens, and of tokens drawn at temperature 1.
    """

    tokens: int = 0
    agreed: int = 0
    overlap: float = 0.0
    greedy: Chains = field(default_factory=Chains)
    sampled: Chains = field(default_factory=Chains)

    def add(self, agreed: Tensor, overlap: Tensor) -> None:
        """Add a row's positions: [DEPTH, n] each, 0 or 1 and a probability, by place in a chain."""
        self.tokens += agreed.shape[1]
        self.agreed += round(float(agreed[0].sum()))
        self.overlap += float(overlap[0].sum())
        self.greedy.add(agreed)
        self.sampled.add(overlap)

    @property
    def greedy_agreement(self) -> float:
        """Share of positions where both have the same likeliest token."""
        return self.agreed / self.tokens

    @property
    def mean_overlap(self) -> float:
        """Mean Σ min(p, q) at temperature 1."""
        return self.overlap / self.tokens

    @property
    def merit(self) -> float:
        """What drafts are ranked by: a round's tokens at temperature 1, of JUDGED candidates."""
        return self.sampled.lengths[JUDGED - 1]

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {
            "tokens": self.tokens,
            "greedy_agreement": self.greedy_agreement,
            "mean_overlap": self.mean_overlap,
            "greedy_acceptance": self.greedy.acceptance,
            "greedy_length": self.greedy.lengths,
            "sampled_acceptance": self.sampled.acceptance,
            "sampled_length": self.sampled.lengths,
        }


Agreements = dict[str, Agreement]
"""By group of examples, `ALL` first."""


def layers_of(drafts: Iterable[Draft]) -> tuple[int, ...]:
    """The target's layers that any of some drafts reads, rising."""
    return tuple(sorted({layer for draft in drafts for layer in draft.layers}))


def batches(
    target: PackedDecoder, examples: Sequence[Example], layers: Sequence[int] = ()
) -> Iterator[Batch]:
    """Examples with the target's states, computed when asked for.

    Args:
        layers: whose inputs are needed, rising.
    """
    for pack in packs(examples, PACK_TOKENS):
        chosen = [examples[i] for i in pack]
        hidden, inputs = read_states(target, chosen, layers)
        keep = torch.tensor(output_positions(lengths_of(chosen)), device=hidden.device)
        yield Batch(chosen, hidden[keep], inputs)


@torch.inference_mode()
def evaluate(
    target: PackedDecoder, students: Mapping[str, Draft], examples: Iterable[Batch]
) -> dict[str, Agreements]:
    """Compare drafts with the target's exact distribution at temperature 1.

    A chain of candidates follows the example's own tokens, as if each had been drawn from the
    draft: what a draft's own states lead to is in it, what its own tokens would is not.

    Args:
        target: the target.
        students: drafts by name; they share the target's forward.
        examples: from `batches`, with the layers that the drafts read.

    Returns:
        Each draft's agreements.
    """
    results: dict[str, Agreements] = {name: {ALL: Agreement()} for name in students}
    for batch in examples:
        drafted = {name: student.predicted(batch) for name, student in students.items()}
        sums: dict[str, list[Tensor]] = {name: [] for name in students}
        for begin in range(0, len(batch.states), LOGIT_ROWS):
            rows = slice(begin, begin + LOGIT_ROWS)
            logits = target.logits(batch.states[rows]).float()
            for name, student in students.items():
                vocab = min(logits.shape[1], student.vocab_size)
                p = torch.softmax(logits[:, :vocab], -1)
                found = [_compare(p, *student.logits(states[rows])) for states in drafted[name]]
                sums[name].append(torch.stack(found))
        counts = [len(e.output_ids) for e in batch.examples]
        for name, agreements in results.items():
            whole = torch.cat(sums[name], 1).cpu()
            for example, figures in zip(batch.examples, torch.split(whole, counts, 1), strict=True):
                by_place = figures.expand(DEPTH, -1, -1)
                for group in dict.fromkeys((ALL, example.group or ALL)):
                    agreement = agreements.setdefault(group, Agreement())
                    agreement.add(by_place[..., 0], by_place[..., 1])
    return results


def _compare(p: Tensor, logits: Tensor, tokens: Tensor | None) -> Tensor:
    """float64 [n, 2]: same argmax (0 or 1) and Σ min(p, q).

    Args:
        p: the target's, [n, V].
        logits: the draft's, [n, own].
        tokens: int64 [own], which ones these are of; None: the first ones, and padding.
    """
    q = torch.softmax(logits[:, : p.shape[1]].float(), -1)
    likeliest = q.argmax(-1)
    if tokens is not None:
        likeliest = tokens[likeliest]
    theirs = p if tokens is None else p[:, tokens]
    agreed = p.argmax(-1) == likeliest
    both = torch.minimum(theirs[:, : q.shape[1]], q).sum(-1)
    return torch.stack([agreed.double(), both.double()], 1)
