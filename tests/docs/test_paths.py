"""Files that pages name are there, and the tables of docs/architecture.md name every file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
PATH = re.compile(r"(?<![\w/.:-])(?:specdec|pipeline|jobs|tests|benchmarks|examples|docs)/[\w./-]+")
MADE_UP = re.compile(r"[A-Z]{4}|/(test_)?chain\.py")
"""Names to fill in, and the policy that docs/architecture.md adds for example."""


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_a_page_names_is_there(page: str) -> None:
    named = {path.rstrip(".") for path in PATH.findall((ROOT / page).read_text(encoding="utf-8"))}
    gone = {
        path
        for path in named
        if not MADE_UP.search(path)
        and not (ROOT / path).exists()
        and not (ROOT / f"{path}.py").exists()
    }
    assert not gone


@pytest.mark.parametrize("package", ["specdec", "pipeline", "jobs"])
def test_the_tables_of_the_architecture_name_every_file(package: str) -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    [section] = re.findall(rf"\n## {package}\n(.*?)\n## ", page, re.DOTALL)
    named: dict[str, set[str]] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            rooms, files = line.strip("|").split("|", 1)
            for room in re.findall(r"`([^`]+)`", rooms):
                named[room] = set(re.findall(r"`([^`]+)`", files))
    there: dict[str, set[str]] = {}
    for file in (ROOT / package).rglob("*.py"):
        room, *names = file.relative_to(ROOT / package).parts
        if file.stem != "__init__":
            there.setdefault(f"{room}/" if names else room, set()).update(
                Path(name).stem for name in names
            )
    assert set(named) == set(there)
    assert not {room: missing for room in there if (missing := there[room] - named[room])}
