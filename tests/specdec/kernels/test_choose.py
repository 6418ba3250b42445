from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from specdec.kernels.base import HEAD_STEP
from specdec.kernels.choose import SWITCH, cpu_kernels, kernels_over, layer_kernels
from specdec.model.decoder import PackedDecoder
from tests.specdec.tiny_models import tiny_model

CPU = torch.device("cpu")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def test_there_are_none_for_other_devices_and_dtypes() -> None:
    assert cpu_kernels(torch.float16, CPU) is None
    assert cpu_kernels(torch.float32, torch.device("cuda")) is None


@needs_compiler
def test_layers_get_them_where_they_can_read_the_heads() -> None:
    found = layer_kernels(torch.float32, CPU, {HEAD_STEP, 4 * HEAD_STEP})
    assert found is cpu_kernels(torch.float32, CPU)
    assert layer_kernels(torch.float32, CPU, {HEAD_STEP, HEAD_STEP // 2}) is None
    assert layer_kernels(torch.float32, CPU, {HEAD_STEP}, torch.int8) is None


@needs_compiler
def test_logits_whose_rows_are_not_contiguous_get_none() -> None:
    logits = torch.zeros(4, 6)
    assert kernels_over(logits[:, :3]) is not None
    assert kernels_over(logits.T) is None


@pytest.mark.parametrize("why", ["switched off", "no compiler", "a compiler that fails"])
def test_without_them_layers_run_on_torch_and_a_failure_is_told(
    anew: None,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SPECBATCH_CACHE", str(tmp_path))
    if why == "switched off":
        monkeypatch.setenv(SWITCH, "0")
    elif why == "no compiler":
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        compiler = tmp_path / "broken"
        compiler.write_text(
            "#!/bin/sh\n[ $1 = --version ] && exit 0\necho 'no OpenMP' >&2; exit 1\n"
        )
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
    with caplog.at_level(logging.WARNING):
        assert cpu_kernels(torch.float32, CPU) is None
    assert ("no OpenMP" in caplog.text) == (why == "a compiler that fails")
    PackedDecoder(tiny_model(), fuse=True)  # which compares itself with the plain forward
