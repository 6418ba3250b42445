"""The families that most people run are right, and one that is wrong is told."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from specdec.model.check import Reference
from specdec.model.stock import StockModel

MOST_USED = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "gemma2", "gemma3_text", "gemma4_text",
    "gpt_oss", "phi3", "qwen3_5_text", "granitemoehybrid",
)  # fmt: skip


@pytest.fixture(scope="module")
def families() -> Iterator[Any]:
    """The benchmark as a module; it imports the files beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        yield importlib.import_module("families")


@pytest.mark.parametrize("kind", MOST_USED)
def test_a_family_that_many_people_run_is_right(families: Any, kind: str) -> None:
    found = families.check_one(families.tiny_model(families.tiny_config(kind, {})))
    verdicts = {dtype: each["verdict"] for dtype, each in found.items()}
    assert verdicts == {"float32": "right", "bfloat16": "right"}


def test_a_family_that_is_wrong_is_told(families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the check at loading is blind."""
    monkeypatch.setattr(Reference, "difference", lambda *_: "")
    monkeypatch.setattr(StockModel, "logits", lambda self, hidden: 1.5 * self.head(hidden))
    found = families.check_one(families.tiny_model(families.tiny_config("llama", {})))
    assert {each["verdict"] for each in found.values()} == {"wrong"}


def test_what_was_found_is_kept_until_it_is_found_again(families: Any, tmp_path: Path) -> None:
    def line(kind: str, found: dict[str, Any]) -> dict[str, Any]:
        return {
            "kind": kind,
            "verdict": found["verdict"],
            "found": {"as it comes": {"float32": found}},
        }

    right = {"verdict": "right", "fused": False, "kernels": True, "recurrent": False}
    refused = {"verdict": "refused", "why": "B cannot run packed: it is recurrent"}
    crashed = {"verdict": "crashed", "why": "a bug"}
    table = tmp_path / "families.yaml"
    families.save(table, [line("b", refused), line("a", right), line("c", right)])
    families.save(table, [line("b", right), line("c", crashed)])
    kept = {"runs": True, "layers": "kernels", "why": ""}
    assert yaml.safe_load(table.read_text()) == {"a": kept, "b": kept}
    families.save(table, [line("a", refused)])
    assert yaml.safe_load(table.read_text())["a"] == {
        "runs": False,
        "layers": None,
        "why": "it is recurrent",
    }


def test_a_family_that_is_refused_in_one_dtype_says_which(families: Any) -> None:
    right = {"verdict": "right", "fused": False, "kernels": True, "recurrent": True}
    refused = {"verdict": "refused", "why": "B cannot run packed: it differs"}
    unbuilt = {"verdict": "not built", "why": "ValueError: no"}
    found = {"as it comes": {"float32": refused, "bfloat16": right}, "capped": {"float32": unbuilt}}
    summary = families.summary(found, "right")
    assert summary["runs"] and summary["why"] == "as it comes in float32: it differs"
    assert summary["recurrent"]
