"""Joining pieces of files to units, and units to bundles: small ones cost as much as large ones.

A unit is committed as one file. Files that became part of a job together are joined together, and
only these: units that are committed stay what they are, whatever files are added later.

A bundle is what an actor is handed at once. Units with few rows to do, such as those of which some
rows alone are tried again, share one, and each is committed by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pipeline.inputs.units import UNJOINED, FilePlan, Piece, Unit

MOST_PIECES = 256
"""Of a unit. More would swell footers, which name all of them; fewer would make more output files.
Unit ids depend on it: a change would cut outputs that were begun into other units."""

_RESERVE = 2
"""Bundles that an actor holds beside those that fill its slots: one is taken up while another is
written. More would leave less to actors that get free."""

Bundle = tuple[Unit, ...]
"""Units that are read and handed to an actor together."""


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
        units += [Unit.of(*joined) for joined in _joined(pieces, unit_rows, most)]
    return sorted(units, key=lambda unit: (order[unit.pieces[0].name], unit.pieces[0].start))


def _joined(pieces: Iterable[Piece], unit_rows: int, most: int) -> Iterator[list[Piece]]:
    joined: list[Piece] = []
    rows = 0
    for piece in pieces:
        if joined and (rows + piece.rows > unit_rows or len(joined) == most):
            yield joined
            joined, rows = [], 0
        joined.append(piece)
        rows += piece.rows
    if joined:
        yield joined


def bundled(units: Iterable[Unit], most_rows: int) -> list[Bundle]:
    """Units in bundles of neighbours with at most `most_rows` rows to do, or one unit."""
    bundles: list[Bundle] = []
    bundle: list[Unit] = []
    rows = 0
    for unit in units:
        if bundle and rows + len(unit.wanted) > most_rows:
            bundles.append(tuple(bundle))
            bundle, rows = [], 0
        bundle.append(unit)
        rows += len(unit.wanted)
    return [*bundles, tuple(bundle)] if bundle else bundles


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
