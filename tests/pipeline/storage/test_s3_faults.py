"""S3 on a bad day: a real server behind a proxy that breaks requests (`faulty_s3`)."""

from __future__ import annotations

import json
import re
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import UserError
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.source import read_units
from pipeline.inputs.units import Unit, plan_files
from pipeline.run.run import run_job
from pipeline.storage import patience, s3_client
from pipeline.storage.folder import Folder, check_access, open_folder
from tests.conftest import ACCESS_KEY, SECRET_KEY, S3Server, TinyModels
from tests.faulty_s3 import FAULTS, FaultyS3, faulty_s3

pytestmark = pytest.mark.s3

TOKEN = "test-session/token=="


@pytest.fixture
def bucket(s3_env: S3Server, request: pytest.FixtureRequest) -> str:
    name = f"faults-{zlib.crc32(request.node.name.encode())}"  # the same faults in each run
    s3_env.client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short waits: the tests' faults do not last."""
    monkeypatch.setattr(patience, "_LONGEST_WAIT", 0.05)


def at(server: FaultyS3) -> S3Config:
    return S3Config(endpoint=server.endpoint)


def stored(server: S3Server, bucket: str) -> dict[str, bytes]:
    """What a bucket holds, past the proxy."""
    client = server.client()
    keys = [e["Key"] for e in client.list_objects_v2(Bucket=bucket).get("Contents", [])]
    return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


# --------------------------------------------------------------- single operations


def test_operations_under_faults_tell_the_truth(s3_env: S3Server, bucket: str, quick: None) -> None:
    data = {f"completions/{i}": str(i).encode() * 10_000 for i in range(30)}
    with faulty_s3(s3_env.endpoint, probability=0.2, seed=1, delay=0.1) as server:
        folder = open_folder(f"s3://{bucket}/out", at(server))
        assert all(folder.put_if_absent(name, content) for name, content in data.items())
        assert not any(folder.put_if_absent(name, b"other") for name in data)
        assert {name: folder.read(name) for name in data} == data
        assert folder.read("completions/none") is None
        for _ in range(10):
            assert folder.list("completions") == {n[12:]: len(c) for n, c in data.items()}
        with folder.open("completions/7") as file:
            file.seek(9_990)
            assert file.read() == b"7" * 10
        for name in data:
            folder.put(name, b"replaced")
        assert stored(s3_env, bucket) == {f"out/{name}": b"replaced" for name in data}
        for name in data:
            folder.delete(name)
        assert stored(s3_env, bucket) == {}
        assert set(server.injected) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_every_kind_of_request_is_outlasted(
    s3_env: S3Server, bucket: str, quick: None, fault: str
) -> None:
    with faulty_s3(s3_env.endpoint, probability=0.5, faults=[fault], delay=0.05) as server:
        folder = open_folder(f"s3://{bucket}/out", at(server))
        for i in range(5):
            assert folder.put_if_absent(f"{i}", b"x" * 100_000)
            assert folder.read(f"{i}") == b"x" * 100_000
            assert folder.list("") == {f"{n}": 100_000 for n in range(i + 1)}
        assert server.injected[fault] > 5


def test_an_answer_later_than_the_client_waits_for(
    s3_env: S3Server, bucket: str, quick: None, no_clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "_SILENCE_SECONDS", 1)
    with faulty_s3(s3_env.endpoint, probability=0.5, faults=["delay"], delay=1.5) as server:
        folder = open_folder(f"s3://{bucket}/out", at(server))
        for i in range(4):
            assert folder.put_if_absent(f"{i}", b"content")
            assert folder.read(f"{i}") == b"content"
        assert server.injected["delay"] >= 2
    assert stored(s3_env, bucket) == {f"out/{i}": b"content" for i in range(4)}


def test_a_lost_answer_is_not_a_lost_file(s3_env: S3Server, bucket: str, quick: None) -> None:
    with faulty_s3(s3_env.endpoint, faults=["lost"]) as server:
        folder = open_folder(f"s3://{bucket}", at(server))
        lose_first_put(server, lambda: None)
        assert folder.put_if_absent("own", b"mine")
        assert server.injected["lost"] == 1
        assert server.requests["PUT"] == 2
    assert stored(s3_env, bucket) == {"own": b"mine"}


def test_of_two_writers_one_whose_answer_is_lost(
    s3_env: S3Server, bucket: str, quick: None
) -> None:
    """Its PUT fails on the way; before it tries again, another writer's file is there."""
    for other, truth in ((b"theirs", False), (b"mine", True)):
        with faulty_s3(s3_env.endpoint, faults=["reset"]) as server:
            folder = open_folder(f"s3://{bucket}", at(server))
            name = other.decode()

            def interfere(name: str = name, other: bytes = other) -> None:
                s3_env.client().put_object(Bucket=bucket, Key=name, Body=other)

            lose_first_put(server, interfere)
            assert folder.put_if_absent(name, b"mine") is truth
            assert server.injected["reset"] == 1
    assert stored(s3_env, bucket) == {"theirs": b"theirs", "mine": b"mine"}


def lose_first_put(server: FaultyS3, meanwhile: Callable[[], None]) -> None:
    """The server's fault hits the first PUT and nothing else; `meanwhile` runs before it."""
    puts = 0

    def on_request(method: str, path: str) -> None:
        nonlocal puts
        puts += method == "PUT"
        server.probability = float(method == "PUT" and puts == 1)
        if server.probability:
            meanwhile()

    server.on_request = on_request


def test_of_many_writers_under_faults_one_wins(s3_env: S3Server, bucket: str, quick: None) -> None:
    with faulty_s3(s3_env.endpoint, probability=0.3, seed=3, delay=0.05) as server:
        folder = open_folder(f"s3://{bucket}", at(server))
        for name in map(str, range(5)):
            contents = [f"{name} of {writer}".encode() * 100 for writer in range(6)]
            with ThreadPoolExecutor(6) as pool:
                results = pool.map(lambda c, n=name: folder.put_if_absent(n, c), contents)
                won = [c for c, written in zip(contents, results, strict=True) if written]
            assert won == [stored(s3_env, bucket)[name]]


# ------------------------------------------------------------------------- inputs


def test_inputs_are_listed_planned_and_read_in_full(
    s3_env: S3Server, bucket: str, quick: None, tmp_path: Path
) -> None:
    """No file, row or unit goes missing because a request failed."""
    client = s3_env.client()
    rows = [{"i": i, "text": "x" * 300} for i in range(1000)]
    for part in range(4):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x", row_group_size=250)
        client.upload_file(str(tmp_path / "x"), bucket, f"in/deep/{part}/a.parquet")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        client.put_object(Bucket=bucket, Key=f"in/deep/{part}/b.jsonl", Body=lines.encode())
    with faulty_s3(s3_env.endpoint, probability=0.2, seed=5, delay=0.05) as server:
        s3 = at(server)
        for pattern, count in (("in", 8), ("in/*/*/*.parquet", 4), ("in/**/b.jsonl", 4)):
            for _ in range(5):
                assert len(list_inputs([f"s3://{bucket}/{pattern}"], s3)) == count
        plans = plan_files(list_inputs([f"s3://{bucket}/in"], s3), s3, unit_rows=100)
        for plan in plans:
            units = [Unit.of(piece) for piece in plan.pieces]
            read = read_units(units, plan.table, s3)
            assert [row for each in read for row in each.table.to_pylist()] == rows
        assert sum(server.injected.values()) > 50


def test_globbing_does_not_take_a_folder_it_cannot_list_for_an_empty_one(
    s3_env: S3Server, bucket: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.5)
    s3_env.client().put_object(Bucket=bucket, Key="a/b/x.jsonl", Body=b"{}\n")
    with faulty_s3(s3_env.endpoint, faults=["error"]) as server:

        def on_request(method: str, path: str) -> None:
            server.probability = float("prefix=a%2Fb%2F" in path)

        server.on_request = on_request
        with pytest.raises(UserError, match=r"S3 answered InternalError.*gave up after"):
            list_inputs([f"s3://{bucket}/a/*/*.jsonl"], at(server))


# --------------------------------------------------------------- failures that stay


def test_a_failure_that_stays_is_told_in_time(
    s3_env: S3Server, bucket: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.4)
    with faulty_s3(s3_env.endpoint, faults=["slow_down"]) as server:
        folder = open_folder(f"s3://{bucket}/out", at(server))
        folder.put("x", b"")  # the first request makes a client, which is not what is timed
        server.probability = 1.0
        operations: list[Callable[[], object]] = [
            lambda: folder.put_if_absent("x", b""),
            lambda: folder.put("x", b""),
            lambda: folder.read("x"),
            lambda: folder.open("x").__enter__(),
            lambda: folder.list("x"),
            lambda: folder.delete("x"),
            lambda: check_access(folder.s3, folder.url),
            lambda: list_inputs([folder.url], folder.s3),
        ]
        for operation in operations:
            began, asked = time.monotonic(), sum(server.requests.values())
            with pytest.raises(UserError) as caught:
                operation()
            assert time.monotonic() - began < 4
            assert 2 <= sum(server.requests.values()) - asked <= 200
            message = str(caught.value)
            assert message.startswith(f"s3://{bucket}")
            assert "SlowDown" in message or "503" in message  # HEAD has no code
            assert re.search(r"gave up after \d+ s and", message)
            assert "the same command resumes" in message


@pytest.mark.parametrize(
    "operation",
    [
        lambda folder: folder.put_if_absent("x", b""),
        lambda folder: folder.read("x"),
        lambda folder: folder.list("x"),
        lambda folder: folder.delete("x"),
    ],
)
def test_what_cannot_succeed_is_not_tried_again(
    s3_env: S3Server, bucket: str, operation: Callable[[Folder], object]
) -> None:
    with faulty_s3(s3_env.endpoint, probability=1.0, faults=["denied"]) as server:
        with pytest.raises(UserError, match=r"refused these credentials"):
            operation(open_folder(f"s3://{bucket}/out", at(server)))
        assert sum(server.requests.values()) == 1


def test_a_bucket_that_is_not_there_is_not_asked_for_again(s3_env: S3Server) -> None:
    with faulty_s3(s3_env.endpoint) as server:
        with pytest.raises(UserError, match="no such bucket: nobody-made-this"):
            check_access(at(server), "s3://nobody-made-this/out")
        assert server.requests == Counter(GET=1)


def test_no_message_holds_a_credential(
    s3_env: S3Server, bucket: str, quick: None, no_clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what was typed nor what a careless server repeats of the request."""
    monkeypatch.setattr(patience, "PATIENCE", 0.3)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    messages = []
    for kind in ("denied", "chatty", "error", "reset"):
        with faulty_s3(s3_env.endpoint, probability=1.0, faults=[kind]) as server:
            folder = open_folder(f"s3://{bucket}/out", at(server))
            for operation in (
                lambda f: f.put_if_absent("x", b""),
                lambda f: f.read("x"),
                lambda f: f.list("x"),
                lambda f: f.delete("x"),
                lambda f: list_inputs([f.url], f.s3),
            ):
                with pytest.raises(UserError) as caught:
                    operation(folder)
                messages.append(f"{caught.value} {caught.value!r} {caught.value.__cause__}")
            assert ACCESS_KEY in server.last_authorization
    with pytest.raises(UserError) as caught:
        check_access(S3Config(), f"s3://{ACCESS_KEY}:{SECRET_KEY}@{bucket}/out")
    messages.append(str(caught.value))
    assert len(messages) == 21
    for message in messages:
        for secret in (SECRET_KEY, ACCESS_KEY, TOKEN, "Signature="):
            assert secret not in message


# --------------------------------------------------------------------- whole jobs


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_outlasts_faults_and_an_outage(
    local_ray: None,
    tiny_models: TinyModels,
    s3_env: S3Server,
    bucket: str,
    write_rows: Callable[..., str],
    tmp_path: Path,
) -> None:
    rows = [{"i": i, "prompt": f"count to {i}"} for i in range(24)]
    inputs = [
        write_rows("in/a.parquet", rows[:12], row_group_size=4),
        write_rows("in/b.jsonl", rows[12:]),
    ]
    for file in inputs:
        s3_env.client().upload_file(file, bucket, f"in/{Path(file).name}")
    values = {
        "input": {"paths": [str(tmp_path / "in")], "prompt_column": "prompt"},
        "output": str(tmp_path / "calm"),
        "models": {"target": tiny_models.target, "draft": tiny_models.draft},
        "sampling": {"max_new_tokens": 8, "temperature": 1.0, "seed": 7},
        "speculation": {"policy": "heuristic", "verification": "coupled"},
        "actors": {"num_cpus": 2, "slots": 8},
        "unit_rows": 2,
    }
    run_job(JobConfig.model_validate(values))
    with faulty_s3(s3_env.endpoint, probability=0.05, seed=11) as server:

        def on_request(method: str, path: str) -> None:
            # The server is gone when the third unit is to be committed, and with it the inputs.
            if method == "PUT" and "/completions/" in path:
                commits.append(path)
                if len(commits) == 3:
                    server.outage(30)

        commits: list[str] = []
        server.on_request = on_request
        values |= {
            "input": {"paths": [f"s3://{bucket}/in"], "prompt_column": "prompt"},
            "output": f"s3://{bucket}/out",
            "s3": {"endpoint": server.endpoint},
        }
        result = run_job(JobConfig.model_validate(values))
        injected = server.injected
    assert result.summary["rows"] == len(rows)
    assert result.summary["errors"] == 0
    assert injected["outage"] >= 1
    assert injected.total() > injected["outage"]
    files = stored(s3_env, bucket)
    assert "out/_SUCCESS" in files
    stormy = {
        Path(key).name: pq.read_table(pa.BufferReader(data))
        for key, data in files.items()
        if key.startswith("out/completions/")
    }
    calm = {f.name: pq.read_table(f) for f in (tmp_path / "calm" / "completions").iterdir()}
    same = ["row_id", "i", "prompt", "completion", "output_tokens", "finish_reason"]
    assert {name: table.select(same).to_pylist() for name, table in stormy.items()} == {
        name: table.select(same).to_pylist() for name, table in calm.items()
    }
