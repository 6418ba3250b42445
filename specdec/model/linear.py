"""Linear layers for CPUs that are fast for few tokens and give a row the same bits in any batch.

Three precisions: the model's own, float32 or bfloat16; `int8wo`, int8 weights and bf16 activations;
`int8`, int8 weights and activations. Int8 weights are quantized per output channel. Embeddings,
norms and attention stay in the model's dtype.

A matrix product of few rows waits for its weights, so int8 weights make it faster by what they are
smaller. On two cores of AMD Zen 3 eight rows of a 2048 x 4096 layer take 2.3 ms in float32, 2.5 ms
in `int8wo`, which is wrong by 0.5%, and 0.8 ms in `int8`, wrong by 0.4%, with fbgemm's product by
1.7%.

Products are our own where the processor has what they need (specdec/kernels/panels.h, tiles.h):
AVX2 for float32 and `int8`, AMX for bfloat16 and for `int8`. Elsewhere, and for `int8wo`, they are
those of torch that give a row the same bits in any batch: oneDNN's, fbgemm's and
`_weight_int8pack_mm`.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from specdec.kernels.choose import cpu_kernels
from specdec.kernels.structs import Weights
from specdec.model.memory import LargePages

Quantization = Literal["int8wo", "int8"]


class RowwiseLinear(nn.Module):
    """y = x W^T + b over the last dimension of x; a subclass packs W and computes `product`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight
        # Stands in for the weight where a layer is asked for its shape; takes no memory.
        self.weight = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return self.product(x)
        return self.product(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        """y [n, out] of x [n, in], the bias included."""
        raise NotImplementedError


class KernelLinear(RowwiseLinear):
    """y = x W^T + b by a product of our own; a subclass packs W for it.

    Args:
        pages: where the packed weight is to lie; None: anywhere.

    Attributes:
        weights: what the kernels read.
    """

    OUTPUTS = 32
    """What outputs are padded to a multiple of: whole panels, or pairs of tiles."""

    takes_any = True  # dtype of inputs, if weights are bytes

    def __init__(self, linear: nn.Linear, pages: LargePages | None = None) -> None:
        super().__init__(linear)
        more = -linear.out_features % self.OUTPUTS
        numbers, scales = self.pack(nn.functional.pad(linear.weight.data, (0, 0, 0, more)))
        if pages is not None:
            numbers = pages.copy(numbers)
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.data
        bias = nn.functional.pad(bias.float(), (0, more))
        self.weights = Weights.of(numbers, scales, bias, linear.weight.shape)

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] as the kernels read it, and if it is bytes, scales of outputs."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        kernels = cpu_kernels(x.dtype, x.device)
        assert kernels is not None, "chosen by `layer_for`, where there are kernels"
        alike = self.takes_any or x.dtype == self.weight.dtype
        if not alike or x.shape[1] != self.weight.shape[1]:  # a kernel would take what lies there
            raise ValueError(
                f"a layer of {self.weight.dtype} weights {[*self.weight.shape]} cannot multiply "
                f"{x.dtype} inputs {[*x.shape]}"
            )
        return kernels.product(x.contiguous(), self.weights)


class PanelLinear(KernelLinear):
    """A `KernelLinear` in float32 or bfloat16.

    On two cores of a Xeon up to 32 rows take half to two thirds of oneDNN's time in float32, 0.6 to
    0.8 of it in bfloat16; hundreds take the same. Eight rows take 1.1 times one.
    """

    takes_any = False

    def pack(self, weight: Tensor) -> tuple[Tensor, None]:
        if weight.dtype == torch.bfloat16:
            return _in_tiles(weight, 32), None
        kernels = cpu_kernels(weight.dtype, weight.device)
        assert kernels is not None and kernels.panel, "chosen by `layer_for`"
        panels = weight.view(-1, kernels.panel, weight.shape[1])
        return panels.transpose(1, 2).contiguous(), None


class PanelInt8Linear(KernelLinear):
    """`Int8Linear` for processors with AVX2, which gives activations up to 16 bits.

    Bytes are widened to be multiplied, so finer steps cost nothing, and what is wrong is the
    weights. On two cores of Zen 3 a model takes half of the time for few rows, 0.9 for hundreds.
    """

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        kernels = cpu_kernels(torch.float32, weight.device)
        assert kernels is not None and kernels.byte_panel, "chosen by `layer_for`"
        rounded, scales = _in_bytes(weight)
        padded = nn.functional.pad(rounded, (0, weight.shape[1] % 2))
        panels = padded.view(-1, kernels.byte_panel, padded.shape[1] // 2, 2)
        return panels.transpose(1, 2).contiguous(), scales


class TileInt8Linear(KernelLinear):
    """`Int8Linear` for processors with AMX, whose sums of bytes are exact.

    On two cores of a Xeon it takes a third to a half of the time, and 16 rows take 1.2 times one.
    """

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        rounded, scales = _in_bytes(weight)
        return _in_tiles(rounded, 64), scales


class PackedLinear(RowwiseLinear):
    """y = x W^T + b in float32 or bfloat16, with W repacked once for oneDNN.

    For 4 to 64 rows this takes a quarter to three quarters of the time of torch's default (MKL, W
    as stored), in bfloat16 half of that again. Fewer than LEAST_ROWS rows are padded to as many,
    for which oneDNN has a faster kernel: five rows take four fifths of the time of one. In float32
    each row's bits are then the same whatever the other rows are; one row alone would be a
    matrix-vector product with its own order of summation.
    """

    LEAST_ROWS = 5
    """Fewest rows of a product; raised, small batches pay for more rows that nobody needs."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, None)

    def product(self, x: Tensor) -> Tensor:
        rows = len(x)
        if rows < self.LEAST_ROWS:
            x = nn.functional.pad(x, (0, 0, 0, self.LEAST_ROWS - rows))
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.contiguous(), self.packed, self.bias, "none", [], ""
        )
        return y[:rows]


class Int8WeightOnlyLinear(RowwiseLinear):
    """y = x W^T + b with int8 weights; x is rounded to bf16, y returned in x's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.data
        rounded, scales = _in_bytes(weight)
        # torch's kernel reads past the end of rows that are no multiple of its vectors.
        self.padding = -weight.shape[1] % 64
        self.packed = nn.Buffer(nn.functional.pad(rounded, (0, self.padding)))
        self.scales = nn.Buffer(scales.to(torch.bfloat16))

    def product(self, x: Tensor) -> Tensor:
        rounded = x.to(torch.bfloat16)
        if self.padding:
            rounded = nn.functional.pad(rounded, (0, self.padding))
        y = torch._weight_int8pack_mm(rounded, self.packed, self.scales).to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int8Linear(RowwiseLinear):
    """y = x W^T + b with int8 weights and activations, the latter scaled per token.

    Each row of x is divided by its largest magnitude and quantized in steps of 1 / `levels`: 127
    where the processor multiplies bytes exactly, otherwise 63, with which no sum of two products
    exceeds the 16 bits that it is kept in.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.packed, self.levels = _packed_int8(linear.weight.data), activation_levels()

    def product(self, x: Tensor) -> Tensor:
        kernels = cpu_kernels(x.dtype, x.device)
        if kernels is not None:
            scaled, largest = kernels.scale_rows(x.contiguous())
        else:
            largest = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12).float()
            scaled = x.float() / largest
        y = _int8_product(scaled, self.packed, self.levels).mul_(largest).to(x.dtype)
        return y if self.bias is None else y + self.bias


def layer_for(quantization: Quantization | None, dtype: torch.dtype) -> type[RowwiseLinear]:
    """What a linear layer of this dtype becomes on this processor."""
    if quantization == "int8wo":
        return Int8WeightOnlyLinear
    kernels = cpu_kernels(dtype, torch.device("cpu"))
    if quantization == "int8":
        if kernels is not None and kernels.tiles:
            return TileInt8Linear
        return PanelInt8Linear if kernels is not None and kernels.byte_panel else Int8Linear
    return PanelLinear if kernels is not None and kernels.panel else PackedLinear


def _in_tiles(weight: Tensor, step: int) -> Tensor:
    """Weight [out, in], out a multiple of 32, as tiles.h wants it; padded to `step` inputs."""
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % step))
    groups = padded.view(-1, 2, 16, padded.shape[1] // step, 16, step // 16)
    return groups.permute(0, 3, 1, 4, 2, 5).contiguous()


def _packed_int8(weight: Tensor) -> Any:
    """Weight [out, in] in fbgemm's layout, quantized per output channel."""
    scales = _channel_scales(weight).double()
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    engine = torch.backends.quantized.engine
    with warnings.catch_warnings():
        # torch announces the removal of quantized tensors; this one only feeds the packing.
        warnings.simplefilter("ignore", UserWarning)
        torch.backends.quantized.engine = "fbgemm"
        quantized = torch.quantize_per_channel(weight.float(), scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantized, None)
        torch.backends.quantized.engine = engine
    return packed


def _int8_product(x: Tensor, packed: Any, levels: int) -> Tensor:
    """x W^T for x in [-1, 1], quantized in steps of 1 / levels; float32."""
    y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
        x, 1 / levels, levels + 1, packed
    )
    return y


@functools.cache
def activation_levels() -> int:
    """Steps between 0 and a row's largest magnitude that this processor's kernel can take."""
    # AVX2 adds two products of bytes in 16 bits, which the largest of eight bits overflow.
    product = _int8_product(torch.ones(1, 64), _packed_int8(torch.ones(16, 64)), 127)
    return 127 if (product - 64).abs().max() < 0.01 else 63


def _in_bytes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, in], weight in steps of each output channel's scale, and these scales."""
    scales = _channel_scales(weight)
    return (weight.float() / scales[:, None]).round().to(torch.int8), scales


def _channel_scales(weight: Tensor) -> Tensor:
    """float32 [out]: what one int8 step of each output channel of weight [out, in] is worth."""
    return weight.float().abs().amax(1).clamp(min=1e-12) / 127


def packable(dtype: torch.dtype) -> bool:
    """Whether linear layers of this dtype can be packed on this CPU."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def is_plain(module: object) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer that multiplies by its weight and does nothing else.

    Quantisers replace or wrap layers, or keep their class and pack the weight.
    """
    if type(module) is not nn.Linear:
        return False
    if getattr(module.forward, "__func__", None) is not nn.Linear.forward:
        return False
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.dtype in PLAIN


PLAIN = {torch.float32, torch.bfloat16, torch.float16}
"""Dtypes of weights that are numbers as they stand."""


def stays_quantised(model: nn.Module) -> bool:
    """Whether a loaded model has linear layers that its quantiser replaced, wrapped or packed."""
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    return getattr(model, "hf_quantizer", None) is not None and not all(map(is_plain, layers))


def outputs_of(head: Any) -> int:
    """How many numbers a linear layer gives, quantised ones and those of here included."""
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


READ_ELSEWHERE = {"dt_proj"}
"""Linear layers whose weights the module that they belong to multiplies with itself (Mamba)."""


def pack_linears(model: nn.Module, quantization: Quantization | None) -> None:
    """Replace the plain linear layers of a `packable` model in place, the LM head included."""
    pages = LargePages()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_plain(child) and name not in READ_ELSEWHERE:
                kind = layer_for(quantization, child.weight.dtype)
                layer = kind(child, pages) if issubclass(kind, KernelLinear) else kind(child)
                setattr(parent, name, layer)


@torch.inference_mode()
def is_invariant(model: nn.Module) -> bool:
    """Whether each kind of linear layer of `model` gives a row the same bits in every batch, here.

    Kernels differ by processor, so this is measured: one layer of each shape, rows alone and among
    others.
    """
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for module in model.modules():
        matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if matrices and not isinstance(module, nn.Embedding):
            return False  # a product whose kernels are not known here: convolutions, experts, ...
        if hasattr(module, "in_features"):
            return False  # a quantised layer, whose weights may be buffers
        if isinstance(module, RowwiseLinear):
            if (shape := module.weight.shape) in seen:
                continue
            seen.add(shape)
            x = torch.randn(130, shape[1], generator=generator)
            whole = module(x)
            for rows in (1, 2, 3, 7, 16, 33, 64, 129):
                if not torch.equal(module(x[:rows]), whole[:rows]):
                    return False
                if not torch.equal(module(x[-rows:]), whole[-rows:]):
                    return False
    return True
