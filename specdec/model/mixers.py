"""Layers whose state runs on, in packed forwards: their own `forward`, over recurrences of ours.

Such a layer (a *mixer*: Mamba, gated delta net, short convolution) names the functions that
convolve and scan as globals of its module, as attention layers name AttentionInterface. So its
`forward` runs here over packed tokens with others under these names, which know rows and slots.
What it does besides, projections, gates and norms, stays its own.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.model.packing import Packing
from specdec.model.recurrent import WIDEST, Replay, Scan, StateLayout
from specdec.model.stock import UnsupportedModel

CONVOLUTION = "causal_conv1d_fn"
"""What transformers' mixers call their causal convolution over time."""

CHUNK = 64
"""Tokens of a chunk in delta rules, as transformers has them. Raised, fewer and larger products."""


def _delta_rule(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    **options: Any,
) -> tuple[Scan, Callable[[Tensor], Any]]:
    """Gated delta rule, with a decay for each head or for each number of a key (Kimi).

    Args:
        query, key: [1, N, Hk, K]; value: [1, N, H, V].
        g: logarithms of decays, [1, N, H] or [1, N, H, K]; beta: [1, N, H], how much is replaced.
    """

    def run(
        state: Tensor, inputs: Sequence[Tensor], readers: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        key, value, g, beta = inputs
        same = options | {"initial_state": state, "output_final_state": True}
        chunk = min(CHUNK, key.shape[1])
        out, after = function(readers[0], key, value, g=g, beta=beta, chunk_size=chunk, **same)
        return out, after

    shape = value.shape[2], key.shape[3], value.shape[3]
    scan = Scan(shape, (key[0], value[0], g[0], beta[0]), (query[0],), run)
    return scan, lambda out: (out[None], None)


def _state_space(
    function: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    chunk_size: int,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **options: Any,
) -> tuple[Scan, Callable[[Tensor], Any]]:
    """State space of Mamba 2.

    Args:
        x: [1, N, H, P]; dt: time steps, [1, N, H]; a: [H]; b, c: [1, N, G, S].
    """
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

    def run(
        state: Tensor, inputs: Sequence[Tensor], readers: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        x, dt, b = inputs
        same = options | {"initial_states": state, "return_final_states": True}
        # The hand-written kernels of mamba-ssm want a power of two.
        chunk = min(chunk_size, max(16, 1 << (x.shape[1] - 1).bit_length()))
        out, after = function(x, dt, a, b, readers[0], chunk_size=chunk, **same)
        return out, after

    shape = x.shape[2], x.shape[3], b.shape[3]
    return Scan(shape, (x[0], dt[0], b[0]), (c[0],), run), lambda out: out[None]


def _selective_scan(
    function: Callable[..., Any],
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **_: Any,
) -> tuple[Scan, Callable[[Tensor], Any]]:
    """Selective scan of Mamba. transformers' begins at a state of zero, so this is one of ours.

    Args:
        x, dt, z: inputs, time steps and gates, [1, P, N]; a: [P, S]; b, c: [1, S, N]; D: [P].
    """
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    dt = F.softplus(dt) if delta_softplus else dt

    def run(
        state: Tensor, inputs: Sequence[Tensor], readers: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        x, dt, b = inputs
        outs = []
        for t in range(x.shape[1]):
            step = dt[:, t, :, None].float()
            moved = step * b[:, t, None].float() * x[:, t, :, None].float()
            state = torch.exp(a * step) * state + moved
            outs.append((state.to(x.dtype) @ readers[0][:, t, :, None]).squeeze(-1))
        return torch.stack(outs, 1), state

    def finish(out: Tensor) -> Tensor:
        y = out.transpose(0, 1)[None]
        if D is not None:
            y = y + x * D[None, :, None]
        return y if z is None else y * F.silu(z)

    inputs = tuple(each[0].transpose(0, 1) for each in (x, dt, b))
    return Scan(tuple(a.shape), inputs, (c[0].transpose(0, 1),), run), finish


Adapt = Callable[..., tuple[Scan, Callable[[Tensor], Any]]]
"""Takes a function that scans and its arguments; gives the scan, and what makes of its outputs
[N, ...] what the function would return."""

SCANS: dict[str, Adapt] = {
    "torch_chunk_gated_delta_rule": _delta_rule,
    "chunk_kimi_delta_attention": _delta_rule,
    "mamba2_chunk_scan": _state_space,
    "mamba_selective_scan": _selective_scan,
}
"""The functions that scan, by the names that mixers call."""


class Mixers:
    """The mixers of a model, which from now on run packed while `running` is set.

    Attributes:
        running: where the tokens of the running forward belong; None: they are rows of their own.
        layouts: what each recurrence keeps of a slot, once `noting` has seen a forward.

    Args:
        model: of transformers; the `forward` of its mixers is replaced.
    """

    def __init__(self, model: nn.Module) -> None:
        self.running: Packing | None = None
        self.layouts: list[StateLayout] = []
        self._noting = False
        self._all = [_Mixer(module, self) for module in model.modules() if _named(module)]

    def __bool__(self) -> bool:
        return bool(self._all)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Within, a forward over one row notes what is kept of a slot."""
        for mixer in self._all:
            mixer.numbers.clear()
        self.layouts, self._noting = [], True
        try:
            yield
        finally:
            self._noting = False

    @contextmanager
    def over(self, packing: Packing) -> Iterator[None]:
        """Within, forwards are over packed tokens."""
        self.running = packing
        try:
            yield
        finally:
            self.running = None

    def note(self, mixer: _Mixer, layout: StateLayout) -> None:
        """Give a number to the recurrence that a mixer calls now, if they are noted."""
        if self._noting:
            mixer.numbers.append(len(self.layouts))
            self.layouts.append(layout)


class _Mixer:
    """One mixer with a `forward` that looks for its recurrences here.

    Attributes:
        numbers: of its recurrences, in the order in which it calls them.
    """

    def __init__(self, module: Any, mixers: Mixers) -> None:
        self.numbers: list[int] = []
        self._module, self._mixers, self._calls = module, mixers, 0
        own: Any = inspect.unwrap(type(module).forward)
        ours: dict[str, Any] = {}
        for name in _named(module):
            function = own.__globals__[name]
            if name == CONVOLUTION:
                ours[name] = functools.partial(self._convolve, function)
            else:
                ours[name] = functools.partial(self._scan, SCANS[name], function)
        self._forward: Any = types.FunctionType(
            own.__code__, own.__globals__ | ours, own.__name__, own.__defaults__, own.__closure__
        )
        self._forward.__kwdefaults__ = own.__kwdefaults__
        # accelerate puts its own around the one that is there.
        setattr(module, "_old_forward" if hasattr(module, "_hf_hook") else "forward", self.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        self._calls = 0
        return self._forward(self._module, *args, **kwargs)

    def _next_number(self) -> int:
        self._calls += 1
        return self.numbers[self._calls - 1]

    def _convolve(
        self, function: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The convolution of x [1, C, N]."""
        weight: Tensor = args[0] if args else kwargs["weight"]
        kernel = weight.shape[-1]
        if kernel > WIDEST:
            raise UnsupportedModel(f"it convolves over {kernel} tokens; {WIDEST} at most can be")
        packing = self._mixers.running
        if packing is None:
            self._mixers.note(self, StateLayout(None, ((x.shape[1:2], x.dtype),)))
            return function(x, *args, **kwargs)

        def run(row: Tensor) -> Tensor:
            return function(row[None], *args, **kwargs)[0]

        return _replay(packing).convolve(self._next_number(), x[0], kernel, run)[None]

    def _scan(self, adapt: Adapt, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        scan, finish = adapt(function, *args, **kwargs)
        packing = self._mixers.running
        if packing is None:
            inputs = tuple((x.shape[1:], x.dtype) for x in scan.inputs)
            self._mixers.note(self, StateLayout(scan.state, inputs))
            return function(*args, **kwargs)
        return finish(_replay(packing).scan(self._next_number(), scan))


def _replay(packing: Packing) -> Replay:
    assert packing.replay is not None, "the cache of a model with mixers has states"
    return packing.replay


def _named(module: nn.Module) -> set[str]:
    """The functions that convolve or scan which the `forward` of a module names."""
    own = inspect.unwrap(type(module).forward)
    code = getattr(own, "__code__", None)
    return {CONVOLUTION, *SCANS} & set(code.co_names if code else ())
