from __future__ import annotations

import ast
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from jobs.cli import app
from tests.conftest import TinyModels
from tests.jobs.nightly.recipes import small_recipe


@pytest.fixture
def recipe(tiny_models: TinyModels, tmp_path: Path) -> Path:
    file = tmp_path / "100% new.yaml"
    values = small_recipe(tiny_models, tmp_path, name="Small.One")
    values["job"]["models"] = {"target": "org/target", "draft": "org/draft"}
    values |= {"schedule": {"cron": "30 2 * * 1-5", "timezone": "Europe/Berlin"}, "catch_up": 2}
    file.write_text(yaml.safe_dump(values))
    return file


def render(kind: str, recipe: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["nightly", "render", kind, str(recipe), *options])


def test_cron(recipe: Path) -> None:
    line = render("cron", recipe).stdout.splitlines()[1]
    assert line.startswith("30 2 * * 1-5 cd ")
    assert "\\%" in line
    words = shlex.split(line.replace("\\%", "%"))
    assert str(recipe) in words
    assert words[-1] == "2>&1"
    program = words[words.index("flock") + 3]
    assert shutil.which(program, path="/usr/bin:/bin"), "cron's PATH is no more than this"


@pytest.mark.parametrize("kind", ["cron", "airflow"])
def test_what_is_overridden_is_so_every_night(recipe: Path, kind: str) -> None:
    text = render(kind, recipe, "--set", "seeds.per_night=20", "--set", "output=/data/x").stdout
    assert "--set seeds.per_night=20 --set output=/data/x" in text


def test_pods(recipe: Path, tmp_path: Path) -> None:
    place = ("--image", "x:1", "--volume", f"claim:{tmp_path}", "--secret", "keys")
    config, job = yaml.safe_load_all(render("kuberay", recipe, *place).stdout)
    assert config["data"]["job.yaml"] == recipe.read_text()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayCronJob")
    assert job["metadata"]["name"] == config["metadata"]["name"] == "nightly-small-one"
    spec = job["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("30 2 * * 1-5", "Europe/Berlin")
    assert spec["jobTemplate"]["entrypoint"] == "specbatch nightly /etc/specbatch/job.yaml"

    documents = list(yaml.safe_load_all(render("kubernetes", recipe, *place).stdout))
    cron = documents[-1]
    assert (cron["kind"], cron["spec"]["timeZone"]) == ("CronJob", "Europe/Berlin")
    created = yaml.safe_load(documents[1]["data"]["rayjob.yaml"])
    assert created["spec"] == spec["jobTemplate"]


def test_pods_need_an_image_and_paths_that_they_have(recipe: Path) -> None:
    result = render("kuberay", recipe)
    assert result.exit_code == 2
    assert "--image: give the container image" in result.stderr
    result = render("kuberay", recipe, "--image", "x:1")
    assert result.exit_code == 2
    assert "is on no volume of the pods" in result.stderr


def test_airflow(recipe: Path) -> None:
    text = render("airflow", recipe).stdout
    tree = ast.parse(text)
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert {"30 2 * * 1-5", "Europe/Berlin", "nightly-Small.One"} <= strings
    (command,) = (s for s in strings if isinstance(s, str) and s.startswith("specbatch nightly"))
    words = shlex.split(command)
    assert words[words.index("--date") + 1].startswith("{{ data_interval_end.in_timezone(")
    assert words[-2:] == ["--catch-up", "2"]


def test_an_unknown_kind(recipe: Path) -> None:
    result = render("airflo", recipe)
    assert result.exit_code == 2
    assert "did you mean 'airflow'?" in result.stderr
