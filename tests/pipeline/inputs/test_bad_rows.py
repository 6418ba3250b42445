"""Jobs over the odd rows: each is there once, with its original columns."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.reports.findings import gather
from pipeline.commit.footer import from_footer
from pipeline.config.job import InputConfig, JobConfig, S3Config, SamplingConfig
from pipeline.errors import RowError
from pipeline.inputs.columns import conformed
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.requests import RowRequests
from pipeline.inputs.row_ids import parse_row_id
from pipeline.inputs.sample import choose_rows
from pipeline.inputs.source import read_units
from pipeline.inputs.units import Unit, plan_files
from pipeline.run.plan import plan_job
from tests.conftest import CONTEXT, TinyModels
from tests.pipeline.inputs.odd_rows import (
    CHAT,
    CHAT_ALONE,
    OK,
    PLAIN,
    PLAIN_ALONE,
    TEMPLATE,
    TEMPLATED,
    TEMPLATED_ALONE,
)
from tests.pipeline.readers import READERS
from tests.pipeline.small_jobs import run, settings


def write(folder: Path, files: dict[str, tuple[bytes | pa.Table, list[str]]]) -> Path:
    for name, (content, _) in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            pq.write_table(content, folder / name)
    return folder


@pytest.fixture(scope="module")
def strict_target(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny target with a chat template that refuses roles, as many models' do."""
    folder = tmp_path_factory.mktemp("models") / "strict"
    shutil.copytree(tiny_models.target, folder)
    template = folder / "chat_template.jinja"
    roles = "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    roles += "{{ raise_exception('no role ' ~ m['role']) }}{% endif %}{% endfor %}"
    template.write_text(roles + template.read_text())
    return str(folder)


def classes(output: Path, kind: str) -> dict[str, str]:
    """Error classes (or OK) of rows by row id."""
    found: dict[str, str] = {}
    for file in (output / kind).glob("*.parquet"):
        rows = pq.read_table(file)
        names = rows["row_id"].to_pylist()
        assert not found.keys() & set(names)
        what = [OK] * len(names)
        if kind == "errors":
            what = rows["error_class"].to_pylist()
            assert set(rows["attempts"].to_pylist()) == {1}
            assert all(rows["error_message"].to_pylist())
        found.update(zip(names, what, strict=True))
    return found


JOBS = {
    "chat": ({"messages_column": "messages"}, CHAT),
    "plain": ({"prompt_column": "prompt"}, PLAIN),
}


@pytest.mark.ray
@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=[pytest.mark.slow] * (job == "chat")) for job in JOBS]
)
def test_every_row_becomes_what_the_table_says(
    local_ray: None, tiny_models: TinyModels, strict_target: str, tmp_path: Path, job: str
) -> None:
    how, files = JOBS[job]
    folder, output = tmp_path / "in %41 ü", tmp_path / "out"
    folder.mkdir()
    write(folder, files)
    values = {
        "input": {"paths": [f"{tmp_path}/x/../{folder.name}"], **how},
        "output": str(output),
        "models": {"target": strict_target, "draft": tiny_models.draft},
        "sampling": {"max_new_tokens": 4},
        "speculation": {"policy": "fixed", "k": 2, "verification": "coupled"},
        "actors": {"num_cpus": 2},
        "max_error_share": 1,
    }
    run(values)
    expected = {
        f"{name}:{i}:0": outcome
        for name, (_, outcomes) in files.items()
        for i, outcome in enumerate(outcomes)
    }
    assert classes(output, "completions") | classes(output, "errors") == expected
    for name, (content, outcomes) in files.items():
        rows = written_rows(output, name)
        assert rows is not None or not outcomes
        if rows is None:
            continue
        assert rows.num_rows == len(outcomes)
        if isinstance(content, bytes):
            if not name.lower().endswith("jsonl"):
                continue
            lines = [line for line in content.split(b"\n") if line.strip()]
            for line, row in zip(lines, rows.to_pylist(), strict=True):
                assert kept(line.strip(b"\r\n"), row), name
        else:
            assert shown(rows.select(content.column_names)) == shown(as_in(content, rows)), name
    # Whatever the names were, nothing was written elsewhere.
    assert {each.name for each in tmp_path.iterdir()} == {folder.name, "out"}
    for kind in ("completions", "errors"):
        check_readers(output / kind)


@pytest.mark.ray
def test_a_row_that_has_no_values_stops_no_job_and_no_page(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """What Python has no value for stays as it is in the files that are written."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in", {"broken-utf8.parquet": PLAIN_ALONE["broken-utf8.parquet"]})
    output = tmp_path / "out"
    values = settings(tiny_models, str(tmp_path / "in"), output, max_error_share=1)
    values["input"] = {"paths": [str(tmp_path / "in")], "prompt_column": "prompt"}
    job = JobConfig.model_validate(values)
    assert run(values).summary["errors"] == 1
    assert [*classes(output, "errors").values()] == ["MalformedText"]
    assert [*classes(output, "completions").values()] == [OK]
    found = gather(str(output), S3Config())
    assert "not valid UTF-8" in found.errors["MalformedText"][0].message
    plan = plan_job(job)
    assert len(choose_rows(plan.units, plan.table, S3Config(), 10)) == 1


def test_why_a_row_fails_goes_from_one_process_to_another() -> None:
    error = pickle.loads(pickle.dumps(RowError("NullPrompt", "it is null")))
    assert (error.error_class, error.message) == ("NullPrompt", "it is null")


def check_readers(folder: Path) -> None:
    """Every file of a folder has the same columns and types, and every reader reads them all."""
    files = [pq.read_metadata(file) for file in folder.glob("*.parquet")]
    schemas = [file.schema.to_arrow_schema().remove_metadata() for file in files]
    assert all(schema.equals(schemas[0]) for schema in schemas)
    for name, read in READERS.items():
        rows, columns = read(folder)
        assert columns == schemas[0].names, name
        assert rows == sum(file.num_rows for file in files), name


def as_in(original: pa.Table, written: pa.Table) -> pa.Table:
    """The input as its job's table has it."""
    return conformed(original, pa.schema([written.field(c) for c in original.column_names]))


@pytest.fixture(scope="module")
def tokenizer(strict_target: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(strict_target)


ALONE = {
    name: (how, file)
    for how, files in (
        ({"messages_column": "messages"}, CHAT_ALONE),
        ({"prompt_column": "prompt"}, PLAIN_ALONE),
        ({"template": TEMPLATE}, TEMPLATED),
        ({"template": TEMPLATE}, TEMPLATED_ALONE),
    )
    for name, file in files.items()
}


@pytest.mark.parametrize("name", ALONE)
def test_rows_of_a_job_of_one_file(name: str, tokenizer: Any, tmp_path: Path) -> None:
    how, (content, outcomes) = ALONE[name]
    write(tmp_path, {name: (content, outcomes)})
    (plan,) = plan_files(list_inputs([str(tmp_path)], S3Config()), S3Config(), 100)
    (rows,) = read_units([Unit.of(*plan.pieces)], plan.table, S3Config())
    input = InputConfig.model_validate({"paths": [str(tmp_path)], **how})
    requests = RowRequests(input, SamplingConfig(), tokenizer, CONTEXT)

    def outcome(index: int) -> str:
        try:
            if index in rows.bad_lines:
                raise rows.bad_lines[index].error
            requests.of(rows.row(index, requests.columns), f"{name}:{index}:0")
            return OK
        except RowError as error:
            return error.error_class

    assert [outcome(index) for index in range(rows.table.num_rows)] == outcomes


def shown(table: pa.Table) -> list[str]:
    """All of a table as text: NaN is not equal to itself."""
    return [_shown(column) for column in table.columns]


def _shown(column: pa.ChunkedArray) -> str:
    try:
        return str(column.to_pylist())
    except (ValueError, OverflowError):  # no text, or none of Python's times
        return str(column.combine_chunks().to_string(window=10_000, container_window=10_000))


def written_rows(output: Path, name: str) -> pa.Table | None:
    """All rows that came of an input file, completed or not, in its order."""
    tables = []
    for file in (output / "completions").glob("*.parquet"):
        record = from_footer(pq.read_metadata(file).metadata)
        if name in record.inputs:
            tables.append(pq.read_table(file))
            if record.files.errors:
                tables.append(pq.read_table(output / record.files.errors.name))
    if not tables:
        return None
    rows = pa.concat_tables(tables, promote_options="default")
    ids = [parse_row_id(each) for each in rows["row_id"].to_pylist()]
    mine = [place for place, each in enumerate(ids) if each.file == name]
    return rows.take(pa.array(sorted(mine, key=ids.__getitem__), pa.int64()))


def kept(line: bytes, row: dict[str, Any]) -> bool:
    """Whether an output row still says all that an input line said."""
    if row.get("raw_line") is not None:
        return bool(row["raw_line"] == line.decode(errors="replace"))
    values = json.loads(line)
    return all(
        plain(row[key]) == plain(value) or as_value(row[key]) == plain(value)
        for key, value in values.items()
    )


def plain(value: Any) -> str:
    """A value as text, without the nulls that Arrow fills missing fields with."""

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: full(v) for k, v in value.items() if v is not None}
        return [full(v) for v in value] if isinstance(value, list) else value

    return json.dumps(full(value), sort_keys=True)


def as_value(text: Any) -> str | None:
    """The same for a value that had no column's type and was kept as JSON."""
    try:
        return plain(json.loads(text))
    except (TypeError, ValueError):
        return None
