"""What only the backend for S3 must do: credentials, buckets, addresses."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.listing import list_inputs
from pipeline.storage import s3 as on_s3
from pipeline.storage.folder import check_access, open_folder, resolved
from tests.conftest import ACCESS_KEY, AWS_ENV, SECRET_KEY, S3Server


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
        check_access(S3Config(endpoint=s3_env.endpoint), "s3://any/x")
    forget_clients()


@pytest.mark.s3
def test_no_such_bucket(s3_env: S3Server) -> None:
    with pytest.raises(UserError, match=r"s3://nothere/x: no such bucket: nothere"):
        check_access(S3Config(endpoint=s3_env.endpoint), "s3://nothere/x")


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in AWS_ENV:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_clients()
    with pytest.raises(UserError, match=r"s3://b/x: no AWS credentials found; set AWS_ACCESS_KEY"):
        check_access(S3Config(endpoint="http://127.0.0.1:9"), "s3://b/x")
    forget_clients()


def test_no_such_profile() -> None:
    with pytest.raises(UserError, match="no AWS profile named 'nobody'"):
        check_access(S3Config(profile="nobody"), "s3://b/x")


def test_server_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWS_ENV.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    with pytest.raises(UserError, match=r"s3://b/x: cannot reach http://127\.0\.0\.1:9"):
        check_access(S3Config(endpoint="http://127.0.0.1:9"), "s3://b/x")
    forget_clients()


def test_a_folder_travels_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWS_ENV.items():
        monkeypatch.setenv(name, value)
    folder = open_folder("s3://b/x", S3Config(endpoint="http://127.0.0.1:9"))
    on_s3.filesystem(folder.url, folder.s3)
    data = pickle.dumps(folder)
    assert SECRET_KEY.encode() not in data
    assert ACCESS_KEY.encode() not in data


def test_settings_are_completed_where_something_is_on_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    forget_clients()
    given = S3Config(endpoint="http://127.0.0.1:9")
    assert resolved(given, "a", "/b") == given
    assert resolved(given, "a", "s3://b/x") == given.model_copy(update={"region": "eu-north-1"})
    forget_clients()


def forget_clients() -> None:
    """Clients are kept for a process's life, as its credentials usually are."""
    on_s3._session.cache_clear()
    on_s3._client.cache_clear()
