"""A night that teaches: candidates are compared, the record says why, and there is a way back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import date as Date
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import jobs.nightly.compare
from jobs.cli import app
from jobs.nightly.archive import Archive, Night, WorkFolder
from jobs.nightly.conversations import CONVERSATION
from jobs.nightly.improve import improve
from jobs.nightly.nights import run_nights
from jobs.nightly.recipe import Recipe
from jobs.nightly.versions import Versions, read_versions, roll_back, write_versions
from jobs.tuning.students import Kind, kind_of
from pipeline.errors import UserError
from pipeline.generate.loading import load_acceptance_head, load_pair, make_engine
from specdec.engine.engine import Engine
from specdec.loading.head_files import read_card
from specdec.policies.registry import make_policy
from specdec.request import Request, SamplingParams
from tests.conftest import TinyModels
from tests.jobs.nightly.recipes import small_recipe, write_seeds


def test_versions_and_the_way_back(tiny_models: TinyModels, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(small_recipe(tiny_models, tmp_path))
    own = read_versions(recipe)
    assert (own.current, own.in_use.draft, own.in_use.head) == (0, tiny_models.draft, None)
    with pytest.raises(UserError, match="nothing before"):
        roll_back(recipe)
    one = own.with_adopted(tiny_models.draft, "/heads/1", "2026-11-20", "faster")
    two = one.with_adopted(tiny_models.draft, "/heads/2", "2026-11-21", "faster still")
    write_versions(recipe, two)
    assert read_versions(recipe) == two
    assert two.in_use.apply(recipe.job).speculation.head == "/heads/2"

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(small_recipe(tiny_models, tmp_path)))
    call = CliRunner().invoke
    result = call(app, ["nightly", "rollback", str(file)])
    assert result.exit_code == 0
    assert "version 1 is in use" in result.stdout
    assert read_versions(recipe).in_use.head == "/heads/1"
    # After a roll-back the next version is taught by the one in use, and that is what it replaces.
    three = read_versions(recipe).with_adopted(None, "/heads/3", "2026-11-22", "")
    write_versions(recipe, three)
    assert roll_back(recipe)[1] == 1
    assert roll_back(recipe)[1] == 0
    assert roll_back(recipe, to=3)[0].head == "/heads/3"
    assert "(in use)" in call(app, ["nightly", "versions", str(file)]).stdout
    with pytest.raises(UserError, match="versions 0 to 3"):
        roll_back(recipe, to=4)
    # A recipe that names another draft has spoken.
    changed = small_recipe(tiny_models, tmp_path)
    changed["job"]["models"]["draft"] = tiny_models.target
    other = read_versions(Recipe.model_validate(changed))
    assert isinstance(other, Versions)
    assert (other.current, other.in_use.draft) == (0, tiny_models.target)


WriteJob = Callable[..., str]


def finished_night(recipe: Recipe, write_job_output: WriteJob) -> Night:
    """A night whose job wrote thirty completions of letters."""
    draw, date = random.Random(0), "2026-11-20"
    work = WorkFolder(Archive.of(recipe), Date.fromisoformat(date), recipe.mark)
    rows = [
        {
            "row_id": f"in.parquet:{i}:0",
            CONVERSATION: f"seed-{i}",
            "prompt": f"say {i}",
            "completion": "".join(draw.choices("abc ", k=12)),
            "finish_reason": "length",
        }
        for i in range(30)
    ]
    models = recipe.job.models.model_dump(include={"target", "draft"})
    sampling = {"max_new_tokens": 12}
    write_job_output({"a": rows}, name=work.output(1).url, models=models, sampling=sampling)
    lists: dict[str, Any] = {name: [] for name in ("filters", "files", "examples")}
    maps = ("lost", "rows", "columns", "summary", "models", "sampling")
    nothing: dict[str, Any] = {name: {} for name in maps} | lists
    return Night(date, recipe.mark, "", 0, 0, cost=None, currency="", **nothing)


@pytest.mark.parametrize(
    ("incumbent", "kind", "made"),
    [("model", "eagle3", "eagle3"), ("eagle3", None, "eagle3"), ("eagle3", "model", "model")],
)
def test_the_next_draft_is_of_either_kind(
    tiny_models: TinyModels,
    tiny_eagle: str,
    write_job_output: WriteJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    incumbent: str,
    kind: str | None,
    made: str,
) -> None:
    monkeypatch.setattr(jobs.nightly.compare, "_COST_SECONDS", 0.3)
    settings = {"draft": True, "kind": kind, "held_out": 0.3, "draft_epochs": 1}
    values = small_recipe(tiny_models, tmp_path, improve=settings)
    own = tiny_eagle if incumbent == "eagle3" else tiny_models.draft
    values["job"]["models"]["draft"] = own
    recipe = Recipe.model_validate(values)
    night, archive, told = finished_night(recipe, write_job_output), Archive.of(recipe), [""]
    record = improve(recipe, archive, night, told.append)
    assert f"training a draft of the kind {made}" in told
    (found,) = record["candidates"]
    assert found["what"] == f"draft draft-2026-11-20, beside draft {Path(own).name} and no head"
    training, compared = found["training"], found["comparison"]
    assert training["kind"] == made and training["rows"] > 5
    assert 1 <= training["length"] <= 5 and "head" not in training
    before, after = compared["lengths"]
    assert f"brings {after:.2f} tokens, with the incumbent {before:.2f}. In the sim" in found["why"]
    adopted = found["decision"] == "adopted"
    assert adopted == compared["adopted"]
    assert not adopted or compared["simulated"]["low"] > 1
    # Only what was adopted is kept, and it is what nights run with from then on.
    folder = Path(recipe.output, "_nightly/models/draft-2026-11-20")
    assert folder.exists() == adopted
    assert read_versions(recipe).in_use.draft == (str(folder) if adopted else own)


HEADS = {
    "for the draft in use": ("eagle3", {"head": True}, {"policy": "goodput"}),
    "for the draft of the night": (
        "model",
        {"head": True, "draft": True, "kind": "eagle3"},
        {"policy": "goodput", "verification": "coupled"},
    ),
    "since the policy needs one": (
        "model",
        {"draft": True, "kind": "eagle3"},
        {"policy": "head", "k_max": 3},
    ),
}


@pytest.mark.parametrize(("incumbent", "wanted", "speculation"), HEADS.values(), ids=HEADS)
def test_heads_are_trained_for_eagle_drafts(
    tiny_models: TinyModels,
    tiny_eagle: str,
    tiny_head: str,
    write_job_output: WriteJob,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    incumbent: str,
    wanted: dict[str, Any],
    speculation: dict[str, Any],
) -> None:
    """The next night runs with what was adopted. Catches a head that knows another draft."""
    monkeypatch.setattr(jobs.nightly.compare, "_COST_SECONDS", 0.3)
    monkeypatch.setattr(jobs.nightly.compare, "verdict", lambda *_: (True, "It is wanted here."))
    small = {"held_out": 0.3, "draft_epochs": 1, "head_epochs": 2, "head_depth": 1}
    values = small_recipe(tiny_models, tmp_path, improve=small | wanted)
    if incumbent == "eagle3":
        values["job"]["models"]["draft"] = tiny_eagle
    if speculation["policy"] == "head":
        speculation = {**speculation, "head": tiny_head}
    values["job"]["speculation"] = speculation
    recipe = Recipe.model_validate(values)
    record = improve(
        recipe, Archive.of(recipe), finished_night(recipe, write_job_output), lambda _: None
    )
    (found,) = record["candidates"]
    training = found["training"]["head"] if "draft" in wanted else found["training"]
    assert training["rows"] > 5 and 0 <= training["auc"] <= 1
    version = read_versions(recipe).in_use
    assert version.draft is not None and kind_of(version.draft) is Kind.EAGLE3
    assert version.head is not None and read_card(version.head)["mixing"] == 0

    job = version.apply(recipe.job)
    pair = load_pair(job)
    engine = make_engine(job, pair, load_acceptance_head(job, pair))
    sampling = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)
    requests = [Request(str(i), (3 + i, 4, 5), sampling) for i in range(3)]
    alone = Engine(pair, policy=make_policy("none"), slots=2).generate(requests)
    outputs = {each.id: each.output_ids for each in engine.generate(requests)}
    assert outputs == {each.id: each.output_ids for each in alone}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("kind", ["model", "eagle3"])
def test_a_night_teaches_head_and_draft(tiny_models: TinyModels, tmp_path: Path, kind: str) -> None:
    write_seeds(tmp_path, {f"w{i}": f"word {i}" for i in range(24)})
    values = small_recipe(
        tiny_models,
        tmp_path,
        seeds={"paths": [str(tmp_path / "seeds.jsonl")], "id_column": "id"},
        improve={
            "head": True,
            "draft": True,
            "kind": kind,
            "held_out": 0.5,
            "head_depth": 1,
            "head_epochs": 2,
            "draft_epochs": 1,
            "draft_minutes": 0.1,
        },
    )
    values["job"]["speculation"] = {"policy": "goodput", "k_max": 3}
    values["job"]["unit_rows"] = 8
    recipe = Recipe.model_validate(values)
    status = run_nights(recipe, lambda archive: [Date(2026, 11, 20)])
    assert status.state == "published", status.message
    record = Archive.of(recipe).improvement("2026-11-20")
    assert record is not None
    draft = record["candidates"][0]
    assert draft["what"].startswith("draft draft-2026-11-20 with head-2026-11-20-of-draft")
    report = Path(recipe.output, "_nightly/reports/2026-11-20.md").read_text()
    versions = read_versions(recipe)
    for candidate in record["candidates"]:
        assert "held-out rows" in candidate["why"]
        assert candidate["why"] in report
        found = candidate["comparison"]
        assert found["adopted"] == (candidate["decision"] == "adopted")
        if found["adopted"]:
            assert found["simulated"]["low"] > 1
    adopted = [c for c in record["candidates"] if c["decision"] == "adopted"]
    assert len(versions.known) == 1 + len(adopted)
    # Only what was adopted is kept.
    kept = {p.name for p in Path(recipe.output, "_nightly/models").iterdir() if p.is_dir()}
    names = {Path(p).name for p in (versions.in_use.head, versions.in_use.draft) if p}
    assert kept - {"_specbatch"} == (names if adopted else set())

    # The same night does not teach twice; the next one runs with what is in use.
    run_nights(recipe, lambda archive: [Date(2026, 11, 20)])
    assert Archive.of(recipe).improvement("2026-11-20") == record
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    trend = CliRunner().invoke(app, ["nightly", "trend", str(file), "--json"])
    (night,) = json.loads(trend.stdout)
    assert night["night"] == "2026-11-20"
    assert night["per_million_output_tokens"] > 0
    # As a table, in a log: nothing is cut.
    assert "2026-11-20" in CliRunner().invoke(app, ["nightly", "trend", str(file)]).stdout
