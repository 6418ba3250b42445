"""Five dates by the command line: one night killed, one missed and caught up, one back-filled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs.nightly.archive import Archive
from jobs.nightly.recipe import load_recipe
from jobs.terminal.amounts import money
from tests.conftest import TinyModels
from tests.jobs.nightly.recipes import rows_of, small_recipe, write_seeds

ROOT = Path(__file__).parents[3]


def nightly(file: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "nightly", str(file), "--quiet", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def made(file: Path, *options: str) -> None:
    process = nightly(file, *options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.ray
def test_five_dates(tiny_models: TinyModels, tmp_path: Path) -> None:
    write_seeds(tmp_path, {f"w{i:02d}": f"word number {i}" for i in range(40)})
    seeds = {"paths": ["seeds.jsonl"], "id_column": "id", "per_night": 8, "only_new": True}
    templates = [
        {"name": "ask", "turns": ["Say {{ word }}."]},
        {
            "name": "twice",
            "turns": ["Say {{ word }}.", "You said {{ completions[0] | truncate(12) }}: why?"],
        },
    ]
    values = small_recipe(tiny_models, tmp_path, seeds=seeds, templates=templates)
    values["job"]["sampling"] = {"max_new_tokens": 60, "n": 2}
    values["job"]["unit_rows"] = 1
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))

    killed = nightly(file, "--date", "2026-11-20")
    turn = tmp_path / "dataset/_nightly/work"
    deadline = time.monotonic() + 120
    while len(list(turn.glob("*/turn-1/completions/*"))) < 2:
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = {p.name: p.stat().st_mtime_ns for p in turn.glob("*/turn-1/completions/*")}
    assert 2 <= len(before) < 16
    assert not (tmp_path / "dataset/data").exists()
    made(file, "--date", "2026-11-20")
    after = {p.name: p.stat().st_mtime_ns for p in turn.glob("*/turn-1/completions/*")}
    assert before.items() <= after.items()

    made(file, "--date", "2026-11-21")
    made(file, "--date", "2026-11-23", "--catch-up", "3")  # the 22nd was missed
    made(file, "--from", "2026-11-19", "--to", "2026-11-19")
    recipe = load_recipe(file)
    archive = Archive.of(recipe)
    nights = archive.nights()
    assert [night.date for night in nights] == [f"2026-11-{day}" for day in range(19, 24)]
    assert all(night.seeds == 8 and night.conversations == 32 for night in nights)
    assert all(night.lost == {} for night in nights)
    rows = rows_of(recipe)
    for night in nights:
        removed = sum(each["removed"] for each in night.filters)
        assert night.total_rows == night.conversations - removed
        assert night.total_rows == sum(row["night"] == night.date for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len({json.dumps(row["messages"]) for row in rows}) == len(rows)
    assert {row["seed_id"] for row in rows} == {f"w{i:02d}" for i in range(40)}

    import datasets

    loaded = datasets.load_dataset(str(tmp_path / "dataset"), cache_dir=str(tmp_path / "cache"))
    assert sum(part.num_rows for part in loaded.values()) == len(rows)
    card = (tmp_path / "dataset/README.md").read_text()
    assert money(sum(night.cost or 0 for night in nights), "USD") in card
    # The dead run held the lock; the second one took it from there.
    assert (
        json.loads((tmp_path / "dataset/_nightly/status.json").read_text())["state"] == "published"
    )
