from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from specdec.model.linear import (
    Int8Linear,
    Int8WeightOnlyLinear,
    KernelLinear,
    PackedLinear,
    PanelInt8Linear,
    PanelLinear,
    Quantization,
    RowwiseLinear,
    TileInt8Linear,
    is_invariant,
    is_plain,
    layer_for,
    pack_linears,
    packable,
)
from tests.specdec.tiny_models import VOCAB, seeded, tiny_model

Kind = Quantization | Literal["tiles", "panels", "byte panels"] | None

KINDS: dict[Kind, type[RowwiseLinear]] = {
    None: PackedLinear,
    "panels": PanelLinear,
    "int8": Int8Linear,
    "tiles": TileInt8Linear,
    "byte panels": PanelInt8Linear,
    "int8wo": Int8WeightOnlyLinear,
}
ERROR: dict[Kind, float] = {
    None: 1e-5,
    "panels": 1e-5,
    "int8": 0.03,
    "tiles": 0.03,
    "byte panels": 0.01,
    "int8wo": 0.01,
}
"""Largest relative error (Frobenius norm) against float32; 1.8% and 0.4% were measured."""

FULL, HALF = torch.float32, torch.bfloat16


def works(kind: Kind, dtype: torch.dtype) -> bool:
    """Whether this processor has such layers: ours want a compiler, AVX2 or AMX."""
    if kind == "tiles":
        return layer_for("int8", dtype) is TileInt8Linear
    if kind == "byte panels":
        return layer_for("int8", dtype) is PanelInt8Linear
    if kind == "panels":
        return layer_for(None, dtype) is PanelLinear
    return packable(dtype)


HERE = [kind for kind in KINDS if works(kind, FULL)]
OURS = [kind for kind in get_args(Quantization) if issubclass(layer_for(kind, FULL), KernelLinear)]
HERE_IN_HALF = [kind for kind in KINDS if works(kind, HALF) and kind != "int8wo"]
INVARIANT = [
    *((kind, FULL) for kind in HERE),
    *((kind, HALF) for kind in HERE_IN_HALF if kind is not None),  # oneDNN's depends on the shape
]

layers = pytest.mark.parametrize("kind", HERE, ids=str)
kinds = pytest.mark.parametrize("kind", [*get_args(Quantization), None], ids=str)


def linear(inputs: int, outputs: int, bias: bool = False, seed: int = 0) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / inputs**0.5)
    return layer


def inputs_of(rows: int, size: int, seed: int = 1) -> Tensor:
    """Rows of very different magnitude."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, rows)[torch.randperm(rows, generator=generator)]
    return scale[:, None] * torch.randn(rows, size, generator=generator)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("kind", "dtype"), INVARIANT, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (576, 192), (208, 97), (64, 1536), (1536, 576)])
def test_a_row_has_the_same_bits_in_any_batch(
    kind: Kind, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    layer, x = KINDS[kind](linear(*shape).to(dtype)), inputs_of(64, shape[0]).to(dtype)
    alone = torch.cat([layer(row[None]) for row in x])
    for batch in (*range(2, 18), 24, 31, 32, 33, 48, 63, 64):
        assert torch.equal(layer(x[:batch]), alone[:batch]), batch
        assert torch.equal(layer(x[-batch:]), alone[-batch:]), batch


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("kind", "dtype"), INVARIANT, ids=str)
def test_a_row_has_the_same_bits_with_more_threads_than_outputs_keep_busy(
    kind: Kind, dtype: torch.dtype
) -> None:
    layer, x = KINDS[kind](linear(96, 80).to(dtype)), inputs_of(200, 96).to(dtype)
    expected = layer(x)
    torch.set_num_threads(12)
    for rows in (1, 15, 40, 200):
        assert torch.equal(layer(x[:rows]), expected[:rows]), rows


def test_any_input_size_works() -> None:
    """In another process: torch's int8 weight-only kernel reads past the end of odd-sized rows."""
    code = f"""
import torch
from specdec.model import linear
for layer, bound in {[(KINDS[kind].__name__, ERROR[kind]) for kind in HERE]}:
    for inputs in (200, 201, 216):
        plain = torch.nn.Linear(inputs, 96, bias=False).requires_grad_(False)
        packed, x = getattr(linear, layer)(plain), torch.randn(33, inputs)
        for rows in (1, 4, 33):
            for _ in range(20):
                error = (packed(x[:rows]) - plain(x[:rows])).norm() / plain(x[:rows]).norm()
                assert error < bound, (layer, inputs, rows, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"killed by signal {-done.returncode}"


@pytest.mark.skipif("panels" not in HERE, reason="no AVX2 here, or no compiler")
def test_float32_sums_go_over_inputs_in_their_order() -> None:
    """As fused multiply-adds do it, one after the other: nothing is left of -1 + 1 + 2^-30."""
    layer = nn.Linear(3, 1, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.tensor([[2.0**-30, 1.0, -1.0]]))
    x = torch.ones(16, 3)
    assert PanelLinear(layer)(x).tolist() == [[0.0]] * 16
    layer.weight.copy_(torch.tensor([[1.0, -1.0, 2.0**-30]]))
    assert PanelLinear(layer)(x).tolist() == [[2.0**-30]] * 16


@pytest.mark.skipif("int8" not in OURS, reason="no AVX2 here, or no compiler")
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_spoils_no_other(odd: float) -> None:
    layer, x = layer_for("int8", FULL)(linear(200, 48)), inputs_of(20, 200)
    expected = layer(x)
    x[7, 130] = odd
    y = layer(x)
    assert y[7].isnan().all()
    others = torch.arange(20) != 7
    assert torch.equal(y[others], expected[others])


@layers
@pytest.mark.parametrize("bias", [False, True])
def test_error_against_float32_is_bounded(kind: Kind, bias: bool) -> None:
    plain, x = linear(512, 256, bias), inputs_of(40, 512)
    got, expected = KINDS[kind](plain)(x), plain(x)
    each_row = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert each_row.max() < ERROR[kind]


@pytest.mark.skipif(not HERE_IN_HALF, reason="no bfloat16 products on this processor")
@pytest.mark.parametrize("kind", HERE_IN_HALF, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 64])
def test_bfloat16_in_bfloat16_out(kind: Kind, rows: int) -> None:
    plain, x = linear(512, 256, bias=True).bfloat16(), inputs_of(rows, 512).bfloat16()
    got, expected = (
        KINDS[kind](plain)(x),
        nn.functional.linear(x.float(), plain.weight.float(), plain.bias.float()),
    )
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() / expected.norm() < max(ERROR[kind], 0.005)


@layers
def test_the_bias_is_added_in_full_precision(kind: Kind) -> None:
    plain = linear(64, 32, bias=True)
    assert torch.equal(KINDS[kind](plain)(torch.zeros(3, 64)), plain.bias.expand(3, -1))


@pytest.mark.parametrize("kind", [k for k in ("panels", "byte panels", "tiles") if k in HERE])
def test_inputs_of_another_width_or_dtype_are_refused(kind: Kind) -> None:
    layer = KINDS[kind](linear(64, 48))
    with pytest.raises(ValueError, match=r"weights \[48, 64\] cannot multiply .* \[3, 63\]"):
        layer(torch.ones(3, 63))
    if kind == "panels":
        with pytest.raises(ValueError, match=r"cannot multiply torch.bfloat16"):
            layer(torch.ones(3, 64, dtype=HALF))
    assert layer(torch.ones(0, 64)).shape == (0, 48)


@layers
@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (1, 2, 3, 64)])
def test_leading_dimensions_are_kept(kind: Kind, shape: tuple[int, ...]) -> None:
    y = KINDS[kind](linear(64, 48))(torch.ones(shape))
    assert (y.shape, y.dtype) == ((*shape[:-1], 48), torch.float32)


@layers
def test_each_output_channel_has_a_scale_of_its_own(kind: Kind) -> None:
    plain = linear(128, 4)
    plain.weight[2] *= 1000
    plain.weight[3] = 0
    x = torch.randn(50, 128, generator=torch.Generator().manual_seed(2))
    got, expected = KINDS[kind](plain)(x), plain(x)
    assert ((got - expected).norm(dim=0) <= 2 * ERROR[kind] * expected.norm(dim=0)).all()


@layers
def test_a_row_with_one_large_number_keeps_its_direction(kind: Kind) -> None:
    plain, x = linear(128, 64), torch.zeros(1, 128)
    x[0, 7] = 1e4
    got, expected = KINDS[kind](plain)(x), plain(x)
    assert (got - expected).norm() < ERROR[kind] * expected.norm()


@kinds
def test_every_linear_layer_is_replaced_and_nothing_else(kind: Quantization | None) -> None:
    model = tiny_model("qwen2")
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    others = {name: type(m) for name, m in model.named_modules() if type(m) is not nn.Linear}
    pack_linears(model, kind)
    after = dict(model.named_modules())
    assert "lm_head" in linears and len(linears) == 2 * 7 + 1
    expected = layer_for(kind, FULL)
    assert all(type(after[name]) is expected for name in linears)
    assert all(type(after[name]) is its for name, its in others.items())
    assert model.get_output_embeddings().weight.shape == (VOCAB, 64)


def test_layers_that_a_quantiser_made_are_left_alone() -> None:
    """It may replace a layer, wrap its forward, or store other numbers as its weight."""

    class Replaced(nn.Linear):
        pass

    wrapped, stored = linear(8, 8), linear(8, 8)
    wrapped.forward = functools.partial(wrapped.forward)  # type: ignore[method-assign]
    stored.weight = nn.Parameter(stored.weight.to(torch.float8_e4m3fn), requires_grad=False)
    model = nn.Sequential(linear(8, 8), Replaced(8, 8), wrapped, stored)
    before = list(model)
    pack_linears(model, "int8")
    assert [is_plain(layer) for layer in before] == [True, False, False, False]
    assert [type(layer) for layer in model] == [
        layer_for("int8", FULL),
        Replaced,
        nn.Linear,
        nn.Linear,
    ]
    assert list(model)[1:] == before[1:]


def test_a_quantised_layer_whose_weights_are_buffers_is_not_taken_for_invariant() -> None:
    layer = nn.Module()
    layer.in_features, layer.qweight = 64, nn.Buffer(torch.zeros(8, 64, dtype=torch.int32))  # type: ignore[assignment]
    assert not is_invariant(nn.Sequential(layer))


def test_quantizing_leaves_torchs_quantization_engine_as_it_was() -> None:
    before = torch.backends.quantized.engine
    Int8Linear(linear(8, 8))
    assert torch.backends.quantized.engine == before


@kinds
def test_a_model_of_these_layers_is_found_invariant(kind: Quantization | None) -> None:
    model = tiny_model("qwen2")
    assert not is_invariant(model)
    pack_linears(model, kind)
    assert is_invariant(model)


NOT_LINEAR = {
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=1, n_head=4, n_positions=64),
    "mixtral": MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    ),
}


@pytest.mark.parametrize("family", NOT_LINEAR)
def test_a_model_that_multiplies_outside_linear_layers_is_not_taken_for_invariant(
    family: str,
) -> None:
    """GPT-2 has Conv1D, mixtures of experts have stacked weights; neither is replaced."""
    model = seeded(AutoModelForCausalLM.from_config, NOT_LINEAR[family]).eval()
    pack_linears(model.requires_grad_(False), "int8")
    assert not is_invariant(model)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("rows", [200, 512, 700])
@layers
def test_a_row_has_the_same_bits_among_the_rows_of_a_prefill(kind: Kind, rows: int) -> None:
    layer, x = KINDS[kind](linear(576, 192)), inputs_of(rows, 576)
    whole = layer(x)
    for batch in (1, 2, 5, 16, 130):
        assert torch.equal(layer(x[:batch]), whole[:batch]), batch
        assert torch.equal(layer(x[-batch:]), whole[-batch:]), batch


@pytest.mark.skipif(platform.machine() != "x86_64", reason="fbgemm's switch is for x86")
def test_a_processor_that_saturates_gets_seven_bits() -> None:
    """A fresh process whose kernels may use AVX2 at most."""
    program = (
        "import torch\n"
        "from specdec.model.linear import Int8Linear, activation_levels\n"
        "linear = torch.nn.Linear(256, 32, bias=False)\n"
        "linear.weight.data.fill_(1.0)\n"
        "error = (Int8Linear(linear)(torch.ones(3, 256)) - 256).abs().max()\n"
        "print(activation_levels(), error.item())"
    )
    environment = {**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    out = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    levels, error = out.stdout.split()
    assert levels == "63" and float(error) < 0.1
