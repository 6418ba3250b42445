"""The generated pages say what the code does; links from outside of docs/ lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = (
    "job-file.md",
    "recipe-file.md",
    "cli.md",
    "openai-parameters.md",
    "models.md",
    "job.schema.json",
    "recipe.schema.json",
)
OUTSIDE = ("README.md", "CHANGELOG.md", "benchmarks/LOG.md")


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    made: dict[str, str] = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
    return made


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_in_step(pages: dict[str, str], name: str) -> None:
    there = (DOCS / name).read_text(encoding="utf-8")
    assert there == pages[name], f"docs/{name} is out of step; run: python docs/generate.py"


def test_no_page_is_missing_here(pages: dict[str, str]) -> None:
    assert set(pages) == set(GENERATED)


def test_every_command_and_key_is_there(pages: dict[str, str]) -> None:
    for command in ("run", "run-batch", "train-head", "render kuberay", "nightly rollback"):
        assert f"# `specbatch {command}`" in pages["cli.md"]
    for key in ("unit_rows", "messages_column", "control_share", "kv_memory_gb", "cpu_hour"):
        assert f"| `{key}` |" in pages["job-file.md"]
    for key in ("per_night", "max_compression", "draft_minutes"):
        assert f"| `{key}` |" in pages["recipe-file.md"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_links_of_pages_that_mkdocs_does_not_see(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    dead = [url for url in links if "://" not in url and not (page.parent / url).exists()]
    assert not dead
