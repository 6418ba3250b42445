"""What rounds' forwards took, collected until there is enough for cost tables to learn from.

Rounds at which a policy looks while they are drafted have tables of their own. Beside a device that
is faster than the host, a draft step that is looked at takes as long as the host does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from specdec.policies.base import RoundOutcome, RoundStart
from specdec.policies.costs import OUTLIER, CostModel, CostTable

TOGETHER = 32
"""Measurements that are collected before the cost tables learn from them.

Each update takes array operations of some 20 µs, and the tables of `further_seconds` anew. Raised,
costs follow a change of the machine later. With 16, they took 1% of a round of four rows.
"""

PROMPTS = 8
"""Rounds with prompts in them that are remembered, of what a prompt's token costs.

Raised, that is known later; lowered, a slow moment of the machine counts for more.
"""


class LearntCosts:
    """D(n) and V(n) of rounds that are looked at, and of those that are not.

    Args:
        profiled: of both, at first; it becomes what is learnt of rounds that are looked at.
    """

    def __init__(self, profiled: CostModel) -> None:
        self._models = {True: profiled}
        # Seconds since the tables learnt last, by what learns them and by tokens.
        self._taken: dict[tuple[Callable[..., None], int], list[float]] = {}

    def of(self, looks: bool) -> CostModel:
        """Of the rounds that are looked at, or of the others, once these may come."""
        return self._models.get(looks, self._models[True])

    def tell_apart(self) -> None:
        """From now on rounds may be of both kinds."""
        if False not in self._models:
            self._models[False] = copy.deepcopy(self._models[True])

    def at(self, rows: int, context: float) -> bool:
        """See `CostModel.at`."""
        changed = [model.at(rows, context) for model in self._models.values()]
        return any(changed)

    def note(self, outcome: RoundOutcome, looks: bool) -> None:
        """Note what a round's forwards took.

        The host launches those of a round that is not looked at together, and then waits. So it is
        not known which part took how long: each has its expected share of the whole. A round
        without candidates tells of both kinds.
        """
        for kind, costs in self._models.items():
            if outcome.draft_costs and costs is not self.of(looks):
                continue
            draft, verify = costs.observe_draft, costs.observe_verify
            parts = [(draft, *step) for step in outcome.draft_costs]
            parts.append((verify, *outcome.verify_cost))
            if not kind:
                due = [float(costs.draft(n)) for _, n, _ in parts[:-1]]
                due.append(float(costs.verify(outcome.verify_cost[0])))
                slower = sum(seconds for *_, seconds in parts) / sum(due)
                parts = [
                    (learn, n, slower * expected)
                    for (learn, n, _), expected in zip(parts, due, strict=True)
                ]
            for learn, tokens, seconds in parts:
                self._taken.setdefault((learn, tokens), []).append(seconds)

    def teach(self) -> bool:
        """Let the tables learn, if there is enough to learn from: whether they did."""
        if sum(map(len, self._taken.values())) < TOGETHER:
            return False
        for (learn, tokens), seconds in self._taken.items():
            learn(tokens, *seconds)
        self._taken = {}
        return True


class PromptTokens:
    """What a prompt's tokens in a round cost, in candidates'.

    They look back less far than tokens behind a whole row, and no logits are made of them. Beyond
    the knee of a GPU's curve they cost as much; on a CPU it may be half.
    """

    def __init__(self) -> None:
        self._share = 1.0

    def places(self, start: RoundStart, tokens: int) -> int:
        """What a verification of so many tokens costs, in tokens without prompts among them."""
        return tokens - round((1 - min(self._share, 1.0)) * start.prompt_tokens)

    def observe(self, outcome: RoundOutcome, verify: CostTable) -> None:
        """Learn from a round in which a prompt joined rows that decode.

        The less a prompt should add to its seconds, the less it tells.
        """
        start, (tokens, seconds) = outcome.start, outcome.verify_cost
        prompt = start.prompt_tokens
        if prompt and prompt < start.target_tokens:
            others = float(verify(tokens - prompt))
            if (due := float(verify(tokens)) - others) > 0:
                share = min(max((seconds - others) / due, 0.0), OUTLIER)
                self._share += min(due / others, 1.0) * (share - self._share) / PROMPTS
