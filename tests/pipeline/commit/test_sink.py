from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.commit.sink import CommitSink
from pipeline.config.job import S3Config
from pipeline.inputs.blocks import UnitFiles
from pipeline.storage.folder import open_folder
from pipeline.storage.local import LocalFolder


def files(completions: bytes, errors: str = "e1") -> pa.Table:
    unit = UnitFiles(
        "u", ((f"errors/u-{errors}.parquet", b"errors"), ("completions/u.parquet", completions))
    )
    return UnitFiles.to_block([unit])


def test_units_survive_their_block() -> None:
    bundle = [UnitFiles("u", (("a", b"\x00\xff"), ("b", b""))), UnitFiles("stopped", ())]
    block = UnitFiles.to_block(bundle)
    assert block.num_rows == 1
    assert UnitFiles.from_block(block) == bundle


def test_a_straggler_changes_nothing_that_is_committed(tmp_path: Path) -> None:
    output = open_folder(str(tmp_path), S3Config())
    sink = CommitSink(output)
    first = sink.write([files(b"first")], None)
    assert set(first) == {"errors/u-e1.parquet", "completions/u.parquet"}
    # A retry that failed other rows brings an errors file of another name, and loses the race.
    late = sink.write([files(b"second", errors="e2")], None)
    assert "completions/u.parquet" not in late
    assert output.read("completions/u.parquet") == b"first"
    assert output.read("errors/u-e1.parquet") == b"errors"


def test_the_commit_comes_last(tmp_path: Path) -> None:
    order: list[str] = []

    class Recorder(LocalFolder):
        def put_if_absent(self, name: str, data: bytes) -> bool:
            order.append(name)
            return True

    CommitSink(Recorder(str(tmp_path), S3Config())).write([files(b"x")], None)
    assert order == ["errors/u-e1.parquet", "completions/u.parquet"]
