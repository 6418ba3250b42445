"""Rows whose completions are given: how likely they are to the target, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence

from specdec.engine.ending import Ending, failure
from specdec.engine.logprobs import PromptReader
from specdec.engine.scheduler import LiveRow
from specdec.model.sharing import SharedCaches

CHUNKS = 8
"""Chunks of given completions that are scored in one step, about.

Raised, steps of long rows take so long that an engine seems to hang; lowered, short rows do not
fill a forward.
"""


def score(
    live: Sequence[LiveRow], reader: PromptReader, shared: SharedCaches
) -> tuple[dict[int, Ending], list[int]]:
    """Set the `logprobs` of some rows whose completions are given, of those that come first.

    What is not finite reaches others through a mask. So a row whose scores are not is computed
    anew in a later step, alone and with pages of its own, before it is one that fails.

    Args:
        live: all live rows, by slot. What a slot holds of its row's prompt is not computed again.
        reader: of log-probabilities.
        shared: the caches of all models.

    Returns:
        How those of these rows ended that did, by slot; and the target's tokens of each forward.
    """
    rows = _first_of(live, CHUNKS * reader.chunk)
    forwards = reader.feed_shared(live, [*rows], shared)
    forwards += reader.score(rows)
    endings: dict[int, Ending] = {}
    for slot, row in rows.items():
        if all(math.isfinite(told.logprob) for told in row.logprobs):
            endings[slot] = Ending(0, "stop")
            continue
        if row.doubtful:
            endings[slot] = failure(0, adjusts=False)
        row.doubtful, row.room = True, 0  # pages that it shared are given up
        shared.scrub(slot, 0)
        shared.rollback(slot, 0)
    return endings, forwards


def _first_of(rows: Sequence[LiveRow], most: int) -> dict[int, LiveRow]:
    """The first rows whose completions are given, by slot: at least one, of about `most` tokens.

    Those in doubt come last, one by one.
    """
    given = {slot: row for slot, row in enumerate(rows) if row.request.given_ids}
    found: dict[int, LiveRow] = {}
    for slot, row in given.items():
        if not row.doubtful and most > 0:
            found[slot] = row
            most -= len(row.tokens)
    return found or dict([next(iter(given.items()))])
