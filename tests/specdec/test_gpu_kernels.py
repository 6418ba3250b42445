"""The Triton kernels against torch: on a GPU, or in Triton's interpreter:

pip install triton && TRITON_INTERPRET=1 pytest tests/specdec/test_gpu_kernels.py
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch import Tensor

from tests.specdec.test_kernels import attention, random

HAS_GPU = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None or not (
    HAS_GPU or os.environ.get("TRITON_INTERPRET")
):
    pytest.skip("needs Triton, and a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from specdec.gpu_kernels import DTYPES, GpuKernels  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.005}


# The interpreter knows bfloat16 as bits alone.
@pytest.fixture(params=[d for d in DTYPES if HAS_GPU or d != torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels() -> GpuKernels:
    return GpuKernels(DEVICE)


def close(got: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dims"), [(2, 2, (64, 64)), (6, 2, (48, 80)), (7, 1, (16, 16))]
)
@pytest.mark.parametrize("many", [False, True])
def test_attention_is_what_its_definition_says(
    kernels: GpuKernels,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dims: tuple[int, int],
    window: int | None,
    many: bool,
) -> None:
    keys = random(4, kv_heads, 256, dims[0], dtype=dtype, seed=1)
    values = random(4, kv_heads, 256, dims[1], dtype=dtype, seed=2)
    rows = [[0, 1, 3, 0], [1, 1, 0, 131], [2, 1, 1, 70], [4, 1, 2, 255]]  # token 3 is not theirs
    rows += [[5 + i, 1, i % 4, 9 * i] for i in range(26 * many)]  # so many that none is split
    query = random(31, heads + 1, dims[0], dtype=dtype)[:, :heads]  # strided, as out of a product
    out = torch.full((31, heads, dims[1]), 7.0, dtype=dtype, device=DEVICE)
    places = (x.to(DEVICE) for x in (query, keys, values, torch.tensor(rows)))
    kernels.attend(*places, 0.3, window, out)
    expected = attention(query, keys, values, rows, window)
    for token in range(31):
        close(out[token].cpu(), expected.get(token, torch.full((), 7.0)).expand_as(out[token]))


def test_extreme_scores_are_no_problem(kernels: GpuKernels, dtype: torch.dtype) -> None:
    keys, values = (random(1, 1, 128, 16, dtype=dtype, seed=s).to(DEVICE) for s in (1, 2))
    query = 100 * random(1, 1, 16, dtype=dtype).to(DEVICE)
    out = torch.empty(1, 1, 16, dtype=dtype, device=DEVICE)
    row = torch.tensor([[0, 1, 0, 99]], device=DEVICE)
    kernels.attend(query, keys, values, row, 10.0, None, out)
    best = (query[0, 0].double() @ keys[0, 0, :100].double().T).argmax()
    close(out[0, 0], values[0, 0, best])


@pytest.mark.parametrize("width", [24, 576, 1500])
def test_the_small_operators_equal_torch(
    kernels: GpuKernels, dtype: torch.dtype, width: int
) -> None:
    x, y = (random(3, width, dtype=dtype, seed=seed).to(DEVICE) for seed in (0, 1))
    weight = random(width, dtype=dtype, seed=2).to(DEVICE)
    both = 3 * random(3, 2 * width, dtype=dtype).to(DEVICE)
    added, normal = x.clone(), torch.nn.functional.rms_norm
    close(
        kernels.add_norm(added, y, weight, 1e-5),
        normal((x + y).float(), (width,), weight.float(), 1e-5),
    )
    assert torch.equal(added, x + y)
    close(
        kernels.add_norm(x, None, weight, 1e-5),
        normal(x.float(), (width,), weight.float(), 1e-5),
    )
    gate, up = both.float().chunk(2, -1)
    close(kernels.gate(both), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("normed", [False, True])
def test_rotation_stores_keys_and_values_and_leaves_queries(
    kernels: GpuKernels, dtype: torch.dtype, normed: bool
) -> None:
    heads = random(5, 6 + 2 + 2, 48, dtype=dtype).to(DEVICE)
    angles = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    cos, sin = angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)
    norms = [random(48, dtype=dtype, seed=seed).to(DEVICE) for seed in (3, 4)]
    slots = torch.tensor([0, 0, 2, 1, 2], device=DEVICE)
    positions = torch.tensor([3, 4, 0, 127, 9], device=DEVICE)
    keys, values = (torch.zeros(3, 2, 128, 48, dtype=dtype, device=DEVICE) for _ in range(2))
    parts = list(heads.clone().float().split([6, 2, 2], 1))
    for i in range(2 * normed):
        parts[i] = torch.nn.functional.rms_norm(parts[i], (48,), norms[i].float(), 1e-6)

    def rotated(part: Tensor) -> Tensor:
        low, high = part.chunk(2, -1)
        return part * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

    given = (norms[0], norms[1], 1e-6) if normed else None
    kernels.rotate_and_store(heads, cos, sin, given, keys, values, slots, positions)
    close(heads[:, :6], rotated(parts[0]))
    close(keys[slots, :, positions], rotated(parts[1]))
    assert torch.equal(values[slots, :, positions].float(), parts[2])
    assert keys.count_nonzero() + values.count_nonzero() == 2 * 5 * 2 * 48
