from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inputs.joining import MOST_PIECES, bundled, bundles_in_flight, plan_units
from pipeline.inputs.listing import InputFile
from pipeline.inputs.units import UNJOINED, FilePlan, Piece, RowRange, Unit, unit_id

UNIT_ROWS = 10


def planned(name: str, rows: Sequence[int], step: int = 0) -> FilePlan:
    """A file whose pieces have so many rows."""
    starts = [sum(rows[:i]) for i in range(len(rows))]
    pieces = (
        Piece(name, start, n, f"/x/{name}", "jsonl", start, start + n)
        for start, n in zip(starts, rows, strict=True)
    )
    file = InputFile(f"/x/{name}", name, "jsonl", 1)
    return FilePlan(file, sum(rows), pa.schema([]), tuple(pieces), step)


sizes = st.lists(st.lists(st.integers(1, UNIT_ROWS), max_size=4), max_size=30)


@st.composite
def inputs(draw: st.DrawFn) -> list[FilePlan]:
    """Files in the order of their names, each of one of three steps."""
    steps = st.integers(UNJOINED, 2)
    return [planned(f"{i:03}", rows, draw(steps)) for i, rows in enumerate(draw(sizes))]


@settings(deadline=None)  # the machine may be busy
@given(inputs())
def test_every_row_is_in_one_unit(files: list[FilePlan]) -> None:
    units = plan_units(files, UNIT_ROWS)
    assert len({unit.id for unit in units}) == len(units)
    steps = {plan.file.name: plan.step for plan in files}
    for step in set(steps.values()):
        mine = [unit for unit in units if steps[unit.pieces[0].name] == step]
        # In input order, and of no other step.
        assert list(chain.from_iterable(unit.pieces for unit in mine)) == [
            piece for plan in files if plan.step == step for piece in plan.pieces
        ]
        for unit, following in pairwise(mine):
            assert 1 <= unit.rows <= UNIT_ROWS
            # As few units as there can be without changing the order; or one a piece, as before.
            assert (unit.rows + following.pieces[0].rows > UNIT_ROWS) or step == UNJOINED
            assert step != UNJOINED or len(unit.pieces) == 1
    # In the order of their first rows.
    firsts = [(unit.pieces[0].name, unit.pieces[0].start) for unit in units]
    assert firsts == sorted(firsts)
    for unit in units:
        places = [unit.place(index) for index in range(unit.rows)]
        assert places == [
            (p.name, row) for p in unit.pieces for row in range(p.start, p.start + p.rows)
        ]


@settings(deadline=None)
@given(sizes, st.lists(st.tuples(st.text("abc012", min_size=1), st.integers(1, UNIT_ROWS))))
def test_files_that_are_added_change_no_unit(
    first: list[list[int]], added: list[tuple[str, int]]
) -> None:
    files = [planned(f"{i:03}", rows) for i, rows in enumerate(first)]
    before = plan_units(files, UNIT_ROWS)
    new = {f"{name}.new": planned(f"{name}.new", [rows], step=1) for name, rows in added}
    together = sorted([*files, *new.values()], key=lambda plan: plan.file.name)
    after = plan_units(together, UNIT_ROWS)
    assert set(before) <= set(after)
    assert sum(unit.rows for unit in after) == sum(plan.rows for plan in together)


def test_a_unit_of_one_piece_is_called_as_ever_and_pieces_are_few() -> None:
    (unit,) = plan_units([planned("a.jsonl", [3])], UNIT_ROWS)
    assert unit.id == unit_id(RowRange("a.jsonl", 0, 3)) == "a-000000000-74999bcfc9"
    files = [planned(f"{i:04}", [1]) for i in range(2 * MOST_PIECES + 1)]
    units = plan_units(files, unit_rows=10_000)
    assert [len(unit.pieces) for unit in units] == [MOST_PIECES, MOST_PIECES, 1]
    # The same first piece and as many rows, yet not the same rows.
    other = plan_units([files[0], *files[2:]], unit_rows=10_000)
    assert (other[0].rows, other[0].pieces[0]) == (units[0].rows, units[0].pieces[0])
    assert other[0].id != units[0].id


def wanting(*rows: int) -> list[Unit]:
    """Units of ten rows of which so many are to be completed; 10: all."""
    units = [Unit.of(planned(f"{i:04}", [10]).pieces[0]) for i in range(len(rows))]
    return [
        unit if n == 10 else replace(unit, only=tuple(range(n)))
        for unit, n in zip(units, rows, strict=True)
    ]


def test_units_with_few_rows_to_do_share_a_bundle() -> None:
    units = wanting(*[1] * 12, 10, 10, 3, 3, 3, 3)
    bundles = bundled(units, UNIT_ROWS)
    assert list(chain.from_iterable(bundles)) == units
    assert [len(bundle) for bundle in bundles] == [10, 2, 1, 1, 3, 1]
    assert bundled([], UNIT_ROWS) == []


@settings(deadline=None)
@given(st.lists(st.integers(1, 10), max_size=60), st.integers(1, 80))
def test_an_actor_has_a_row_for_each_slot_wherever_it_is(rows: list[int], slots: int) -> None:
    bundles = bundled(wanting(*rows), UNIT_ROWS)
    done = [sum(len(unit.wanted) for unit in bundle) for bundle in bundles]
    at_once = bundles_in_flight(bundles, slots)
    # One of them may be on its way in, and one on its way out.
    held = at_once - 2
    windows = [done[i : i + held] for i in range(max(1, len(done) - held + 1))]
    assert all(sum(window) >= min(slots, sum(done)) for window in windows)
    assert at_once <= 2 + slots
    # Full units fill slots as they always did: with those that have as many rows, and two more.
    full = bundled(wanting(*[10] * 20), UNIT_ROWS)
    assert [bundles_in_flight(full, n) for n in (1, 10, 11, 64)] == [3, 3, 4, 9]
