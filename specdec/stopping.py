"""When to stop drafting: the `StopPolicy` seam and the policies that need no training.

A policy decides per row, in four places of a round:

    budget   before drafting: at most how many candidates for each row (host numbers, no device
    work) go_on    after each candidate: which rows draft another one (a device tensor, or None for
    all) submit   before verification: how many of the drafted candidates to submit
    observe  after the round: what was accepted

The invariant of rejection sampling: whether candidate y_k is *submitted* may depend on y_1..y_{k-1}
and on the draft's distributions, never on y_k itself. `go_on` is safe by construction, since it
sees y_k and decides about y_{k+1}. `submit` must keep to it by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class RowMemory:
    """What a policy keeps about one row from round to round.

    Attributes:
        k: the current candidate length of policies that adapt it; 0 before the row's first round.
    """

    k: int = 0


@dataclass(frozen=True, slots=True)
class DraftStep:
    """The candidates just drawn, one for each of n rows.

    Attributes:
        rows: index of each row among the round's rows.
        depth: how many candidates these rows have now.
        tokens: int64 [n], the candidates.
        logits: float [n, V], the draft's raw logits they were drawn from.
        hidden: [n, hidden], the draft's last hidden states behind these logits.
    """

    rows: Sequence[int]
    depth: int
    tokens: Tensor
    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What became of a round, per row (host numbers).

    Attributes:
        rows: the rows' memories.
        drafted, submitted, accepted: candidates per row.
    """

    rows: Sequence[RowMemory]
    drafted: Sequence[int]
    submitted: Sequence[int]
    accepted: Sequence[int]


class StopPolicy:
    """Drafts nothing and remembers nothing: the base, and the policy `none`."""

    def budget(self, rows: Sequence[RowMemory]) -> list[int]:
        """At most how many candidates to draft for each row in this round."""
        return [0] * len(rows)

    def go_on(self, step: DraftStep) -> Tensor | None:
        """bool [n]: which rows draft on; None: all of them, without asking the device."""
        return None

    def submit(self, rows: Sequence[RowMemory], drafted: Sequence[int]) -> Sequence[int]:
        """How many of each row's drafted candidates to submit; mind the invariant above."""
        return drafted

    def observe(self, outcome: RoundOutcome) -> None:
        """Learn from a finished round."""


@dataclass
class Fixed(StopPolicy):
    """Always k candidates."""

    k: int = 4

    def budget(self, rows: Sequence[RowMemory]) -> list[int]:
        return [self.k] * len(rows)


@dataclass
class Heuristic(StopPolicy):
    """Hugging Face's schedule, per row: k grows by 2 after a full acceptance, else shrinks by 1."""

    k: int = 4
    k_min: int = 1
    k_max: int = 20

    def budget(self, rows: Sequence[RowMemory]) -> list[int]:
        return [row.k or self.k for row in rows]

    def observe(self, outcome: RoundOutcome) -> None:
        for row, submitted, accepted in zip(
            outcome.rows, outcome.submitted, outcome.accepted, strict=True
        ):
            if submitted:
                k = (row.k or self.k) + (2 if accepted == submitted else -1)
                row.k = min(max(k, self.k_min), self.k_max)


@dataclass
class Confidence(StopPolicy):
    """Hugging Face's assisted generation: stop after a candidate less likely than `threshold`.

    The likelihood is the draft's own, before temperature, so that it also means something when
    greedy. The unlikely candidate itself is still submitted.
    """

    threshold: float = 0.4
    k_max: int = 20

    def budget(self, rows: Sequence[RowMemory]) -> list[int]:
        return [self.k_max] * len(rows)

    def go_on(self, step: DraftStep) -> Tensor:
        chosen = step.logits.gather(1, step.tokens[:, None]).squeeze(1).float()
        return torch.exp(chosen - step.logits.float().logsumexp(-1)) >= self.threshold


POLICIES = ("none", "fixed", "heuristic", "confidence")


def make_policy(
    name: str, *, k: int = 4, k_min: int = 1, k_max: int = 20, threshold: float = 0.4
) -> StopPolicy:
    """The policy called `name`, from the numbers of a job file's `speculation` section.

    Args:
        name: one of POLICIES.
        k: candidates of `fixed`, first length of `heuristic`.
        k_min, k_max: least and most candidates of policies that adapt.
        threshold: least likelihood of `confidence`.

    Raises:
        ValueError: there is no such policy.
    """
    match name:
        case "none":
            return StopPolicy()
        case "fixed":
            return Fixed(k)
        case "heuristic":
            return Heuristic(k, k_min, k_max)
        case "confidence":
            return Confidence(threshold, k_max)
    raise ValueError(f"no stop policy {name!r}; there are {', '.join(POLICIES)}")
