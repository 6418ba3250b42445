from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.model_family import LAYERS, expected, families
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
