"""How candidates are drawn and looked at: a pure function of tensors, which a GPU can record."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from specdec.drafters.base import Drawn
from specdec.lossless.sampling import SamplingBatch
from specdec.lossless.verification import Mode
from specdec.policies.base import Head, Signal
from specdec.policies.signals import read_signals


@dataclass(frozen=True, slots=True, eq=False)
class Choosing:
    """Draws one candidate of each of n rows; see `specdec.drafters.base.Choose`.

    Attributes:
        mode: how they are verified.
        params: the rows' sampling parameters; under `rejection` with the numbers to draw by.
        at: int64 [n], their output positions, where the mode draws by them: `coupled` rows.
        wanted: what a policy wants to know of them, and `head`, what it needs for that.
        adjust: makes of logits [n, V] what the rows ask for, if they ask for anything.
    """

    mode: Mode
    params: SamplingBatch
    at: Tensor | None
    wanted: frozenset[Signal]
    head: Head | None
    adjust: Callable[[Tensor], Tensor] | None = None

    @property
    def recordable(self) -> bool:
        return self.adjust is None

    @property
    def key(self) -> Hashable:
        params = self.params
        flags = params.all_greedy, params.any_greedy, params.any_top_p, params.any_min_p
        return type(self.mode), flags, params.max_top_k, self.wanted, id(self.head)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        if self.params.all_greedy:
            return ()
        return tuple(self.params.used.values()) + (() if self.at is None else (self.at,))

    def __call__(self, logits: Tensor, hidden: Tensor, *inputs: Tensor) -> Drawn:
        if self.adjust is not None:
            logits = self.adjust(logits)
        params = self.params.of_tensors(inputs) if inputs else self.params
        tokens, q = self.mode.propose(logits, params, None if self.at is None else inputs[-1])
        return tokens, q, self.look(logits, tokens, hidden)

    def look(self, logits: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor | None:
        """The signals of some candidates, if they are wanted: float32 [n, len(Signal)]."""
        if not self.wanted:
            return None
        return read_signals(logits, tokens, hidden, self.wanted, self.head)
