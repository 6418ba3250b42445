"""The compiled kernels against torch."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.kernels.base import LayerKernels
from specdec.kernels.choose import cpu_kernels
from specdec.kernels.cpu import DTYPES, CpuKernels
from specdec.kernels.scoring import Scoring
from specdec.model.pages import PAGE
from specdec.model.rows import PackedRow, cut_rows
from specdec.model.trees import Tree, lay_out

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.005}

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def kernels(dtype: torch.dtype) -> CpuKernels:
    found = cpu_kernels(dtype, CPU)
    assert found is not None
    return found


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        got.float(), expected.float(), rtol=TOLERANCE[got.dtype], atol=TOLERANCE[got.dtype]
    )


def in_pages(kernels: LayerKernels, keys: Tensor, values: Tensor) -> list[Tensor]:
    """Keys and values [slots, heads, capacity, dim] in pages that lie anywhere, and their table."""
    slots, _, capacity, _ = keys.shape
    table = 1 + torch.randperm(slots * capacity // PAGE).view(slots, -1)
    stored = []
    for tensor in (keys, values):
        pages = tensor.unflatten(2, (-1, PAGE)).transpose(1, 2)
        held = tensor.new_full((1 + table.numel(), *pages.shape[2:]), torch.nan)
        held[table] = pages
        stored.append(held)
    return [as_wanted(kernels, stored[0]), stored[1], table]


def as_wanted(kernels: LayerKernels, keys: Tensor) -> Tensor:
    """Keys [pages, heads, PAGE, dim] as they lie in memory for these kernels."""
    return keys.mT.contiguous().mT if kernels.keys_by_dimension else keys


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: list[list[int]],
    window: int | None,
    scoring: Scoring = Scoring(0.3),  # noqa: B008
    *,
    chunked: bool = False,
    paths: Tensor | None = None,
) -> dict[int, Tensor]:
    """By packed token, what it attends to, one token at a time in float64."""
    group = query.shape[1] // keys.shape[1]
    found = {}
    for begin, count, slot, start in rows:
        for t in range(count):
            places = places_of(start + t, None if paths is None else paths[:, begin + t].tolist())
            last, low = len(places) - 1, 0
            if window:
                low = last - last % window if chunked else max(0, last + 1 - window)
            k, v = (
                x[slot, :, places[low:]].double().repeat_interleave(group, 0)
                for x in (keys, values)
            )
            scores = torch.einsum("hd,hld->hl", query[begin + t].double(), k) * scoring.scale
            scores = scoring.capped(scores)
            if scoring.key_bias is not None:
                scores = scores + scoring.key_bias[:, low : last + 1]
            weights = scoring.weights(scores[:, None])[:, 0]
            found[begin + t] = torch.einsum("hl,hld->hd", weights, v)
    return found


def places_of(stored: int, path: list[int] | None) -> list[int]:
    """Where the positions that a token sees are stored, in order; `path`: its base and mask."""
    base, mask = path or (stored + 1, 0)
    return [*range(base), *(base + bit for bit in range(64) if mask >> bit & 1)]


@needs_compiler
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (7, 1), (9, 3)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (16, 16), (48, 80)])
def test_attention_is_what_its_definition_says(
    kernels: CpuKernels,
    dtype: torch.dtype,
    dims: tuple[int, int],
    heads: int,
    kv_heads: int,
    window: int | None,
) -> None:
    keys = random(4, kv_heads, 160, dims[0], dtype=dtype, seed=1)
    values = random(4, kv_heads, 160, dims[1], dtype=dtype, seed=2)
    rows = [[0, 1, 3, 0], [1, 5, 0, 131], [6, 24, 1, 70], [31, 2, 2, 8]]  # token 30 is not theirs
    query = random(33, heads + 1, dims[0], dtype=dtype)[:, :heads]  # strided, as out of a product
    out = torch.full((33, heads, dims[1]), 7.0, dtype=dtype)
    stored = in_pages(kernels, keys, values)
    kernels.attend(query, *stored, torch.tensor(rows), Scoring(0.3), window, out)
    expected = attention(query, keys, values, rows, window)
    for token in range(33):
        close(out[token], expected.get(token, torch.full((), 7.0)).expand_as(out[token]))


@needs_compiler
@pytest.mark.parametrize("window", [None, 40])
def test_attention_gives_a_token_the_same_bits_in_any_batch_and_any_pages(
    kernels: CpuKernels, dtype: torch.dtype, window: int | None
) -> None:
    keys, values = (random(9, 3, 256, 64, dtype=dtype, seed=seed) for seed in (1, 2))
    query = random(9 * 5, 9, 64, dtype=dtype)
    every = torch.tensor([[5 * slot, 5, slot, 20 * slot + 3] for slot in range(9)])
    together = torch.empty_like(query)
    kernels.attend(query, *in_pages(kernels, keys, values), every, Scoring(0.1), window, together)
    for threads in (1, torch.get_num_threads()):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        elsewhere = in_pages(kernels, keys, values)
        for begin, count, slot, start in every.tolist():
            for t in range(count):
                alone = torch.empty(1, 9, 64, dtype=dtype)
                row = torch.tensor([[0, 1, slot, start + t]])
                token = query[begin + t : begin + t + 1]
                kernels.attend(token, *elsewhere, row, Scoring(0.1), window, alone)
                assert torch.equal(alone[0], together[begin + t])
        torch.set_num_threads(before)


SCORINGS = ("plain", "soft cap", "sinks", "bias", "all")


def scoring_of(kind: str, heads: int, dtype: torch.dtype) -> Scoring:
    sinks, bias = random(heads, dtype=dtype, seed=5), random(heads, 300, dtype=torch.float32)
    every = kind == "all"
    return Scoring(
        0.3,
        3.0 if every or kind == "soft cap" else None,
        sinks if every or kind == "sinks" else None,
        bias[:, :256] if every or kind == "bias" else None,  # strided
    )


TREES = [(70, [-1, -1, 0, 1, 0, 2, 5, 6, 3]), (131, [*range(-1, 62), 3])]
"""Bases and parents. The second one's last node has the last bit of a mask and a short path."""


def check_trees_and_scorings(
    kernels: LayerKernels,
    kind: str,
    window: int | None,
    chunked: bool,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bits: bool,
) -> None:
    """Rows that end in trees, beside one without, against the definition and each token alone."""
    keys = random(3, 2, 224, 48, dtype=dtype, seed=1)
    values = random(3, 2, 224, 32, dtype=dtype, seed=2)
    packed = [PackedRow(0, 3, 2, 97), PackedRow(3, 11, 0, 68), PackedRow(14, 5, 1, 190)]
    trees = [None, *(Tree(*tree) for tree in TREES)]
    positions, *numbers = lay_out(packed, trees)
    paths, scoring = torch.tensor(numbers), scoring_of(kind, 6, dtype)
    rows = cut_rows(np.array(packed), kernels.row_tokens or 99).tolist()
    query = random(19, 6, 48, dtype=dtype)

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, rows: list[list[int]], paths: Tensor | None
    ) -> Tensor:
        out = torch.empty(*query.shape[:2], 32, dtype=dtype, device=device)
        stored = in_pages(kernels, keys, values)
        places = (x.to(device) for x in (query, *stored, torch.tensor(rows)))
        there = [x.to(device) if isinstance(x, Tensor) else x for x in scoring]
        kernels.attend(
            *places, Scoring(*there), window, out, chunked=chunked,
            paths=paths.to(device) if paths is not None else None,
        )  # fmt: skip
        return out.cpu()

    out = attend(query, keys, values, rows, paths)
    expected = attention(query, keys, values, rows, window, scoring, chunked=chunked, paths=paths)
    for token, right in expected.items():
        close(out[token], right)
    for begin, count, slot, start in packed if bits else []:
        for t in range(begin, begin + count):
            places = places_of(start + t - begin, paths[:, t].tolist())
            own = [x.new_zeros(1, *x.shape[1:]) for x in (keys, values)]
            for mine, theirs in zip(own, (keys, values), strict=True):
                mine[0, :, : len(places)] = theirs[slot, :, places]
            alone = attend(query[t : t + 1], *own, [[0, 1, 0, positions[t]]], None)
            assert torch.equal(alone[0], out[t])


@needs_compiler
@pytest.mark.parametrize("kind", SCORINGS)
@pytest.mark.parametrize(("window", "chunked"), [(None, False), (7, False), (7, True), (90, True)])
def test_trees_and_every_scoring_are_what_their_definitions_say(
    kernels: CpuKernels, dtype: torch.dtype, kind: str, window: int | None, chunked: bool
) -> None:
    check_trees_and_scorings(kernels, kind, window, chunked, dtype, CPU, bits=True)


@needs_compiler
@pytest.mark.parametrize("width", [1, 7, 1024, 1025, 49152])
def test_argmax_is_torchs_and_the_first_of_equals(
    kernels: CpuKernels, dtype: torch.dtype, width: int
) -> None:
    x = random(40, width + 3, dtype=dtype)[:, :width]  # as logits of a vocabulary that is padded
    assert torch.equal(kernels.argmax(x), x.argmax(-1))
    x[::2, width // 2 :] = x[::2, width // 2 :].clamp(min=3.0)  # many equals, in several blocks
    x[1::4] = -torch.inf
    x[3, width - 1] = x.max() + 1
    x[2, width // 2], x[4, 0], x[6, width - 1] = torch.nan, torch.inf, torch.nan
    # NaN is the largest to torch; the largest of rows without a softmax is not finite.
    first = [int((row == row.max()).nonzero()[0]) if row.max().isfinite() else -1 for row in x]
    assert kernels.argmax(x).tolist() == first
    assert [first[row] for row in (1, 2, 4, 5, 6)] == [-1] * 5


@needs_compiler
@pytest.mark.parametrize("width", [1, 7, 300, 49152])
def test_softmax_is_what_its_definition_says(
    kernels: CpuKernels, dtype: torch.dtype, width: int
) -> None:
    logits = (5 * random(20, width + 3, dtype=dtype))[:, :width]  # of a vocabulary that is padded
    logits[3, width // 2 + 1 :] = -torch.inf
    temperature = torch.linspace(0.2, 3, 20)
    p = kernels.softmax(logits, temperature)
    expected = torch.softmax(logits.double() / temperature[:, None], -1)
    torch.testing.assert_close(p.double(), expected, rtol=2e-5, atol=1e-30)
    assert ((p.double().sum(-1) - 1).abs() < 1e-6).all()
    assert torch.equal(kernels.softmax(logits[7:8], temperature[7:8])[0], p[7])
    for row, odd in enumerate((torch.nan, torch.inf)):
        logits[row, width // 2] = odd
    logits[2] = -torch.inf
    assert kernels.softmax(logits, temperature)[:4].isnan().all(-1).tolist() == [True] * 3 + [False]


@needs_compiler
@pytest.mark.parametrize("width", [1, 7, 49152])
def test_a_tokens_signals_are_what_their_definitions_say(
    kernels: CpuKernels, dtype: torch.dtype, width: int
) -> None:
    logits = (5 * random(20, width + 3, dtype=dtype))[:, :width]
    logits[:, width // 2 + 1 :] = -torch.inf
    tokens, out = torch.arange(20) % min(20, width // 2 + 1), torch.full((20, 5), 7.0)
    kernels.token_signals(logits, tokens, out)
    log_p = logits.double().log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)
    expected = [log_p.gather(1, tokens[:, None])[:, 0], log_p.amax(-1), entropy]
    torch.testing.assert_close(out[:, :3], torch.stack(expected, 1).float(), atol=3e-5, rtol=3e-5)
    assert (out[:, 3:] == 7).all()
    alone = torch.zeros(1, 3)  # as a token gets the same bits in any batch
    kernels.token_signals(logits[5:6], tokens[5:6], alone)
    assert torch.equal(alone[0], out[5, :3])


@needs_compiler
def test_embeddings_and_states_are_normed_side_by_side(
    kernels: CpuKernels, dtype: torch.dtype
) -> None:
    embeddings, states = (random(n, 72, dtype=dtype, seed=n) for n in (40, 300))
    tokens = torch.randint(40, (300,), generator=torch.Generator().manual_seed(0))
    norms = [torch.nn.RMSNorm(72, eps=eps, dtype=dtype) for eps in (1e-6, 0.1)]
    for seed, norm in enumerate(norms):
        norm.weight.data = random(72, dtype=dtype, seed=seed)
        norm.variance_epsilon = norm.eps
    found = kernels.norm_beside(embeddings, tokens, states, norms)
    given = embeddings[tokens].float(), states.float()
    expected = [norm(x) for norm, x in zip(norms, given, strict=True)]
    close(found, torch.cat(expected, 1))
    alone = kernels.norm_beside(embeddings, tokens[7:8], states[7:8], norms)
    assert torch.equal(alone, found[7:8])


@needs_compiler
def test_extreme_scores_are_no_problem(kernels: CpuKernels, dtype: torch.dtype) -> None:
    keys, values = (random(1, 1, 128, 16, dtype=dtype, seed=seed) for seed in (1, 2))
    query = 1000 * random(1, 1, 16, dtype=dtype)
    out = torch.empty(1, 1, 16, dtype=dtype)
    row = torch.tensor([[0, 1, 0, 99]])
    kernels.attend(query, *in_pages(kernels, keys, values), row, Scoring(1.0), None, out)
    best = (query[0, 0].double() @ keys[0, 0, :100].double().T).argmax()
    close(out[0, 0], values[0, 0, best])


def check_small_operators(
    kernels: LayerKernels, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    """`add_norm` and `gate` of kernels for CPUs or GPUs against torch."""
    x, y = (random(rows, width, dtype=dtype, seed=seed).to(device) for seed in (0, 1))
    weight = random(width, dtype=dtype, seed=2).to(device)
    both = 3 * random(rows, 2 * width, dtype=dtype).to(device)
    added = x.clone()
    close(
        kernels.add_norm(added, y, weight, 1e-5),
        torch.nn.functional.rms_norm((x + y).float(), (width,), weight.float(), 1e-5),
    )
    assert torch.equal(added, x + y)
    close(
        kernels.add_norm(x, None, weight, 1e-5),
        torch.nn.functional.rms_norm(x.float(), (width,), weight.float(), 1e-5),
    )
    gate, up = both.float().chunk(2, -1)
    close(kernels.gate(both), torch.nn.functional.silu(gate) * up)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3, 200])
@pytest.mark.parametrize("width", [24, 576])
def test_the_small_operators_equal_torch(
    kernels: CpuKernels, dtype: torch.dtype, rows: int, width: int
) -> None:
    check_small_operators(kernels, rows, width, dtype, CPU)
    x = random(rows, width, dtype=dtype)
    scaled, largest = kernels.scale_rows(x)
    assert torch.equal(largest, x.float().abs().amax(-1, keepdim=True))
    assert torch.equal(scaled, x.float() / largest)


def check_rotation(
    kernels: LayerKernels, normed: bool, dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    """`rotate_and_store` of kernels for CPUs or GPUs against its definition."""
    heads = random(5, 6 + 2 + 2, dim, dtype=dtype).to(device)
    angles = torch.rand(5, dim // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    cos, sin = angles.cos().to(device, dtype), angles.sin().to(device, dtype)
    norms = [random(dim, dtype=dtype, seed=seed).to(device) for seed in (3, 4)]
    slots = torch.tensor([0, 0, 2, 1, 2], device=device)
    positions = torch.tensor([3, 4, 0, 127, 9], device=device)
    keys, values = (torch.zeros(14, 2, PAGE, dim, dtype=dtype, device=device) for _ in range(2))
    keys = as_wanted(kernels, keys)
    table = 1 + torch.randperm(13)[:12].view(3, 4).to(device)
    at = table[slots, positions // PAGE], slice(None), positions % PAGE
    parts = list(heads.clone().float().split([6, 2, 2], 1))
    for i in range(2 * normed):
        parts[i] = torch.nn.functional.rms_norm(parts[i], (dim,), norms[i].float(), 1e-6)

    def rotated(part: Tensor) -> Tensor:
        low, high = part.chunk(2, -1)
        return part * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

    given = (*norms, 1e-6) if normed else None
    kernels.rotate_and_store(heads, cos, sin, given, keys, values, table, slots, positions)
    close(heads[:, :6], rotated(parts[0]))
    close(keys[at], rotated(parts[1]))
    assert torch.equal(values[at].float(), parts[2])
    assert keys.count_nonzero() + values.count_nonzero() == 2 * 5 * 2 * dim


@needs_compiler
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_stores_keys_and_values_and_leaves_queries(
    kernels: CpuKernels, dtype: torch.dtype, normed: bool
) -> None:
    check_rotation(kernels, normed, 16, dtype, CPU)
