from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import specdec

FOREIGN = ("ray", "pyarrow", "boto3", "botocore", "pipeline", "jobs")
SOURCES = sorted(Path(specdec.__file__).parent.rglob("*.py"))


def run(code: str) -> str:
    """stdout of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_specdec_runs_where_the_packages_above_it_cannot_be_imported() -> None:
    """None in sys.modules makes an import fail. (accelerate, if it can, imports boto3 by itself.)"""
    modules = [f"specdec.{path.stem}" for path in SOURCES if path.parent.name == "specdec"]
    run(
        f"import sys; sys.modules.update(dict.fromkeys({FOREIGN!r}))\n"
        + "\n".join(f"import {module.removesuffix('.__init__')}" for module in modules)
    )


def test_a_fresh_engine_import_loads_nothing_of_the_cluster() -> None:
    out = run("import sys, specdec.engine, specdec.pair; print(*sys.modules)")
    loaded = {name.partition(".")[0] for name in out.split()}
    assert not loaded & {"ray", "pyarrow", "pipeline", "jobs"}


def test_no_source_file_imports_a_package_above() -> None:
    """Also not inside a function."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & set(FOREIGN), path
