"""Committing finished units: a Ray Data `Datasink` that writes each file at most once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

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

    Attributes:
        checksums: after the write, SHA-256 by name of the files that it wrote.
    """

    def __init__(self, output: Folder) -> None:
        self._output = output
        self.checksums: dict[str, str] = {}

    def write(self, blocks: Iterable[Block], ctx: object) -> dict[str, str]:
        """Commit every unit in `blocks`. Returns checksums of the files that it wrote."""
        written = {}
        for block in blocks:
            for name, data in UnitFiles.from_block(block).files:
                if self._output.put_if_absent(name, data):
                    written[name] = hashlib.sha256(data).hexdigest()
        return written

    def on_write_complete(self, write_result: WriteResult[dict[str, str]]) -> None:
        for written in write_result.write_returns:
            self.checksums.update(written)
