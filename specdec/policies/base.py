"""When to stop drafting: the seam between the engine and stop policies.

Each candidate costs a draft step and a token of the verification, and counts only if all before it
are accepted. So drafting has to stop somewhere, and where it pays to stop differs from row to row.

A policy decides per row, in these places of a round:

    choose   first: how many of the candidates that are known without a draft to take
    budget   before drafting: at most how many candidates for each row, behind those
    go_on    after each candidate: which rows draft another one
    submit   before verification: how many of each row's candidates to submit
    observe  after the round, or during the next: what was accepted, and what it cost

In a round that `branches` each row has a tree: each draft step draws `width` children of every node
that is expanded, the draft's best ones. A policy then decides in other places:

    keep     after each draft step: which children become nodes
    go_on    and which of these are expanded by the next step
    prune    before verification, in place of `submit`: which nodes to submit

All of it happens on the host, on arrays over rows. What a policy wants to know of the device comes
as `Signal`s, one transfer per draft step; a policy that wants none never makes the host wait, nor
does one that `looks` at none in this round: it finds them in the outcome.

The invariant of rejection sampling: whether candidate y_k is *submitted* may depend on all that is
known before y_k is drawn: y_1..y_{k-1}, the draft's distributions, other rows, the clock, and
everything of earlier rounds, candidates that were discarded there included. It may never depend on
y_k itself. `go_on` is safe by construction, since it sees y_k and decides about y_{k+1}. `submit`
must keep to it by itself. Earlier rounds may be remembered because no random number is drawn twice:
numbers are keyed by the row's round, too. `choose` is free: what is known was not drawn.

In a tree the same holds of each node. Whether it is kept, and submitted, may depend on what is
known before it is drawn: its better siblings, its parent and other branches. It may never depend on
itself, on worse siblings, which lack it, or on what it leads to. For once y_1..y_{r-1} are
rejected, both y_r and a bonus token in its place have the law of what these rejections left of the
target's distribution. So any choice between the two that is made without y_r is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from specdec.measure.calibration import Array, Flags
from specdec.policies.chains import Chain
from specdec.policies.memory import RowMemory
from specdec.policies.settings import Setting

if TYPE_CHECKING:
    from torch import Tensor

    from specdec.model.decoder import PackedDecoder

Indices = NDArray[np.int64]

MOST_CANDIDATES = 64
"""Most candidates of a round that a policy can be told.

Verification packs all candidates of all rows: raised, a wrong setting takes much memory before
anybody notices. Acceptance makes more than about 20 useless with the drafts there are.
"""

MOST_WIDTH = 4
"""Most children of a node that a policy can be told.

Raised, each costs a pass over the vocabulary when it is drawn and when it is judged. The fourth
stands in one or two positions of a hundred.
"""

FEW = 8
"""Rows up to which plain Python is quicker than arrays, of which each operation finds cold caches.

Raised, a large batch waits for Python's loops; lowered, a small one for array operations.
"""


FEW_PROMPTS = 2
"""Tokens of prompts for each row up to which a round counts as one that decodes.

Raised, rounds tell more often what others take, and less truly: a prompt looks back less far.
"""


class Signal(IntEnum):
    """Columns of what is read off a draft step; logarithms and entropy are in nats.

    All are of the draft's raw distribution (temperature 1), so that they mean something for greedy
    rows too. The head's two are its logits without the bias that its training weights put in.
    """

    LOG_Q = 0  # of the candidate
    LOG_TOP = 1  # of the likeliest token
    ENTROPY = 2
    HEAD_BEFORE = 3
    HEAD_AFTER = 4


HEAD_SIGNALS = frozenset({Signal.HEAD_BEFORE, Signal.HEAD_AFTER})
"""What a trained head says."""

TOKEN_SIGNALS = (Signal.LOG_Q, Signal.LOG_TOP, Signal.ENTROPY)
"""What the draft's distribution says: the first columns, in their order."""


class Head(Protocol):
    """What says HEAD_SIGNALS of a candidate: an `AcceptanceHead`."""

    def debiased(self, hidden: Tensor, token_signals: Tensor) -> Tensor:
        """Logits of acceptance, before and after the draw: float32 [n, 2].

        Args:
            hidden: float32 [n, width], states that the candidates are drawn from.
            token_signals: float32 [n, 3]: their TOKEN_SIGNALS.
        """


@dataclass(frozen=True, slots=True)
class RoundStart:
    """What is known before a round drafts, per row (host numbers).

    Attributes:
        rows: the rows' memories.
        room: most candidates each row may have; 0 while its prompt is being fed.
        decoding: whether each row's prompt is fed but for its last token.
        contexts: tokens of each row so far.
        draft_pending: tokens that the draft must be fed before it can propose for each row.
        target_tokens: packed tokens of the verification without any candidate.
        free_trimming: whether a candidate may be trimmed by its own score: matching modes only.
        beside: whether the device works beside the host, and waits where candidates are looked at.
        draws_behind: whether the draft goes on behind known candidates; else it leaves such a row.
        nodes: most nodes that each row's tree may have; what is kept beyond is dropped.
        notes: what the policy wants to know again when it observes the round. The next round may
            have begun by then.
    """

    rows: Sequence[RowMemory]
    room: Sequence[int]
    decoding: Sequence[bool]
    contexts: Sequence[int]
    draft_pending: Sequence[int]
    target_tokens: int
    free_trimming: bool
    beside: bool = False
    draws_behind: bool = True
    nodes: Sequence[int] = ()
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt_tokens(self) -> int:
        """Packed tokens of the verification that belong to prompts which are being fed."""
        return self.target_tokens - sum(self.decoding)

    @property
    def decodes(self) -> bool:
        """Whether few of its tokens are prompts', so that it tells what rounds take.

        Where rows come and go in a large batch, hardly any round is without.
        """
        return self.prompt_tokens <= FEW_PROMPTS * len(self.rows)


@dataclass(frozen=True, slots=True)
class DraftStep:
    """The candidates just drawn, one for each of n rows; of trees, several for a row.

    Attributes:
        rows: int [n], index of each row among the round's rows.
        depth: how many candidates were drawn for these rows by now; of trees, that these are deep.
        signals: float [n, len(Signal)]; columns that the policy does not want are 0.
        parents: int [n], of trees: the number of the node that each follows, -1 for the root. Nodes
            are numbered by row, in the order in which they were kept.
        ranks: int [n], of trees: which of its parent's children each is, from 0. Children of a node
            stand next to each other in this order.
    """

    rows: Indices
    depth: int
    signals: Array
    parents: Indices | None = None
    ranks: Indices | None = None


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    """What became of a round, per row (host numbers).

    Attributes:
        start: as it began.
        drafted, submitted, accepted: candidates per row.
        draft_costs: (packed tokens, seconds) of each draft step.
        verify_cost: (packed target tokens, seconds of the rest of the round).
        unseen: the draft steps, where the policy did not look at them; they are read when asked.
        known: how many of each row's candidates were taken without a draft: its first.
        looked_up: of the `Chain` of each row, how many candidates the committed tokens judge, and
            how many of these stand, submitted or not; empty where there are no chains.
        parents: of trees: of each node that was drafted the number of its parent, by row.
        kept: of trees: the numbers of the nodes that were submitted, by row.
        path: of trees: the numbers of the nodes that stand, from the root on, by row.
    """

    start: RoundStart
    drafted: Sequence[int]
    submitted: Sequence[int]
    accepted: Sequence[int]
    draft_costs: Sequence[tuple[int, float]]
    verify_cost: tuple[int, float]
    unseen: Callable[[], Sequence[DraftStep]] = tuple
    known: Sequence[int] = ()
    looked_up: Sequence[tuple[int, int]] = ()
    parents: Sequence[Sequence[int]] = ()
    kept: Sequence[Sequence[int]] = ()
    path: Sequence[Sequence[int]] = ()

    @property
    def drawn(self) -> Sequence[int]:
        """Candidates of each row that a draft proposed."""
        if not any(self.known):
            return self.drafted
        return [n - k for n, k in zip(self.drafted, self.known, strict=True)]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a row's round went as it did, for `specbatch explain`.

    Attributes:
        predicted: estimated acceptance of each drawn candidate, if the policy estimates it.
        reason: one sentence.
        known: the same of candidates that are known without a draft.
    """

    predicted: tuple[float, ...]
    reason: str
    known: tuple[float, ...] = ()


class StopPolicy:
    """The base of policies: drafts nothing and remembers nothing.

    A policy is a dataclass in a file of its own. Its fields made by `setting` are what it can be
    told; `name` and `summary` are what job files and help call it. One line in
    specdec/policies/registry.py makes it known to jobs, commands and tests. A policy's file must
    load without torch, since configuration does: what needs torch is imported where it is used.

    Attributes:
        name: in job files.
        summary: what it does, in half a sentence.
        estimates: whether it takes an estimator, and so a trained head.
        drafts: whether it asks a draft model for candidates.
        looks_up: whether it chooses among candidates that were looked up.
        learns_late: whether it may observe a round when the next one has been drafted.
        needs_head: whether a job must name a trained head, or another estimator.
        wanted: signals to compute of candidates; if there are none, `go_on` is not asked.
        head: the acceptance head behind the head's signals.
        width: children drawn of each node that is expanded; 1: candidates follow each other.
    """

    name: ClassVar[str] = "unnamed"
    summary: ClassVar[str] = ""
    estimates: ClassVar[bool] = False
    drafts: ClassVar[bool] = True
    looks_up: ClassVar[bool] = False
    learns_late: ClassVar[bool] = False
    needs_head: ClassVar[bool] = False

    wanted: frozenset[Signal] = frozenset()
    head: Head | None = None
    width: int = 1

    @property
    def grows(self) -> bool:
        """Whether any of its rounds may have trees: asked when an engine is made."""
        return self.width > 1

    @property
    def branches(self) -> bool:
        """Whether the round whose budget it gave has trees: then `keep` and `prune` are asked."""
        return self.grows

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """What it can be told, by name."""
        own: tuple[Field[Any], ...] = fields(cls) if is_dataclass(cls) else ()
        return {each.name: each.metadata["setting"] for each in own if "setting" in each.metadata}

    @property
    def looks(self) -> bool:
        """Whether the round whose budget it gave asks `go_on`; else it may see signals later."""
        return bool(self.wanted)

    @property
    def most(self) -> int:
        """Most candidates of a row that it asks for: a row has cache pages for so many."""
        asked: list[int] = [getattr(self, key) for key in ("k", "k_max") if hasattr(self, key)]
        return max(asked, default=MOST_CANDIDATES)

    def prepare(self, target: PackedDecoder, draft: PackedDecoder | None, slots: int) -> None:
        """Called once before the first round, with the models that will be run."""

    def budget(self, start: RoundStart) -> Sequence[int]:
        """At most how many candidates to draft for each row in this round."""
        return [0] * len(start.rows)

    def go_on(self, step: DraftStep) -> Flags:
        """bool [n]: which rows draft on."""
        return np.ones(len(step.rows), dtype=bool)

    def keep(self, step: DraftStep) -> Flags:
        """bool [n]: which children become nodes: of each parent the first few, or none."""
        return np.ones(len(step.rows), dtype=bool)

    def prune(self, parents: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Which nodes of each row's tree to submit; mind the invariant above.

        Args:
            parents: of all nodes of each row.

        Returns:
            Numbers of nodes, ascending. With a node go its parent and its better siblings.
        """
        return [range(len(each)) for each in parents]

    def submit(self, drafted: Sequence[int]) -> Sequence[int]:
        """How many of each row's candidates to submit, with the known; mind the invariant above."""
        return drafted

    def wants_lookups(self) -> bool:
        """Whether to look candidates up in this round; asked once in each where one may."""
        return self.looks_up

    def lookups_took(self, seconds: float) -> None:
        """Called behind `choose` where it was done: what that and the choice took the host."""

    def choose(self, start: RoundStart, chains: Sequence[Chain]) -> Sequence[int]:
        """How many candidates to take of each row's chain; what a grammar forces, if no more.

        Asked in every round but control rounds, also where all chains are empty.
        """
        return [chain.forced for chain in chains]

    def observe(self, outcome: RoundOutcome) -> None:
        """Learn from a finished round.

        Beside a GPU this comes while the next round is verified, if the policy `learns_late`.
        """

    def costs_table(self) -> dict[str, list[tuple[int, float]]]:
        """Measured seconds by packed tokens, `draft` and `verify`, if the policy knows them."""
        return {}

    @property
    def fell_back(self) -> bool:
        """Whether a trained head was found out of calibration and is no longer believed."""
        return False

    def explain(self, row: int) -> Explanation:
        """Why the round just drafted stopped where it did, for one of its rows."""
        return Explanation((), self.name)
