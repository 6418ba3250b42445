"""Committing finished units: a Ray Data `Datasink` that writes each file at most once.

`completions/UNIT.parquet` is the commit of a unit. Its errors and trace are written before it, and
its footer says what they are called and what their checksums are. Where it exists, the unit is
done. Where it does not, whatever else attempts at the unit have left counts for nothing.

Each file is written in one atomic step, and only if no file has its name (`put_if_absent`). A
unit's name is a function of its input files and row ranges, so every attempt at it, by any actor,
run or machine, wants to write the same file, and one of them wins.

docs/how-it-works/exactly-once.md says what a reader may rely on, and why nothing is lost or
doubled. `pipeline.commit.retry` replaces a unit by its next generation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.data import Datasink
from ray.data.block import Block
from ray.data.datasource.datasink import WriteResult

from pipeline.inputs.blocks import UnitFiles
from pipeline.storage.folder import Folder

_THREADS = 8
"""Units of a bundle that are written at once: on S3 this is mostly waiting."""


class CommitSink(Datasink[dict[str, str]]):
    """Writes units' files into the output folder; a file that exists is never touched.

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
        written: dict[str, str] = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for block in blocks:
                units = UnitFiles.from_block(block)
                for checksums in pool.map(self.commit, units):
                    written |= checksums
                if self._monitor is not None:
                    self._monitor.committed.remote([unit.unit_id for unit in units])
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
