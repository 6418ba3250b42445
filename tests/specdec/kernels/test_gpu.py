"""The Triton kernels against torch: on a GPU, or in Triton's interpreter:

pip install triton && TRITON_INTERPRET=1 pytest tests/specdec/kernels/test_gpu.py
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from specdec.kernels.scoring import Scoring
from specdec.kernels.stored import LARGEST, Scales, quantise
from specdec.model.cache import LayerLayout, SlotCache
from specdec.model.check import distance
from specdec.model.decoder import PackedDecoder
from specdec.model.pages import PAGE
from tests.specdec.kernels.test_cpu import (
    attention,
    check_rotation,
    check_small_operators,
    check_trees_and_scorings,
    close,
    in_pages,
    random,
)
from tests.specdec.tiny_models import VOCAB, tiny_model

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
        places = [x.to(DEVICE) for x in (query, *in_pages(kernels, keys, values))]
        kernels.attend(*places, torch.tensor(rows, device=DEVICE), Scoring(0.3), window, out)
        return out.cpu()

    out, expected = attend(rows), attention(query, keys, values, rows, window)
    for token in range(37):
        close(out[token], expected.get(token, torch.full((), 7.0)).expand_as(out[token]))
    for first, count, slot, position in rows:  # a token's numbers are the same without the others
        token = first + count - 1
        alone = [[token, min(count, 1), slot, position + count - 1], *[[0, 0, 0, 0]] * len(rows)]
        if count and HAS_GPU:
            assert torch.equal(attend(alone[: len(rows)])[token], out[token])
        elif count:  # the interpreter's products, those of numpy, treat rows of a tile differently
            close(attend(alone[: len(rows)])[token], out[token])


def test_extreme_scores_are_no_problem(kernels: GpuKernels, dtype: torch.dtype) -> None:
    keys, values = (random(1, 1, 128, 16, dtype=dtype, seed=s).to(DEVICE) for s in (1, 2))
    query = 100 * random(1, 1, 16, dtype=dtype).to(DEVICE)
    out = torch.empty(1, 1, 16, dtype=dtype, device=DEVICE)
    row = torch.tensor([[0, 1, 0, 99]], device=DEVICE)
    stored = [x.to(DEVICE) for x in in_pages(kernels, keys.cpu(), values.cpu())]
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


# ------------------------------------------------------------- keys and values of eight bits

EIGHT_BITS = pytest.mark.parametrize("stored", LARGEST, ids=str)


@EIGHT_BITS
@pytest.mark.parametrize(
    ("window", "scoring"), [(None, Scoring(0.3)), (7, Scoring(0.3, softcap=2.0))]
)
def test_attention_reads_keys_and_values_of_eight_bits(
    kernels: GpuKernels,
    dtype: torch.dtype,
    stored: torch.dtype,
    window: int | None,
    scoring: Scoring,
) -> None:
    """Those that torch has stored, in rows that are split and in pages that lie anywhere."""
    cache = SlotCache((LayerLayout(2, 48, 80),), 4, 256, dtype, DEVICE, stored=stored)
    cache.pages._free.reverse()
    cache.extend([(slot, 256) for slot in range(4)])
    slots, positions = (x.flatten().to(DEVICE) for x in torch.meshgrid(
        torch.arange(4), torch.arange(256), indexing="ij"
    ))  # fmt: skip
    sizes = torch.logspace(-2, 2, 1024)[:, None, None]  # each position has a scale of its own
    key, value = (random(1024, 2, dim, dtype=dtype, seed=dim) for dim in (48, 80))
    cache.write(0, key.to(DEVICE), (sizes * value).to(DEVICE), cache.places(slots, positions))
    rows = [[0, 1, 3, 0], [1, 3, 0, 126], [4, 2, 1, 70], [6, 4, 2, 252]]
    query = random(10, 6, 48, dtype=dtype)
    out = torch.empty(10, 6, 80, dtype=dtype, device=DEVICE)
    kernels.attend(
        query.to(DEVICE), cache.keys[0], cache.values[0], cache.table,
        torch.tensor(rows, device=DEVICE), scoring, window, out, scales=cache.scales(0),
    )  # fmt: skip
    keys, values = (x.cpu() for x in cache.read(0, slice(0, 4), 256))
    for token, right in attention(query, keys, values, rows, window, scoring).items():
        size = right.abs().max()
        close((out[token].cpu() / size).to(dtype), right / size)


@EIGHT_BITS
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_stores_eight_bits_of_what_it_would_store(
    kernels: GpuKernels, dtype: torch.dtype, stored: torch.dtype, normed: bool
) -> None:
    heads = random(5, 6 + 2 + 2, 48, dtype=dtype).to(DEVICE)
    heads[2, -1] = 0
    cos, sin = (random(5, 48, dtype=dtype, seed=seed).to(DEVICE) for seed in (1, 2))
    norm = (*(random(48, dtype=dtype, seed=seed).to(DEVICE) for seed in (3, 4)), 1e-6)
    table = 1 + torch.arange(12, device=DEVICE).view(3, 4)
    slots = torch.tensor([0, 0, 2, 1, 2], device=DEVICE)
    positions = torch.tensor([3, 4, 0, 127, 9], device=DEVICE)

    def store(kind: torch.dtype, scales: Scales | None) -> list[torch.Tensor]:
        pools = [torch.zeros(13, 2, PAGE, 48, dtype=kind, device=DEVICE) for _ in range(2)]
        kernels.rotate_and_store(
            heads.clone(), cos, sin, norm if normed else None, *pools, table, slots, positions,
            scales,
        )  # fmt: skip
        return pools

    scales = Scales(*(torch.zeros(13, 2, PAGE, device=DEVICE) for _ in range(2)))
    at = table[slots, positions // PAGE], slice(None), positions % PAGE
    for plain, numbers, own in zip(store(dtype, None), store(stored, scales), scales, strict=True):
        expected, expected_scales = quantise(plain[at], stored)
        same = numbers[at].float() == expected.float()
        if not HAS_GPU and stored.is_floating_point:  # the interpreter loses a carry
            same |= expected.float().frexp().mantissa.abs() == 0.5
        assert same.all()
        assert torch.equal(own[at], expected_scales)
        assert own.count_nonzero() == 5 * 2


@torch.inference_mode()
@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_a_model_gives_what_torch_does_with_its_keys_and_values(
    kernels: GpuKernels, kv_dtype: Any
) -> None:
    """In fused layers, behind a prefill; but for numbers that rounding takes to their next step."""
    decoder = PackedDecoder(tiny_model("qwen3").to(DEVICE), fuse=True, kv_dtype=kv_dtype)
    exact = PackedDecoder(tiny_model("qwen3").to(DEVICE))
    text = torch.randint(VOCAB, (108,), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def logits(decoder: PackedDecoder, kernels: GpuKernels | None) -> torch.Tensor:
        cache = decoder.new_cache(2, 128)
        cache.kernels = kernels
        decoder.recordings = None
        decoder.forward(cache, [(1, 80)], text[:80])
        hidden = decoder.forward(cache, [(0, 20), (1, 8)], text[80:])
        return decoder.logits(hidden)

    found, expected = logits(decoder, kernels), logits(decoder, None)
    # The interpreter loses a carry as it rounds to fp8: a number falls to half of what it was.
    part = 0.2 if HAS_GPU or kv_dtype == "int8" else 3
    assert distance(found, expected)[0] < part * distance(expected, logits(exact, None))[0]
