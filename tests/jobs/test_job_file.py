from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.job_file import JobFileError, load_job

GOOD: dict[str, Any] = {
    "input": {"paths": ["prompts/*.parquet"], "messages_column": "messages"},
    "output": "out",
    "models": {"target": "owner/target", "draft": "./draft"},
}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump({**GOOD, **changes}))
    return file


def test_relative_paths_are_relative_to_the_job_file(tmp_path: Path) -> None:
    job = load_job(write(tmp_path))
    assert job.input.paths == (f"{tmp_path}/prompts/*.parquet",)
    assert job.output == f"{tmp_path}/out"
    assert job.models.draft == f"{tmp_path}/draft"
    assert job.models.target == "owner/target"


def test_urls_and_absolute_paths_stay(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, output="s3://bucket/out"), ["input.paths=[/data/a.jsonl]"])
    assert job.output == "s3://bucket/out"
    assert job.input.paths == ("/data/a.jsonl",)


def test_model_folder_beside_the_job_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    job = load_job(write(tmp_path, models={"target": "mine", "draft": "theirs"}))
    assert job.models.target == f"{tmp_path}/mine"
    assert job.models.draft == "theirs"


def test_head_folder_beside_the_job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, speculation={"head": "heads/mine"})
    assert load_job(file).speculation.head == f"{tmp_path}/heads/mine"
    monkeypatch.chdir("/")
    assert load_job(file, ["speculation.head=other"]).speculation.head == "/other"


def test_a_corpus_lies_beside_the_job_file(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, speculation={"corpus": ["out/a", "s3://bucket/b"]}))
    assert job.speculation.corpus == (f"{tmp_path}/out/a", "s3://bucket/b")
    job = load_job(write(tmp_path, speculation={"corpus": "out/a", "policy": "suffix"}))
    assert job.speculation.corpus == (f"{tmp_path}/out/a",)


def test_head_policy_may_use_an_estimator_without_training(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, speculation={"policy": "head", "estimator": "entropy"}))
    assert job.speculation.head is None


def test_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    overrides = ["sampling.temperature=0", "sampling.stop=[a, b]", "output=x", "unit_rows=8"]
    job = load_job(write(tmp_path), overrides)
    assert job.sampling.temperature == 0
    assert job.sampling.stop == ("a", "b")
    assert job.output == "/x"
    assert job.unit_rows == 8
    assert job.input.messages_column == "messages"


def test_defaults_are_those_of_the_design(tmp_path: Path) -> None:
    job = load_job(write(tmp_path))
    assert job.speculation.policy == "goodput"
    assert job.speculation.control_share == 0.02
    assert job.speculation.verification == "rejection"
    assert job.unit_rows == 256
    assert not job.models.trust_remote_code


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": "x"}, "outputs: unknown key; did you mean 'output'?"),
        ({"actors": {"num_gpu": 1}}, "actors.num_gpu: unknown key; did you mean 'num_gpus'?"),
        (
            {"actors": {"groups": {"L4": {"num_gpu": 1}}}},
            "actors.groups.L4.num_gpu: unknown key; did you mean 'num_gpus'?",
        ),
        ({"input": {"paths": "a"}}, "exactly one of messages_column, prompt_column, template"),
        (
            {"input": {"paths": "a", "prompt_column": "p", "template": "{{ t }}"}},
            "prompt_column and template are all given",
        ),
        ({"input": {"paths": "a", "template": "{{ x"}}, "input.template: is not a valid jinja2"),
        ({"input": {"paths": [], "prompt_column": "p"}}, "input.paths: "),
        (
            {"models": {"target": "t"}, "speculation": {"policy": "fixed"}},
            "speculation.policy fixed needs models.draft; give a draft, or set speculation.policy "
            "to none, suffix or goodput",
        ),
        (
            {"models": {"target": "t"}, "speculation": {"estimator": "entropy"}},
            "speculation.estimator judges what a draft proposes, and models.draft is null",
        ),
        ({"models": {"draft": "t"}}, "models.target: required"),
        (
            {"models": {"target": "t", "draft": "d", "quantization": "int8", "dtype": "bfloat16"}},
            "models: quantization int8 goes with dtype float32, not bfloat16",
        ),
        (
            {"speculation": {"policy": "fixed", "lookup": True}},
            "lookup belongs to the policies suffix and goodput, not to fixed",
        ),
        (
            {"speculation": {"policy": "suffix", "lookup": False}},
            "lookup: false leaves the policy suffix nothing to propose",
        ),
        (
            {"models": {"target": "t"}, "speculation": {"lookup": False}},
            "speculation.lookup is false and models.draft is null",
        ),
        (
            {"speculation": {"lookup": False, "corpus": "out/a"}},
            "corpus is for looking candidates up, which lookup: false forbids; remove one of them",
        ),
        (
            {"speculation": {"policy": "fixed", "corpus": ["out/a"]}},
            "corpus is for looking candidates up, which fixed does not; remove one of them",
        ),
        ({"speculation": {"corpus": 7}}, "speculation.corpus: "),
        ({"speculation": {"policy": "head"}}, "head: give the folder of a trained head"),
        ({"speculation": {"estimator": "head"}}, "make one with specbatch train-head"),
        (
            {"speculation": {"policy": "fixed", "head": "h"}},
            "head belongs to the policies head and goodput, not to fixed",
        ),
        (
            {"speculation": {"policy": "fixed", "estimator": "entropy"}},
            "estimator belongs to the policies head and goodput, not to fixed",
        ),
        (
            {"speculation": {"head": "h", "estimator": "entropy"}},
            "head is not used with estimator entropy",
        ),
        ({"speculation": {"policy": "head", "head": "h", "threshold": 1}}, "speculation.threshold"),
        ({"speculation": {"policy": "fast"}}, "speculation.policy: input should be 'none'"),
        ({"speculation": {"control_share": 0.9}}, "speculation.control_share: input should be"),
        ({"speculation": {"threshold": 0.5}}, "threshold belongs to the policies confidence"),
        ({"speculation": {"k_min": 9, "k_max": 3}}, "k_min (9) is more than k_max (3)"),
        ({"sampling": {"n": 0}}, "sampling.n: input should be greater than or equal to 1, got 0"),
        ({"sampling": {"temperature": -1}}, "sampling.temperature: input should be greater than"),
        ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        (
            {"sampling": {"stop": ["a", ""]}},
            "sampling.stop: '' is empty, which would stop every row at once",
        ),
        ({"actors": {"min": 4, "max": 2}}, "actors: max (2) is less than min (4)"),
        ({"s3": {"endpoint": "http://user:pw@host"}}, "must not hold a user name or password"),
        ({"s3": {"secret_key": "x"}}, "s3.secret_key: unknown key"),
        ({"unit_rows": "many"}, "unit_rows: input should be a valid integer"),
        ({"name": "../x"}, "name: "),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(JobFileError) as caught:
        load_job(write(tmp_path, **changes))
    assert message in str(caught.value)
    assert all(line.startswith(f"{tmp_path}/job.yaml: ") for line in str(caught.value).split("\n"))


def test_every_mistake_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobFileError) as caught:
        load_job(write(tmp_path, unit_rows=0, nam="x"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "line 1: not valid YAML"),
        ("- a\n- b", "top level must be keys and values"),
        ("", "top level must be keys and values"),
        ("x: !!python/object/apply:os.system ['touch /tmp/owned']", "not valid YAML"),
    ],
)
def test_what_is_not_a_job_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(JobFileError, match=r"job\.yaml") as caught:
        load_job(file)
    assert message in str(caught.value)


def test_missing_file_and_bad_override(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="no such job file"):
        load_job(tmp_path / "nope.yaml")
    with pytest.raises(JobFileError, match="write it as key=value"):
        load_job(write(tmp_path), ["sampling.seed"])
    with pytest.raises(JobFileError, match="not valid YAML"):
        load_job(write(tmp_path), ["sampling.stop=[a"])
