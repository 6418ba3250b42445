"""What values JSON lines have, counted place by place, and the one type for each that follows.

A place is a column, a field of objects or the items of lists. Most of its values decide what it
is; the others are the mistakes of their rows (`jsonl.misfit`). Counts of several files add up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import json as arrow_json
from pyarrow import types as t

from pipeline.errors import UserError
from pipeline.inputs.columns import EXACT, JSON_TEXT
from pipeline.inputs.jsonl import deeply_nested, parse_line

_MOST_FIELDS = 2000
"""Columns of a file, or fields of the objects in a column, at most. More names than these are data:
they are not told apart any more."""

_MAX_TYPE_DEPTH = 20
"""Lists and objects in each other, at most: Arrow's files end at 64, where a list counts twice."""


class Mixed(Exception):
    """No type holds most of the values of a place."""


class _Unsure(Exception):
    """Arrow's reader does not say enough of these lines."""


@dataclass(slots=True)
class Seen:
    """How many values of which kind a place has; nulls do not count.

    Attributes:
        truths, texts, lists, objects, fractions: how many.
        whole: integers of up to 64 bits, with a sign.
        beyond: other integers.
        negative: whether an integer is below zero.
        unsigned: whether all those beyond have 64 bits without a sign.
        inexact: integers that are no float64.
        items: values in the lists.
        fields: values in the objects, in the order in which they appeared.
    """

    truths: int = 0
    texts: int = 0
    lists: int = 0
    objects: int = 0
    fractions: int = 0
    whole: int = 0
    beyond: int = 0
    negative: bool = False
    unsigned: bool = True
    inexact: int = 0
    items: Seen | None = None
    fields: dict[str, Seen] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All values that are not null."""
        numbers = self.fractions + self.whole + self.beyond
        return self.truths + self.texts + self.lists + self.objects + numbers

    def add(self, other: Seen) -> None:
        """Count the values of another place as of this one."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.negative |= other.negative
        self.unsigned &= other.unsigned
        if other.items is not None:
            self.items = self.items or Seen()
            self.items.add(other.items)
        for name, values in other.fields.items():
            self._field(name).add(values)

    def _field(self, name: str) -> Seen:
        """Values under a name; nobody's if there are too many names already."""
        if name not in self.fields and len(self.fields) > _MOST_FIELDS:
            return Seen()
        return self.fields.setdefault(name, Seen())

    def note(self, value: Any) -> None:
        """Count a value as `json` reads it."""
        if value is None:
            return
        if isinstance(value, str):
            self.texts += 1
        elif isinstance(value, bool):
            self.truths += 1
        elif isinstance(value, int):
            self._integer(value)
        elif isinstance(value, float):
            self.fractions += 1
        elif isinstance(value, list):
            self.lists += 1
            self.items = self.items or Seen()
            for each in value:
                self.items.note(each)
        else:
            self.objects += 1
            for name, each in value.items():
                self._field(name).note(each)

    def _integer(self, value: int) -> None:
        self.negative |= value < 0
        self.inexact += abs(value) > EXACT
        if -(2**63) <= value < 2**63:
            self.whole += 1
        else:
            self.beyond += 1
            self.unsigned &= 0 <= value < 2**64

    def note_column(self, column: pa.Array) -> None:
        """Count a piece of a column as Arrow's reader of JSON gives it.

        Raises:
            _Unsure: integers may have become fractions in it.
        """
        kind, there = column.type, len(column) - column.null_count
        if t.is_null(kind) or not there:
            return
        if t.is_boolean(kind):
            self.truths += there
        elif t.is_integer(kind):
            ends = pc.min_max(column).as_py()
            self.whole += there
            self.negative |= ends["min"] < 0
            if not -EXACT <= ends["min"] <= ends["max"] <= EXACT:
                outside = pc.or_(pc.greater(column, EXACT), pc.less(column, -EXACT))
                self.inexact += pc.sum(outside).as_py()
        elif t.is_floating(kind):
            if pc.any(pc.greater_equal(pc.abs(column), EXACT)).as_py():
                raise _Unsure
            self.fractions += there
        elif t.is_list(kind):
            self.lists += there
            self.items = self.items or Seen()
            self.items.note_column(column.flatten())
        elif t.is_struct(kind):
            self.objects += there
            for each, values in zip(kind, column.flatten(), strict=True):
                self._field(each.name).note_column(values)
        else:
            self.texts += there  # Arrow takes some texts for times

    def kind(self, depth: int = _MAX_TYPE_DEPTH, *, inside: bool = True) -> pa.DataType:
        """The type that holds most values of the place; nulls' own if there are none.

        Args:
            depth: of lists and objects in each other, at most.
            inside: whether the place is within a value, not a column.

        Raises:
            Mixed: no type does.
        """
        total = self.total
        if not total:
            return pa.null()
        numbers = self.fractions + self.whole + self.beyond
        if not depth or (inside and self.texts and self.lists):
            # Within chat messages and sampling parameters both are right: `content`, `stop`.
            raise Mixed
        if 2 * self.texts > total:
            return pa.string()
        if 2 * self.truths > total:
            return pa.bool_()
        if 2 * numbers > total:
            return self._number(total)
        if 2 * self.lists > total:
            return pa.list_(pa.null() if self.items is None else self.items.kind(depth - 1))
        if 2 * self.objects > total and 0 < len(self.fields) <= _MOST_FIELDS:
            fields = self.fields.items()
            return pa.struct([(name, values.kind(depth - 1)) for name, values in fields])
        raise Mixed

    def _number(self, total: int) -> pa.DataType:
        if self.fractions:
            fit, kind = self.fractions + self.whole + self.beyond - self.inexact, pa.float64()
        elif self.beyond and self.unsigned and not self.negative:
            fit, kind = self.whole + self.beyond, pa.uint64()
        else:
            fit, kind = self.whole, pa.int64()
        if 2 * fit <= total:
            raise Mixed
        return kind

    def schema(self) -> pa.Schema:
        """The columns of a table whose rows these objects are."""
        return pa.schema([_column(name, values) for name, values in self.fields.items()])


_COUNTS = ("truths", "texts", "lists", "objects", "fractions", "whole", "beyond", "inexact")


def _column(name: str, values: Seen) -> pa.Field:
    try:
        return pa.field(name, values.kind(inside=False))
    except Mixed:
        return pa.field(name, pa.string(), metadata=JSON_TEXT)


def see_lines(lines: Sequence[bytes]) -> Seen:
    """The rows on some lines; those that are no objects do not count."""
    seen = Seen()
    try:
        table = _read(lines)
        for name, column in zip(table.column_names, table.columns, strict=True):
            values = seen._field(name)
            for chunk in column.chunks:
                values.note_column(chunk)
        seen.objects = table.num_rows
        return seen
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, _Unsure, UnicodeError):
        seen = Seen()
    for line in lines:
        if (row := parse_line(line)) is not None:
            seen.note(row)
    return seen


def _read(lines: Sequence[bytes]) -> pa.Table:
    """Lines as Arrow reads them, several times faster than Python, if there is nothing odd."""
    if any(map(deeply_nested, lines)):
        raise _Unsure  # Arrow's reader would take minutes, or end the process
    data = b"".join(lines)
    options = arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1)
    table = arrow_json.read_json(pa.BufferReader(data), read_options=options)
    if table.num_rows != len(lines):
        raise _Unsure  # two objects on a line
    return table


def check_columns_are_names(seen: Seen, url: str) -> None:
    """Check that the keys of lines are names of columns, not data.

    Raises:
        UserError: names the file and the fix.
    """
    if len(seen.fields) > _MOST_FIELDS:
        raise UserError(
            f"{url}: its lines have more than {_MOST_FIELDS:,} keys in all, and each is a column; "
            'put those that are data into one object, as {"values": {...}}'
        )


def without_strays(seen: Seen, names: Collection[str]) -> Seen:
    """The same without those of `names` that at most half of the rows have."""
    fields = {
        name: values
        for name, values in seen.fields.items()
        if name not in names or not 0 < 2 * values.total <= seen.objects
    }
    seen.fields = fields
    return seen
