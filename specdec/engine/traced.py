"""What a round predicted, decided and met, as rows keep it on request."""

from __future__ import annotations

from typing import Any

from specdec.engine.round import Round
from specdec.policies.base import Explanation, StopPolicy
from specdec.request import RoundTrace


def trace(this: Round, policy: StopPolicy) -> None:
    """Note it for each decoding row of a round."""
    trees = this.trees
    drafted = this.proposal if trees is None else trees.proposal
    candidates = drafted.candidates.tolist()
    live = sum(this.start.decoding)
    for slot, row in enumerate(this.rows):
        if not this.start.decoding[slot]:
            continue
        if this.control:
            why = Explanation((), "control round")
        elif not this.start.room[slot]:
            why = Explanation((), "no room for a candidate")
        else:
            why = policy.explain(slot)
        n, known = drafted.lengths[slot], this.proposal.known[slot]
        predicted = why.predicted
        if known and (predicted or why.known):  # what nobody doubts is certain
            predicted = (*why.known[:known], *[1.0] * (known - len(why.known)), *predicted)
        shape: dict[str, Any] = {}
        if trees is not None:
            parts = zip(("parents", "kept", "path"), map(tuple, this.tree(slot)), strict=True)
            shape = dict(parts)
        row.trace.append(
            RoundTrace(
                context=this.start.contexts[slot],
                live=live,
                candidates=tuple(candidates[slot][:n]),
                predicted=predicted[:n],
                submitted=this.submitted[slot],
                accepted=this.accepted[slot],
                reason=why.reason,
                sources=tuple(each.removeprefix("in_") for each in this.taken(slot).sources),
                **shape,
            )
        )
