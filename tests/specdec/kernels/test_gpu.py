"""The Triton kernels against torch: on a GPU, or in Triton's interpreter:

pip install triton && TRITON_INTERPRET=1 pytest tests/specdec/kernels/test_gpu.py
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from specdec.kernels.scoring import Scoring
from tests.specdec.kernels.test_cpu import (
    attention,
    check_rotation,
    check_small_operators,
    check_trees_and_scorings,
    close,
    in_pages,
    random,
)

HAS_GPU = torch.cuda.is_available()
if importlib.util.find_spec("triton") is None or not (
    HAS_GPU or os.environ.get("TRITON_INTERPRET")
):
    pytest.skip("needs Triton, and a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from specdec.kernels.gpu import DTYPES, GpuKernels  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


# The interpreter knows bfloat16 as bits alone.
@pytest.fixture(params=[d for d in DTYPES if HAS_GPU or d != torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels() -> GpuKernels:
    return GpuKernels(DEVICE)


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
    rows = [[0, 1, 3, 0], [1, 3, 0, 126], [4, 2, 1, 70], [7, 4, 2, 252]]  # token 6 is not theirs
    rows += [[11 + i, 1, i % 4, 9 * i] for i in range(26 * many)]  # so many that none is split
    rows += [[0, 0, 0, 0]]
    query = random(37, heads + 1, dims[0], dtype=dtype)[:, :heads]  # strided, as out of a product

    def attend(rows: list[list[int]]) -> torch.Tensor:
        out = torch.full((37, heads, dims[1]), 7.0, dtype=dtype, device=DEVICE)
        places = [x.to(DEVICE) for x in (query, *in_pages(keys, values))]
        kernels.attend(*places, torch.tensor(rows, device=DEVICE), Scoring(0.3), window, out)
        return out.cpu()

    out, expected = attend(rows), attention(query, keys, values, rows, window)
    for token in range(37):
        close(out[token], expected.get(token, torch.full((), 7.0)).expand_as(out[token]))
    for first, count, slot, position in rows:  # a token's numbers are the same without the others
        token = first + count - 1
        alone = [[token, min(count, 1), slot, position + count - 1], *[[0, 0, 0, 0]] * len(rows)]
        if count:
            assert torch.equal(attend(alone[: len(rows)])[token], out[token])


def test_extreme_scores_are_no_problem(kernels: GpuKernels, dtype: torch.dtype) -> None:
    keys, values = (random(1, 1, 128, 16, dtype=dtype, seed=s).to(DEVICE) for s in (1, 2))
    query = 100 * random(1, 1, 16, dtype=dtype).to(DEVICE)
    out = torch.empty(1, 1, 16, dtype=dtype, device=DEVICE)
    row = torch.tensor([[0, 1, 0, 99]], device=DEVICE)
    stored = [x.to(DEVICE) for x in in_pages(keys.cpu(), values.cpu())]
    kernels.attend(query, *stored, row, Scoring(10.0), None, out)
    best = (query[0, 0].double() @ keys[0, 0, :100].double().T).argmax()
    close(out[0, 0], values[0, 0, best])


@pytest.mark.parametrize(
    ("kind", "window", "chunked"),
    [
        ("plain", None, False),
        ("soft cap", 7, False),
        ("sinks", 7, True),
        ("bias", 90, True),
        ("all", None, False),
    ],
)
def test_trees_and_every_scoring_are_what_their_definitions_say(
    kernels: GpuKernels, dtype: torch.dtype, kind: str, window: int | None, chunked: bool
) -> None:
    check_trees_and_scorings(kernels, kind, window, chunked, dtype, DEVICE, bits=False)


@pytest.mark.parametrize("width", [24, 576, 1500])
def test_the_small_operators_equal_torch(
    kernels: GpuKernels, dtype: torch.dtype, width: int
) -> None:
    check_small_operators(kernels, 3, width, dtype, DEVICE)


@pytest.mark.parametrize("normed", [False, True])
def test_rotation_stores_keys_and_values_and_leaves_queries(
    kernels: GpuKernels, dtype: torch.dtype, normed: bool
) -> None:
    check_rotation(kernels, normed, 48, dtype, DEVICE)
