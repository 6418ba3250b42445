"""Parquet: cut by row groups, from its footer alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.inputs.columns import stored
from pipeline.inputs.formats.base import Cut, Found, Reader, Rows, Wanted, cut_groups, sliced

_BATCH_ROWS = 4096
"""Rows decoded at a time. More needs more memory; ranges are cut from these batches."""

_INT96_UNIT = "us"
"""Of the times that Spark and Hive write in 96 bits. Of nanoseconds, 64 bits hold the years 1677 to
2262 only, and Arrow makes 1816 of 9999."""


class ParquetReader(Reader):
    """Cuts by numbers of row groups."""

    name = "Parquet"

    def find(self, file: pa.NativeFile, url: str, unit_rows: int) -> Found:
        with _opened(file) as parquet:
            metadata, schema = parquet.metadata, parquet.schema_arrow
            schema = pa.schema([(field.name, stored(field.type)) for field in schema])
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        return Found(metadata.num_rows, schema, cut_groups(groups, unit_rows))

    def read(self, file: pa.NativeFile, cuts: Sequence[Cut], wanted: Wanted) -> Iterator[Rows]:
        groups = list(range(cuts[0].offset, max(cut.end for cut in cuts)))
        with _opened(file) as parquet:
            batches = parquet.iter_batches(_BATCH_ROWS, row_groups=groups)
            for part in sliced(batches, cuts):
                yield Rows(wanted.conformed(part))


def _opened(file: pa.NativeFile) -> pq.ParquetFile:
    return pq.ParquetFile(file, coerce_int96_timestamp_unit=_INT96_UNIT)
