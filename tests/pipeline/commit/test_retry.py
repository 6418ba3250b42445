"""Failed rows that are tried again: what a reader sees at any moment, and what is left."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import layout
from pipeline.commit.files import attached_file, parquet_bytes
from pipeline.commit.footer import from_footer, read_record, to_footer
from pipeline.commit.record import parts
from pipeline.commit.retry import RetrySink, failed_units
from pipeline.commit.sink import CommitSink
from pipeline.commit.stats import stats_tables, summarise
from pipeline.config.job import S3Config
from pipeline.inputs.blocks import UnitFiles
from pipeline.inputs.units import Piece, Unit, unit_id
from pipeline.storage.folder import Folder, open_folder
from tests.conftest import S3Server
from tests.faulty_s3 import faulty_s3
from tests.pipeline.commit.records import record

NAME, ROWS = "a.parquet", 6
PIECE = Piece(NAME, 0, ROWS, "/x", "parquet", 0, 1)
UNIT = unit_id(PIECE)
COMPLETIONS = layout.completions(UNIT)
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
    files, names = [], {}
    attached = {}
    if failed:
        attached[layout.ERRORS] = table(
            failed,
            error_class=["Unlucky"] * len(failed),
            error_message=["bad day"] * len(failed),
            attempts=pa.array([1] * len(failed), pa.int64()),
        )
    if trace:
        rounds = [row for row in done for _ in range(2)]
        attached[layout.TRACE] = table(rounds, round=[0, 1] * len(done))
    for kind, rows in attached.items():
        file, content = attached_file(kind, UNIT, rows)
        files.append((file.name, content))
        names |= {f"{kind}_file": Path(file.name).name, f"{kind}_sha256": file.sha256}
    counts = {"rounds": 2, "drafted": 4, "verified": 3, "accepted": 1, "committed": 3}
    committed = record(
        UNIT,
        f"actor-{generation}",
        input=NAME,
        rows=len(done) + len(failed),
        completions=len(done),
        errors={"Unlucky": len(failed)} if failed else {},
        prompt_tokens=2 * len(done),
        output_tokens=3 * len(done),
        counts={name: n * len(done) for name, n in counts.items()},
        started=100.0 * generation,
        finished=100.0 * generation + 10,
        engine={"target_forwards": 5},
        phase_seconds={"verify": 4.0},
        trace_rounds=2 * len(done) if trace else 0,
        generation=generation,
        **{"errors_file": None, "errors_sha256": None, **names},
    )
    completed = table(
        done,
        completion=[f"{text}{row}" for row in done],
        prompt_tokens=pa.array([2] * len(done), pa.int64()),
        output_tokens=pa.array([3] * len(done), pa.int64()),
    )
    files.append((COMPLETIONS, parquet_bytes(completed, to_footer(committed))))
    return UnitFiles(UNIT, tuple(files))


def seen(output: Folder) -> tuple[dict[str, str], dict[str, int]]:
    """Completed rows with their texts and failed rows with their attempts, as a reader has them.

    A reader takes what is in completions/, and of errors/ the file that the footer names.
    """
    completed: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for name in output.list("completions"):
        completed += pq.read_table(pa.BufferReader(output.read(f"completions/{name}"))).to_pylist()
        errors = read_record(output, name.removesuffix(".parquet")).files.errors
        if errors:
            data = output.read(errors.name)
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
    first = read_record(folder, UNIT)
    written = RetrySink(folder).commit(attempt(1, [4], [1, 5], text="y"))
    assert set(written) >= {COMPLETIONS}
    completed, failed = seen(folder)
    assert completed == {f"{NAME}:{i}:0": f"{'y' if i == 4 else 'x'}{i}" for i in (0, 2, 3, 4)}
    assert failed == {f"{NAME}:1:0": 2, f"{NAME}:5:0": 2}
    RetrySink(folder).commit(attempt(2, [1, 5], [], text="z"))
    completed, failed = seen(folder)
    assert list(completed) == [f"{NAME}:{i}:0" for i in range(ROWS)]
    assert not failed

    last = read_record(folder, UNIT)
    assert (last.retries.generation, last.rows) == (2, ROWS)
    assert (last.results.completions, last.results.failed) == (6, 0)
    assert last.files.errors is None
    assert folder.list("errors") == {}
    assert {f"trace/{name}" for name in folder.list("trace")} == {last.files.trace.name}
    # Who failed before, and how often: one file for each generation that was superseded.
    history = folder.list(layout.HISTORY)
    assert Path(first.files.errors.name).name in history
    rows = [
        (row["row_id"], row["attempts"], row["error_class"])
        for file in last.superseded_files
        for row in pq.read_table(pa.BufferReader(folder.read(file.name))).to_pylist()
    ]
    assert len(history) == 2
    assert rows == [
        *((f"{NAME}:{i}:0", 1, "Unlucky") for i in (1, 4, 5)),
        *((f"{NAME}:{i}:0", 2, "Unlucky") for i in (1, 5)),
    ]
    kept = pq.read_table(pa.BufferReader(folder.read(COMPLETIONS)))
    assert kept.schema.field("kind").type == KINDS
    assert kept.schema.field("id").type == pa.int32()
    rounds = pq.read_table(pa.BufferReader(folder.read(last.files.trace.name)))
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
            generation = read_record(folder, UNIT).retries.generation
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
    assert read_record(folder, UNIT).retries.generation == 1


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
    unit = Unit.of(PIECE)
    (wanted,) = failed_units(folder, [unit])
    assert (wanted.only, wanted.generation) == ((1, 4, 5), 1)
    assert Unit.from_json(wanted.to_json()) == wanted
    folder.delete(read_record(folder, UNIT).files.errors.name)
    assert failed_units(folder, [unit]) == [wanted]
    RetrySink(folder).commit(attempt(1, [1, 4, 5], []))
    assert failed_units(folder, [unit]) == []
    assert len(seen(folder)[0]) == ROWS
    assert read_record(folder, UNIT).superseded_files == []


def test_a_unit_without_errors_or_trace_touches_no_file_called_none(folder: Folder) -> None:
    others = {"errors/None": b"mine", "trace/None": b"mine, too"}
    for name, content in others.items():
        folder.put(name, content)
    CommitSink(folder).commit(attempt(0, [0, 2, 3], [1, 4, 5], trace=False))
    assert RetrySink(folder).commit(attempt(1, [1, 4, 5], [], trace=False))
    # Now the unit has neither. An attempt at no row finds nothing to keep, and nothing to remove.
    assert RetrySink(folder).commit(attempt(2, [], [], trace=False))
    last = read_record(folder, UNIT)
    assert (last.retries.generation, last.files.there) == (2, [])
    assert {name: folder.read(name) for name in others} == others
    assert len(folder.list(layout.HISTORY)) == 1


def test_the_parts_of_a_record_sum_to_the_whole(tmp_path: Path) -> None:
    output = open_folder(str(tmp_path), S3Config())
    CommitSink(output).commit(attempt(0, [0, 2, 3], [1, 4, 5]))
    RetrySink(output).commit(attempt(1, [4], [1, 5]))
    RetrySink(output).commit(attempt(2, [1], [5]))
    whole = read_record(output, UNIT)
    first, second, third = parts(whole)
    assert [p.rows for p in (first, second, third)] == [3, 1, 2]
    assert [p.results.completions for p in (first, second, third)] == [3, 1, 1]
    assert [p.results.failed for p in (first, second, third)] == [0, 0, 1]
    assert [p.results.counts.rounds for p in (first, second, third)] == [6, 2, 2]
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
    assert from_footer(to_footer(whole)) == whole
    assert asdict(parts(first)[0]) == asdict(first)
