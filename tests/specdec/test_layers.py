from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import specdec

FOREIGN = ("ray", "pyarrow", "boto3", "botocore", "pipeline", "jobs")
ROOT = Path(specdec.__file__).parents[1]
SOURCES = sorted((ROOT / "specdec").rglob("*.py"))


def test_importing_all_of_specdec_loads_nothing_of_cluster_tables_or_buckets() -> None:
    """In a fresh interpreter; torch comes when it is asked for, and a user needs specdec alone.

    None in sys.modules makes an import fail: accelerate imports boto3 where it can, which is not
    specdec's doing. Triton is there beside a GPU.
    """
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    if importlib.util.find_spec("triton") is None:
        modules.remove("specdec.kernels.gpu")
    code = f"""
import importlib, sys, specdec
assert specdec.Request("a", (1,)).sampling == specdec.SamplingParams()
assert "torch" not in sys.modules
sys.modules.update(boto3=None, botocore=None)
from specdec import Engine, ModelPair, Request, SamplingParams, make_policy
for module in {modules!r}:
    importlib.import_module(module.removesuffix(".__init__"))
print(*(name for name, module in sys.modules.items() if module))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "transformers" in loaded
    assert not loaded & set(FOREIGN)


def test_all_that_a_user_needs_comes_from_specdec_itself() -> None:
    needed = {"Engine", "ModelPair", "Request", "SamplingParams", "make_policy"}
    assert needed <= set(specdec.__all__)
    assert all(hasattr(specdec, name) for name in specdec.__all__)
    assert not hasattr(specdec, "Nothing")


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
