"""With what credentials S3 is asked: such as expire during a job, none, and those that pay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import UserError
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.source import read_units
from pipeline.inputs.units import Unit, plan_files
from pipeline.run.run import run_job
from pipeline.storage import s3_client
from pipeline.storage.folder import Folder, check_access, find_files, open_folder
from tests.conftest import ACCESS_KEY, AWS_ENV, SECRET_KEY, S3Server, TinyModels
from tests.faulty_s3 import FaultyS3, faulty_s3

pytestmark = pytest.mark.s3

OLD, OLD_SECRET = "old-access-key", "old-secret-key"
MOST = 4
"""Requests of what is repeated once. botocore asks once more for a HEAD, for the region."""


@pytest.fixture
def file(no_clients: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The credentials file of a user who has nothing else, with keys that have expired."""
    for name in AWS_ENV:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    log_in(path, OLD, OLD_SECRET)
    return path


@pytest.fixture
def server(s3_server: S3Server) -> Iterator[FaultyS3]:
    with faulty_s3(s3_server.endpoint) as server:
        server.expired = {OLD}
        yield server


def log_in(file: Path, key: str, secret: str) -> None:
    file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")


def kept(server: S3Server, name: str) -> str:
    """A bucket with a file of rows."""
    client = server.client()
    client.create_bucket(Bucket=name)
    client.put_object(Bucket=name, Key="in/a.jsonl", Body=b'{"prompt": "x"}\n')
    return f"s3://{name}"


def read_range(folder: Folder) -> object:
    with folder.open("in/a.jsonl", 5) as file:
        return file.read()


OPERATIONS: dict[str, Callable[[Folder], object]] = {
    "put_if_absent": lambda f: f.put_if_absent("x", b"1"),
    "replace": lambda f: f.replace("in/a.jsonl", b"1", '"other"'),
    "upload": lambda f: f.upload("y", Path(__file__)),
    "read": lambda f: f.read("in/a.jsonl"),
    "stamp": lambda f: f.stamp("in/a.jsonl"),  # by HEAD, whose answer has no code
    "read_range": read_range,
    "list": lambda f: f.list("in"),
    "find_files": lambda f: find_files(f.join("in/*.jsonl"), f.s3),
    "check_access": lambda f: check_access(f.s3, f.url),
    "delete": lambda f: f.delete("x"),
}


def test_credentials_that_expired_are_looked_up_again(
    s3_server: S3Server, server: FaultyS3, file: Path
) -> None:
    """Everything that a driver, a read task or an actor does goes on with a file's new keys."""
    folder = open_folder(kept(s3_server, "renewed"), S3Config(endpoint=server.endpoint))
    for name in ("put_if_absent", "stamp"):
        before = server.requests.total()
        with pytest.raises(UserError) as caught:
            OPERATIONS[name](folder)
        assert server.requests.total() - before <= MOST, name
        assert "the AWS credentials have expired (" in str(caught.value), name
        assert "log in again" in str(caught.value)
        assert "the same command resumes" in str(caught.value)
        assert OLD not in str(caught.value)
    expired = s3_client._clients[folder.s3]
    log_in(file, ACCESS_KEY, SECRET_KEY)
    for name in ("put_if_absent", "upload", "stamp", "read_range", "list"):
        s3_client._clients[folder.s3] = expired
        before = server.requests.total()
        OPERATIONS[name](folder)
        assert server.requests.total() - before <= MOST, name


@pytest.mark.ray
def test_a_job_whose_credentials_expire_says_so(
    local_ray: None,
    tiny_models: TinyModels,
    s3_env: S3Server,
    no_clients: None,
) -> None:
    url = kept(s3_env, "expires")
    with faulty_s3(s3_env.endpoint) as server:

        def on_request(method: str, path: str) -> None:
            if method == "PUT" and "/completions/" in path:
                server.expired = {ACCESS_KEY}

        server.on_request = on_request
        job = JobConfig.model_validate(
            {
                "input": {"paths": f"{url}/in", "prompt_column": "prompt"},
                "output": f"{url}/out",
                "s3": {"endpoint": server.endpoint},
                "models": {"target": tiny_models.target},
                "sampling": {"max_new_tokens": 2},
                "speculation": {"policy": "none"},
                "actors": {"num_cpus": 1},
            }
        )
        with pytest.raises(UserError, match="credentials have expired") as caught:
            run_job(job)
        assert "the same command resumes" in str(caught.value)
        assert ACCESS_KEY not in str(caught.value)


# -------------------------------------------------------------- buckets of others


def test_a_public_bucket_is_read_without_credentials(
    s3_server: S3Server, server: FaultyS3, file: Path
) -> None:
    file.unlink()
    kept(s3_server, "public")
    s3 = S3Config(endpoint=server.endpoint, anonymous=True, profile="nobody")
    plans = plan_files(list_inputs(["s3://public/in"], s3), s3, unit_rows=8)
    (read,) = read_units([Unit.of(*plans[0].pieces)], plans[0].table, s3)
    assert read.table.to_pylist() == [{"prompt": "x"}]
    assert server.last_authorization == ""


def test_who_asks_a_bucket_where_requesters_pay_agrees_to(
    s3_env: S3Server, server: FaultyS3
) -> None:
    url = kept(s3_env, "paid")
    for pays in (True, False):
        folder = open_folder(url, S3Config(endpoint=server.endpoint, requester_pays=pays))
        for operation in OPERATIONS.values():
            server.headers.clear()
            operation(folder)
            agreed = [h.get("x-amz-request-payer") for h in server.headers.values()]
            assert agreed == ["requester" if pays else None] * len(agreed)


def test_input_and_output_are_reached_apart(s3_env: S3Server) -> None:
    values: dict[str, Any] = {
        "input": {"paths": "s3://public/in", "prompt_column": "prompt", "s3": {"anonymous": True}},
        "output": "s3://mine/out",
        "output_s3": {"endpoint": "http://127.0.0.1:9000", "region": "eu-north-1"},
        "s3": {"region": "us-west-2"},
        "models": {"target": "m"},
        "speculation": {"policy": "none"},
    }
    job = JobConfig.model_validate(values)
    assert job.s3_of_input == S3Config(anonymous=True, region="us-west-2")
    assert job.s3_of_output == S3Config(endpoint="http://127.0.0.1:9000", region="eu-north-1")
    assert JobConfig.model_validate(job.model_dump(mode="json")) == job
    del values["output_s3"], values["input"]["s3"]
    job = JobConfig.model_validate(values)
    assert job.s3_of_input == job.s3_of_output == S3Config(region="us-west-2")
