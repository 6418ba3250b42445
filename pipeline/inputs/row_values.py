"""Rows of a table as Python values, which not every value has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline.errors import RowError


def row_values(table: pa.Table, index: int) -> dict[str, Any]:
    """One row of a table.

    Raises:
        RowError: a value is no valid text, or nothing that Python has.
    """
    try:
        (row,) = table.slice(index, 1).to_pylist()
    except UnicodeDecodeError as error:
        raise RowError("MalformedText", f"a column is not valid UTF-8: {error}") from None
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise RowError("MalformedValue", f"a column holds no usable value: {error}") from None
    return dict(row)


def each_row(table: pa.Table) -> Iterator[dict[str, Any] | RowError]:
    """All rows of a table in order, or why one has no values."""
    try:
        yield from table.to_pylist()  # many times as fast as one by one, where nothing is wrong
        return
    except (pa.ArrowException, ValueError, OverflowError):  # of which UnicodeDecodeError is one
        pass
    for index in range(table.num_rows):
        try:
            yield row_values(table, index)
        except RowError as error:
            yield error
