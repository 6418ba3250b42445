from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest

from pipeline.commit import manifest
from pipeline.commit.schema import check_reserved
from pipeline.commit.stats import UnitRecord, busy_seconds, stats_tables, summarise
from pipeline.config import model_identity
from pipeline.config.job import THRESHOLD_POLICIES, Estimator, JobConfig, Policy, S3Config
from pipeline.errors import UserError
from pipeline.inputs.listing import InputFile
from pipeline.inputs.units import FilePlan, Unit
from pipeline.storage.folder import Folder
from specdec.measure.speedup import SpeedupMeter
from specdec.policies.registry import ESTIMATORS, POLICIES, THRESHOLDS
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
    unit = Unit("u", "/x", name, "parquet", 0, rows, 0, 1)
    file = InputFile(f"/x/{name}", name, "parquet", size)
    return [FilePlan(file, rows, pa.schema([("p", pa.string())]), (unit,))]


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
        ({"speculation__verification": "coupled"}, 'verification: "rejection" there, "coupled"'),
    ],
)
def test_what_changes_results_is_named(
    tiny_models: TinyModels, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    output = Folder(str(tmp_path), S3Config())
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
    assert get_args(Policy) == POLICIES
    assert set(get_args(Estimator)) == set(ESTIMATORS)
    assert set(THRESHOLD_POLICIES) == set(THRESHOLDS)


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
    output = Folder(str(tmp_path), S3Config())
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


def test_a_job_that_committed_nothing_can_be_corrected(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    output = Folder(str(tmp_path), S3Config())
    for seed in (1, 2):
        config = job(tiny_models, sampling__seed=seed)
        manifest.claim(output, config, plans(), manifest.fingerprint(config, plans()))
    assert json.loads((tmp_path / manifest.JOB).read_text())["config"]["sampling"]["seed"] == 2


def test_a_folder_with_someone_elses_completions(tiny_models: TinyModels, tmp_path: Path) -> None:
    output = Folder(str(tmp_path), S3Config())
    output.put("completions/mine.parquet", b"")
    with pytest.raises(UserError, match=r"has completions but no _specbatch/job\.json"):
        manifest.claim(output, job(tiny_models), plans(), {})
    with pytest.raises(UserError, match=r"mine\.parquet is not of this job"):
        manifest.committed(output, plans()[0].units)


def test_the_job_record_holds_no_secret(
    tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    output = Folder(str(tmp_path), S3Config())
    manifest.claim(output, job(tiny_models, s3__profile="mine"), plans(), {})
    text = (tmp_path / manifest.JOB).read_text()
    assert json.loads(text)["config"]["s3"]["profile"] == "mine"
    assert "planted-secret" not in text


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no such folder"):
        model_identity.model_identity("./nowhere/model")


def test_reserved_columns_are_refused() -> None:
    (plan,) = plans()
    bad = FilePlan(plan.file, 3, pa.schema([("completion", pa.string())]), plan.units)
    with pytest.raises(UserError, match=r"a\.parquet: column 'completion' has the name of an out"):
        check_reserved([bad])


# ------------------------------------------------------------------------- stats


def record(unit: str = "u", actor: str = "a", **changes: Any) -> UnitRecord:
    values: dict[str, Any] = {
        "unit": unit,
        "job": "j",
        "input": "a.parquet",
        "start": 0,
        "rows": 3,
        "samples": 3,
        "completions": 2,
        "errors": {"NullPrompt": 1},
        "errors_file": "e",
        "errors_sha256": "0",
        "prompt_tokens": 10,
        "output_tokens": 20,
        "counts": {"rounds": 10, "drafted": 30, "verified": 25, "accepted": 10, "committed": 20},
        "actor": actor,
        "node": "n",
        "started": 0.0,
        "finished": 10.0,
        "engine": {"target_forwards": 12},
        "phase_seconds": {"verify": 4.0, "idle": 1.0},
        "peak_live": 2,
    }
    return UnitRecord(**{**values, **changes})


def test_a_record_survives_its_json() -> None:
    assert UnitRecord.from_json(record().to_json()) == record()


def test_a_record_of_an_older_version_is_read() -> None:
    new = ("trace_file", "trace_sha256", "trace_rounds", "speedup", "calibration", "costs")
    new += ("outcomes", "slowest", "fell_back", "samples", "own_n")
    old = {k: v for k, v in asdict(record()).items() if k not in new}
    read = UnitRecord.from_json(json.dumps(old).encode())
    assert read == record()
    summary = summarise([read])
    assert summary["speedup"] is summary["speedup_ci"] is None
    assert summary["calibration"] == []
    assert summary["positions"] == []
    for name in ("costs", "positions"):
        assert stats_tables([read])[name].num_rows == 0


def meter(speculative: float, control: float, rounds: int = 20) -> dict[str, Any]:
    """Rounds of four rows and seconds each; with speculation they commit twice as much."""
    result = SpeedupMeter()
    for i in range(rounds):
        result.book(4, speculative * (1 + 0.01 * (i % 3)), 8, control=False)
        result.book(4, control * (1 + 0.01 * (i % 3)), 4, control=True)
    return result.to_json()


def test_speedup_is_measured_over_units_and_per_unit_and_actor() -> None:
    records = [
        record("u", "a", speedup=meter(0.1, 0.1)),
        record("v", "b", speedup=meter(0.3, 0.1)),
        record("w", "b", speedup=meter(0.3, 0.1, rounds=2)),
    ]
    summary = summarise(records)
    low, high = summary["speedup_ci"]
    assert low < summary["speedup"] < high
    assert 2 / 3 < summary["speedup"] < 2
    assert summary["speedup_controls"] == 42
    tables = stats_tables(records)
    fast, slow, unknown = tables["units"].to_pylist()
    assert fast["speedup"] == pytest.approx(2)
    assert slow["speedup"] == pytest.approx(2 / 3)
    assert slow["speedup_low"] < slow["speedup"] < slow["speedup_high"]
    assert (unknown["speedup"], unknown["speedup_controls"]) == (None, 0)
    assert [a["speedup_controls"] for a in tables["actors"].to_pylist()] == [20, 22]


def test_columns_that_are_null_in_every_row_have_types() -> None:
    tables = stats_tables([record(counts=dict.fromkeys(record().counts, 0))])
    for table in tables.values():
        assert not any(pa.types.is_null(column.type) for column in table.schema)
    assert tables["units"].schema.field("trace_file").type == pa.string()
    assert tables["units"].schema.field("speedup").type == pa.float64()


def test_calibration_by_input_and_context() -> None:
    def bins(judged: int, predicted: float, accepted: int) -> list[list[float]]:
        result = [[0.0, 0.0, 0.0] for _ in range(10)]
        result[int(predicted * 10)] = [judged, judged * predicted, accepted]
        return result

    records = [
        record("u", calibration={"128": bins(10, 0.55, 5), "256": bins(10, 0.95, 9)}),
        record("v", input="b.parquet", calibration={"128": bins(20, 0.35, 1)}),
    ]
    rows = {(row["by"], row["name"]): row for row in summarise(records)["calibration"]}
    assert list(rows) == [
        ("all", ""),
        ("input", "a.parquet"),
        ("input", "b.parquet"),
        ("context", "128"),
        ("context", "256"),
    ]
    assert rows["all", ""]["judged"] == 40
    assert rows["all", ""]["accepted"] == 15 / 40
    assert rows["all", ""]["ece"] == pytest.approx((0.5 + 0.5 + 6) / 40)
    assert rows["input", "b.parquet"]["predicted"] == pytest.approx(0.35)
    assert rows["context", "128"]["judged"] == 30
    assert stats_tables(records)["calibration"].to_pylist() == list(rows.values())


def test_acceptance_by_position() -> None:
    records = [
        # Of three candidates none, one and all were accepted; nothing behind a rejection is judged.
        record("u", outcomes=[(0, 0, 9), (3, 0, 4), (3, 1, 2), (3, 3, 1)]),
        record("v", outcomes=[(1, 1, 5)]),
    ]
    rows = summarise(records)["positions"]
    assert rows == [
        {"position": 1, "judged": 12, "accepted": 8},
        {"position": 2, "judged": 3, "accepted": 1},
        {"position": 3, "judged": 1, "accepted": 1},
    ]
    assert stats_tables(records)["positions"].to_pylist() == rows


def test_costs_are_an_actors_latest_and_fallen_heads_are_counted() -> None:
    records = [
        record("u", "a", finished=5.0, costs={"draft": [(1, 0.1)]}),
        record("v", "a", finished=9.0, costs={"draft": [(1, 0.2)]}, fell_back=True),
        record("w", "b", finished=9.0),
    ]
    assert summarise(records)["actors_fell_back"] == 1
    tables = stats_tables(records)
    assert [a["fell_back"] for a in tables["actors"].to_pylist()] == [True, False]
    assert tables["costs"].to_pylist() == [
        {"actor": "a", "kind": "draft", "tokens": 1, "seconds": 0.2}
    ]


def test_a_pause_between_runs_is_not_busy_time() -> None:
    runs = [(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (100.0, 103.0)]
    assert busy_seconds(record(started=s, finished=f) for s, f in runs) == 8.0


def test_the_summary_adds_up_and_derives_ratios_from_counts() -> None:
    summary = summarise([record("u"), record("v", started=10.0, finished=20.0)])
    assert (summary["rows"], summary["errors"]) == (4, 2)
    assert summary["errors_by_class"] == {"NullPrompt": 2}
    assert summary["tokens_per_second"] == 2.0
    assert summary["acceptance_rate"] == 20 / 50
    assert summary["block_efficiency"] == 40 / 20
    assert summary["phase_seconds"] == {"verify": 8.0, "idle": 2.0}
    assert summary["target_forwards"] == 24
    assert summary["speedup"] is summary["speedup_ci"] is summary["cost"] is None


def test_a_job_without_rows_has_a_summary() -> None:
    summary = summarise([])
    assert summary["rows"] == 0
    assert summary["tokens_per_second"] is None
    assert all(table.num_rows == 0 for table in stats_tables([]).values())


def test_tables_by_actor_and_phase() -> None:
    tables = stats_tables([record("u", "a"), record("v", "b"), record("w", "b")])
    assert tables["units"].num_rows == 3
    assert tables["actors"]["units"].to_pylist() == [1, 2]
    assert {"actor": "b", "phase": "verify", "seconds": 8.0} in tables["phases"].to_pylist()
