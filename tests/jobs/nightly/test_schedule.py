from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import TinyModels
from recipes import small_recipe
from typer.testing import CliRunner, Result

from jobs.cli import app


@pytest.fixture
def recipe(tiny_models: TinyModels, tmp_path: Path) -> Path:
    file = tmp_path / "100% new.yaml"
    values = small_recipe(tiny_models, tmp_path, name="Small.One")
    values |= {"schedule": {"cron": "30 2 * * 1-5", "timezone": "Europe/Berlin"}, "catch_up": 2}
    file.write_text(yaml.safe_dump(values))
    return file


def render(kind: str, recipe: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["nightly", "render", kind, str(recipe), *options])


def test_cron(recipe: Path) -> None:
    line = render("cron", recipe).stdout.splitlines()[1]
    assert line.startswith("30 2 * * 1-5 cd ")
    words = shlex.split(line.replace("\\%", "%"))
    assert "\\%" in line
    assert str(recipe) in words
    assert words[-1] == "2>&1"


def test_kubernetes(recipe: Path) -> None:
    config, job = yaml.safe_load_all(render("kubernetes", recipe, "--image", "x:1").stdout)
    assert config["data"]["recipe.yaml"] == recipe.read_text()
    assert job["kind"] == "CronJob"
    spec = job["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("30 2 * * 1-5", "Europe/Berlin")
    assert spec["concurrencyPolicy"] == "Forbid"
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "x:1"
    assert (
        pod["volumes"][0]["configMap"]["name"] == config["metadata"]["name"] == "nightly-small-one"
    )


def test_kuberay(recipe: Path) -> None:
    text = render("kuberay", recipe).stdout
    _, job = yaml.safe_load_all(text)
    assert "operator's time zone" in text
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayCronJob")
    template = job["spec"]["jobTemplate"]
    assert template["shutdownAfterJobFinishes"] is True
    assert template["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] == 1


def test_airflow(recipe: Path) -> None:
    text = render("airflow", recipe).stdout
    ast.parse(text)
    assert "schedule='30 2 * * 1-5'" in text
    assert "--catch-up 2" in text
    assert "data_interval_end" in text


def test_an_unknown_kind(recipe: Path) -> None:
    result = render("airflo", recipe)
    assert result.exit_code == 2
    assert "did you mean 'airflow'?" in result.stderr
