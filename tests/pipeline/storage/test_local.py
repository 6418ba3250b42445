"""What only the backend for disks must do."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.layout import STAGING
from pipeline.storage import local
from pipeline.storage.folder import open_folder


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(local.os, "link", refuse)
    folder = open_folder(str(tmp_path), S3Config())
    assert folder.put_if_absent("x", b"first")
    assert not folder.put_if_absent("x", b"second")
    assert folder.read("x") == b"first"


def test_nothing_half_written_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(local.os, "link", crash)
    folder = open_folder(str(tmp_path), S3Config())
    with pytest.raises(KeyboardInterrupt):
        folder.put_if_absent("completions/x", b"data")
    assert folder.list("completions") == {}


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="part of this path is a file"):
        open_folder(str(tmp_path / "out"), S3Config()).put("x", b"")


def test_a_disk_that_fails_while_a_file_is_read_is_named(tmp_path: Path) -> None:
    folder = open_folder(str(tmp_path), S3Config())
    folder.put("x", b"1")
    with (
        pytest.raises(UserError, match=r"/x: the disk answered with an input/output error; check"),
        folder.open("x"),
    ):
        raise OSError(errno.EIO, "Input/output error")


def test_what_a_killed_writer_left_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(str(tmp_path), S3Config())
    folder.put("x", b"1")
    (tmp_path / STAGING / "left").write_bytes(b"half")
    folder.clear_staging()
    assert not (tmp_path / STAGING).exists()
    assert folder.read("x") == b"1"
