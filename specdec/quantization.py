"""Int8 linear layers for CPUs whose every output row is bit-equal in any batch (DESIGN.md §3, "CPU").

`int8wo`: int8 weights, bf16 activations. `int8`: int8 weights and activations. Both quantize a weight per
output channel; embeddings, norms and attention stay in float32.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

Quantization = Literal["int8wo", "int8"]


def _channel_scales(weight: Tensor) -> Tensor:
    """float32 [out]: what one int8 step of each output channel of weight [out, in] is worth."""
    return weight.float().abs().amax(1).clamp(min=1e-12) / 127


class Int8WeightOnlyLinear(nn.Module):
    """y = x W^T + b with int8 weights; x is rounded to bf16, y returned in x's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scales = _channel_scales(linear.weight.data)
        self.weight = nn.Buffer((linear.weight.data.float() / scales[:, None]).round().to(torch.int8))
        self.scales = nn.Buffer(scales.to(torch.bfloat16))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch._weight_int8pack_mm(flat, self.weight, self.scales).to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int8Linear(nn.Module):
    """y = x W^T + b with int8 weights and activations, the latter scaled per token.

    Each row of x is divided by its largest magnitude and quantized with the fixed scale 1/63 and zero
    point 64: seven bits, because fbgemm's AVX2 kernel saturates with eight.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data.float()
        scales = _channel_scales(weight).double()
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        engine = torch.backends.quantized.engine
        with warnings.catch_warnings():
            # torch announces the removal of quantized tensors; the packed operator below is what stays.
            warnings.simplefilter("ignore", UserWarning)
            torch.backends.quantized.engine = "fbgemm"
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            self.packed = torch.ops.quantized.linear_prepack(quantized, None)
            torch.backends.quantized.engine = engine
        # Kept for whoever asks a linear layer for its shape; costs no memory.
        self.weight = torch.empty(weight.shape, device="meta")
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True).clamp_(min=1e-12)
        y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            (x / largest).float(), 1 / 63, 64, self.packed
        )
        y = (y * largest).to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantize_(model: nn.Module, kind: Quantization) -> None:
    """Replace every linear layer of `model` in place, the LM head included."""
    layer = {"int8wo": Int8WeightOnlyLinear, "int8": Int8Linear}[kind]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, layer(child))
