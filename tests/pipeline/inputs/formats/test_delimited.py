"""CSV and TSV: wherever a file is cut, its rows are those that it holds as a whole."""

from __future__ import annotations

import csv
import io
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.inputs.formats.base import Cut, Rows, Wanted
from pipeline.inputs.formats.delimited import DelimitedReader

CSV, TSV = DelimitedReader("CSV", ","), DelimitedReader("TSV", "\t")
TABLE = pa.schema([("a", pa.string()), ("b", pa.string())])


def read(
    data: bytes, unit_rows: int, reader: DelimitedReader = CSV
) -> tuple[list[Cut], list[Rows]]:
    """A file's cuts, and each of them read by itself."""
    with pa.BufferReader(data) as file:
        found = reader.find(file, "x.csv", unit_rows)
    rows = []
    for cut in found.cuts:
        with pa.BufferReader(data) as file:
            rows += list(reader.read(file, [cut], Wanted(TABLE)))
    assert [cut.rows for cut in found.cuts] == [each.table.num_rows for each in rows]
    assert sum(cut.rows for cut in found.cuts) == found.rows
    return list(found.cuts), rows


def values(rows: list[Rows]) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for each in rows for row in each.table.to_pylist()]


TEXTS = st.text(st.sampled_from('ab,\t"\n\r é\ufeff'), max_size=6).map(lambda text: text or "x")


@given(
    st.lists(st.tuples(TEXTS, TEXTS), max_size=20),
    st.integers(1, 5),
    st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
@settings(deadline=None)
def test_rows_do_not_depend_on_cuts(
    table: list[tuple[str, str]], unit_rows: int, quoting: Any, newline: str, tabs: bool
) -> None:
    if quoting == csv.QUOTE_MINIMAL:  # with which Python leaves a lone return unquoted
        table = [(a.replace("\r", ""), b.replace("\r", "") or "x") for a, b in table]
    table = [(a.lstrip("\ufeff") or "x", b) for a, b in table]
    file = io.StringIO(newline="")
    delimiter = "\t" if tabs else ","
    writer = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=newline)
    writer.writerows([("a", "b"), *table])
    data = file.getvalue().encode("utf-8-sig" if unit_rows == 1 else "utf-8")
    cuts, rows = read(data, unit_rows, TSV if tabs else CSV)
    assert values(rows) == table
    assert [cut.start for cut in cuts] == list(range(0, len(table), unit_rows))
    assert not any(each.bad_lines for each in rows)


def test_fields_are_texts_as_they_stand() -> None:
    data = b'b,a\n007,1.50\n,""\n\n" x", y \n5" disk,a "b" c\n"say ""hi""",NA'
    _, rows = read(data, 2)
    assert values(rows) == [
        ("1.50", "007"),
        ("", ""),
        (" y ", " x"),
        ('a "b" c', '5" disk'),
        ("NA", 'say "hi"'),
    ]


def test_a_bad_record_is_one_bad_row() -> None:
    data = b"a,b\n1,2\nonly\n1,2,3\n\xff,x\nlone\rreturn,x\n3,4\n"
    _, rows = read(data, 100)
    (read_,) = rows
    assert values(rows) == [("1", "2"), *[(None, None)] * 4, ("3", "4")]
    assert {index: (line.text, line.error_class) for index, line in read_.bad_lines.items()} == {
        1: ("only", "MalformedLine"),
        2: ("1,2,3", "MalformedLine"),
        3: ("\ufffd,x", "MalformedLine"),
        4: ("lone\rreturn,x", "MalformedLine"),
    }
    assert read_.bad_lines[1].message == "the line has 1 fields, and the header 2"
    assert read_.bad_lines[3].message == "the line is not UTF-8"


@pytest.mark.parametrize(("data", "rows"), [(b"", 0), (b"\n\n", 0), (b"a,b", 0), (b"a,b\n1,2", 1)])
def test_small_files(data: bytes, rows: int) -> None:
    assert sum(cut.rows for cut in read(data, 10)[0]) == rows


@pytest.mark.parametrize("unit_rows", [1, 100])
def test_a_quote_that_nothing_closes_is_found_before_a_job_begins(unit_rows: int) -> None:
    with pytest.raises(UserError, match=r"x\.csv: line 4: a field begins with a quote that noth"):
        read(b'a,b\n"1\n1",2\n"3,4\n5,6\n', unit_rows)


def test_a_field_may_be_longer_than_pythons_limit() -> None:
    _, rows = read(b"a,b\n" + b"x" * 200_000 + b",y\n", 1)
    assert len(values(rows)[0][0]) == 200_000
