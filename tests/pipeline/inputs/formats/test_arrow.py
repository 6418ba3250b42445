"""Arrow's two layouts, read by ranges of batches."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from pipeline.inputs.columns import stored
from pipeline.inputs.formats.arrow import ArrowReader
from pipeline.inputs.formats.base import Wanted

TABLE = pa.table(
    {
        "n": list(range(50)),
        "text": [f"row {i}" for i in range(50)],
        "list": [[{"role": "user", "content": "x" * i}] for i in range(50)],
    }
)
ENCODED = TABLE.append_column("kind", TABLE["text"].dictionary_encode())


def written(table: pa.Table, layout: str, batch_rows: int, compression: Any = None) -> bytes:
    sink = pa.BufferOutputStream()
    make = pa.ipc.new_file if layout == "file" else pa.ipc.new_stream
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with make(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("layout", ["file", "stream"])
@pytest.mark.parametrize("table", [TABLE, ENCODED], ids=["plain", "dictionary"])
@pytest.mark.parametrize("unit_rows", [1, 7, 20, 100])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_ranges_are_read_by_themselves(
    layout: str, table: pa.Table, unit_rows: int, compression: Any
) -> None:
    data = written(table, layout, 8, compression)
    reader = ArrowReader()
    with pa.BufferReader(data) as file:
        found = reader.find(file, "x.arrow", unit_rows)
    assert found.rows == 50
    assert found.schema == pa.schema([(f.name, stored(f.type)) for f in table.schema])
    rows: list[dict[str, Any]] = []
    for offset in sorted({cut.offset for cut in found.cuts}):
        together = [cut for cut in found.cuts if cut.offset == offset]
        assert together[0].start == len(rows)
        with pa.BufferReader(data) as file:
            read = list(reader.read(file, together, Wanted(found.schema)))
        assert [each.table.num_rows for each in read] == [cut.rows for cut in together]
        rows += [row for each in read for row in each.table.to_pylist()]
    assert rows == table.to_pylist()
    # What a range does not need is not read.
    if table is TABLE and unit_rows < 20:
        assert len({cut.offset for cut in found.cuts}) > 1


@pytest.mark.parametrize("layout", ["file", "stream"])
def test_no_rows(layout: str) -> None:
    with pa.BufferReader(written(TABLE.slice(0, 0), layout, 8)) as file:
        found = ArrowReader().find(file, "x.arrow", 10)
    assert (found.rows, list(found.cuts)) == (0, [])


@pytest.mark.parametrize("data", [b"", b"hello, I am no Arrow at all", b"ARROW1 but no more"])
def test_what_is_no_arrow(data: bytes) -> None:
    with pa.BufferReader(data) as file, pytest.raises((pa.ArrowException, OSError)):
        ArrowReader().find(file, "x.arrow", 10)
