"""Whether too many of a job's rows failed, and the words that say why most of them did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit.record import UnitRecord
from pipeline.errors import TooManyErrors
from pipeline.inputs.row_ids import ROW_ID
from pipeline.observe.error_share import too_many
from pipeline.storage.folder import Folder


def check_failed_rows(
    output: Folder, records: Sequence[UnitRecord], most: float, missing: int = 0
) -> None:
    """Check that no more rows failed than the job allows.

    Args:
        output: the job's folder.
        records: of the units that are committed.
        most: the job's `max_error_share`.
        missing: units that are not.

    Raises:
        TooManyErrors: says how many, which error is the commonest, and what to do.
    """
    failed = sum(record.results.failed for record in records)
    completed = sum(record.results.completions for record in records)
    if not too_many(failed, completed, most):
        return
    share = f"more than max_error_share ({most:g})" if completed else "none was completed"
    fixes = [f"failed rows are in {output.join(layout.ERRORS)}; --only-failed tries them again"]
    if completed:
        fixes.append("a higher max_error_share accepts them")
    if missing:
        fixes.append(f"{missing:,} units are not generated")
    raise TooManyErrors(
        f"{failed:,} of {failed + completed:,} rows failed, {share}. {commonest(output, records)}. "
        f"What is committed stays: {', '.join(fixes)}",
        missing,
    )


def commonest(output: Folder, records: Sequence[UnitRecord]) -> str:
    """The commonest error of some units that have any, with a row that failed so and its message.

    Args:
        output: the job's folder.
        records: of the units.
    """
    errors = Counter[str]()
    for record in records:
        errors.update(record.results.errors)
    [(kind, count)] = errors.most_common(1)
    file = next(r.files.errors for r in records if r.results.errors.get(kind))
    data = output.read(file.name) if file else None
    example = "" if data is None else f", as in {_first(data, kind)}"
    return f"Most often it is {kind} ({count:,}){example}"


def _first(data: bytes, kind: str) -> str:
    """The first row of an errors file that failed so."""
    columns = [ROW_ID, "error_class", "error_message"]
    table = pq.read_table(pa.BufferReader(data), columns=columns)
    row = table.filter(pc.equal(table["error_class"], kind)).slice(0, 1).to_pylist()[0]
    return f"row {row[ROW_ID]}: {row['error_message']}"
