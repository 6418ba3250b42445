"""What a model is compared with when it is loaded: its own plain forward, and how exact that is.

The comparison catches whatever an architecture does that packed attention or a fused layer does
not know of, and a GPU whose kernels are not what they were when they were written.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from specdec.model.linear import packable, stays_quantised
from specdec.model.stock import StockModel

CPU_CHECK = (73, 22)
"""Tokens of the two rows that a model on a CPU is checked with.

The first begins with more than QUERY_BLOCK and two pages, the second within GRID_TOKENS; both begin
with more than the windows. Raised, loading takes longer.
"""

GRID_CHECK = (137, 22)
"""The same where torch's operators attend batch-invariantly: the first begins beyond KEY_BLOCK."""

GPU_CHECK = (401, 130)
"""Tokens of the two rows that a model on a GPU is checked with: several blocks of its kernels.

Raised, loading takes longer; at 64 or less only one block of keys would be checked.
"""

TAIL = 16
"""How many of the last tokens of each row are compared.

Raised, more of the rows is compared, and the LM head takes longer.
"""

SPREAD = 3.0
"""Least standard deviation of the logits that are compared: what trained models have.

Flatter ones, of random models, are spread to it, since nothing shows in them.
"""

FLOOR = 1e-3
"""Total variation between the distributions of two right forwards in float32, at most.

SmolLM2-135M has 1e-5. Raised, a wrong forward may pass.
"""

MARGIN = 3.0
"""How much further than a half-precision forward is from float32 a packed one may be from it.

Two independent roundings are 1.4 times as far from each other as from the truth.
"""

WORST_MARGIN = 10.0
"""The same for the one token that differs most: rounding may send it to another expert.

Raised, a forward that is wrong for single tokens may pass in half precision.
"""

USUAL_NOISE = 0.02
"""Total variation that half precision costs where it cannot be measured, as in quantised models.

Raised, a forward that is wrong may pass in them.
"""


@dataclass(frozen=True, slots=True)
class Reference:
    """What the plain forward gives for two rows, and how far it is from full precision.

    Attributes:
        rows: tokens of each row, int64 [n].
        logits: of the last TAIL tokens of each row, float32 [TAIL, V].
        noise: mean and largest total variation between these, or the second row's alone, and the
            same in float32.
    """

    rows: tuple[Tensor, Tensor]
    logits: tuple[Tensor, Tensor]
    noise: tuple[float, float]

    @classmethod
    def of(
        cls, stock: StockModel, vocab_size: int, context: int, lengths: tuple[int, int]
    ) -> Reference:
        """That of a model whose attention is made transformers' own, for rows of such lengths."""
        model, decoder = stock.model, stock.decoder
        device: torch.device = model.get_input_embeddings().weight.device
        draw = torch.Generator().manual_seed(0)
        padding = getattr(model.config.get_text_config(), "pad_token_id", None)
        first, second = (
            _other_than(padding, torch.randint(vocab_size, (min(n, context),), generator=draw)).to(
                device
            )
            for n in lengths
        )
        rows = first, second
        stock.set_attention("sdpa" if decoder._supports_sdpa else "eager")
        logits = _tail(model, first), _tail(model, second)
        if stays_quantised(model):
            return cls(rows, logits, _noise_of_attention(stock, rows, torch.cat(logits)))
        # One row tells it, and a forward takes long. But rounding may send a token of either row to
        # another expert, which costs many times as much.
        measured = rows if "expert" in str(model.config.to_dict()) else rows[1:]
        return cls(rows, logits, _noise(model, measured, torch.cat(logits[-len(measured) :])))

    def has(self, row: int, place: int) -> bool:
        """Whether the token at a place of a row is one of those that are compared."""
        return place >= len(self.rows[row]) - TAIL

    def at(self, places: Sequence[tuple[int, int]]) -> Tensor:
        """The plain logits [m, V] of tokens by row and place in it; `has` says which are known."""
        return torch.stack([self.logits[row][place - len(self.rows[row])] for row, place in places])

    def difference(self, packed: Tensor, expected: Tensor) -> str:
        """What packed logits [m, V] differ by from others; "" if that is rounding."""
        mean, most = distance(packed, expected)
        limits = FLOOR + MARGIN * self.noise[0], FLOOR + WORST_MARGIN * self.noise[1]
        if mean < limits[0] and most < limits[1]:
            return ""
        return (
            f"its distributions differ from the plain forward's by {mean:.2g} in total variation, "
            f"{most:.2g} at most ({limits[0]:.2g} and {limits[1]:.2g} would be rounding)"
        )


def distance(logits: Tensor, expected: Tensor) -> tuple[float, float]:
    """Mean and largest total variation between the distributions of logits [m, V].

    Both are spread to the standard deviation of a trained model if `expected` is flatter.
    """
    expected = expected.float()
    factor = (SPREAD / expected.std().clamp(min=1e-6)).clamp(min=1)
    p, q = ((each.float() * factor).softmax(-1) for each in (logits, expected))
    variation = (p - q).abs().sum(-1) / 2
    # A comparison with NaN is false, so that a model that gives NaN is refused.
    return variation.mean().item(), variation.max().item()


def _other_than(padding: int | None, tokens: Tensor) -> Tensor:
    """Tokens without padding, which some models (RoBERTa) do not count as they count positions."""
    return tokens if padding is None else torch.where(tokens == padding, abs(padding - 1), tokens)


def _tail(model: Any, tokens: Tensor) -> Tensor:
    # Most models can leave out the LM head's work for the rest.
    fewer = "logits_to_keep" in inspect.signature(type(model).forward).parameters
    options = {"logits_to_keep": TAIL} if fewer else {}
    logits: Tensor = model(input_ids=tokens[None], use_cache=False, **options).logits
    return logits[0, -TAIL:].float()


def _noise(model: PreTrainedModel, rows: Sequence[Tensor], logits: Tensor) -> tuple[float, float]:
    """Mean and largest total variation between `logits` of rows and those of full precision."""
    if model.dtype == torch.float32:
        return 0.0, 0.0
    parameters = list(model.parameters())
    if all(p.dtype.itemsize >= 2 and p.device.type != "meta" for p in parameters):
        try:
            with full_precision(model):
                exact = torch.cat([_tail(model, row) for row in rows])
            return distance(logits, exact)
        except RuntimeError:  # a module that multiplies with another one's weights
            pass
    return USUAL_NOISE, 4 * USUAL_NOISE


def _noise_of_attention(
    stock: StockModel, rows: tuple[Tensor, Tensor], logits: Tensor
) -> tuple[float, float]:
    """What `logits` differ by from those with attention that rounds otherwise.

    Quantised layers cannot be widened. Some round their inputs to steps, which float32 crosses too.
    """
    stock.set_attention("eager")
    mean, most = distance(torch.cat([_tail(stock.model, row) for row in rows]), logits)
    if stock.model.dtype == torch.float32:
        return mean, most
    return max(mean, USUAL_NOISE), max(most, 4 * USUAL_NOISE)


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within, each module computes in float32, its weights converted while it runs."""
    kept: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def widen(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        kept[module] = [(each, each.data) for each in own if _is_half(each)]
        for each, data in kept[module]:
            each.data = data.float()
        return tuple(map(_widened, args)), {name: _widened(each) for name, each in kwargs.items()}

    def narrow(module: nn.Module, *_: object) -> None:
        for each, data in kept.pop(module):
            each.data = data

    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(widen, with_kwargs=True))
        hooks.append(module.register_forward_hook(narrow))
    try:
        yield
    finally:
        for module in list(kept):
            narrow(module)
        for hook in hooks:
            hook.remove()


class ProductsInFloat32(TorchFunctionMode):
    """Within, plain linear layers in half precision multiply in float32 and round what comes out.

    CPUs without instructions for half precision take several times as long for its products. Those
    are torch's in either forward; the check is of what stands between them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        numbers = [each for each in args if isinstance(each, Tensor)]
        plain = all(type(each) in (Tensor, nn.Parameter) and _is_half(each) for each in numbers)
        if func is not F.linear or kwargs or not plain:  # a quantiser's weights know what they do
            return func(*args, **(kwargs or {}))
        return func(*map(_widened, args)).to(args[0].dtype)


def products_for(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """ProductsInFloat32 where a device has none of a dtype."""
    slow = device.type == "cpu" and dtype.itemsize == 2 and not packable(dtype)
    return ProductsInFloat32() if slow else nullcontext()


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize == 2


def _widened(value: Any) -> Any:
    return value.float() if _is_half(value) else value
