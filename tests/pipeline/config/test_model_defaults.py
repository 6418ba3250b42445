"""What a target recommends is used where a job says nothing of it, and said so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.job import JobConfig
from pipeline.config.model_defaults import in_force, sources, with_model_defaults
from pipeline.errors import UserError

RECOMMENDED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": 1}


def job(target: Path, **sampling: Any) -> JobConfig:
    (target / "config.json").write_text("{}")
    (target / "model.safetensors").write_bytes(b"")
    return JobConfig.model_validate(
        {
            "input": {"paths": "in.jsonl", "prompt_column": "p"},
            "output": "out",
            "models": {"target": str(target)},
            "speculation": {"policy": "none"},
            "sampling": sampling,
        }
    )


@pytest.mark.parametrize(
    ("sampling", "values", "taken"),
    [
        ({}, (0.6, 0.95, 20), ["temperature", "top_p", "top_k"]),
        ({"top_p": 0.5}, (0.6, 0.5, 20), ["temperature", "top_k"]),
        # Who names a temperature means a sampling of their own,
        ({"temperature": 1.0}, (1.0, 1.0, 0), []),
        ({"defaults": "none"}, (1.0, 1.0, 0), []),
        # unless they ask for the model's.
        ({"temperature": 0.3, "defaults": "model"}, (0.3, 0.95, 20), ["top_p", "top_k"]),
    ],
)
def test_what_the_job_does_not_say_the_model_does(
    tmp_path: Path, sampling: dict[str, Any], values: tuple[float, ...], taken: list[str]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    found, keys = with_model_defaults(job(tmp_path, **sampling))
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.top_k) == values
    assert keys == taken
    assert with_model_defaults(found)[0] == found


def test_where_each_value_is_from(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(RECOMMENDED))
    found, taken = with_model_defaults(job(tmp_path, top_p=0.5, max_tokens=7))
    said = in_force(found.sampling.model_dump(), sources(found.sampling, taken))
    assert said == (
        "max_new_tokens 7, top_p 0.5 (the job); temperature 0.6, top_k 20 (the target's "
        "generation_config.json); min_p 0, repetition_penalty 1 (defaults)"
    )


def test_a_model_without_recommendations_changes_nothing(tmp_path: Path) -> None:
    plain = job(tmp_path)
    assert with_model_defaults(plain) == (plain, [])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert with_model_defaults(plain) == (plain, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"temperature": -1}', "has temperature that cannot be used .* set sampling.defaults"),
        ("{", "cannot be read"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        with_model_defaults(job(tmp_path))


def test_a_hub_that_cannot_be_asked_is_no_model_without_recommendations() -> None:
    """Else a job would sample otherwise on a machine without network, and nothing would say so."""
    values = {
        "input": {"paths": "in.jsonl", "prompt_column": "p"},
        "output": "out",
        "models": {"target": "nobody/no-such-model"},
        "speculation": {"policy": "none"},
    }
    with pytest.raises(UserError, match=r"check the name, the network.*sampling.defaults: none"):
        with_model_defaults(JobConfig.model_validate(values))
    values["sampling"] = {"defaults": "none"}
    assert with_model_defaults(JobConfig.model_validate(values))[1] == []
