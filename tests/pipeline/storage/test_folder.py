"""What `Folder` promises: every test here runs on a disk and on a real S3 server."""

from __future__ import annotations

import pickle
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.storage.folder import Folder, find_files, is_local, locate, open_folder


def test_put_if_absent_never_overwrites(folder: Folder) -> None:
    assert folder.put_if_absent("completions/u.parquet", b"first")
    assert not folder.put_if_absent("completions/u.parquet", b"second")
    assert folder.read("completions/u.parquet") == b"first"


def test_of_many_writers_one_wins(folder: Folder) -> None:
    wins: list[int] = []

    def write(number: int) -> None:
        if folder.put_if_absent("x", str(number).encode() * 1000):
            wins.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert folder.read("x") == str(wins[0]).encode() * 1000


def test_put_replaces(folder: Folder) -> None:
    folder.put("a/x", b"first")
    folder.put("a/x", b"second")
    assert folder.read("a/x") == b"second"


def test_replace_is_for_who_knows_the_version(folder: Folder) -> None:
    folder.put("x", b"first")
    data, version = folder.read_version("x")
    assert data == b"first"
    assert folder.replace("x", b"second", version)
    assert not folder.replace("x", b"third", version)
    assert folder.read("x") == b"second"
    assert not folder.replace("gone", b"third", version)
    assert folder.read("gone") is None
    with pytest.raises(FileNotFoundError):
        folder.read_version("gone")


def test_of_many_who_replace_one_version_one_wins(folder: Folder) -> None:
    folder.put("x", b"first")
    _, version = folder.read_version("x")
    wins: list[int] = []

    def write(number: int) -> None:
        if folder.replace("x", str(number).encode() * 1000, version):
            wins.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert folder.read("x") == str(wins[0]).encode() * 1000


def test_tree_names_files_at_any_depth(folder: Folder) -> None:
    assert folder.tree("a") == {}
    folder.put("a/x", b"12")
    folder.put("a/deep/y", b"1")
    assert folder.tree("a") == {"x": 2, "deep/y": 1}


def test_list_names_files_and_nothing_else(folder: Folder) -> None:
    assert folder.list("a") == {}
    folder.put("a/x", b"12")
    folder.put("a/deep/y", b"1")
    assert folder.list("a") == {"x": 2}


def test_read_and_delete_of_what_is_not_there(folder: Folder) -> None:
    assert folder.read("nope") is None
    folder.delete("nope")
    folder.put("x", b"1")
    folder.delete("x")
    assert folder.read("x") is None


def test_a_file_is_opened_for_random_access(folder: Folder) -> None:
    folder.put("a/x", b"0123456789")
    with folder.open("a/x") as file:
        assert file.size() == 10
        file.seek(4)
        assert file.read(3) == b"456"
    with pytest.raises(FileNotFoundError), folder.open("a/none"):
        pass


def test_what_goes_wrong_with_the_content_of_an_open_file_stays_what_it_is(folder: Folder) -> None:
    folder.put("x.parquet", b"no table")
    with pytest.raises(ValueError, match="Parquet"), folder.open("x.parquet") as file:
        pq.read_table(file)


def test_a_stamp_tells_a_file_from_a_later_one(folder: Folder) -> None:
    assert folder.stamp("x") is None
    folder.put("x", b"first")
    stamp = folder.stamp("x")
    assert stamp is not None
    assert stamp.size == 5
    assert abs(stamp.modified / 1e9 - time.time()) < 60
    assert folder.stamp("x") == stamp
    folder.put("x", b"longer")
    assert folder.stamp("x") != stamp
    folder.put("a/x", b"")
    assert folder.stamp("a") is None


def test_a_subfolder_is_a_folder(folder: Folder) -> None:
    inner = folder.subfolder("a")
    assert inner.put_if_absent("x", b"1")
    assert not folder.put_if_absent("a/x", b"2")
    assert (inner.url, inner.s3) == (folder.join("a"), folder.s3)
    folder.put("b/deep/y", b"1")
    folder.put("z", b"1")
    assert set(folder.folders()) - {"_specbatch"} == {"a", "b"}


def test_a_folder_holds_what_was_put_there_and_nothing_else(folder: Folder) -> None:
    folder.put_folder("day", {"a": b"1", "b": b"2"})
    assert folder.tree("day") == {"a": 1, "b": 1}
    folder.put("day/left/c", b"3")
    folder.put_folder("day", {"b": b"22", "d": b"4"})
    assert folder.tree("day") == {"b": 2, "d": 1}
    folder.put_folder("day", {})
    assert folder.tree("day") == {}


def test_a_local_file_is_copied(folder: Folder, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for content in (b"first" * 1000, b"second"):
        source.write_bytes(content)
        folder.upload("a/x", source)
        assert folder.read("a/x") == content
    assert folder.tree("a") == {"x": 6}


def test_a_path_names_a_file_a_folder_or_the_files_of_a_glob(folder: Folder) -> None:
    for name in ("in/a.jsonl", "in/deep/b.jsonl", "in/deep/_c", "in/deep/[d]"):
        folder.put(name, b"{}")

    def found(pattern: str) -> tuple[str, dict[str, str]]:
        it = find_files(folder.join(pattern), folder.s3)
        return it.kind, {file.name: file.url for file in it.files}

    assert found("in/a.jsonl") == ("file", {"a.jsonl": folder.join("in/a.jsonl")})
    assert found("in/deep/[d]") == ("file", {"[d]": folder.join("in/deep/[d]")})
    kind, files = found("in")
    assert (kind, set(files)) == ("folder", {"a.jsonl", "deep/b.jsonl", "deep/_c", "deep/[d]"})
    assert found("in/*/b.*") == ("glob", {"deep/b.jsonl": folder.join("in/deep/b.jsonl")})
    assert found("in/*.parquet") == ("glob", {})
    assert found("gone") == ("nothing", {})
    (file,) = find_files(folder.join("in/a.jsonl"), folder.s3).files
    there, name = locate(file.url, folder.s3)
    assert there.stamp(name) == file.stamp
    assert there.read(name) == b"{}"


def test_a_folder_travels(folder: Folder) -> None:
    folder.put("x", b"1")
    assert pickle.loads(pickle.dumps(folder)) == folder
    assert pickle.loads(pickle.dumps(folder)).read("x") == b"1"


# ------------------------------------------------------------------- which backend it is


def test_a_url_says_which_backend_it_is() -> None:
    assert is_local("a/b") and is_local("/a") and not is_local("s3://b/x")
    assert open_folder("s3://b/x", S3Config()).join("y") == "s3://b/x/y"
    folder, name = locate("x", S3Config())
    assert (folder.url, name) == (".", "x")
    with pytest.raises(UserError, match=r"^gs://b/x: gs:// is not supported; use a local path or"):
        open_folder("gs://me:secret@b/x?key=secret", S3Config())
