"""Input that changes between runs, and outputs that begin beside another."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from jobs.job_file import load_job
from pipeline import layout
from pipeline.commit import planned_inputs
from pipeline.commit.planned_inputs import Planned
from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.inputs.listing import InputFile, check_unchanged, list_inputs
from pipeline.inputs.source import read_units
from pipeline.inputs.units import UNJOINED, FilePlan, Unit, plan_files
from pipeline.outputs.verify import verify
from pipeline.run.plan import plan_job
from pipeline.run.run import RunMode
from pipeline.storage.folder import open_folder
from pipeline.storage.local import LocalFolder
from tests.conftest import S3Server, TinyModels
from tests.pipeline.small_jobs import rows_of, run


def plan(name: str, size: int = 10, rows: int = 3, modified: int = 5 * 10**9) -> FilePlan:
    file = InputFile(f"/x/{name}", name, "parquet", size, modified)
    return FilePlan(file, rows, pa.schema([]), ())


def test_what_was_planned_is_read_back(tmp_path: Path) -> None:
    output = open_folder(str(tmp_path), S3Config())
    assert planned_inputs.read_planned(output) == {}
    output.put(layout.INPUTS, planned_inputs.to_bytes([plan("a"), plan("b", 7, 2, 0)]))
    assert planned_inputs.read_planned(output) == {
        "a": Planned(10, 3, 5 * 10**9, step=0),
        "b": Planned(7, 2, 0, step=0),
    }


def test_a_step_that_is_noted_stays_and_new_files_share_the_next() -> None:
    def steps(planned: dict[str, Planned], *names: str, begun: bool = True) -> list[int]:
        plans = [plan(name) for name in names]
        return [p.step for p in planned_inputs.in_steps(plans, planned, begun=begun)]

    noted = {"a": Planned(10, 3, step=0), "b": Planned(10, 3, step=4)}
    assert steps(noted, "a", "b", "c", "d") == [0, 4, 5, 5]
    assert steps({}, "a", "b", begun=False) == [0, 0]
    # Of versions that noted no steps, or no files at all.
    assert steps({"a": Planned(10, 3)}, "a", "b") == [UNJOINED, 0]
    assert steps({}, "a", "b") == [UNJOINED, UNJOINED]
    # What another run has noted meanwhile is told.
    assert not planned_inputs.other_steps([plan("a")], {"a": Planned(10, 3, step=0)})
    assert planned_inputs.other_steps([plan("a")], {"a": Planned(10, 3)})
    assert planned_inputs.other_steps([plan("a"), plan("b")], {"a": Planned(10, 3, step=0)})


def test_each_change_is_named_with_old_and_new() -> None:
    planned = {name: Planned(10, 3, 5 * 10**9) for name in ("a", "b", "c", "d")}
    planned["old"] = Planned(10, 3)  # of a version that did not note the time
    now = [plan("a", size=11, rows=4), plan("b", modified=6 * 10**9), plan("c"), plan("old")]
    lines = planned_inputs.changes(planned, [*now, plan("e")])
    assert lines == [
        "input file a has changed: 10 bytes there, 11 here, 3 rows there, 4 here",
        "input file b has changed: modified 1970-01-01 00:00:05.000 there, "
        "1970-01-01 00:00:06.000 here",
        "input file d is gone",
        "input file e is new",
    ]
    assert not any("file b" in line for line in planned_inputs.changes(planned, now, times=False))
    many = planned_inputs.changes({}, [plan(f"{i:03}") for i in range(1200)])
    assert many[-1] == "and 1,195 more input files"
    assert len(many) == 6


def test_a_file_that_changes_after_planning_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"p": "one"}\n')
    (planned,) = plan_files(list_inputs([str(tmp_path)], S3Config()), S3Config(), 4)
    units = [Unit.of(*planned.pieces)]
    assert len(list(read_units(units, planned.table, S3Config()))) == 1
    file.write_text('{"p": "two"}\n')
    os.utime(file, ns=(0, planned.file.modified + 1))
    with pytest.raises(UserError, match=r"a\.jsonl: this input file has changed since the job"):
        list(read_units(units, planned.table, S3Config()))
    file.unlink()
    with pytest.raises(UserError, match="this input file is gone"):
        list(read_units(units, planned.table, S3Config()))


@pytest.mark.s3
def test_files_on_s3_are_told_by_size_and_time(s3_env: S3Server) -> None:
    client = s3_env.client()
    client.create_bucket(Bucket="changes")
    client.put_object(Bucket="changes", Key="in/a.jsonl", Body=b'{"p": 1}\n')
    s3 = S3Config(endpoint=s3_env.endpoint)
    by_name, by_folder, by_glob = (
        list_inputs([f"s3://changes/{path}"], s3)[0] for path in ("in/a.jsonl", "in", "in/*.jsonl")
    )
    assert by_name.modified == by_folder.modified == by_glob.modified > 0
    check_unchanged(by_name.url, by_name.size, by_name.modified, s3)
    client.put_object(Bucket="changes", Key="in/a.jsonl", Body=b'{"p": 1}\n\n')
    with pytest.raises(UserError, match="has changed"):
        check_unchanged(by_name.url, by_name.size, by_name.modified, s3)


# -------------------------------------------------------------------- whole jobs


def write(folder: Path, name: str, words: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"prompt": words}), folder / name)
    return folder / name


@pytest.fixture
def job_file(tiny_models: TinyModels, tmp_path: Path) -> Path:
    values = {
        "input": {"paths": "in", "prompt_column": "prompt"},
        "output": "out",
        "models": {"target": tiny_models.target},
        "sampling": {"max_new_tokens": 4, "temperature": 0},
        "speculation": {"policy": "none"},
        "actors": {"num_cpus": 2},
        "unit_rows": 2,
    }
    write(tmp_path / "in", "a.parquet", ["one", "two", "three"])
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


@pytest.mark.ray
def test_changed_new_and_touched_files(local_ray: None, job_file: Path, tmp_path: Path) -> None:
    """One job through all that can become of its input."""
    assert call("run", job_file, "-q").exit_code == 0
    output = tmp_path / "out"
    before = rows_of(output)

    # New files are named and left out.
    for name in ("b", "c", "d", "e"):
        write(tmp_path / "in", f"{name}.parquet", [f"four {name}"])
    told = call("run", job_file)
    assert told.exit_code == 0, told.output
    note = "4 new input files are not part of this job; --extend adds: b.parquet, c.parquet, d.par"
    assert note in told.stderr
    assert "and 1 more" in told.stderr
    assert "Nothing was missing" in told.stdout

    # --extend adds them and what is missing, and keeps what is there.
    lost, *kept = sorted((output / "completions").iterdir())
    lost.unlink()
    left = plan_job(load_job(job_file))
    assert [file.name for file in left.left_out] == [f"{name}.parquet" for name in "bcde"]
    assert [each.name for unit in left.units for each in unit.pieces] == ["a.parquet"] * 2
    times = {file: file.stat().st_mtime_ns for file in kept}
    assert call("run", job_file, "--extend", "-q").exit_code == 0
    assert len(rows_of(output)) == 7
    assert before.items() <= rows_of(output).items()
    assert {file: file.stat().st_mtime_ns for file in kept} == times
    record = json.loads((output / "_specbatch/job.json").read_text())
    assert [(step["files"], step["rows"]) for step in record["extended"]] == [(4, 4)]
    assert "created" in record
    again = call("run", job_file)
    assert "new input" not in again.stderr
    assert "Nothing was missing" in again.stdout
    assert call("verify", output).exit_code == 0

    # A file whose time alone differs may be the same, and the user may say so.
    file = tmp_path / "in" / "a.parquet"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    message = refused(call("run", job_file))
    assert "input file a.parquet has changed: modified 20" in message
    assert "--same-content" in message
    assert call("run", job_file, "--same-content", "-q").exit_code == 0
    assert call("run", job_file, "-q").exit_code == 0

    # One with other rows may not.
    write(tmp_path / "in", "a.parquet", ["one", "two", "three", "four"])
    for option in ("-q", "--same-content", "--extend"):
        message = refused(call("run", job_file, option))
        assert "holds a job on other input" in message
        assert "a.parquet has changed" in message
        assert "3 rows there, 4 here" in message
        assert "digest" not in message
    file.unlink()
    assert "input file a.parquet is gone" in refused(call("run", job_file))
    assert before.items() <= rows_of(output).items()


@pytest.mark.slow
@pytest.mark.ray
def test_an_extension_that_was_stopped_is_finished(
    local_ray: None, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("run", job_file, "-q").exit_code == 0
    write(tmp_path / "in", "b.parquet", ["four"])
    put = LocalFolder.put

    def die(self: LocalFolder, name: str, data: bytes) -> None:
        if name == layout.INPUTS:
            raise KeyboardInterrupt
        put(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "put", die)
        assert call("run", job_file, "--extend", "-q").exit_code == 130
    assert "run again with --extend" in refused(call("run", job_file))
    assert call("run", job_file, "--extend", "-q").exit_code == 0
    assert len(rows_of(tmp_path / "out")) == 4
    assert verify(str(tmp_path / "out"), S3Config()).problems == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_fork_reuses_nothing_and_leaves_the_first_alone(
    local_ray: None, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change = ("--set", "sampling.max_new_tokens=3")
    assert "no job's output here" in refused(call("run", job_file, *change, "--fork", "fork"))
    assert call("run", job_file, "-q").exit_code == 0
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*") if f.is_file()}

    message = refused(call("run", job_file, *change))
    assert "sampling.max_new_tokens: 4 there, 3 here" in message
    assert "--fork OUT" in message
    assert call("run", job_file, *change, "--fork", "fork", "-q").exit_code == 0
    forked = rows_of(tmp_path / "fork")
    assert len(forked) == 3
    assert all(row["output_tokens"] <= 3 for row in forked.values())
    record = json.loads((tmp_path / "fork/_specbatch/job.json").read_text())
    assert record["forked_from"] == {
        "output": str(tmp_path / "out"),
        "differences": ["sampling.max_new_tokens: 4 there, 3 here"],
    }
    # It can be resumed by the same command, and is another job's output to any other.
    assert "Nothing was missing" in call("run", job_file, *change, "--fork", "fork").stdout
    assert "holds another job" in refused(call("run", job_file, "--fork", "fork"))
    assert "the job's own output" in refused(call("run", job_file, *change, "--fork", "out"))
    assert "leave out" in refused(call("run", job_file, "--fork", "x", "--only-failed"))
    after = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert after == before


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_job_on_s3_is_extended(
    local_ray: None, tiny_models: TinyModels, s3_env: S3Server, tmp_path: Path
) -> None:
    client = s3_env.client()
    client.create_bucket(Bucket="extend")
    client.put_object(Bucket="extend", Key="in/a.jsonl", Body=b'{"p": "one"}\n{"p": "two"}\n')
    values: dict[str, Any] = {
        "input": {"paths": ["s3://extend/in"], "prompt_column": "p"},
        "output": "s3://extend/out",
        "s3": {"endpoint": s3_env.endpoint},
        "models": {"target": tiny_models.target},
        "sampling": {"max_new_tokens": 4, "temperature": 0},
        "speculation": {"policy": "none"},
        "actors": {"num_cpus": 2},
    }
    run(values)
    client.put_object(Bucket="extend", Key="in/b.jsonl", Body=b'{"p": "three"}\n')
    notes: list[str] = []
    assert run(values, note=notes.append).units_run == 0
    assert notes == ["1 new input file is not part of this job; --extend adds: b.jsonl"]
    assert run(values, mode=RunMode(extend=True)).summary["rows"] == 3
    assert verify("s3://extend/out", S3Config(endpoint=s3_env.endpoint)).problems == []
    client.put_object(Bucket="extend", Key="in/a.jsonl", Body=b'{"p": "one"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl has changed: 26 bytes there, 13 here"):
        run(values)
