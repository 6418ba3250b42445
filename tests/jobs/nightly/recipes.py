"""Small recipes over the tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from jobs.nightly.archive import Archive
from jobs.nightly.recipe import Recipe
from tests.conftest import TinyModels


def small_recipe(models: TinyModels, root: Path, **changes: Any) -> dict[str, Any]:
    """A recipe whose random models' texts pass most filters."""
    values: dict[str, Any] = {
        "name": "small",
        "output": str(root / "dataset"),
        "seeds": {"paths": [str(root / "seeds.jsonl")], "id_column": "id", "per_night": 6},
        "templates": [{"name": "ask", "turns": ["Say {{ word }}."]}],
        "job": {
            "models": {"target": models.target, "draft": models.draft},
            "sampling": {"max_new_tokens": 12},
            "speculation": {"policy": "fixed", "k": 2, "verification": "coupled"},
            "unit_rows": 2,
            "actors": {"num_cpus": 1},
            "prices": {"cpu_hour": 3.6, "source": "the test", "date": "2026-11-25"},
        },
        "filters": {"finish_reason": None, "length": None, "repetition": None},
        "split": {"validation": 0.3},
    }
    return {**values, **changes}


def write_seeds(root: Path, words: dict[str, str]) -> None:
    """Seeds of the ids and words."""
    lines = [json.dumps({"id": name, "word": word}) for name, word in words.items()]
    (root / "seeds.jsonl").write_text("\n".join(lines) + "\n")


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    """All published rows, by the manifests."""
    archive = Archive.of(recipe)
    return [
        row
        for night in archive.nights()
        for file in night.files
        for row in pq.read_table(Path(recipe.output, file["name"])).to_pylist()
    ]
