"""Files that no job may begin with, and files that change or go while it is at work."""

from __future__ import annotations

import datetime
import gzip
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import UserError
from pipeline.inputs.source import read_units
from pipeline.run.plan import JobPlan, plan_job
from tests.conftest import TinyModels
from tests.pipeline.inputs.odd_rows import INT, jsonl, table
from tests.pipeline.small_jobs import run

TABLE = table(["x"])


def parquet(rows: pa.Table = TABLE) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    return bytes(sink.getvalue())


def arrow(rows: pa.Table = TABLE) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, rows.schema) as writer:
        writer.write_table(rows)
    return bytes(sink.getvalue())


TWICE = pa.table([pa.array(["x"]), INT, INT], names=["prompt", "a", "a"])
LINE = jsonl({"prompt": "x"})

REFUSED = {
    "empty.parquet": (b"", "not a readable Parquet file"),
    "text.parquet": (b"prompt\nhello\n" * 9, "not a readable Parquet file"),
    "cut-off.parquet": (parquet()[:-20], "not a readable Parquet file"),
    "beginning-lost.parquet": (parquet()[200:], "not a readable Parquet file"),
    "broken-footer.parquet": (
        parquet()[:-60] + b"\xff" * 52 + parquet()[-8:],
        "not a readable Parquet file",
    ),
    "lines.parquet": (LINE, "not a readable Parquet file"),
    "gzip.jsonl": (gzip.compress(LINE), "is compressed with gzip, though its name says JSON li"),
    "zstd.jsonl": (pa.compress(LINE, "zstd", asbytes=True), "is compressed with zstd"),
    "parquet.jsonl": (parquet(), "is a Parquet file, though its name says JSON lines"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), "is text in UTF-16, not UTF-8"),
    "utf16-without-mark.jsonl": (LINE.decode().encode("utf-16-be"), "begins with zero bytes, as t"),
    "utf32-without-mark.csv": ("prompt\nx".encode("utf-32-le"), "begins with zero bytes, as text"),
    "latin1.csv": (
        "prompt,größe\nx,1".encode("latin-1"),
        "no header of CSV: the line is not UTF-8",
    ),
    "old-mac.csv": (b"prompt,b\rx,1\r", "is no header of CSV: the line cannot be read"),
    "array.jsonl": (b'[{"prompt": "x"},\n{"prompt": "y"}]\n', "is one JSON array; files of this"),
    "pretty.jsonl": (b'{\n  "prompt": "x"\n}\n', "has no JSON object on a line of its own"),
    "named.jsonl.gz": (gzip.compress(LINE), "compressed files cannot be cut into units"),
    "named.parquet.zst": (b"", "compressed files cannot be cut into units"),
    "table.xlsx": (b"prompt\nx", "not one of .parquet, .jsonl, .ndjson, .json, .csv, .tsv, .arrow"),
    "named.csv.gz": (gzip.compress(b"prompt\nx"), "compressed files cannot be cut into units"),
    "gzip.csv": (gzip.compress(b"prompt\nx"), "is compressed with gzip, though its name says CSV"),
    "no-such-column.csv": (b"a;prompt\n1;x\n", "no column 'prompt'; its columns: a;prompt"),
    "columns-twice.tsv": (b"prompt\ta\ta\nx\t1\t2\n", "two columns are named 'a'; rename one"),
    "reserved.csv": (b"prompt,attempts\nx,1\n", "column 'attempts' has the name of an output"),
    "open-quote.csv": (b'prompt\nx\n"y\nz\n', "line 3: a field begins with a quote that nothing"),
    "lines.arrow": (LINE * 9, "not a readable Arrow file"),
    "cut-off.feather": (arrow()[:-20], "not a readable Arrow file"),
    "no-such-column.arrow": (arrow(pa.table({"q": ["x"]})), "no column 'prompt'; its columns: q"),
    "reserved.parquet": (parquet(table(["x"], completion=INT)), "column 'completion' has the name"),
    "reserved.jsonl": (jsonl({"prompt": "x", "row_id": 1}), "column 'row_id' has the name of an"),
    "columns-twice.parquet": (parquet(TWICE), "two columns are named 'a'; rename one"),
    "no-such-column.parquet": (parquet(pa.table({"q": ["x"]})), "no column 'prompt'; its columns"),
    "no-such-key.jsonl": (jsonl({"q": "x"}), "no column 'prompt'; its columns: q"),
    "no-object-at-all.jsonl": (b"hello\n", "has no JSON object on a line of its own"),
    "capital.parquet": (parquet(table(["x"], Completion=INT)), "column 'Completion' has the name"),
}


def planned(path: Path | str | list[Path], output: Path) -> JobPlan:
    paths = path if isinstance(path, list) else [path]
    values = {
        "input": {"paths": [*map(str, paths)], "prompt_column": "prompt"},
        "output": str(output),
        "models": {"target": "any"},
        "sampling": {"defaults": "none"},
        "speculation": {"policy": "none"},
    }
    return plan_job(JobConfig.model_validate(values))


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jsonl").write_bytes(LINE)
    file = tmp_path / "in" / name
    file.write_bytes(content)
    # By name, by glob, and (what is of another kind is left out there) in a folder.
    for path in (
        file,
        tmp_path / "in" / "*",
        *([tmp_path / "in"] if file.suffix != ".xlsx" else []),
    ):
        with pytest.raises(UserError) as caught:
            planned(path, tmp_path / "out")
        assert message in str(caught.value)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'[{"prompt": "x"},\n{"prompt": "y"}]\n',
            "is one JSON array; files of this name are read a",
        ),
        (b'{\n  "prompt": "x"\n}\n', "has no JSON object on a line of its own"),
    ],
)
def test_a_json_file_is_one_of_lines(tmp_path: Path, content: bytes, message: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    file = folder / "a.json"
    file.write_bytes(b"\xef\xbb\xbf\n" + LINE + b"[1]\n")
    assert planned(file, tmp_path / "out").rows == 2
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{re.escape(str(file))}: {message}"):
        planned(file, tmp_path / "out")
    # A folder is not searched for them, since so much else is called .json.
    (folder / "b.jsonl").write_bytes(LINE)
    assert planned(folder, tmp_path / "out").rows == 1


def test_files_of_odd_names_are_found(tmp_path: Path) -> None:
    names = ["_hidden.jsonl", "[a].jsonl", "per%20cent.jsonl", "new\nline.jsonl", "-x.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(LINE)
        assert planned(tmp_path / name, tmp_path / "out").rows == 1
    assert planned(f"{tmp_path}/nothing/../*.jsonl", tmp_path / "out").rows == len(names) - 1


def test_links_lead_to_each_file_once_and_to_none_that_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "day").mkdir(parents=True)
    (folder / "day" / "a.jsonl").write_bytes(LINE)
    (folder / "a-latest.jsonl").symlink_to(folder / "day" / "a.jsonl")
    (folder / "a-latest").symlink_to(folder / "day")
    (folder / "around").symlink_to(folder)
    (folder / "day" / "round").symlink_to(folder / "around")
    for path in (folder, folder / "**" / "*.jsonl"):
        assert [plan.file.name for plan in planned(path, tmp_path / "out").files] == ["day/a.jsonl"]
    for path in (folder / "*" / "*.jsonl", folder / "a-latest" / "*.jsonl"):  # level by level
        assert planned(path, tmp_path / "out").rows == 1
    assert planned([folder / "a-latest", folder / "day"], tmp_path / "out").rows == 1
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    for path in (folder, folder / "*.jsonl"):
        with pytest.raises(UserError, match=r"gone\.jsonl: .* is a link that leads nowhere"):
            planned(path, tmp_path / "out")


FOLDERS = {
    "jobs/out/_specbatch/job.json": "jobs/out: is the whole output of a job: name its completions/",
    "jobs/out/_delta_log/0.json": "jobs/out: is a Delta, Hudi or Iceberg table",
    "jobs/out/.hoodie/x": "jobs/out: is a Delta, Hudi or Iceberg table",
    "jobs/metadata/v1.metadata.json": "is a Delta, Hudi or Iceberg table",
    "jobs/_old/_specbatch/job.json": "",
}


@pytest.mark.parametrize("sign", FOLDERS)
def test_a_folder_of_more_than_rows_is_refused(tmp_path: Path, sign: str) -> None:
    (tmp_path / sign).parent.mkdir(parents=True)
    (tmp_path / sign).touch()
    rows = tmp_path / "jobs" / "out" / "completions"
    rows.mkdir(parents=True)
    (rows / "a.parquet").write_bytes(parquet())
    assert planned(rows, tmp_path / "new").rows == 1
    if FOLDERS[sign]:
        with pytest.raises(UserError, match=FOLDERS[sign]):
            planned(tmp_path / "jobs", tmp_path / "new")
    else:
        assert planned(tmp_path / "jobs", tmp_path / "new").rows == 1


def test_a_glob_does_not_leave_folders_of_spark_out(tmp_path: Path) -> None:
    (tmp_path / "in" / "spark.parquet").mkdir(parents=True)
    for name in ("a.parquet", "spark.parquet/part-0.parquet"):
        (tmp_path / "in" / name).write_bytes(parquet())
    with pytest.raises(UserError, match=r"matches the folder .*/spark\.parquet, and a glob names"):
        planned(tmp_path / "in" / "*.parquet", tmp_path / "out")
    assert planned(tmp_path / "in" / "*.parquet" / "*", tmp_path / "out").rows == 1
    assert planned(tmp_path / "in", tmp_path / "out").rows == 2


def test_times_in_96_bits_are_of_any_year(tmp_path: Path) -> None:
    """Spark writes them so, and a last day of 9999 is common. Arrow would make 1816 of it."""
    days = [datetime.datetime(9999, 12, 31), datetime.datetime(1, 1, 1), None]
    file = tmp_path / "a.parquet"
    rows = table(["x"] * 3, day=pa.array(days, pa.timestamp("us")))
    pq.write_table(rows, file, use_deprecated_int96_timestamps=True)
    plan = planned(file, tmp_path / "out")
    (unit,) = read_units(plan.units, plan.table, S3Config())
    assert unit.table["day"].to_pylist() == days


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root to become somebody else")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp())  # tmp_path is in a folder of root's
    try:
        folder.chmod(0o755)
        (folder / "a.jsonl").write_bytes(LINE)
        (folder / "a.jsonl").chmod(0o600)
        (folder / "closed").mkdir(mode=0o700)
        (folder / "closed" / "b.jsonl").write_bytes(LINE)
        os.seteuid(65534)
        for path in ("a.jsonl", "closed", "closed/b.jsonl", "closed/*.jsonl"):
            with pytest.raises(UserError) as caught:
                planned(folder / path, folder / "out")
            assert str(folder) in str(caught.value), path
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


CHANGES: dict[str, Callable[[Path], object]] = {
    "is gone": lambda file: file.unlink(),
    "has changed since the job was planned": lambda file: change(file, 5),
    "not a readable Parquet file": lambda file: damage(file),
}


def change(file: Path, rows: int) -> None:
    if file.suffix == ".parquet":
        pq.write_table(table(["y"] * rows), file)
    else:
        file.write_bytes(b"\n" * file.stat().st_size)


def damage(file: Path) -> None:
    """Bad bytes that neither size nor date betrays."""
    data, stat = file.read_bytes(), file.stat()
    file.write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("message", CHANGES)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_files_that_change_after_the_plan(tmp_path: Path, suffix: str, message: str) -> None:
    file = tmp_path / f"a.{suffix}"
    prompts = [f"row {i}" for i in range(100)]
    if suffix == "parquet":
        pq.write_table(table(prompts), file)
    elif "Parquet" in message:
        pytest.skip("any bytes are lines")
    else:
        file.write_bytes(jsonl(*({"prompt": prompt} for prompt in prompts)))
    plan = planned(file, tmp_path / "out")
    CHANGES[message](file)
    with pytest.raises(UserError) as caught:
        list(read_units(plan.units, plan.table, S3Config()))
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_whose_input_vanishes(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "b.jsonl").write_bytes(LINE)
    monkeypatch.setattr(
        "pipeline.run.ray_session.check_resources", lambda *_: (tmp_path / "b.jsonl").unlink()
    )
    values = {
        "input": {"paths": [f"{tmp_path}/*.jsonl"], "prompt_column": "prompt"},
        "output": str(tmp_path / "out"),
        "models": {"target": tiny_models.target},
        "sampling": {"max_new_tokens": 4},
        "speculation": {"policy": "none"},
        "actors": {"num_cpus": 2},
    }
    with pytest.raises(UserError, match=r"b\.jsonl: .*is gone.*; restore it"):
        run(values)
    # The same command resumes, once the file is there again.
    (tmp_path / "b.jsonl").write_bytes(LINE)
    monkeypatch.undo()
    assert run(values).summary["rows"] == 2
