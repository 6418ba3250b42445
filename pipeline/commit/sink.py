"""Committing finished units: a Ray Data `Datasink` that writes each file at most once.

**The commit protocol**

*What is atomic.* One file at a time: a reader sees the whole of it or none of it. On a disk the
content is written to `_specbatch/staging/`, synced, and then given its name in one step (`link`,
which fails if the name is taken). On S3 it is one PUT with `If-None-Match: *`, which fails so too.
`completions/UNIT.parquet` is the commit of a unit: its errors and trace are written before it, and
its footer says what they are called and what their checksums are. Where it exists the unit is
done; where it does not, whatever else the unit's attempts left counts for nothing.

*What a reader may rely on*, at any moment, whatever is running or was killed:

- every file in `completions/` is whole, and no row is in two of them;
- a committed row stays: no later run removes or changes it;
- a row of a committed unit is either in its completions file or in the errors file that the footer
  of the completions file names (`UnitRecord.errors_file`), never in both.

Once `_SUCCESS` is there, also: every row of the input is in one of the two folders, `errors/` and
`trace/` hold nothing but what footers name, and `_specbatch/manifest.json` has every file's
checksum. Before that, files in `errors/` that no footer names are of attempts that came too late.

*Why nothing is duplicated.* A unit's name is a function of its input file and row range, so every
attempt at it, by any actor, run or machine, wants to write the same file, and of several writers
one wins. A straggler, a unit that Ray runs again and a second driver find the name taken and change
nothing. No list of what is done is kept beside the files, so none can disagree with them: a resume
lists `completions/`, subtracts it from the plan and runs the rest.

*Half-written files.* On a disk they exist in `_specbatch/staging/` only, under random names; the
end of the job removes them. On S3 a PUT that breaks off leaves no object. A PUT whose answer was
lost is repeated; if the name then turns out to be taken by the same content, it was ours.

*Trying failed rows again* (`--only-failed`, `pipeline.commit.retry`). The rows that failed are
generated alone and joined with those that the completions file has. The errors and trace of the new
generation are written under new names, since these hold a checksum of the content, and superseded
errors are copied to `_specbatch/history/`. Then the completions file is replaced in one step: by
`rename` under a lock on a disk, by a PUT with `If-Match` on S3, both only if it still is the file
that was read. So a reader sees the old generation or the new one, each complete, if it opens the
file once (`pq.read_table(path)` opens it twice, for its footer and for its pages: while a retry
runs, read the bytes first). Of two attempts one wins, and a straggler of an earlier retry cannot
undo a later one. `_SUCCESS` is taken away before the first unit is replaced and comes back when all
adds up again; a retry that is killed has replaced some units and left the others as they were, and
any later run puts it in order.

*The end* (`pipeline.commit.finish`). Rows in = rows completed + rows in errors is checked for each
unit; then statistics and manifest are written, then `_SUCCESS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from ray.data import Datasink
from ray.data.block import Block
from ray.data.datasource.datasink import WriteResult

from pipeline.inputs.blocks import UnitFiles
from pipeline.storage.folder import Folder


class CommitSink(Datasink[dict[str, str]]):
    """Writes units' files into the output folder.

    A file's name is a function of its unit and a file that exists is never touched, so a unit that
    is generated twice is committed once. The completions file is written last: where it exists,
    the unit is done.

    Args:
        output: the folder.
        monitor: actor handle of the job's `Monitor`, which is told what was committed; or None.

    Attributes:
        checksums: after the write, SHA-256 by name of the files that it wrote.
    """

    def __init__(self, output: Folder, monitor: Any = None) -> None:
        self._output, self._monitor = output, monitor
        self.checksums: dict[str, str] = {}

    def write(self, blocks: Iterable[Block], ctx: object) -> dict[str, str]:
        """Commit every unit in `blocks`. Returns checksums of the files that it wrote."""
        written, units = dict[str, str](), []
        for block in blocks:
            unit = UnitFiles.from_block(block)
            written.update(self.commit(unit))
            units.append(unit.unit_id)
        if self._monitor is not None:
            self._monitor.committed.remote(units)
        return written

    def commit(self, unit: UnitFiles) -> dict[str, str]:
        """Commit one unit. Returns checksums of the files that it wrote."""
        return {
            name: hashlib.sha256(data).hexdigest()
            for name, data in unit.files
            if self._output.put_if_absent(name, data)
        }

    def on_write_complete(self, write_result: WriteResult[dict[str, str]]) -> None:
        for written in write_result.write_returns:
            self.checksums.update(written)
