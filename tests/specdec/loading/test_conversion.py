from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.specdec.loading.saved_models import SMOLLM2

CONVERT = f"""
import torch; torch.set_num_threads(1)
from specdec.loading.pair import ModelPair
ModelPair.load({SMOLLM2!r}, device="cpu")
"""


@pytest.mark.slow
def test_processes_that_convert_the_same_gguf_at_once_all_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECBATCH_CACHE", str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", CONVERT]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (converted,) = (tmp_path / "gguf").iterdir()
    assert (converted / "model.safetensors").is_file()
