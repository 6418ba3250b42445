from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from specdec.kernels import compile as module

QUICK = tuple(flag.replace("-O3", "-O0") for flag in module.FLAGS)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@needs_compiler
def test_the_library_is_compiled_once_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECBATCH_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "FLAGS", QUICK)
    library = module.compiled("g++")
    assert list(tmp_path.iterdir()) == [library]
    before = library.stat().st_mtime_ns
    assert module.compiled("g++") == library
    assert library.stat().st_mtime_ns == before


@needs_compiler
@pytest.mark.parametrize("file", ["cpu.cpp", "logits.h"])
def test_a_changed_source_or_header_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    """An upgrade must not find the library of the version before."""
    sources = tmp_path / "sources"
    sources.mkdir()
    for source in module.source_files():
        shutil.copy(source, sources)
    before = module._digest("g++", "-fopenmp")
    monkeypatch.setattr(module, "SOURCE", sources / "cpu.cpp")
    assert module._digest("g++", "-fopenmp") == before
    with (sources / file).open("a") as text:
        text.write("\n")
    assert module._digest("g++", "-fopenmp") != before


def test_every_header_is_compiled_and_every_source_is_shipped() -> None:
    """What cpu.cpp includes, and what pyproject.toml puts into a wheel."""
    import tomllib

    folder = module.SOURCE.parent
    included = {
        line.split('"')[1]
        for file in module.source_files()
        for line in file.read_text().splitlines()
        if line.startswith('#include "')
    }
    assert {file.name for file in module.source_files()} == included | {"cpu.cpp"}
    project = tomllib.loads((folder.parents[1] / "pyproject.toml").read_text())
    shipped = project["tool"]["setuptools"]["package-data"]["*"]
    for file in module.source_files():
        assert any(file.match(pattern) for pattern in shipped), file


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_is_no_problem(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "FLAGS", QUICK)
    for folder in (str(tmp_path / "file" / "folder"), "~nobody-of-this-name/cache"):
        monkeypatch.setenv("SPECBATCH_CACHE", folder)
        assert module.load_library("g++")["argmax_float32"]


@needs_compiler
def test_the_source_compiles_without_a_warning(tmp_path: Path) -> None:
    out = subprocess.run(
        ["g++", *module.FLAGS, "-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-fsyntax-only",
         str(module.SOURCE)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0 and not out.stderr
