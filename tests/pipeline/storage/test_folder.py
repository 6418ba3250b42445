from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.listing import list_inputs
from pipeline.storage import folder as storage
from pipeline.storage.folder import Folder, check_access, filesystem
from tests.conftest import ACCESS_KEY, AWS_ENV, SECRET_KEY, S3Server


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


def test_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(storage.os, "link", refuse)
    folder = Folder(str(tmp_path), S3Config())
    assert folder.put_if_absent("x", b"first")
    assert not folder.put_if_absent("x", b"second")
    assert folder.read("x") == b"first"


def test_nothing_half_written_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "link", crash)
    folder = Folder(str(tmp_path), S3Config())
    with pytest.raises(KeyboardInterrupt):
        folder.put_if_absent("completions/x", b"data")
    assert folder.list("completions") == {}


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="part of this path is a file"):
        Folder(str(tmp_path / "out"), S3Config()).put("x", b"")


# ------------------------------------------------------------------------ S3


@pytest.mark.s3
def test_inputs_on_s3(s3_env: S3Server) -> None:
    client = s3_env.client()
    client.create_bucket(Bucket="inputs")
    for key in ("a/x.jsonl", "a/deep/y.jsonl", "a/notes.txt", "b/z.jsonl"):
        client.put_object(Bucket="inputs", Key=key, Body=b"{}\n")
    s3 = S3Config(endpoint=s3_env.endpoint)
    assert [f.name for f in list_inputs(["s3://inputs/a"], s3)] == ["deep/y.jsonl", "x.jsonl"]
    (file,) = list_inputs(["s3://inputs/*/z.jsonl"], s3)
    assert (file.url, file.name, file.size) == ("s3://inputs/b/z.jsonl", "b/z.jsonl", 3)
    with pytest.raises(UserError, match="no files match this glob"):
        list_inputs(["s3://inputs/*.parquet"], s3)


@pytest.mark.s3
def test_wrong_credentials(s3_env: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()
    with pytest.raises(UserError, match=r"s3://any/x: the server refused these credentials"):
        check_access("s3://any/x", S3Config(endpoint=s3_env.endpoint))
    forget_clients()


@pytest.mark.s3
def test_no_such_bucket(s3_env: S3Server) -> None:
    with pytest.raises(UserError, match=r"s3://nothere/x: no such bucket: nothere"):
        check_access("s3://nothere/x", S3Config(endpoint=s3_env.endpoint))


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in AWS_ENV:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_clients()
    with pytest.raises(UserError, match=r"s3://b/x: no AWS credentials found; set AWS_ACCESS_KEY"):
        check_access("s3://b/x", S3Config(endpoint="http://127.0.0.1:9"))
    forget_clients()


def test_no_such_profile() -> None:
    with pytest.raises(UserError, match="no AWS profile named 'nobody'"):
        check_access("s3://b/x", S3Config(profile="nobody"))


def test_server_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWS_ENV.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    with pytest.raises(UserError, match=r"s3://b/x: cannot reach http://127\.0\.0\.1:9"):
        check_access("s3://b/x", S3Config(endpoint="http://127.0.0.1:9"))
    forget_clients()


def test_a_folder_travels_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWS_ENV.items():
        monkeypatch.setenv(name, value)
    folder = Folder("s3://b/x", S3Config(endpoint="http://127.0.0.1:9"))
    filesystem(folder.url, folder.s3)
    data = pickle.dumps(folder)
    assert SECRET_KEY.encode() not in data
    assert ACCESS_KEY.encode() not in data


def forget_clients() -> None:
    """Clients are kept for a process's life, as its credentials usually are."""
    storage._session.cache_clear()
    storage._client.cache_clear()
