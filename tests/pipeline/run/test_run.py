"""Whole jobs on a real Ray, with real (tiny, random) models."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from ray.data import DataContext
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.commit import manifest
from pipeline.commit.footer import read_records
from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.observe.progress import JobProgress
from pipeline.outputs.rounds import read_rounds
from pipeline.run.run import JobResult
from pipeline.storage.folder import open_folder
from specdec.measure.speedup import SpeedupMeter
from tests.conftest import S3Server, TinyModels
from tests.pipeline.small_jobs import alone, rows_of, run, settings, started

pytestmark = pytest.mark.ray

ROWS = 60


def texts(output: Path) -> dict[str, str]:
    return {name: row["completion"] for name, row in rows_of(output).items()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    schema = pa.schema(
        [
            pa.field("id", pa.int32(), nullable=False),
            pa.field("kind", pa.dictionary(pa.int8(), pa.string())),
            pa.field("at", pa.timestamp("ms", tz="UTC")),
            pa.field(
                "messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
            ),
        ]
    )
    for part in range(2):
        rows = [
            {
                "id": i,
                "kind": "even" if i % 2 == 0 else "odd",
                "at": None,
                "messages": [{"role": "user", "content": f"count to {i}"}],
            }
            for i in range(part * ROWS // 2, (part + 1) * ROWS // 2)
        ]
        table = pa.Table.from_pylist(rows, schema)
        pq.write_table(table, folder / f"part-{part}.parquet", row_group_size=10)
    return folder


Finished = tuple[dict[str, Any], Path, JobResult, list[JobProgress]]


@pytest.fixture(scope="module")
def finished(
    local_ray: None,
    tiny_models: TinyModels,
    prompts: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Finished:
    """A finished job of two actors, measured and traced: its settings, output, result, progress."""
    output = tmp_path_factory.mktemp("job") / "out"
    values = settings(
        tiny_models,
        str(prompts),
        output,
        speculation={
            "policy": "goodput",
            "verification": "coupled",
            "control_share": 0.3,
            "trace": True,
        },
        actors={"min": 2, "num_cpus": 1, "slots": 16},
    )
    told: list[JobProgress] = []
    with pytest.MonkeyPatch.context() as patch:
        # Otherwise the first actor may be done before the second has started.
        patch.setattr(DataContext.get_current(), "wait_for_min_actors_s", 300)
        return values, output, run(values, progress=told.append), told


def test_every_row_is_completed_once(finished: Finished) -> None:
    _, output, result, _ = finished
    rows = rows_of(output)
    expected = {f"part-{i // 30}.parquet:{i % 30}:0": i for i in range(ROWS)}
    assert {name: row["id"] for name, row in rows.items()} == expected
    assert result.summary["rows"] == ROWS
    assert result.summary["errors"] == 0
    assert not (output / "errors").exists()
    for row in rows.values():
        assert row["finish_reason"] in {"stop", "length"}
        assert 1 <= row["output_tokens"] <= 16
        assert row["rounds"] >= 1
        assert row["accepted"] <= row["verified"] <= row["drafted"]
        assert row["block_efficiency"] == row["output_tokens"] / row["rounds"]


def test_rows_keep_their_order_and_columns_their_types(finished: Finished, prompts: Path) -> None:
    _, output, _, _ = finished
    wanted = pq.read_schema(prompts / "part-0.parquet")
    for file in (output / "completions").glob("*.parquet"):
        table = pq.read_table(file)
        assert table["id"].to_pylist() == sorted(table["id"].to_pylist())
        for field in wanted:
            wanted_type = pa.string() if field.name == "kind" else field.type
            assert table.schema.field(field.name).type == wanted_type
    assert ds.dataset(output / "completions").count_rows() == ROWS


def test_units_share_the_engines_slots(finished: Finished) -> None:
    _, _, result, _ = finished
    # A unit has 4 rows: more in the slots at once come from several units.
    assert result.summary["peak_live"] > 4


def test_progress_is_told_while_units_run(finished: Finished) -> None:
    _, _, _, told = finished
    stages = list(dict.fromkeys(p.stage for p in told))
    assert stages[:2] == ["connecting to Ray", "starting actors"]
    assert any(p.stage == "generating" and p.tally.counts.committed for p in told)
    assert all(p.rows_total == ROWS for p in told)


def test_manifest_statistics_and_marker(finished: Finished) -> None:
    _, output, result, _ = finished
    listed = json.loads((output / "_specbatch" / "manifest.json").read_text())
    assert listed["rows_in"] == listed["rows_out"] == ROWS
    completed = [f["rows"] for f in listed["files"] if f["name"].startswith("completions/")]
    assert sum(completed) == ROWS
    assert (output / "_SUCCESS").exists()
    assert not (output / "_specbatch" / "staging").exists()
    units = pq.read_table(output / "stats" / "units.parquet")
    assert sum(units["completions"].to_pylist()) == ROWS
    phases = pq.read_table(output / "stats" / "phases.parquet").to_pylist()
    booked = {p["phase"] for p in phases}
    assert {"load", "verify", "prefill", "idle"} <= booked
    # Whether a draft of which a step takes what a verification takes is tried, is for the clock.
    assert ("draft" in booked) == (sum(units["draft_forwards"].to_pylist()) > 0)
    assert sum(p["seconds"] for p in phases) == pytest.approx(
        sum(result.summary["phase_seconds"].values())
    )


def test_a_finished_job_does_nothing(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.run.run.connected", lambda: pytest.fail("Ray was wanted"))
    values, output, first, _ = finished
    before = {f: f.stat().st_mtime_ns for f in output.rglob("*") if f.is_file()}
    again = run(values)
    assert again.units_run == 0
    assert again.summary == first.summary
    assert {f: f.stat().st_mtime_ns for f in output.rglob("*") if f.is_file()} == before


def test_where_no_row_failed_there_is_nothing_to_try_again_and_no_ray(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, _, _, _ = finished
    monkeypatch.setattr("pipeline.run.run.connected", lambda: pytest.fail("Ray was wanted"))
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["run", str(job), "--only-failed"])
    assert result.exit_code == 0
    assert "No row is in errors: there is nothing to try again." in result.stdout


@pytest.mark.slow  # test_small_files loses a unit, too
def test_missing_units_are_done_again_and_only_those(finished: Finished) -> None:
    values, output, _, _ = finished
    before = texts(output)
    files = sorted((output / "completions").glob("*.parquet"))
    kept = {file: file.stat().st_mtime_ns for file in files[2:]}
    for file in files[:2]:
        file.unlink()
    assert run(values).units_run == 2
    assert texts(output) == before
    assert {file: file.stat().st_mtime_ns for file in files[2:]} == kept
    assert (output / "_SUCCESS").exists()


def test_a_changed_file_is_noticed(finished: Finished) -> None:
    values, output, _, _ = finished
    file = next((output / "completions").glob("*.parquet"))
    data = file.read_bytes()
    pq.write_table(pq.read_table(file).slice(1), file)
    (output / "_SUCCESS").unlink()
    with pytest.raises(RuntimeError, match=r"not a file that specbatch wrote|its rows are not"):
        run(values)
    file.write_bytes(data)
    run(values)
    assert (output / "_SUCCESS").exists()


def test_another_job_is_refused(finished: Finished) -> None:
    values, _, _, _ = finished
    other = {**values, "sampling": {**values["sampling"], "seed": 8}}
    with pytest.raises(UserError, match=r"sampling\.seed: 7 there, 8 here"):
        run(other)


def test_coupled_tokens_depend_on_nothing_but_seed_and_target(finished: Finished) -> None:
    # Whether goodput drafts here is for the clock: of policies that always do, the same is asked in
    # `test_template_stop_strings_and_sampling_by_row`.
    values, output, _, _ = finished
    assert texts(output) == alone(values)
    assert pq.read_table(output / "stats" / "actors.parquet").num_rows == 2


def test_speedup_calibration_and_rounds_are_recorded(finished: Finished) -> None:
    """goodput, measured and traced, explains each of its completions."""
    values, output, result, _ = finished
    low, high = result.summary["speedup_ci"]
    assert 0 < low <= result.summary["speedup"] <= high
    assert result.summary["speedup_controls"] >= 3
    units = pq.read_table(output / "stats/units.parquet")
    assert {"speedup", "speedup_low", "speedup_high"} <= set(units.column_names)
    costs = pq.read_table(output / "stats/costs.parquet").to_pylist()
    assert {row["kind"] for row in costs} == {"draft", "verify"}
    assert all(row["seconds"] > 0 for row in costs)

    folder = open_folder(str(output), S3Config())
    records = read_records(folder, manifest.committed_ids(folder))
    meter = SpeedupMeter()
    for record in records:
        assert record.work.speedup is not None
        meter.add(SpeedupMeter.from_json(record.work.speedup))
    whole = meter.estimate()
    assert whole is not None
    assert (whole.value, whole.controls) == pytest.approx(
        (result.summary["speedup"], result.summary["speedup_controls"])
    )

    listed = json.loads((output / "_specbatch/manifest.json").read_text())["files"]
    traces = {f["name"]: f for f in listed if f["name"].startswith("trace/")}
    assert set(traces) == {record.files.trace.name for record in records}
    for name, file in traces.items():
        assert hashlib.sha256((output / name).read_bytes()).hexdigest() == file["sha256"]
        assert pq.read_metadata(output / name).num_rows == file["rows"]
    for name, row in rows_of(output).items():
        rounds = read_rounds(folder, name)
        assert [each["round"] for each in rounds] == list(range(len(rounds)))
        # The round that feeds the last prompt token is not one of decoding.
        assert len(rounds) in (row["rounds"], row["rounds"] - 1)
        assert sum(len(each["candidates"]) for each in rounds) == row["drafted"]
        assert sum(each["submitted"] for each in rounds) == row["verified"]
    # A trace that another attempt left is no part of the job.
    (output / "trace" / "left-over.parquet").write_bytes(b"")
    (output / "_SUCCESS").unlink()
    (output / "_specbatch/manifest.json").unlink()
    run(values)
    assert {f"trace/{f.name}" for f in (output / "trace").iterdir()} == set(traces)


@pytest.mark.parametrize("policy", [pytest.param("entropy", marks=pytest.mark.slow), "head"])
def test_template_stop_strings_and_sampling_by_row(
    local_ray: None,
    tiny_models: TinyModels,
    tiny_head: str,
    tmp_path: Path,
    write_rows: Callable[..., str],
    policy: str,
) -> None:
    """Under a policy with an acceptance head, and one without: the tokens are the same."""
    greedily = {"temperature": 0.0, "ignore_eos": True, "stop": None}
    rows: list[dict[str, Any]] = [
        {"q": "a", "sampling_params": {"max_new_tokens": 3, "ignore_eos": True}},
        {"q": "a", "sampling_params": greedily},
        {"q": "a", "sampling_params": greedily},
        *({"q": f"b{i}", "sampling_params": None} for i in range(13)),
    ]
    file = write_rows("in.parquet", rows)
    speculation: dict[str, Any] = {"policy": policy, "verification": "coupled", "k_max": 3}
    if policy == "head":
        speculation["head"] = tiny_head
    values = settings(tiny_models, file, tmp_path / "out", speculation=speculation)
    values["input"] = {"paths": [file], "template": "Q: {{ q }}"}
    text = alone(values)["in.parquet:1:0"]
    # A stop string that the greedy output is known to reach ends the text before it.
    stop = text[2:4]
    assert "\ufffd" not in stop  # no stop string may hold half of a character
    rows[1]["sampling_params"] = {**greedily, "stop": [stop]}
    write_rows("in.parquet", rows)
    summary = run(values).summary
    short, cut, greedy, *_ = rows_of(tmp_path / "out").values()
    assert short["output_tokens"] == 3
    assert short["finish_reason"] == "length"
    assert greedy["completion"] == text
    assert cut["completion"] == text.split(stop)[0]
    assert cut["finish_reason"] == "stop"
    assert texts(tmp_path / "out") == alone(values)

    judged = sum(row["judged"] for row in summary["calibration"] if row["by"] == "all")
    assert summary["verified"] > 0
    assert summary["phase_seconds"]["draft"] > 0
    # The candidates up to the first rejection are judged, in policies that predict.
    assert (0 < judged <= summary["verified"]) == (policy == "head")
    with pytest.raises(UserError, match=r"speculation\.trace=true"):
        read_rounds(open_folder(str(tmp_path / "out"), S3Config()), "in.parquet:0:0")


def test_no_rows_at_all(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, write_rows: Callable[..., str]
) -> None:
    file = write_rows("in.jsonl", [])
    result = run(settings(tiny_models, file, tmp_path / "out"))
    assert result.summary["rows"] == 0
    assert (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.slow
def test_a_killed_job_is_resumed(
    finished: Finished, tiny_models: TinyModels, prompts: Path, tmp_path: Path
) -> None:
    _, undisturbed, _, _ = finished
    values = settings(tiny_models, str(prompts), tmp_path / "out")
    values["actors"] = {"num_cpus": 1, "slots": 2, "units_in_flight": 1}
    process = started(values, tmp_path / "job.yaml", "--quiet", stderr=subprocess.DEVNULL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list((tmp_path / "out" / "completions").glob("*.parquet")))
    assert not (tmp_path / "out" / "_SUCCESS").exists()
    result = run(values)
    units = len(list((undisturbed / "completions").iterdir()))
    assert done >= 2
    assert 0 < result.units_run == units - done
    assert texts(tmp_path / "out") == texts(undisturbed)


@pytest.mark.slow  # test_chaos has its job on S3, too
@pytest.mark.s3
def test_the_same_job_on_s3(
    finished: Finished, tiny_models: TinyModels, prompts: Path, s3_env: S3Server, tmp_path: Path
) -> None:
    client = s3_env.client()
    client.create_bucket(Bucket="jobs")
    for file in prompts.glob("*.parquet"):
        client.upload_file(str(file), "jobs", f"in/{file.name}")
    values = settings(tiny_models, "s3://jobs/in/*.parquet", "s3://jobs/out")
    values["s3"] = {"endpoint": s3_env.endpoint}
    assert run(values).summary["rows"] == ROWS
    assert run(values).units_run == 0
    for entry in client.list_objects_v2(Bucket="jobs", Prefix="out/")["Contents"]:
        target = tmp_path / entry["Key"]
        target.parent.mkdir(parents=True, exist_ok=True)
        client.download_file("jobs", entry["Key"], str(target))
    _, local, _, _ = finished
    assert texts(tmp_path / "out") == texts(local)
    assert sorted(f.name for f in (tmp_path / "out" / "completions").iterdir()) == sorted(
        f.name for f in (local / "completions").iterdir()
    )
    written = b"".join(f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert b"test-secret-key" not in written
