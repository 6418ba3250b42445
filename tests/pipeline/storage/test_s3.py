"""What only the backend for S3 must do: credentials, buckets, addresses."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.listing import list_inputs
from pipeline.storage import s3_client
from pipeline.storage.folder import (
    check_access,
    check_conditions,
    find_files,
    locate,
    open_folder,
    resolved,
)
from tests.conftest import ACCESS_KEY, AWS_ENV, SECRET_KEY, S3Server
from tests.faulty_s3 import faulty_s3


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
def test_wrong_credentials(
    s3_env: S3Server, no_clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(UserError, match=r"s3://any/x: the server refused these credentials"):
        check_access(S3Config(endpoint=s3_env.endpoint), "s3://any/x")


@pytest.mark.s3
def test_no_such_bucket(s3_env: S3Server) -> None:
    with pytest.raises(UserError, match=r"s3://nothere/x: no such bucket: nothere"):
        check_access(S3Config(endpoint=s3_env.endpoint), "s3://nothere/x")


def test_no_credentials(no_clients: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in AWS_ENV:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"s3://b/x: no AWS credentials found; set AWS_ACCESS_KEY"):
        check_access(S3Config(endpoint="http://127.0.0.1:9"), "s3://b/x")


def test_no_such_profile() -> None:
    with pytest.raises(UserError, match="no AWS profile named 'nobody'"):
        check_access(S3Config(profile="nobody"), "s3://b/x")


def test_server_out_of_reach(no_clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWS_ENV.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"s3://b/x: cannot reach http://127\.0\.0\.1:9"):
        check_access(S3Config(endpoint="http://127.0.0.1:9"), "s3://b/x")


def test_a_folder_travels_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AWS_ENV.items():
        monkeypatch.setenv(name, value)
    folder = open_folder("s3://b/x", S3Config(endpoint="http://127.0.0.1:9"))
    s3_client._client(folder.s3)
    data = pickle.dumps(folder)
    assert SECRET_KEY.encode() not in data
    assert ACCESS_KEY.encode() not in data


def test_settings_are_completed_where_something_is_on_s3(
    no_clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    given = S3Config(endpoint="http://127.0.0.1:9")
    assert resolved(given, "a", "/b") == given
    assert resolved(given, "a", "s3://b/x") == given.model_copy(update={"region": "eu-north-1"})


# ------------------------------------------------------------------- what stores do not do


@pytest.mark.s3
def test_a_store_without_conditional_writes_is_found_out(s3_env: S3Server) -> None:
    """Whether it refuses them or takes no notice, and before anything was generated."""
    client = s3_env.client()
    client.create_bucket(Bucket="unconditional")
    for conditions in ("refused", "ignored", "kept"):
        with faulty_s3(s3_env.endpoint, conditions=conditions) as server:
            folder = open_folder("s3://unconditional/out", S3Config(endpoint=server.endpoint))
            if conditions == "kept":
                check_conditions(folder)
            else:
                with pytest.raises(UserError) as caught:
                    check_conditions(folder)
                assert str(caught.value).startswith("s3://unconditional/out: this store does not")
                assert "use a store that does, such as AWS S3" in str(caught.value)
        assert client.list_objects_v2(Bucket="unconditional")["KeyCount"] == 0


@pytest.mark.s3
def test_a_server_of_ones_own_is_sent_no_checksums_that_it_may_not_know(s3_env: S3Server) -> None:
    s3_env.client().create_bucket(Bucket="checksums")
    with faulty_s3(s3_env.endpoint) as server:
        folder = open_folder("s3://checksums/out", S3Config(endpoint=server.endpoint))
        folder.put_if_absent("x", b"1")
        folder.upload("y", Path(__file__))
        folder.read("x")
        for headers in server.headers.values():
            assert not [name for name in headers if "checksum" in name or "trailer" in name]


# ------------------------------------------------------------------------- odd names

ODD = ("two words", "100%25", "a+b", "schön ☃", "a#b", "a?b=c", "[x]", "a//b", "x..y", "a=1/b&c")
"""Names that somebody decodes, encodes or tidies up if nobody takes care."""


@pytest.mark.s3
def test_keys_are_taken_as_they_are(s3_env: S3Server) -> None:
    client = s3_env.client()
    client.create_bucket(Bucket="odd")
    s3 = S3Config(endpoint=s3_env.endpoint)
    for odd in ODD:
        url = f"s3://odd/in/{odd}/{odd}.jsonl"
        client.put_object(Bucket="odd", Key=f"in/{odd}/{odd}.jsonl", Body=b"{}\n")
        (file,) = find_files(url, s3).files
        assert file.url == url
        folder, name = locate(url, s3)
        assert folder.read(name) == b"{}\n"
        output = open_folder(f"s3://odd/out/{odd}", s3)
        assert output.put_if_absent(odd, b"1")
        if "//" not in odd:  # SeaweedFS keeps files in folders, where `//` is `/`
            assert output.tree("") == {odd: 1}
            assert find_files(output.url, s3).files[0].url == output.join(odd)
    listed = {entry["Key"] for entry in client.list_objects_v2(Bucket="odd")["Contents"]}
    assert {key.replace("//", "/") for key in listed} == {
        name.replace("//", "/")
        for odd in ODD
        for name in (f"in/{odd}/{odd}.jsonl", f"out/{odd}/{odd}")
    }
    assert len(list_inputs(["s3://odd/in"], s3)) == len(ODD)
    # What a job is told of a folder that a console made is not a file.
    client.put_object(Bucket="odd", Key="marked/", Body=b"")
    assert find_files("s3://odd/marked", s3).files == ()


@pytest.mark.parametrize("url", ["s3://b/a//x.jsonl", "s3://b//x.jsonl", "s3a://b/a//x.jsonl"])
def test_slashes_of_a_key_are_kept(url: str) -> None:
    folder, name = locate(url, S3Config())
    assert f"{folder.url}/{name}" == url.replace("s3a", "s3")
