"""What an engine counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from specdec.measure.speedup import SpeedupMeter
from specdec.policies.base import RoundOutcome
from specdec.policies.chains import Chain
from specdec.request import Counts


@dataclass(slots=True)
class EngineStats:
    """What an engine did since it was made.

    Attributes:
        counts: summed over rows.
        rounds: steps that ran a target forward.
        live_rows: summed over these rounds; divided by `rounds`, the mean live batch.
        target_forwards, draft_forwards, target_tokens, draft_tokens: forwards and tokens through
            each.
        shared_tokens: prompt tokens that the target did not compute, since another row had.
        preempted: how often a row was sent back to the queue for want of cache pages.
        verified_forced, accepted_forced: of the candidates, those that a grammar forced.
        verified_in_prompt, accepted_in_prompt: of the candidates that were looked up, those found
            in the row's own prompt and output, and in outputs of the prompt's other samples.
        verified_in_rows, accepted_in_rows: the same of those found in outputs of other rows.
        verified_in_corpus, accepted_in_corpus: of those found in what earlier jobs wrote.
        seconds: by phase: profile, prefill, draft, decide (look-ups, and the policy between steps),
            verify, sample, host; control: target forwards of control rounds; warmup: recording
            forwards of new sizes on a GPU.
        speedup: rounds with speculation and control rounds.
        outcomes: rounds of rows by (candidates verified, candidates that verification accepted).
        trees: candidates of rounds that branch, as `nodes` has them.
        chains: rounds of rows since then that did not, by candidates drafted, verified and accepted
            by verification.
    """

    counts: Counts = field(default_factory=Counts)
    rounds: int = 0
    live_rows: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    target_tokens: int = 0
    draft_tokens: int = 0
    shared_tokens: int = 0
    preempted: int = 0
    verified_forced: int = 0
    accepted_forced: int = 0
    verified_in_prompt: int = 0
    accepted_in_prompt: int = 0
    verified_in_rows: int = 0
    accepted_in_rows: int = 0
    verified_in_corpus: int = 0
    accepted_in_corpus: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    speedup: SpeedupMeter = field(default_factory=SpeedupMeter)
    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)
    chains: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    trees: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    @property
    def nodes(self) -> dict[tuple[int, int], list[int]]:
        """Candidates by (depth, rank among siblings), since any have branched.

        Each has how many were drafted, verified, judged, and accepted by verification.
        """
        nodes = {place: counts.copy() for place, counts in self.trees.items()}
        for (drafted, verified, accepted), rows in self.chains.items():
            judged = min(verified, accepted + 1)
            for i, most in enumerate((drafted, verified, judged, accepted)):
                for depth in range(1, most + 1):
                    nodes.setdefault((depth, 0), [0, 0, 0, 0])[i] += rows
        return nodes

    def count_target(self, forwards: Sequence[int]) -> None:
        """Add forwards of the target: tokens of each."""
        self.target_forwards += len(forwards)
        self.target_tokens += sum(forwards)

    def count_row(self, counts: Counts, accepted: int, known: Chain) -> None:
        """Add a row's round.

        Args:
            counts: of it.
            accepted: candidates that verification accepted, of which the output may hold fewer.
            known: the candidates in front that came without a draft.
        """
        self.counts.add(counts)
        self.outcomes[counts.verified, accepted] += 1
        if not known.tokens:
            return
        sources = known.sources
        verified = min(counts.verified, len(sources))
        stand = min(counts.accepted, verified)
        for what, n in (("verified", verified), ("accepted", stand)):
            for source, number in Counter(sources[:n]).items():
                name = f"{what}_{source}"
                setattr(self, name, getattr(self, name) + number)

    def count_draft(self, forwards: Sequence[int]) -> None:
        """Add forwards of the draft: tokens of each."""
        self.draft_forwards += len(forwards)
        self.draft_tokens += sum(forwards)

    def count_tree(self, parents: Sequence[int], kept: Sequence[int], path: Sequence[int]) -> None:
        """Add a row's tree: the parents of its nodes, those verified and those accepted."""
        places: list[tuple[int, int]] = []
        children = Counter[int]()
        for parent in parents:
            depth = 1 if parent < 0 else places[parent][0] + 1
            places.append((depth, children[parent]))
            children[parent] += 1
        reached, stands = {-1, *path}, {*path}
        judged: list[int] = []
        for node in kept:
            if parents[node] in reached:
                judged.append(node)
                if node in stands:  # its later siblings are not asked
                    reached.remove(parents[node])
        for i, nodes in enumerate((range(len(parents)), kept, judged, path)):
            for node in nodes:
                self.trees.setdefault(places[node], [0, 0, 0, 0])[i] += 1

    def count_shapes(self, outcome: RoundOutcome) -> None:
        """Count a round's candidates by where they stood, if any have branched."""
        accepted = outcome.accepted
        if outcome.path:
            rows = zip(outcome.parents, outcome.kept, outcome.path, accepted, strict=True)
            for parents, kept, path, stand in rows:
                self.count_tree(parents, kept, path if stand else ())
        elif self.trees:
            self.chains.update(zip(outcome.drafted, outcome.submitted, accepted, strict=True))
