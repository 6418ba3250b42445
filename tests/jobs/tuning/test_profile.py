from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import jobs.tuning.profile_draft
from jobs.cli import app
from jobs.tuning.profile_report import recommend
from tests.conftest import TinyModels

WriteRows = Callable[..., str]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["profile", *(str(a) for a in arguments)])


def one_error(result: Result) -> str:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    return result.stderr.splitlines()[-1]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.tuning.profile_draft, "COST_SECONDS", 0.2)


@pytest.fixture
def job(tiny_models: TinyModels, write_rows: WriteRows, tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [
        {"prompt": f"say {i} times {i * 7}", "kind": ["odd", "even"][i % 2 == 0]} for i in range(15)
    ]
    write_rows("in/prompts.jsonl", [*rows, {"prompt": "", "kind": "odd"}])
    file = tmp_path / "job.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "input": {"paths": "in", "prompt_column": "prompt"},
                "output": "out",
                "models": {"target": tiny_models.target, "draft": tiny_models.draft},
                "sampling": {"max_new_tokens": 12, "temperature": 0.8},
                "speculation": {"policy": "none"},
                "actors": {"slots": 3},
            }
        )
    )
    return file


def test_a_profile(job: Path, tmp_path: Path) -> None:
    result = call(job, "--class-column", "kind")
    assert result.exit_code == 0, result.output
    for title in (
        "P(candidate i is accepted | those before it are)",
        "Acceptance by class of prompt",
        "Milliseconds by packed tokens",
        "Predicted speedup over no speculation",
        "Recommendation",
    ):
        assert title in result.stdout
    assert "odd" in result.stdout and "even" in result.stdout
    assert "these figures are rough" in result.stdout
    assert "1 rows were left out, most often: EmptyPrompt" in result.stdout
    assert "slots: " in result.stdout
    assert "recording acceptance" in result.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_profile_as_json(job: Path) -> None:
    result = call(job, "--json", "--rows", 8, "--set", "speculation.verification=coupled")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["verification"] == "coupled"
    assert found["rows"] + sum(found["rows_left_out"].values()) == 8
    assert [each["live"] for each in found["predictions"]] == [1, 2, 3]
    for each in found["predictions"]:
        assert each["speedup"]["none"] == 1
        assert set(each["speedup"]) >= {"fixed 1", "fixed 8", "heuristic", "entropy", "goodput"}
        assert "head" not in each["speedup"]
        low, high = each["goodput_interval"]
        assert low <= each["speedup"]["goodput"] <= high
    # With one live row the bound is exact.
    first = found["predictions"][0]
    assert max(first["speedup"].values()) <= first["bound"] + 1e-9
    assert found["acceptance_by_class"][0]["class"] == "prompts.jsonl"
    assert found["recommendation"]["reasons"]


def test_a_head_takes_part(job: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    from specdec.loading.head_files import save_head
    from specdec.loading.pair import ModelPair
    from specdec.policies.signals import AcceptanceHead

    pair = ModelPair.load(tiny_models.target, tiny_models.draft, device="cpu")
    save_head(tmp_path / "head", AcceptanceHead(64, depth=1), pair, {})
    chosen = ("speculation.policy=goodput", f"speculation.head={tmp_path / 'head'}")
    sets = [word for each in chosen for word in ("--set", each)]
    result = call(job, "--json", "--rows", 5, *sets)
    assert result.exit_code == 0, result.output
    assert "head" in json.loads(result.stdout)["predictions"][0]["speedup"]


def test_mistakes_are_one_line(job: Path, tiny_models: TinyModels) -> None:
    assert "no column 'kinds'" in one_error(call(job, "--class-column", "kinds"))
    assert "no column 'promt'" in one_error(call(job, "--set", "input.prompt_column=promt"))
    other = f"models.draft={tiny_models.other_vocabulary}"
    assert "draft" in one_error(call(job, "--set", other))


def test_help_has_an_example() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert "specbatch profile job.yaml --rows 64" in result.stdout


# --------------------------------------------------------------------------- recommendations


def prediction(live: int, none: float, **speedup: float) -> dict[str, Any]:
    speeds = {name.replace("_", " "): value for name, value in speedup.items()}
    fixed = max((n for n in speeds if n.startswith("fixed")), key=lambda n: speeds[n])
    return {
        "live": live,
        "none_tokens_per_second": none,
        "speedup": {"none": 1.0, **speeds},
        "best_fixed": fixed,
    }


def test_goodput_is_recommended_where_it_is_about_the_best() -> None:
    found = recommend(
        [
            prediction(1, 10, fixed_2=1.5, goodput=1.6),
            prediction(8, 60, fixed_2=1.21, goodput=1.2),
            prediction(16, 80, fixed_2=0.7, goodput=0.99),
        ]
    )
    # 8 rows give 72 tokens/s, 16 give 80 without speculation.
    assert (found["policy"], found["slots"], found["speculate"]) == ("none", 16, False)
    text = " ".join(found["reasons"])
    assert "Do not speculate at 16 live rows" in text
    assert "fixed 2, the best of the other policies, would be 0.70 times" in text
    assert "switches speculation off by itself" in text
    assert "Speculation pays at 1, 8 live rows" in text

    found = recommend(
        [
            prediction(1, 10, fixed_2=1.5, goodput=1.6),
            prediction(8, 60, fixed_2=1.21, goodput=1.2),
        ]
    )
    assert (found["policy"], found["slots"]) == ("goodput", 8)
    assert found["speedup"] == 1.2


def test_a_policy_that_is_clearly_faster_is_recommended() -> None:
    found = recommend([prediction(4, 10, fixed_2=1.4, fixed_3=1.5, goodput=1.3)])
    assert (found["policy"], found["k"], found["slots"]) == ("fixed", 3, 4)
    assert "goodput, the usual choice, would reach 1.30" in " ".join(found["reasons"])
