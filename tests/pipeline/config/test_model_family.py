from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.model_family import LAYERS, eagle, expected, families, without_trees
from pipeline.errors import UserError


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """Writes a model's folder with a config, and gives its name."""

    def write(text: str) -> str:
        (tmp_path / "model.safetensors").touch()
        (tmp_path / "config.json").write_text(text)
        return str(tmp_path)

    return write


def test_each_family_says_what_runs_or_why_not() -> None:
    for kind, family in families().items():
        assert (family.layers in LAYERS) if family.runs else family.why, kind


@pytest.mark.parametrize(
    ("config", "line", "good"),
    [
        ({"model_type": "llama"}, "llama runs: layers with a third", True),
        (
            {"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3"}},
            "qwen3 runs: layers",
            True,
        ),
        ({"model_type": "xlnet"}, "xlnet was refused when it was tried: ", False),
        ({"model_type": "brand_new"}, "brand_new is no family that was tried", False),
        ({}, "", True),
    ],
)
def test_a_config_tells_the_family(model: Any, config: Any, line: str, good: bool) -> None:
    found, fine = expected(model(json.dumps(config)))
    assert found.startswith(line) and bool(found) == bool(line) and fine == good


def test_a_hub_model_that_is_not_here_says_nothing() -> None:
    assert expected("nobody/such-a-model") == ("", True)


def test_a_config_that_cannot_be_read_is_named(model: Any) -> None:
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        expected(model("{"))


EAGLE = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "vocab_size": 128_256,
    "draft_vocab_size": 32_000,
    "hidden_size": 4096,
}


def test_an_eagle_draft_is_told_as_such(model: Any) -> None:
    name = model(json.dumps(EAGLE))
    line, fine = expected(name)
    assert line.startswith("EAGLE-3 (EAGLE/SGLang format): llama layer") and fine
    assert "32,000 of 128,256 tokens" in line and eagle(name) == line
    assert eagle("nobody/such-a-model") == ""


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (EAGLE, "the draft is EAGLE-3"),
        ({"model_type": "mamba"}, "the draft has layers whose state runs on"),
        ({"text_config": {"model_type": "qwen3_5_text"}}, "the draft has layers whose state"),
        ({"model_type": "llama"}, ""),
        ({"model_type": "brand_new"}, ""),
        ({}, ""),
    ],
)
def test_whether_candidates_can_branch_is_told(model: Any, config: Any, why: str) -> None:
    assert without_trees("nobody/such-a-model", model(json.dumps(config))).startswith(why)
    assert bool(without_trees("nobody/such-a-model", model(json.dumps(config)))) == bool(why)
    assert without_trees(model(json.dumps(config)), None) == "there is no draft"
