"""A finished job's output, and what is said when something in it is no longer as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline import layout
from pipeline.commit.files import parquet_bytes
from pipeline.commit.footer import from_footer, from_plain, to_footer, to_plain
from pipeline.config.job import S3Config
from pipeline.errors import UserError
from pipeline.outputs.problems import Verification
from pipeline.outputs.verify import verify
from tests.conftest import S3Server, TinyModels
from tests.pipeline.small_jobs import run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def finished(
    local_ray: None, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two input files of ten rows, three of them bad, in units of four; traced."""
    folder = tmp_path_factory.mktemp("verify")
    for name, bad in (("a", {1, 5}), ("b", {9})):
        prompts = [None if i in bad else f"count to {i}" for i in range(10)]
        pq.write_table(pa.table({"prompt": prompts}), folder / f"{name}.parquet")
    values = {
        "input": {"paths": [str(folder / "*.parquet")], "prompt_column": "prompt"},
        "output": str(folder / "out"),
        "models": {"target": tiny_models.target, "draft": tiny_models.draft},
        "sampling": {"max_new_tokens": 6, "temperature": 0},
        "speculation": {"policy": "fixed", "k": 2, "control_share": 0, "trace": True},
        "actors": {"num_cpus": 2, "slots": 8},
        "unit_rows": 4,
    }
    run(values)
    return folder / "out"


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A copy of the output to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def check(output: Path) -> Verification:
    return verify(str(output), S3Config())


def files(output: Path, kind: str = "completions") -> list[Path]:
    return sorted((output / kind).glob("*.parquet"))


def failed_unit(output: Path) -> Path:
    """The completions file of a unit that has an error row."""
    return output / "completions" / f"{files(output, 'errors')[0].stem[:-9]}.parquet"


def rewrite(
    file: Path,
    change: Callable[[pa.Table], pa.Table] = lambda table: table,
    **record: Any,
) -> None:
    """Write a completions file again with other rows or another record."""
    table = pq.read_table(file)
    old = from_footer(pq.read_metadata(file).metadata)
    other = from_plain({**to_plain(old), **record})
    file.write_bytes(parquet_bytes(change(table), to_footer(other)))


def test_a_finished_job_is_as_it_should_be(finished: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify(str(finished), S3Config(), lambda done, units: told.append((done, units)))
    assert found.problems == []
    assert found.ok
    assert found.finished
    assert (found.rows_in, found.rows_out, found.rows_in_errors) == (20, 17, 3)
    # Completions and trace of six units, errors of three, and statistics.
    assert found.units == 6
    assert found.files == 6 + 6 + 3 + 7
    assert told == [(i, 6) for i in range(1, 7)]


def test_the_manifest_says_what_it_was_made_of(finished: Path) -> None:
    listed = json.loads((finished / layout.MANIFEST).read_text())
    assert listed["config"]["sampling"]["max_new_tokens"] == 6
    assert {"specbatch", "torch", "ray", "python"} <= set(listed["versions"])
    assert set(listed["git"]) == {"source", "job"}
    assert all(len(file["sha256"]) == 64 for file in (*listed["files"], *listed["stats"]))


def lose_a_unit(output: Path) -> None:
    files(output)[1].unlink()


def lose_errors(output: Path) -> None:
    files(output, "errors")[0].unlink()


def lose_a_row(output: Path) -> None:
    rewrite(files(output)[0], lambda table: table.slice(1))


def lose_a_row_and_its_count(output: Path) -> None:
    rewrite(files(output)[0], lambda table: table.slice(1), completions=2)


def repeat_a_row(output: Path) -> None:
    rewrite(failed_unit(output), lambda t: pa.concat_tables([t.slice(0, 1), t.slice(0, 2)]))


def complete_a_failed_row(output: Path) -> None:
    failed = pq.read_table(files(output, "errors")[0])["row_id"][0].as_py()

    def take_it(table: pa.Table) -> pa.Table:
        ids = [failed, *table["row_id"].to_pylist()[1:]]
        return table.set_column(0, "row_id", pa.array(ids))

    rewrite(failed_unit(output), take_it)


def another_type(output: Path) -> None:
    file = files(output)[0]
    tokens = pa.field("output_tokens", pa.int32())
    rewrite(
        file,
        lambda t: t.cast(pa.schema([tokens if f.name == tokens.name else f for f in t.schema])),
    )


def another_column(output: Path) -> None:
    rewrite(files(output)[0], lambda t: t.append_column("mine", t["row_id"]))


def other_rows(output: Path) -> None:
    ids = pa.array(["c.parquet:0:0", "a.parquet:99:0", "what"])
    rewrite(files(output)[0], lambda table: table.slice(0, 3).set_column(0, "row_id", ids))


def another_units_file(output: Path) -> None:
    shutil.copy(files(output)[0], files(output)[1])


def the_same_unit_twice(output: Path) -> None:
    shutil.copy(files(output)[0], output / "completions" / "copy.parquet")


def flip_a_bit(output: Path) -> None:
    file = files(output)[0]
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)


def flip_a_bit_in_errors(output: Path) -> None:
    file = files(output, "errors")[0]
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)


def half_a_file(output: Path) -> None:
    file = files(output)[0]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def an_empty_file(output: Path) -> None:
    files(output, "trace")[0].write_bytes(b"")


def someone_elses_file(output: Path) -> None:
    (output / "completions" / "notes.txt").write_text("mine")


def a_folder_with_rows(output: Path) -> None:
    (output / "completions" / "old").mkdir()
    shutil.copy(files(output)[0], output / "completions" / "old" / "x.parquet")


def late_errors(output: Path) -> None:
    shutil.copy(files(output, "errors")[0], output / "errors" / "late-12345678.parquet")


def a_killed_writer(output: Path) -> None:
    (output / "_specbatch/staging").mkdir()
    (output / "_specbatch/staging/123-unit.parquet").write_bytes(b"PAR1")


def another_job(output: Path) -> None:
    rewrite(files(output)[0], job="0123456789abcdef")


def no_manifest(output: Path) -> None:
    (output / layout.MANIFEST).unlink()


def wrong_sums(output: Path) -> None:
    edit(output / layout.MANIFEST, lambda listed: listed.update(rows_in_errors=2))


def a_file_the_manifest_lacks(output: Path) -> None:
    edit(output / layout.MANIFEST, lambda listed: listed["files"].pop())


def a_file_only_the_manifest_has(output: Path) -> None:
    more = {"name": "errors/none.parquet", "rows": 1, "sha256": "0" * 64}
    edit(output / layout.MANIFEST, lambda listed: listed["files"].append(more))


def other_statistics(output: Path) -> None:
    (output / "stats/units.parquet").write_bytes(b"")


def not_finished(output: Path) -> None:
    (output / "_SUCCESS").unlink()


def another_plan(output: Path) -> None:
    file = output / "_specbatch/inputs.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(2, "rows", pa.array([12, 7])), file)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


UNLIKE = {"missing", "foreign", "checksum", "manifest"}
"""What follows from a file with other rows: those are gone, their rounds are nobody's ..."""


@pytest.mark.parametrize(
    ("spoil", "kinds", "message"),
    [
        (lose_a_unit, {"missing", "stray", "manifest"}, "rows that no unit holds: 4-6"),
        (lose_errors, {"missing", "manifest"}, "rows neither in completions nor in errors: a."),
        (lose_a_row, {"count", *UNLIKE}, "2 rows, its footer says 3"),
        (lose_a_row_and_its_count, {"count", *UNLIKE}, "nor in errors: a.parquet:0"),
        (repeat_a_row, {"duplicate", *UNLIKE}, "there twice, in completions: a.parquet:0:0"),
        (complete_a_failed_row, {"duplicate", *UNLIKE}, "there twice, in errors, too: a.parq"),
        (
            another_type,
            {"columns", "checksum"},
            "job's table: output_tokens: int32, output_tokens: ",
        ),
        (another_column, {"columns", "checksum"}, "not those of the job's table: mine: string"),
        (other_rows, UNLIKE, "a.parquet:99:0, c.parquet:0:0, what"),
        (another_units_file, {"duplicate", "stray", *UNLIKE}, "holds unit a-0000"),
        (the_same_unit_twice, {"foreign", "duplicate", "manifest"}, "rows from 0 on are in an"),
        (flip_a_bit, {"unreadable", "stray", *UNLIKE}, "checksum is not the one in the manifest"),
        (flip_a_bit_in_errors, {"unreadable", *UNLIKE}, "content has changed since it was wri"),
        (half_a_file, {"unreadable", "stray", *UNLIKE}, "not a file that specbatch wrote"),
        (an_empty_file, {"checksum", "unreadable"}, "its content has changed"),
        (someone_elses_file, {"stray"}, "completions/notes.txt: belongs to no unit"),
        (a_folder_with_rows, {"stray"}, "completions/old/x.parquet: belongs to no unit"),
        (late_errors, {"stray"}, "errors/late-12345678.parquet: belongs to no unit"),
        (a_killed_writer, {"half-written"}, "a writer that was killed left it"),
        (another_job, {"foreign", "checksum"}, "committed by a job with other settings"),
        (no_manifest, {"manifest"}, "manifest.json: not there, but _SUCCESS is"),
        (wrong_sums, {"manifest"}, "rows_in_errors is 2, the files have 3"),
        (a_file_the_manifest_lacks, {"manifest"}, "not in the manifest"),
        (a_file_only_the_manifest_has, {"missing"}, "errors/none.parquet: not there, but in the"),
        (other_statistics, {"checksum"}, "stats/units.parquet: its checksum"),
        (not_finished, {"unfinished"}, "_SUCCESS: not there: run the job to its end"),
        (another_plan, {"missing", "foreign", "manifest"}, "a.parquet: rows that no unit holds: 1"),
    ],
)
def test_what_is_wrong_is_named(
    output: Path, spoil: Callable[[Path], None], kinds: set[str], message: str
) -> None:
    spoil(output)
    found = check(output)
    lines = [f"{problem.file}: {problem.message}" for problem in found.problems]
    assert any(message in line for line in lines), lines
    assert found.problems_found == len(found.problems)
    # Nothing is blamed that is all right: each kind is one that follows from what was spoiled.
    assert {problem.kind for problem in found.problems} <= kinds
    assert {problem.kind for problem in found.problems} & kinds


def test_the_command_says_it_and_exits_with_1(output: Path) -> None:
    good = CliRunner().invoke(app, ["verify", str(output)])
    assert good.exit_code == 0, good.output
    assert "rows: 20 in, 17 completed + 3 in errors; 6 units" in good.stdout
    assert good.stdout.splitlines()[-1].startswith("ok: ")
    lose_a_unit(output)
    bad = CliRunner().invoke(app, ["verify", str(output)])
    assert bad.exit_code == 1
    assert "missing a.parquet: rows that no unit holds: 4-6" in bad.stdout
    told = CliRunner().invoke(app, ["verify", str(output), "--json"])
    assert told.exit_code == 1
    values = json.loads(told.stdout)
    assert not values["ok"]
    assert {"kind", "file", "message"} == set(values["problems"][0])
    assert values["rows_in"] == 20


def test_a_folder_without_a_job_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no job's output here"):
        check(tmp_path)
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert result.exit_code == 2


@pytest.mark.s3
def test_on_s3(output: Path, s3_env: S3Server) -> None:
    client = s3_env.client()
    client.create_bucket(Bucket="verify")
    for file in filter(Path.is_file, output.rglob("*")):
        client.upload_file(str(file), "verify", f"out/{file.relative_to(output)}")
    url, endpoint = "s3://verify/out", ["--endpoint", s3_env.endpoint]
    good = CliRunner().invoke(app, ["verify", url, *endpoint])
    assert good.exit_code == 0, good.output
    gone = files(output, "errors")[0].name
    client.delete_object(Bucket="verify", Key=f"out/errors/{gone}")
    bad = CliRunner().invoke(app, ["verify", url, *endpoint, "--json"])
    assert bad.exit_code == 1
    problems = json.loads(bad.stdout)["problems"]
    assert f"errors/{gone}" in {problem["file"] for problem in problems}
