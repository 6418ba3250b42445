"""The kernels as they are compiled for other processors, as far as this one runs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from specdec.kernels import compile as compilation
from specdec.model.decoder import PackedDecoder
from specdec.model.linear import (
    KernelLinear,
    PanelInt8Linear,
    PanelLinear,
    Quantization,
    layer_for,
    pack_linears,
)
from tests.specdec.tiny_models import VOCAB, tiny_model

PROCESSORS = {
    "AVX2": (["avx2", "fma", "f16c", "bmi2"], ["-march=x86-64-v3"]),
    "AVX-512": (["avx512bw", "avx512vl"], ["-march=x86-64-v4"]),
    "AVX-512 and VNNI": (["avx512bw", "avx512_vnni"], ["-march=x86-64-v4", "-mavx512vnni"]),
}
"""What each must have, as Linux names it, and how the compiler is told."""


def features() -> set[str]:
    """What this processor has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {word for line in lines if line.startswith("flags") for word in line.split()}


HERE = [
    name
    for name, (needed, _) in PROCESSORS.items()
    if shutil.which("g++") and features().issuperset(needed)
]


@pytest.fixture(params=HERE)
def processor(request: pytest.FixtureRequest, anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are those of this processor until the test is over."""
    _, told = PROCESSORS[request.param]
    flags = [flag for flag in compilation.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(compilation, "FLAGS", (*flags, *told))


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("shape", [(1, 1), (64, 33), (201, 96), (1536, 576)])
@pytest.mark.parametrize("rows", [1, 6, 7, 14, 15, 40])
def test_bytes_are_multiplied_exactly(shape: tuple[int, int], rows: int) -> None:
    """What is off from a product in double precision is how inputs were rounded, and no more."""
    torch.manual_seed(0)
    layer = nn.Linear(*shape).requires_grad_(False)
    packed, x = PanelInt8Linear(layer), torch.randn(rows, shape[0])
    scales = layer.weight.abs().amax(1, keepdim=True) / 127
    weight = (layer.weight / scales).round().double() * scales
    levels = min(2**15 - 1, (2**31 - 1) // (127 * (shape[0] + shape[0] % 2)))
    steps = x.double().abs().amax(1, keepdim=True) / levels
    expected = (x / steps).round() * steps @ weight.T + layer.bias
    torch.testing.assert_close(packed(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("inputs", [516, 518, 4096, 100_001])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_bytes_fit(inputs: int, sign: int) -> None:
    layer = nn.Linear(inputs, 2, bias=False).requires_grad_(False)
    layer.weight.fill_(sign)
    y = PanelInt8Linear(layer)(torch.ones(3, inputs))
    torch.testing.assert_close(y, torch.full_like(y, sign * inputs))


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_forward_is_that_of_torchs_operators(
    quantization: Quantization | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one to twenty tokens, so of groups of queries of all sizes; over several pages."""
    assert issubclass(layer_for(quantization, torch.float32), PanelLinear | PanelInt8Linear)
    text = torch.randint(VOCAB, (120,), generator=torch.Generator().manual_seed(0))
    made = []
    for kernels in (True, False):
        model = tiny_model()
        decoder = PackedDecoder(model, fuse=True)
        pack_linears(model, quantization)
        assert any(isinstance(module, KernelLinear) for module in model.modules())
        if not kernels:
            monkeypatch.setattr("specdec.model.cache.layer_kernels", lambda *given: None)
        cache = decoder.new_cache(3, 128)
        decoder.forward(cache, [(1, 40), (0, 37), (2, 3)], text[:80])
        made.append(decoder.forward(cache, [(0, 5), (1, 20), (2, 1)], text[80:106]).clone())
    torch.testing.assert_close(*made, rtol=1e-3, atol=1e-3)
