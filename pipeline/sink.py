"""Committing finished units: a Ray Data `Datasink` that writes each file at most once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from ray.data import Datasink
from ray.data.block import Block
from ray.data.datasource.datasink import WriteResult

from pipeline.blocks import UnitFiles
from pipeline.storage import Folder


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
        written, units = {}, []
        for block in blocks:
            unit = UnitFiles.from_block(block)
            for name, data in unit.files:
                if self._output.put_if_absent(name, data):
                    written[name] = hashlib.sha256(data).hexdigest()
            units.append(unit.unit_id)
        if self._monitor is not None:
            self._monitor.committed.remote(units)
        return written

    def on_write_complete(self, write_result: WriteResult[dict[str, str]]) -> None:
        for written in write_result.write_returns:
            self.checksums.update(written)
