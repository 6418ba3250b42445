"""Failed rows that are tried again: what a reader sees at any moment, and what is left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle

from pipeline.commit import manifest
from pipeline.commit.retry import RetrySink, failed_units, named
from pipeline.commit.sink import CommitSink
from pipeline.commit.stats import UnitRecord, parquet_bytes, parts, stats_tables, summarise
from pipeline.config.job import S3Config
from pipeline.errors import JobStopped, RowError
from pipeline.generate.actor import GenerateActor
from pipeline.inputs.blocks import UnitFiles
from pipeline.inputs.units import Unit, unit_id
from pipeline.outputs.verify import verify
from pipeline.run import run as run_module
from pipeline.run.run import Mode
from pipeline.storage.folder import Folder, open_folder
from tests.conftest import S3Server, TinyModels
from tests.faulty_s3 import faulty_s3
from tests.pipeline.small_jobs import rows_of, run, started

# Workers cannot import a test module; they get its classes by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

NAME, ROWS = "a.parquet", 6
UNIT = unit_id(NAME, 0, ROWS)
COMPLETIONS = f"completions/{UNIT}.parquet"
KINDS = pa.dictionary(pa.int8(), pa.string())


def table(rows: list[int], **columns: list[Any]) -> pa.Table:
    kinds = pa.array(["even" if row % 2 == 0 else "odd" for row in rows], pa.string()).cast(KINDS)
    return pa.table(
        {
            "row_id": pa.array([f"{NAME}:{row}:0" for row in rows], pa.string()),
            "id": pa.array(rows, pa.int32()),
            "kind": kinds,
            **columns,
        }
    )


def attempt(
    generation: int, done: list[int], failed: list[int], text: str = "x", trace: bool = True
) -> UnitFiles:
    """What an attempt at some rows of the unit brings to its sink."""
    files = []
    errors = (None, None, None)
    if failed:
        errors = named(
            UNIT,
            table(
                failed,
                error_class=["Unlucky"] * len(failed),
                error_message=["bad day"] * len(failed),
                attempts=pa.array([1] * len(failed), pa.int64()),
            ),
        )
        files.append((f"errors/{errors[0]}", errors[2]))
    rounds = (None, None, None)
    if trace:
        rounds = named(
            UNIT, table([row for row in done for _ in range(2)], round=[0, 1] * len(done))
        )
        files.append((f"trace/{rounds[0]}", rounds[2]))
    counts = {"rounds": 2, "drafted": 4, "verified": 3, "accepted": 1, "committed": 3}
    record = UnitRecord(
        unit=UNIT,
        job="j",
        input=NAME,
        start=0,
        rows=len(done) + len(failed),
        completions=len(done),
        errors={"Unlucky": len(failed)} if failed else {},
        errors_file=errors[0],
        errors_sha256=errors[1],
        prompt_tokens=2 * len(done),
        output_tokens=3 * len(done),
        counts={name: n * len(done) for name, n in counts.items()},
        actor=f"actor-{generation}",
        node="n",
        started=100.0 * generation,
        finished=100.0 * generation + 10,
        engine={"target_forwards": 5},
        phase_seconds={"verify": 4.0},
        peak_live=2,
        trace_file=rounds[0],
        trace_sha256=rounds[1],
        trace_rounds=2 * len(done) if trace else 0,
        generation=generation,
    )
    completed = table(
        done,
        completion=[f"{text}{row}" for row in done],
        prompt_tokens=pa.array([2] * len(done), pa.int64()),
        output_tokens=pa.array([3] * len(done), pa.int64()),
    )
    files.append((COMPLETIONS, parquet_bytes(completed, record)))
    return UnitFiles(UNIT, tuple(files))


def seen(output: Folder) -> tuple[dict[str, str], dict[str, int]]:
    """Completed rows with their texts and failed rows with their attempts, as a reader has them.

    A reader takes what is in completions/, and of errors/ the file that the footer names.
    """
    completed: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for name in output.list("completions"):
        completed += pq.read_table(pa.BufferReader(output.read(f"completions/{name}"))).to_pylist()
        record = manifest.read_record(output, name.removesuffix(".parquet"))
        if record.errors_file:
            data = output.read(f"errors/{record.errors_file}")
            failed += pq.read_table(pa.BufferReader(data)).to_pylist()
    ids = Counter(row["row_id"] for row in (*completed, *failed))
    assert set(ids.values()) <= {1}, "a row is there twice"
    assert sum(ids.values()) in {0, ROWS}, "a row is gone"
    return (
        {row["row_id"]: row["completion"] for row in completed},
        {row["row_id"]: row["attempts"] for row in failed},
    )


def test_failed_rows_join_the_completed_ones(folder: Folder) -> None:
    CommitSink(folder).commit(attempt(0, [0, 2, 3], [1, 4, 5]))
    first = manifest.read_record(folder, UNIT)
    written = RetrySink(folder).commit(attempt(1, [4], [1, 5], text="y"))
    assert set(written) >= {COMPLETIONS}
    completed, failed = seen(folder)
    assert completed == {f"{NAME}:{i}:0": f"{'y' if i == 4 else 'x'}{i}" for i in (0, 2, 3, 4)}
    assert failed == {f"{NAME}:1:0": 2, f"{NAME}:5:0": 2}
    RetrySink(folder).commit(attempt(2, [1, 5], [], text="z"))
    completed, failed = seen(folder)
    assert list(completed) == [f"{NAME}:{i}:0" for i in range(ROWS)]
    assert not failed

    record = manifest.read_record(folder, UNIT)
    assert (record.generation, record.rows, record.completions, record.failed) == (2, ROWS, 6, 0)
    assert record.errors_file is None
    assert folder.list("errors") == {}
    assert set(folder.list("trace")) == {record.trace_file}
    # Who failed before, and how often: one file for each generation that was superseded.
    history = folder.list(manifest.HISTORY)
    assert first.errors_file in history
    rows = [
        (row["row_id"], row["attempts"], row["error_class"])
        for name, _, _ in manifest.superseded(record)
        for row in pq.read_table(pa.BufferReader(folder.read(name))).to_pylist()
    ]
    assert len(history) == 2
    assert rows == [
        *((f"{NAME}:{i}:0", 1, "Unlucky") for i in (1, 4, 5)),
        *((f"{NAME}:{i}:0", 2, "Unlucky") for i in (1, 5)),
    ]
    kept = pq.read_table(pa.BufferReader(folder.read(COMPLETIONS)))
    assert kept.schema.field("kind").type == KINDS
    assert kept.schema.field("id").type == pa.int32()
    rounds = pq.read_table(pa.BufferReader(folder.read(f"trace/{record.trace_file}")))
    assert rounds["round"].to_pylist() == [0, 1] * ROWS
    assert rounds["id"].to_pylist() == sorted(rounds["id"].to_pylist())


class Killed(BaseException):
    """What a writer sees when its process ends."""


class Mortal:
    """What makes the writer of a folder die before one of its steps."""

    steps = 0
    die_at = -1

    def _step(self) -> None:
        Mortal.steps += 1
        if Mortal.steps == Mortal.die_at:
            raise Killed

    def put_if_absent(self, name: str, data: bytes) -> bool:
        self._step()
        return super().put_if_absent(name, data)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        self._step()
        return super().replace(name, data, version)

    def delete(self, name: str) -> None:
        self._step()
        super().delete(name)


def test_killed_at_any_step_a_retry_loses_nothing(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    CommitSink(folder).commit(attempt(0, [0, 2, 3], [1, 4, 5]))
    before = seen(folder)
    deaths = 0
    mortal = type("MortalFolder", (Mortal, type(folder)), {})(folder.url, folder.s3)
    for step in range(1, 20):
        monkeypatch.setattr(Mortal, "steps", 0)
        monkeypatch.setattr(Mortal, "die_at", step)
        tried = attempt(1, [4], [1, 5], text="y")
        try:
            RetrySink(mortal).commit(tried)
        except Killed:
            deaths += 1
            generation = manifest.read_record(folder, UNIT).generation
            completed, failed = seen(folder)
            if generation == 0:
                assert (completed, failed) == before
            else:
                assert set(before[0].items()) < set(completed.items())
                assert failed == {f"{NAME}:1:0": 2, f"{NAME}:5:0": 2}
        else:
            break
    assert deaths >= 5  # errors, history, trace, commit, and what is removed after it
    completed, failed = seen(folder)
    assert (len(completed), len(failed)) == (4, 2)


def test_stragglers_and_second_drivers_change_nothing(folder: Folder) -> None:
    CommitSink(folder).commit(attempt(0, [0, 2, 3], [1, 4, 5]))
    sink = RetrySink(folder)
    late = attempt(1, [1, 4, 5], [], text="late")
    assert sink.commit(attempt(1, [4], [1, 5], text="y"))
    assert sink.commit(late) == {}
    assert sink.commit(attempt(2, [1], [5], text="z"))
    after = seen(folder)
    assert sink.commit(late) == {}
    # One of the first generation, that neither saw.
    CommitSink(folder).commit(attempt(0, [0, 1, 2, 3], [4, 5], text="old"))
    assert seen(folder) == after
    assert sink.commit(UnitFiles(UNIT, ())) == {}


def test_of_many_retries_at_once_one_wins(folder: Folder) -> None:
    CommitSink(folder).commit(attempt(0, [0, 2, 3], [1, 4, 5]))
    wins: list[str] = []

    def commit(number: int) -> None:
        if COMPLETIONS in RetrySink(folder).commit(attempt(1, [1, 4, 5], [], text=f"{number}-")):
            wins.append(f"{number}-")

    threads = [threading.Thread(target=commit, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    completed, failed = seen(folder)
    assert len(wins) == 1
    assert {completed[f"{NAME}:{i}:0"] for i in (1, 4, 5)} == {f"{wins[0]}{i}" for i in (1, 4, 5)}
    assert not failed
    assert manifest.read_record(folder, UNIT).generation == 1


@pytest.mark.s3
def test_through_answers_that_are_lost(s3_env: S3Server) -> None:
    """A PUT whose answer was lost is repeated, and finds that it has replaced the file itself."""
    s3_env.client().create_bucket(Bucket="lost")
    faults = ("lost", "reset", "error", "truncated")
    with faulty_s3(s3_env.endpoint, probability=0.3, seed=2, faults=faults) as proxy:
        folder = open_folder("s3://lost/out", S3Config(endpoint=proxy.endpoint))
        CommitSink(folder).commit(attempt(0, [0, 2, 3], [1, 4, 5]))
        assert COMPLETIONS in RetrySink(folder).commit(attempt(1, [4], [1, 5], text="y"))
        assert COMPLETIONS in RetrySink(folder).commit(attempt(2, [1, 5], [], text="z"))
        assert proxy.injected["lost"] >= 2
    completed, failed = seen(open_folder("s3://lost/out", S3Config(endpoint=s3_env.endpoint)))
    assert list(completed) == [f"{NAME}:{i}:0" for i in range(ROWS)]
    assert not failed


def test_only_failed_rows_are_wanted_even_if_their_file_is_lost(folder: Folder) -> None:
    CommitSink(folder).commit(attempt(0, [0, 2, 3], [1, 4, 5]))
    unit = Unit(UNIT, "/x", NAME, "parquet", 0, ROWS, 0, 1)
    (wanted,) = failed_units(folder, [unit])
    assert (wanted.only, wanted.generation) == ((1, 4, 5), 1)
    assert Unit.from_json(wanted.to_json()) == wanted
    folder.delete(f"errors/{manifest.read_record(folder, UNIT).errors_file}")
    assert failed_units(folder, [unit]) == [wanted]
    RetrySink(folder).commit(attempt(1, [1, 4, 5], []))
    assert failed_units(folder, [unit]) == []
    assert len(seen(folder)[0]) == ROWS
    assert manifest.superseded(manifest.read_record(folder, UNIT)) == []


def test_the_parts_of_a_record_sum_to_the_whole(tmp_path: Path) -> None:
    output = open_folder(str(tmp_path), S3Config())
    CommitSink(output).commit(attempt(0, [0, 2, 3], [1, 4, 5]))
    RetrySink(output).commit(attempt(1, [4], [1, 5]))
    RetrySink(output).commit(attempt(2, [1], [5]))
    whole = manifest.read_record(output, UNIT)
    first, second, third = parts(whole)
    assert [p.rows for p in (first, second, third)] == [3, 1, 2]
    assert [p.completions for p in (first, second, third)] == [3, 1, 1]
    assert [p.failed for p in (first, second, third)] == [0, 0, 1]
    assert [p.counts["rounds"] for p in (first, second, third)] == [6, 2, 2]
    summary = summarise([whole])
    assert (summary["rows"], summary["errors"], summary["units"]) == (5, 1, 1)
    assert summary["output_tokens"] == 15
    # Every second that an actor spent is in it, and no pause between runs.
    assert summary["phase_seconds"] == {"verify": 12.0}
    assert summary["seconds"] == 30.0
    assert summary["target_forwards"] == 15
    tables = stats_tables([whole])
    assert tables["actors"]["actor"].to_pylist() == ["actor-0", "actor-1", "actor-2"]
    assert sum(tables["actors"]["rows"].to_pylist()) == 5
    assert tables["units"]["generation"].to_pylist() == [0, 1, 2]
    assert sum(tables["units"]["rows"].to_pylist()) == ROWS
    assert UnitRecord.from_json(whole.to_json()) == whole
    assert asdict(parts(first)[0]) == asdict(first)


# -------------------------------------------------------------------- whole jobs


class UnluckyActor(GenerateActor):
    """Some rows fail today."""

    unlucky: tuple[str, ...] = ("p.jsonl:1:0", "p.jsonl:2:0", "p.jsonl:9:0")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        prompt_ids = self._renderer.prompt_ids

        def prompt_ids_or_not(row: Any) -> Any:
            if f"p.jsonl:{row['id']}:0" in self.unlucky:
                raise RowError("Unlucky", "a bad day")
            return prompt_ids(row)

        self._renderer.prompt_ids = prompt_ids_or_not  # type: ignore[method-assign]
        self._columns = [*self._columns, "id"]


class LessUnluckyActor(UnluckyActor):
    unlucky = ("p.jsonl:9:0",)


def settings(models: TinyModels, inputs: str, output: Path | str, **more: Any) -> dict[str, Any]:
    return {
        "input": {"paths": [inputs], "prompt_column": "prompt"},
        "output": str(output),
        "models": {"target": models.target, "draft": models.draft},
        "sampling": {"max_new_tokens": 12, "temperature": 1.0, "seed": 3},
        "speculation": {
            "policy": "fixed",
            "k": 2,
            "verification": "coupled",
            "control_share": 0,
            "trace": True,
        },
        "actors": {"num_cpus": 2, "slots": 4},
        "unit_rows": 4,
        **more,
    }


def prompts(path: Path, rows: int = 12) -> list[dict[str, Any]]:
    values = [
        {"id": i, "prompt": f"count to {i}", "tag": None if i % 3 else "x"} for i in range(rows)
    ]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return values


def texts(output: Path) -> dict[str, str]:
    return {name: row["completion"] for name, row in rows_of(output).items()}


class Reader(threading.Thread):
    """Reads completions/ again and again, as someone who does not wait for the end would."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self._output, self._over = output, threading.Event()
        self._last = texts(output)
        self.reads, self.wrong = 0, ""

    def run(self) -> None:
        while not self._over.is_set() and not self.wrong:
            try:
                now = texts(self._output)
                if not self._last.items() <= now.items():
                    self.wrong = f"rows are gone: {self._last.keys() - now.keys()}"
                self._last = now
                self.reads += 1
            except Exception as error:
                self.wrong = f"{type(error).__name__}: {error}"
            time.sleep(0.02)

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


@pytest.mark.ray
def test_only_failed_rows_are_tried_again(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(tmp_path / "p.jsonl")
    output = tmp_path / "out"
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), output)
    monkeypatch.setattr(run_module, "GenerateActor", UnluckyActor)
    assert run(values).summary["errors_by_class"] == {"Unlucky": 3}
    first = texts(output)
    untouched = output / "completions" / f"{unit_id('p.jsonl', 4, 4)}.parquet"
    written = untouched.stat().st_mtime_ns

    monkeypatch.setattr(run_module, "GenerateActor", LessUnluckyActor)
    with Reader(output) as reader:
        second = run(values, mode=Mode(only_failed=True))
    assert not reader.wrong, reader.wrong
    assert reader.reads > 5
    assert second.units_run == 2
    assert (second.summary["rows"], second.summary["errors"]) == (11, 1)
    (left,) = rows_of(output, "errors").values()
    assert (left["id"], left["attempts"], left["error_message"]) == (9, 2, "a bad day")
    assert verify(str(output), S3Config()).problems == []

    monkeypatch.setattr(run_module, "GenerateActor", GenerateActor)
    with Reader(output) as reader:
        third = run(values, mode=Mode(only_failed=True))
    assert not reader.wrong, reader.wrong
    assert third.units_run == 1
    assert untouched.stat().st_mtime_ns == written
    assert not list((output / "errors").iterdir())
    history = [pq.read_table(file) for file in (output / "_specbatch/history").iterdir()]
    before = [(row["id"], row["attempts"]) for table in history for row in table.to_pylist()]
    assert sorted(before) == [(1, 1), (2, 1), (9, 1), (9, 2)]
    assert first.items() <= texts(output).items()
    listed = json.loads((output / "_specbatch/manifest.json").read_text())
    assert (listed["rows_in"], listed["rows_out"], listed["rows_in_errors"]) == (12, 12, 0)
    assert len(listed["history"]) == 3
    assert verify(str(output), S3Config()).problems == []
    # All the same as if no row had failed.
    undisturbed = settings(tiny_models, str(tmp_path / "p.jsonl"), tmp_path / "undisturbed")
    run(undisturbed)
    assert rows_of(output).keys() == rows_of(tmp_path / "undisturbed").keys()
    assert texts(output) == texts(tmp_path / "undisturbed")

    again = run(values, mode=Mode(only_failed=True))
    assert again.units_run == 0
    assert again.summary == third.summary


@pytest.mark.slow
@pytest.mark.ray
def test_missing_units_are_left_to_another_run(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(tmp_path / "p.jsonl")
    output = tmp_path / "out"
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), output)
    monkeypatch.setattr(run_module, "GenerateActor", UnluckyActor)
    run(values)
    gone = output / "completions" / f"{unit_id('p.jsonl', 4, 4)}.parquet"
    gone.unlink()
    monkeypatch.setattr(run_module, "GenerateActor", GenerateActor)
    result = run(values, mode=Mode(only_failed=True))
    assert (result.units_run, result.missing) == (2, 1)
    assert (result.summary["rows"], result.summary["errors"]) == (8, 0)
    assert not gone.exists()
    assert not (output / "_SUCCESS").exists()
    assert run(values).units_run == 1
    assert len(rows_of(output)) == 12
    assert verify(str(output), S3Config()).problems == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_retry_that_is_killed_leaves_every_row_where_it_was_or_is(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Rows that fail for ever, in many units; SIGKILL once the retry has replaced some of them."""
    rows = [{"id": i, "prompt": None if i % 4 == 0 else f"count to {i}"} for i in range(120)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out"
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), output)
    values["sampling"]["max_new_tokens"] = 2
    run(values)
    before = texts(output)
    files = len(list((output / "completions").iterdir()))
    process = started(
        values, tmp_path / "job.yaml", "--only-failed", "--quiet", stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if len(list((output / "_specbatch").glob("history/*"))) >= 2:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "_SUCCESS").exists()
    assert texts(output) == before
    folder = open_folder(str(output), S3Config())
    records = manifest.read_records(folder, manifest.committed_ids(folder))
    assert len(records) == files
    retried = [record for record in records if record.generation]
    assert retried
    for record in records:
        data = folder.read(f"errors/{record.errors_file}")
        failed = pq.read_table(pa.BufferReader(data)).to_pylist()
        assert {row["attempts"] for row in failed} == {record.generation + 1}
    # Any later run puts it in order.
    assert run(values).units_run == 0
    assert texts(output) == before
    assert len(rows_of(output, "errors")) == 30
    assert verify(str(output), S3Config()).problems == []


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
def test_failed_rows_are_tried_again_on_s3(
    local_ray: None,
    tiny_models: TinyModels,
    s3_env: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_env.client().create_bucket(Bucket="retries")
    prompts(tmp_path / "p.jsonl")
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), "s3://retries/out")
    values["s3"] = {"endpoint": s3_env.endpoint}
    monkeypatch.setattr(run_module, "GenerateActor", UnluckyActor)
    assert run(values).summary["errors"] == 3
    monkeypatch.setattr(run_module, "GenerateActor", GenerateActor)
    result = run(values, mode=Mode(only_failed=True))
    assert (result.units_run, result.summary["rows"], result.summary["errors"]) == (2, 12, 0)
    found = verify("s3://retries/out", S3Config(endpoint=s3_env.endpoint))
    assert found.problems == []
    assert (found.rows_in, found.rows_out, found.units) == (12, 12, 3)


@pytest.mark.slow
@pytest.mark.ray
def test_a_retry_that_is_asked_to_stop_keeps_what_it_has(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts(tmp_path / "p.jsonl")
    values = settings(tiny_models, str(tmp_path / "p.jsonl"), tmp_path / "out")
    monkeypatch.setattr(run_module, "GenerateActor", UnluckyActor)
    run(values)
    before = texts(tmp_path / "out")
    stop = threading.Event()
    stop.set()
    with pytest.raises(JobStopped):
        run(values, mode=Mode(only_failed=True), stop=stop)
    assert before.items() <= texts(tmp_path / "out").items()
    assert run(values).summary["rows"] >= 9
