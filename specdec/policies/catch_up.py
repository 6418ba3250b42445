"""What a new row owes: before a draft can propose for a row, it must read the row's prompt.

The draft reads a prompt once, in the first round that drafts for the row. All rounds that the row
has left profit from it, so all of them share the cost: each owes a part, before it may gain. If the
first round paid for it alone, no prompt would ever be worth reading. If a row that joins others
paid nothing, each new row would find speculation cheap while all together run at a loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.policies.base import RoundOutcome, RoundStart
from specdec.policies.costs import CostTable

USUAL = 2
"""Tokens of a row that a first draft step reads where nothing was missed, at most.

After a full acceptance the draft lacks its own last candidate and the bonus token: 2. What it reads
beyond is a debt. A larger value would hide short gaps from the account.
"""

CATCH_UP_ROUNDS = 64
"""Most rounds that share the cost of reading a prompt, or what the draft missed while unused.

More rounds make long rows join more readily; a row that ends sooner leaves some of its debt unpaid.
With 8, all rows of the simulator stayed without speculation where their prompts were long.
"""


def owed(
    start: RoundStart, rows: Sequence[int], rates: Sequence[float], draft: CostTable
) -> dict[int, float]:
    """Seconds that each of some rows owes in each of its rounds, if it is drafted for.

    Args:
        start: the round.
        rows: at least one, by index.
        rates: of all rows, how often a candidate is accepted.
        draft: seconds of a draft step.
    """
    debts = {row: start.rows[row].catch_up for row in rows}
    lacking = {row: start.draft_pending[row] for row in rows}
    if max(lacking.values()) <= USUAL:
        return debts
    # Each is taken to read it beside the usual tokens of the others: in the long run rows come one
    # by one. Those that come together, as at first, take more, once.
    usual, longest = USUAL * len(rows), max(lacking.values())
    a_token = max(float(draft(usual + longest) - draft(usual)), 0.0) / longest
    for row in rows:
        # Where it is a close call, a round has about one candidate for each row.
        rounds = start.room[row] / (1 + rates[row])
        debts[row] += a_token * lacking[row] / min(max(rounds, 1.0), CATCH_UP_ROUNDS)
    return debts


def shared(seconds: float, outcome: RoundOutcome, draft: CostTable) -> float:
    """A round's seconds with what its rows owe in place of what the draft read in it."""
    rows = zip(outcome.start.rows, outcome.drawn, strict=True)
    debts = [row.catch_up for row, k in rows if k]
    read, usual = outcome.draft_costs[0][0], USUAL * len(debts) + sum(outcome.known)
    if read > usual:
        seconds -= float(draft(read) - draft(usual))
    return seconds + sum(debts)
