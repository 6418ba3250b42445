"""Every wrong job file and command that came to mind: each ends in a line that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from tests.conftest import TinyModels
from tests.jobs.command_line import call

SECRET = "wJalrXUtnFEMIplanted"


@pytest.fixture(autouse=True)
def no_ray_and_no_aws(no_clients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is found before Ray starts, on a machine without AWS credentials."""
    monkeypatch.setattr("pipeline.run.run.connected", lambda: pytest.fail("Ray was wanted"))
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")


@pytest.fixture
def job(tiny_models: TinyModels, tmp_path: Path) -> dict[str, Any]:
    """A job with nothing wrong in it."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    return {
        "input": {"paths": "in.jsonl", "prompt_column": "prompt"},
        "output": "out",
        "models": {"target": tiny_models.target, "draft": tiny_models.draft},
    }


def refused(result: Result) -> str:
    """The error of a command that was refused as it should be."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert SECRET not in result.output
    assert result.stderr.startswith("error: ")
    return result.stderr


def in_job(job: dict[str, Any], dotted: str, value: object) -> dict[str, Any]:
    """A copy of the job in which one key has another value."""
    key, _, rest = dotted.partition(".")
    inner = in_job(job.get(key) or {}, rest, value) if rest else value
    return {**job, key: inner}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

NOT_JOB_FILES = {
    "empty": (b"", "its top level must be keys and values"),
    "a list": (b"- a\n- b", "its top level must be keys and values"),
    "a word": (b"hello", "its top level must be keys and values"),
    "open bracket": (b"a: [1", "line 1: not valid YAML"),
    "tabs": (b"input:\n\tpaths: x", "line 2: not valid YAML"),
    "two documents": (b"a: 1\n---\nb: 2", "line 2: not valid YAML"),
    "unknown alias": (b"a: *nope", "undefined alias 'nope'"),
    "null byte": (b"a: \0", "not valid YAML: unacceptable character"),
    "no such date": (b"output: 2026-13-45", "not valid YAML: month must be in 1..12"),
    "python object": (b"x: !!python/object/apply:os.system [touch owned]", "not valid YAML"),
    "python name": (b"x: !!python/name:os.system", "not valid YAML"),
    "a list as key": (b"[1, 2]: 2", "unhashable key"),
    "a number as key": (b"1: 2", "1: keys should be strings"),
    "base 60": (b"budget: {hours: 1:30}", "line 1: not valid YAML: 1:30 is not a decimal number"),
    "base 8": (
        b"sampling: {seed: 010}",
        "line 1: not valid YAML: 010 is not a decimal number; wri",
    ),
    "a key twice": (
        b"output: a\noutput: b",
        "line 2: not valid YAML: the key 'output' is given tw",
    ),
    "too deep": (b"a: " + b"[" * 3000 + b"]" * 3000, "it is nested too deeply"),
    "UTF-16": ("a: 1".encode("utf-16"), "cannot be read: 'utf-8' codec can't decode"),
    "a billion laughs": (BOMB.encode(), "i: unknown key"),
    "a template bomb": (
        b"input: {paths: x, template: '" + b"{{" + b"(" * 3000 + b"1" + b")" * 3000 + b"}}'}",
        "input.template: is not a valid jinja2 template: it is nested too deeply",
    ),
}


@pytest.mark.parametrize("name", NOT_JOB_FILES)
def test_what_is_no_job_file(tmp_path: Path, name: str) -> None:
    content, message = NOT_JOB_FILES[name]
    file = tmp_path / "job.yaml"
    file.write_bytes(content)
    error = refused(call("run", file))
    assert message in error
    assert f"{file}: " in error
    assert len(error) < 5000
    assert not (tmp_path / "owned").exists()


def test_a_folder_and_nothing_at_all(tmp_path: Path) -> None:
    assert "cannot be read: " in refused(call("run", tmp_path))
    assert "no such job file" in refused(call("run", tmp_path / "nope.yaml"))


VALUES: list[tuple[str, object, str]] = [
    # ---- names of keys and kinds of values
    ("outputs", "x", "outputs: unknown key; did you mean 'output'?"),
    ("actors.num_gpu", 1, "actors.num_gpu: unknown key; did you mean 'num_gpus'?"),
    ("sampling.max_token", 1, "sampling.max_token: unknown key; did you mean 'max_new_tokens'?"),
    (
        "sampling",
        {"max_tokens": 4, "max_new_tokens": 8},
        "sampling: max_new_tokens 8 and max_tokens 4 are the same setting; give one of them",
    ),
    ("sampling.max_completion_tokens", 0, "sampling.max_new_tokens: input should be greater than"),
    ("max_error_share", 50, "max_error_share: input should be less than or equal to 1"),
    ("sampling", None, "sampling: must be a section of keys and values (leave it out for"),
    ("actors", [1], "actors: must be a section of keys and values"),
    ("models", "gpt", "models: must be a section of keys and values"),
    ("input.paths", None, "input.paths: must be a list"),
    ("input.paths", [], "input.paths: "),
    ("input.paths", [1], "input.paths.0: input should be a valid string"),
    ("input.paths", "", "input.paths: holds an empty path"),
    ("input.paths", ["a\0b"], "input.paths: holds a null byte"),
    ("input.messages_column", "m", "messages_column and prompt_column are all given"),
    ("input.prompt_column", None, "exactly one of messages_column, prompt_column, template"),
    ("output", "", "output: string should have at least 1 character"),
    ("output", None, "output: input should be a valid string"),
    ("output", "a\0b", "output: holds a null byte"),
    ("output", "~nobody-at-all/x", "no user of this name"),
    ("output", "\ud800", "output: must be text without half characters"),
    ("name", "../x", "name: string should match pattern"),
    ("name", 7, "name: input should be a valid string"),
    ("unit_rows", 0, "unit_rows: input should be greater than or equal to 1"),
    ("unit_rows", "many", "unit_rows: input should be a valid integer"),
    ("models.target", "", "models.target: string should have at least 1 character"),
    (
        "models.dtype",
        "fp16",
        "models.dtype: input should be 'auto', 'float32', 'bfloat16' or 'float16'",
    ),
    ("models.quantization", "int4", "models.quantization: input should be 'int8wo' or 'int8'"),
    ("models.device_map", 3, "models.device_map: input should be a valid string"),
    ("sampling.temperature", -1, "sampling.temperature: input should be greater than or equal to"),
    ("sampling.temperature", 1e-9, "sampling.temperature: must be 0 (greedy) or at least 1e-5"),
    ("sampling.temperature", float("inf"), "sampling.temperature: input should be a finite number"),
    ("sampling.top_p", 0, "sampling.top_p: input should be greater than 0"),
    ("sampling.stop", {"a": 1}, "sampling.stop: must be a list"),
    ("sampling.stop", ["a", ""], "sampling.stop: '' is empty, which would stop every row"),
    ("sampling.stop", ["a", "\ufffd"], "sampling.stop: '\ufffd' holds U+FFFD"),
    ("sampling.stop_token_ids", [3, -1], "sampling.stop_token_ids: holds a negative number"),
    ("sampling.max_new_tokens", 0.5, "sampling.max_new_tokens: input should be a valid integer"),
    ("sampling.n", 0, "sampling.n: input should be greater than or equal to 1"),
    ("sampling.max_new_tokens", True, "sampling.max_new_tokens: write a number, not true"),
    ("sampling.prompt_logprobs", False, "write a number, or `null` for none, not false"),
    ("max_error_share", False, "max_error_share: write a number, not false"),
    ("speculation.policy", "Goodput", "speculation.policy: input should be 'none', 'fixed'"),
    ("speculation.k", 99, "speculation.k: input should be less than or equal to 64"),
    ("speculation.threshold", 0.5, "threshold belongs to the policies confidence, entropy, head"),
    ("speculation.width", 9, "speculation.width: input should be less than or equal to 4"),
    ("actors.min", 0, "actors.min: input should be greater than or equal to 1"),
    ("actors.max", 0, "actors.max: input should be greater than or equal to 1"),
    ("actors.num_cpus", float("nan"), "actors.num_cpus: input should be a finite number"),
    # ---- templates
    ("input.template", "{{ x }}", "prompt_column and template are all given"),
    ("input", {"paths": "x", "template": "{{ x"}, "input.template: is not a valid jinja2 template"),
    ("input", {"paths": "x", "template": "{{ x | no }}"}, "No filter named 'no'"),
    ("input", {"paths": "x", "template": "{% include '/etc/passwd' %}"}, "must not include"),
    (
        "input",
        {"paths": "x", "template": "Q: {question}"},
        "input.template: has no column in it; a",
    ),
    # ---- models
    ("models.target", "./targt", "targt: no such folder or GGUF file"),
    ("models.target", "in.jsonl", "in.jsonl: no such folder or GGUF file"),
    ("models.target", ".", "has no config.json"),
    ("models.target", "a//b", "model a//b: no such folder or GGUF file"),
    ("models.target", "nobody/no-such-model", "check the name, the network, or give a folder"),
    ("models.target", "https://huggingface.co/a/b", "write its name alone, 'a/b'"),
    ("models.draft", "pkg:no_such_package/x.gguf", "no installed package 'no_such_package'"),
    ("models.draft", "OTHER", "models.draft: the vocabularies differ at token 5: '!' in"),
    (
        "models.draft",
        "mtp",
        "models.draft: MTP heads inside a target's checkpoint are not read; giv",
    ),
    ("speculation.head", "nowhere", "speculation.head: "),
    # ---- where it reads and writes
    ("input.paths", "nothing/*.parquet", "no files match this glob"),
    ("input.paths", "gone.jsonl", "gone.jsonl: no such file or folder"),
    ("input.paths", "job.yaml", "job.yaml: not one of .parquet, .jsonl, .ndjson"),
    ("input.paths", "x" * 300, "too long for the file system"),
    ("input.paths", f"https://me:{SECRET}@host/x?sig={SECRET}", "https://host/x: https:// is not"),
    ("input.paths", f"s3://me:{SECRET}@bucket/x", "must not hold a user name or password"),
    ("input.paths", "s3://", "no bucket in this URL; write s3://BUCKET/PATH"),
    ("input.paths", "s3://bucket/x", "no AWS credentials found; set AWS_ACCESS_KEY_ID"),
    ("input.prompt_column", "promt", "in.jsonl: no column 'promt'; its columns: prompt"),
    ("input.paths", ".", "lies in the input"),
    ("input.paths", "**/*.parquet", "lies in the input"),
    ("input.paths", "out/completions/*.parquet", "lies in the input"),
    ("output", "in.jsonl", "part of this path is a file, not a folder"),
    ("output", "in.jsonl/x", "part of this path is a file, not a folder"),
    ("output", "gs://bucket/x", "gs:// is not supported; use a local path or s3://"),
    ("output", "s3://bucket/x", "no AWS credentials found; set AWS_ACCESS_KEY_ID"),
    ("output", "x" * 300, "too long for the file system"),
    ("s3", SECRET, "s3: must be a section of keys and values"),
    ("s3.secret_key", SECRET, "s3.secret_key: unknown key"),
    ("s3.endpoint", "s3.example.com", "s3.endpoint: must be a URL such as https://"),
    ("s3.endpoint", f"http://me:{SECRET}@host", "s3.endpoint: must not hold a user name"),
    ("s3.region", [SECRET], "s3.region: input should be a valid string"),
]


@pytest.mark.parametrize(("key", "value", "message"), VALUES)
def test_wrong_values(
    job: dict[str, Any],
    tiny_models: TinyModels,
    tmp_path: Path,
    key: str,
    value: object,
    message: str,
) -> None:
    if value == "OTHER":
        value = tiny_models.other_vocabulary
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(in_job(job, key, value)))
    error = refused(call("run", file))
    assert message in error
    assert len(error.splitlines()) <= 2


OVERRIDES = [
    ("sampling.seed", "--set sampling.seed: write it as key=value"),
    ("=1", "write it as key=value"),
    ("a..b=1", "write it as key=value"),
    ("sampling.stop=[a", "--set sampling.stop=[a: the value is not valid YAML"),
    (
        "sampling.stop=###",
        "it would be a comment; text that holds signs of YAML goes in two kinds of",
    ),
    ("input.template=Q: {{ x }}", """--set 'input.template="Q: {{ q }}"'"""),
    ("budget.hours=1:30", "1:30 is not a decimal number"),
    ("models={target: a, target: b}", "the value is not valid YAML"),
    ("smapling.seed=1", "smapling: unknown key; did you mean 'sampling'?"),
    ("sampling.sed=1", "sampling.sed: unknown key; did you mean 'seed'?"),
    ("sampling.temperature=", "sampling.temperature: input should be a valid number, got None"),
    ("sampling.temperature=hot", "sampling.temperature: input should be a valid number"),
    ("sampling=3", "sampling: must be a section of keys and values"),
    ("sampling.seed.x=1", "sampling.seed: input should be a valid integer"),
    ("sampling.max_new_tokens=1e3", "sampling.max_new_tokens: input should be a valid integer"),
    ("output=", "output: input should be a valid string, got None"),
    ("input.paths=", "input.paths: must be a list"),
    ("unit_rows=-1", "unit_rows: input should be greater than or equal to 1"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES)
def test_wrong_overrides(job: dict[str, Any], tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    assert message in refused(call("validate", file, "--set", override))


COMMANDS = [
    (["run"], "Missing argument 'FILE'"),
    (["runn", "x"], "No such command 'runn'"),
    (["run", "x", "--sett", "a=1"], "No such option: --sett"),
    (["run", "x", "--set"], "requires an argument"),
    (["report", "/nowhere"], "no job's output here: there is no _specbatch/job.json"),
    (["report", "s3://"], "no bucket in this URL"),
    (["report", f"https://me:{SECRET}@host/x"], "https://host/x: https:// is not supported"),
    (["report", "s3://b/x", "--endpoint", "nope"], "--endpoint: must be a URL"),
    (["report", "s3://b/x", "--endpoint", f"http://me:{SECRET}@h"], "--endpoint: must not hold"),
    (["report", "s3://b/x", "--profile", "nobody"], "no AWS profile named 'nobody'"),
    (["explain", "/nowhere", "--row", "x"], "no job's output here"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS)
def test_wrong_commands(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert SECRET not in result.output


def test_the_good_job_is_good(job: dict[str, Any], tmp_path: Path) -> None:
    """Without this the tables would prove little."""
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job))
    assert call("validate", file).exit_code == 0


# ----------------------------------------------------------------------------- MTP

MTP: list[tuple[dict[str, str], list[str]]] = [
    *(({"draft": "mtp"}, [command]) for command in ("validate", "plan", "run", "profile")),
    ({"draft": "mtp"}, ["submit", "--address", "http://nobody:8265"]),
    ({}, ["validate", "--set", "models.draft=MTP"]),
    ({}, ["profile", "--draft", "mtp"]),
]


@pytest.mark.parametrize(("models", "command"), MTP)
def test_heads_inside_a_target_are_no_draft(
    job: dict[str, Any], tmp_path: Path, models: dict[str, str], command: list[str]
) -> None:
    """Catches a command that takes them for a name on the hub, whose error is another one."""
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump({**job, "models": job["models"] | models}))
    error = refused(call(command[0], file, *command[1:]))
    assert f"{file}: models.draft: MTP heads inside a target's checkpoint are not read" in error
    assert "`specbatch distill --kind eagle3`; for a folder of this name write ./" in error


@pytest.mark.parametrize("name", ["./mtp", "mtp"])
def test_a_folder_that_is_called_mtp_is_a_draft(
    job: dict[str, Any], tiny_models: TinyModels, tmp_path: Path, name: str
) -> None:
    """It lies beside the job file, where `mtp` alone is a path as well."""
    (tmp_path / "mtp").symlink_to(tiny_models.draft)
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(in_job(job, "models.draft", name)))
    result = call("validate", file)
    assert result.exit_code == 0, result.output
    assert f'"draft": "{tmp_path / "mtp"}"' in result.stdout


# ----------------------------------------------------------------------- weights


def test_pickle_weights_are_not_loaded(job: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    file = tmp_path / "job.yaml"
    for key in ("models.target", "models.draft"):
        file.write_text(yaml.safe_dump(in_job(job, key, str(folder))))
        for command in ("validate", "run"):
            error = refused(call(command, file))
            assert "has no safetensors, only pytorch_model.bin, a pickle file" in error
    (folder / "pytorch_model.bin").unlink()
    assert "has no weights" in refused(call("run", file))


def test_code_that_comes_with_a_model_is_not_run(tiny_models: TinyModels, tmp_path: Path) -> None:
    """In a process of its own, since imported code would stay."""
    import json
    import shutil

    folder = tmp_path / "remote"
    shutil.copytree(tiny_models.target, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'owned')!r}, 'w')\nclass C: pass\nclass M: pass\n"
    )
    code = (
        "from specdec.loading.pair import ModelPair\n"
        "from specdec.loading.sources import PairError\n"
        f"try: ModelPair.load({str(folder)!r}, device='cpu')\n"
        "except PairError as error: print(error)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert "needs Python code of its own" in result.stdout, result.stderr
    assert not (tmp_path / "owned").exists()
