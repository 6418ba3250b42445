"""Joining pieces of files to units, and units to bundles: small ones cost as much as large ones.

A unit is committed as one file. Files that became part of a job together are joined together, and
only these: units that are committed stay what they are, whatever files are added later.

A bundle is what an actor is handed at once. Units with few rows to do, such as those of which some
rows alone are tried again, share one, and each is committed by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from pipeline.inputs.units import UNJOINED, FilePlan, Unit

MOST_PIECES = 256
"""Of a unit. More would swell footers, which name all of them; fewer would make more output files.
Unit ids depend on it: a change would cut outputs that were begun into other units."""

_RESERVE = 2
"""Bundles that an actor holds beside those that fill its slots: one is taken up while another is
written. More would leave less to actors that get free."""

Bundle = tuple[Unit, ...]
"""Units that are read and handed to an actor together."""

_Item = TypeVar("_Item")


def plan_units(files: Sequence[FilePlan], unit_rows: int) -> list[Unit]:
    """The units of a job, in the order of their first rows.

    Pieces that are neighbours in the input are joined while they have at most `unit_rows` rows.

    Args:
        files: in input order, cut into pieces of at most `unit_rows` rows.
        unit_rows: most rows of a unit.
    """
    order = {plan.file.name: number for number, plan in enumerate(files)}
    units: list[Unit] = []
    for step in {plan.step for plan in files}:
        most = 1 if step == UNJOINED else MOST_PIECES
        pieces = (piece for plan in files if plan.step == step for piece in plan.pieces)
        joined = _neighbours(pieces, lambda piece: piece.rows, unit_rows, most)
        units += [Unit.of(*each) for each in joined]
    return sorted(units, key=lambda unit: (order[unit.pieces[0].name], unit.pieces[0].start))


def bundled(units: Iterable[Unit], most_rows: int) -> list[Bundle]:
    """Units in bundles of neighbours with at most `most_rows` rows to do, or one unit."""
    bundles = _neighbours(units, lambda unit: len(unit.wanted), most_rows)
    return [tuple(bundle) for bundle in bundles]


def _neighbours(
    items: Iterable[_Item], rows: Callable[[_Item], int], most_rows: int, most: int | None = None
) -> Iterator[list[_Item]]:
    """Neighbours together, as many as have at most `most_rows` rows; at least one, at most `most`.

    Args:
        items: in their order.
        rows: how many one has.
        most_rows, most: of rows and items together; no `most`: any number.
    """
    group: list[_Item] = []
    total = 0
    for item in items:
        if group and (total + rows(item) > most_rows or len(group) == most):
            yield group
            group, total = [], 0
        group.append(item)
        total += rows(item)
    if group:
        yield group


def bundles_in_flight(bundles: Sequence[Bundle], slots: int) -> int:
    """How many bundles an actor must be handed at once so that its slots are always full.

    Enough that any so many neighbours have a row for each slot, and a reserve.

    >>> bundles_in_flight([], 64)
    2
    """
    rows = [sum(len(unit.wanted) for unit in bundle) for bundle in bundles]
    first = together = too_few = 0
    for last, more in enumerate(rows):
        together += more
        while together >= slots:
            together -= rows[first]
            first += 1
        too_few = max(too_few, last + 1 - first)
    return min(too_few + 1, len(rows)) + _RESERVE
