from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest

from pipeline import layout
from pipeline.commit import manifest
from pipeline.commit.files import parquet_bytes
from pipeline.commit.schema import check_reserved
from pipeline.config import model_identity
from pipeline.config.job import Estimator, JobConfig, Policy, S3Config
from pipeline.errors import UserError
from pipeline.inputs.columns import JSON_TEXT
from pipeline.inputs.listing import InputFile
from pipeline.inputs.units import FilePlan, Piece, Unit
from pipeline.layout import ADDED_COLUMNS
from pipeline.storage.folder import open_folder
from specdec.policies.estimators import ESTIMATORS
from specdec.policies.registry import POLICIES
from tests.conftest import TinyModels


def job(models: TinyModels, **changes: Any) -> JobConfig:
    settings: dict[str, Any] = {
        "input": {"paths": ["x"], "prompt_column": "p"},
        "output": "out",
        "models": {"target": models.target, "draft": models.draft},
    }
    for dotted, value in changes.items():
        section, _, key = dotted.partition("__")
        settings[section] = {**settings.get(section, {}), key: value} if key else value
    return JobConfig.model_validate(settings)


def plans(rows: int = 3, size: int = 100, name: str = "a.parquet") -> list[FilePlan]:
    piece = Piece(name, 0, rows, "/x", "parquet", 0, 1)
    file = InputFile(f"/x/{name}", name, "parquet", size)
    return [FilePlan(file, rows, pa.schema([("p", pa.string())]), (piece,))]


@pytest.mark.parametrize(
    "changes",
    [
        {"actors__slots": 3},
        {"actors__min": 3},
        {"name": "other"},
        {"output": "elsewhere"},
        {"speculation__threshold": None},
        {"speculation__verification": "rejection"},
        {"speculation__control_share": 0.2},
        {"speculation__trace": True},
        {"models__kv_dtype": "auto"},
    ],
)
def test_what_does_not_change_results_is_not_in_the_fingerprint(
    tiny_models: TinyModels, changes: dict[str, Any]
) -> None:
    before = manifest.fingerprint(job(tiny_models), plans())
    assert manifest.fingerprint(job(tiny_models, **changes), plans()) == before


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"sampling__seed": 1}, "sampling.seed: 0 there, 1 here"),
        ({"sampling__stop": ["x"]}, 'sampling.stop: [] there, ["x"] here'),
        ({"input__prompt_column": "q"}, 'input.prompt_column: "p" there, "q" here'),
        ({"unit_rows": 5}, "unit_rows: 256 there, 5 here"),
        ({"speculation__k_max": 5}, "speculation.k_max: 20 there, 5 here"),
        (
            {"speculation__estimator": "entropy"},
            'estimator: null there, "entropy" here',
        ),
        ({"models__dtype": "bfloat16"}, 'models.dtype: "auto" there, "bfloat16" here'),
        ({"models__kv_dtype": "int8"}, 'models.kv_dtype: null there, "int8" here'),
        ({"speculation__verification": "coupled"}, 'verification: "rejection" there, "coupled"'),
    ],
)
def test_what_changes_results_is_named(
    tiny_models: TinyModels, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    output = open_folder(str(tmp_path), S3Config())
    first, second = job(tiny_models), job(tiny_models, **changes)
    manifest.claim(output, first, plans(), manifest.fingerprint(first, plans()))
    output.put("completions/u.parquet", b"")
    manifest.claim(output, first, plans(), manifest.fingerprint(first, plans()))
    with pytest.raises(UserError, match="holds another job") as caught:
        manifest.claim(output, second, plans(), manifest.fingerprint(second, plans()))
    assert line in str(caught.value)


def test_coupled_results_depend_on_neither_draft_nor_policy(tiny_models: TinyModels) -> None:
    coupled = {"speculation__verification": "coupled"}
    before = manifest.fingerprint(job(tiny_models, **coupled), plans())
    plain = job(tiny_models, **coupled, speculation__policy="none", models__draft=None)
    assert manifest.fingerprint(plain, plans()) == before


def test_the_names_of_policies_are_those_of_specdec() -> None:
    assert get_args(Policy) == tuple(POLICIES)
    assert set(get_args(Estimator)) == set(ESTIMATORS)


def test_fingerprints_name_settings_in_the_order_of_earlier_jobs(
    tiny_models: TinyModels, tiny_head: str
) -> None:
    """A fingerprint's digest depends on it: in another order, no earlier job could be resumed."""
    found = {}
    for policy in POLICIES:
        chosen = {"policy": policy, "head": tiny_head if policy == "head" else None}
        mark = manifest.fingerprint(job(tiny_models, speculation=chosen), plans())
        found[policy] = list(mark["speculation"].items())[2:]
    released = {
        "none": [],
        "fixed": [("k", 4)],
        "heuristic": [("k", 4), ("k_min", 1), ("k_max", 20)],
        "confidence": [("threshold", None), ("k_max", 20)],
        "entropy": [("threshold", None), ("k_max", 20)],
        "head": [("threshold", None), ("k_min", 1), ("k_max", 20), ("estimator", None)],
        "suffix": [("threshold", None), ("k_max", 20)],
        "goodput": [("k_max", 20), ("estimator", None)],
    }
    found["head"].pop()
    assert {name: found[name] for name in released} == released


def test_a_width_is_part_of_a_job_if_it_makes_trees(tiny_models: TinyModels) -> None:
    marks = [
        manifest.fingerprint(job(tiny_models, speculation={"policy": "fixed", **width}), plans())
        for width in ({}, {"width": None}, {"width": 1}, {"width": 2})
    ]
    assert marks[0] == marks[1] == marks[2]
    assert marks[3]["speculation"] == {**marks[0]["speculation"], "width": 2}


@pytest.mark.parametrize("policy", get_args(Policy))
def test_every_policy_has_a_fingerprint_that_coupled_leaves_out(
    tiny_models: TinyModels, tiny_head: str, policy: str
) -> None:
    chosen = {"policy": policy, "head": tiny_head if policy == "head" else None}
    rejection = manifest.fingerprint(job(tiny_models, speculation=chosen), plans())["speculation"]
    assert rejection["policy"] == policy
    assert ("head" in rejection) == (policy == "head")
    assert not {"control_share", "trace"} & rejection.keys()
    coupled = job(tiny_models, speculation={**chosen, "verification": "coupled"})
    mark = manifest.fingerprint(coupled, plans())
    assert mark["speculation"] == {"verification": "coupled"}
    assert "draft" not in mark["models"]


def test_another_head_is_another_job(
    tiny_models: TinyModels, tiny_head: str, tmp_path: Path
) -> None:
    def digest_of(head: str) -> str:
        speculation = {"policy": "goodput", "head": head}
        mark = manifest.fingerprint(job(tiny_models, speculation=speculation), plans())
        return str(mark["speculation"]["head"])

    moved = shutil.copytree(tiny_head, tmp_path / "moved")
    assert digest_of(str(moved)) == digest_of(tiny_head)
    card = json.loads((moved / "card.json").read_text())
    (moved / "card.json").write_text(json.dumps({**card, "weights_sha256": "0" * 64}))
    assert digest_of(str(moved)) != digest_of(tiny_head)


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_draft_and_head_are_looked_for_before_anything_starts(
    tiny_models: TinyModels, tiny_head: str, tmp_path: Path, verification: str
) -> None:
    def check(head: str, draft: str) -> None:
        speculation = {"policy": "goodput", "head": head, "verification": verification}
        model_identity.check_models(job(tiny_models, speculation=speculation, models__draft=draft))

    check(tiny_head, tiny_models.draft)
    with pytest.raises(UserError, match="no such folder"):
        check(tiny_head, "./gone/draft")
    with pytest.raises(UserError, match=r"speculation\.head: .*no acceptance head here"):
        check(str(tmp_path), tiny_models.draft)
    with pytest.raises(UserError, match=r"trained for another draft, .*specbatch train-head"):
        check(tiny_head, tiny_models.target)
    half = shutil.copytree(tiny_head, tmp_path / "half")
    (half / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"half has no head\.safetensors"):
        check(str(half), tiny_models.draft)


def test_changed_weights_are_another_model(tiny_models: TinyModels, tmp_path: Path) -> None:
    copy = tmp_path / "target"
    shutil.copytree(tiny_models.target, copy)
    before = model_identity.model_identity(str(copy))
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    after = model_identity.model_identity(str(copy))
    assert before["digest"] != after["digest"]


def test_changed_inputs_are_named(tiny_models: TinyModels, tmp_path: Path) -> None:
    output = open_folder(str(tmp_path), S3Config())
    config = job(tiny_models)
    manifest.claim(output, config, plans(), manifest.fingerprint(config, plans()))
    output.put("completions/u.parquet", b"")
    for changed, line in (
        (plans(size=101), "input file a.parquet has changed"),
        (plans() + plans(name="b.parquet"), "input file b.parquet is new"),
        (plans(name="b.parquet"), "input file a.parquet is gone"),
    ):
        with pytest.raises(UserError, match=line):
            manifest.claim(output, config, changed, manifest.fingerprint(config, changed))


def planned_as(table: pa.Schema, name: str = "a.parquet", step: int = 0) -> list[FilePlan]:
    return [replace(plan, schema=table, table=table, step=step) for plan in plans(name=name)]


def test_the_table_that_a_job_writes_stays(tiny_models: TinyModels, tmp_path: Path) -> None:
    output = open_folder(str(tmp_path), S3Config())
    config = job(tiny_models)
    first = pa.schema([pa.field("p", pa.string(), metadata=JSON_TEXT), ("n", pa.int32())])
    later = pa.schema({"p": pa.string(), "n": pa.int64()})

    def claim(files: list[FilePlan], **options: Any) -> pa.Schema:
        return manifest.claim(output, config, files, manifest.fingerprint(config, files), **options)

    assert claim(planned_as(first)).equals(first, check_metadata=True)
    output.put("completions/u.parquet", b"")
    assert claim(planned_as(later)).equals(first, check_metadata=True)
    record = json.loads((tmp_path / layout.JOB).read_text())
    assert record["table"]["columns"] == {"p": "string", "n": "int32"}

    # What is added must fit it.
    both = [*planned_as(later), *planned_as(later, "b.parquet", 1)]
    with pytest.raises(UserError, match=r"b\.parquet: column 'n' is int64, but int32 in what this"):
        claim(both, extend=True)
    fitting = [*planned_as(first), *planned_as(pa.schema({"n": pa.int8()}), "b.parquet", 1)]
    assert claim(fitting, extend=True).equals(first, check_metadata=True)

    # An output of a version that kept none goes on as it is planned now.
    del record["table"]
    record["fingerprint"] = manifest.fingerprint(config, fitting)
    output.put(layout.JOB, json.dumps(record).encode())
    assert claim([*planned_as(later), fitting[1]]).equals(later)


def test_a_job_keeps_the_optional_columns_that_it_was_begun_with(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    output = open_folder(str(tmp_path), S3Config())
    config = job(tiny_models, sampling__logprobs=1)
    manifest.claim(output, config, planned_as(pa.schema({"parsed": pa.string()})), {})
    record = json.loads((tmp_path / layout.JOB).read_text())
    usual = ("logprobs", "reasoning_tokens")
    assert manifest.optional_columns(output, record, usual) == ("logprobs",)

    # A version that noted none had others; what is the input's own is none of them.
    del record["optional_columns"]
    assert manifest.optional_columns(output, record, usual) == usual
    there = pa.table({name: ["x"] for name in ("row_id", "parsed", "content", "logprobs")})
    output.put("completions/u.parquet", parquet_bytes(there))
    assert manifest.optional_columns(output, record, usual) == ("logprobs", "content")


def test_a_job_that_committed_nothing_can_be_corrected(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    output = open_folder(str(tmp_path), S3Config())
    for seed in (1, 2):
        config = job(tiny_models, sampling__seed=seed)
        manifest.claim(output, config, plans(), manifest.fingerprint(config, plans()))
    assert json.loads((tmp_path / layout.JOB).read_text())["config"]["sampling"]["seed"] == 2


def test_a_folder_with_someone_elses_completions(tiny_models: TinyModels, tmp_path: Path) -> None:
    output = open_folder(str(tmp_path), S3Config())
    output.put("completions/mine.parquet", b"")
    with pytest.raises(UserError, match=r"has completions but no _specbatch/job\.json"):
        manifest.claim(output, job(tiny_models), plans(), {})
    with pytest.raises(UserError, match=r"mine\.parquet is not of this job"):
        manifest.committed(output, [Unit.of(*plans()[0].pieces)])


def test_the_job_record_holds_no_secret(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    output = open_folder(str(tmp_path), S3Config())
    manifest.claim(output, job(tiny_models, s3__profile="mine"), plans(), {})
    text = (tmp_path / layout.JOB).read_text()
    assert json.loads(text)["config"]["s3"]["profile"] == "mine"
    assert "planted-secret" not in text


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no such folder"):
        model_identity.model_identity("./nowhere/model")


def test_reserved_columns_are_refused() -> None:
    (plan,) = plans()
    bad = FilePlan(plan.file, 3, pa.schema([("completion", pa.string())]), plan.pieces)
    with pytest.raises(UserError, match=r"a\.parquet: column 'completion' has the name of an out"):
        check_reserved([bad], ADDED_COLUMNS)
