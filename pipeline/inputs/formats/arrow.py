"""Arrow's own files, and those of `datasets.save_to_disk`.

There are two layouts. A file ends with a footer that says where its batches are; a stream has none,
so its batches are counted once, and where each begins is noted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
from pyarrow import types as t

from pipeline.inputs.columns import stored
from pipeline.inputs.formats.base import (
    Cut,
    Found,
    Reader,
    Rows,
    Wanted,
    buffered,
    cut_groups,
    sliced,
)

_FILE_MAGIC = b"ARROW1"


class ArrowReader(Reader):
    """Cuts by record batches: numbers of batches in a file, bytes in a stream."""

    name = "Arrow"

    def find(self, file: pa.NativeFile, url: str, unit_rows: int) -> Found:
        if _has_footer(file):
            with pa.ipc.open_file(file) as reader:
                schema = reader.schema
                batches = range(reader.num_record_batches)
                groups = [reader.get_batch(number).num_rows for number in batches]
            cuts = cut_groups(groups, unit_rows)
        else:
            schema, groups, places = _walk(file)
            if any(_has_dictionary(field.type) for field in schema):
                # Its batches need the dictionaries before them, so reading begins at the front.
                groups, places = [sum(groups)], [0, places[-1]]
            cuts = [
                replace(cut, offset=places[cut.offset], end=places[cut.end])
                for cut in cut_groups(groups, unit_rows)
            ]
        schema = pa.schema([(field.name, stored(field.type)) for field in schema])
        return Found(sum(groups), schema, cuts)

    def read(self, file: pa.NativeFile, cuts: Sequence[Cut], wanted: Wanted) -> Iterator[Rows]:
        batches = _batches(file, cuts[0].offset, max(cut.end for cut in cuts))
        for part in sliced(batches, cuts):
            yield Rows(wanted.conformed(part))


def _has_footer(file: pa.NativeFile) -> bool:
    start = file.read(len(_FILE_MAGIC))
    file.seek(0)
    return bool(start == _FILE_MAGIC)


def _walk(file: pa.NativeFile) -> tuple[pa.Schema, list[int], list[int]]:
    """Of a stream: its schema, the rows of each batch, and where each begins and the last ends."""
    with buffered(file) as stream, pa.ipc.open_stream(stream) as reader:
        groups, places = [], [stream.tell()]
        for batch in reader:
            groups.append(batch.num_rows)
            places.append(stream.tell())
        return reader.schema, groups, places


def _batches(file: pa.NativeFile, offset: int, end: int) -> Iterator[pa.RecordBatch]:
    if _has_footer(file):
        with pa.ipc.open_file(file) as reader:
            yield from (reader.get_batch(number) for number in range(offset, end))
        return
    with buffered(file) as stream, pa.ipc.open_stream(stream) as reader:
        if not offset:
            yield from reader
            return
        stream.seek(offset)
        messages = pa.PythonFile(stream, mode="r")
        while stream.tell() < end:
            yield pa.ipc.read_record_batch(pa.ipc.read_message(messages), reader.schema)


def _has_dictionary(kind: pa.DataType) -> bool:
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    return bool(t.is_dictionary(kind)) or any(map(_has_dictionary, inner))
