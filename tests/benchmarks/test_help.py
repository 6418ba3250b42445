"""Every benchmark can be imported, and says what it measures, prints and takes."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
COMMANDS = {
    "adjustments": [],
    "corpus": [],
    "duplicates": [],
    "engine": ["peers", "policies", "speedup", "overhead", "prefixes", "quality"],
    "families": [],
    "foresight": ["collect", "judge", "worth"],
    "gpu": ["forwards", "rates"],
    "lookups": ["record", "replay"],
    "lossless": [],
    "memory": [],
    "overhead": [],
    "peers": [],
    "recurrent": [],
    "roofline": [],
    "scale": ["plan", "flow", "units", "actors", "resume", "files"],
    "schemas": [],
    "simulate": ["record", "replay"],
    "suffix": [],
    "virtual_gpu": [],
    "whole_job": [],
}


def run_help(monkeypatch: pytest.MonkeyPatch, script: str, *command: str) -> None:
    """Call a benchmark with `--help` in this process, and forget the files beside it again."""
    monkeypatch.setattr(sys, "argv", [script, *command, "--help"])
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    before = set(sys.modules)
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(FOLDER)):
                del sys.modules[name]
    assert not ended.value.code


@pytest.mark.parametrize("script", COMMANDS)
def test_a_benchmark_says_what_it_measures(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_help(monkeypatch, script)
    about = capsys.readouterr().out
    assert f"  python benchmarks/{script}.py" in about
    for command in COMMANDS[script]:
        run_help(monkeypatch, script, command)
        assert f"benchmarks/{script}.py {command}" in about
        about += capsys.readouterr().out
    assert len(re.findall(r"\bminutes?\b", about)) >= max(1, len(COMMANDS[script]))
    assert len(re.findall(r"[Pp]rints", about)) >= max(1, len(COMMANDS[script]))


def test_no_benchmark_is_left_out() -> None:
    runnable = {
        file.stem for file in FOLDER.glob("*.py") if "    python benchmarks/" in file.read_text()
    }
    assert runnable - {"sides"} == set(COMMANDS)
