"""How candidates are drawn and looked at: a pure function of tensors, which a GPU can record."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from specdec.drafters.base import Drawn
from specdec.lossless.sampling import SamplingBatch
from specdec.lossless.verification import Mode
from specdec.policies.base import HEAD_SIGNALS, TOKEN_SIGNALS, Head, Signal
from specdec.policies.signals import LEAST_LOG, read_signals


@dataclass(frozen=True, slots=True, eq=False)
class Choosing:
    """Draws one candidate of each of n rows, or some siblings; see `specdec.drafters.base.Choose`.

    Attributes:
        mode: how they are verified.
        params: the rows' sampling parameters; under `rejection` with the numbers to draw by.
        at: int64 [n], their output positions, where the mode draws by them: `coupled` rows.
        wanted: what a policy wants to know of them, and `head`, what it needs for that.
        adjust: makes of logits [n, V] what the rows ask for, if they ask for anything.
        width: siblings, if more than 1. What it returns then has them as second dimension.
    """

    mode: Mode
    params: SamplingBatch
    at: Tensor | None
    wanted: frozenset[Signal]
    head: Head | None
    adjust: Callable[[Tensor], Tensor] | None = None
    width: int = 1

    @property
    def recordable(self) -> bool:
        return self.adjust is None

    @property
    def likeliest(self) -> bool:
        return self.adjust is None and self.params.all_greedy

    @property
    def key(self) -> Hashable:
        params = self.params
        flags = params.all_greedy, params.any_greedy, params.any_top_p, params.any_min_p
        return type(self.mode), flags, params.max_top_k, self.wanted, id(self.head), self.width

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        if self.params.all_greedy:
            return ()
        return tuple(self.params.used.values()) + (() if self.at is None else (self.at,))

    def __call__(self, logits: Tensor, hidden: Tensor, *inputs: Tensor) -> Drawn:
        if self.adjust is not None:
            logits = self.adjust(logits)
        params = self.params.of_tensors(inputs) if inputs else self.params
        at = None if self.at is None else inputs[-1]
        tokens, q = self.mode.propose(logits, params, at, self.width)
        return tokens, q, self.look(logits, tokens, hidden)

    def look(self, logits: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor | None:
        """The signals of some candidates, if they are wanted: float32 [n, len(Signal)]."""
        if not self.wanted:
            return None
        if self.width == 1:
            return read_signals(logits, tokens, hidden, self.wanted, self.head)
        best = read_signals(logits, tokens[:, 0], hidden, self.wanted, self.head)
        return self._siblings(best, logits, tokens, hidden)

    def _siblings(self, best: Tensor, logits: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Signals float32 [n, width, len(Signal)] of siblings; those of the `best` are known.

        They differ in what the draft gives to each, and in what a head makes of that.
        """
        signals = best[:, None].repeat(1, self.width, 1)
        judging = self.head is not None and bool(self.wanted & HEAD_SIGNALS)
        if judging or Signal.LOG_Q in self.wanted:
            own = logits.gather(1, tokens).float()
            log_q = signals[..., Signal.LOG_Q] + own - own[:, :1]
            signals[..., Signal.LOG_Q] = log_q.clamp(min=LEAST_LOG)
        if self.head is not None and judging:
            known = len(TOKEN_SIGNALS)
            states = hidden.float().repeat_interleave(self.width, 0)
            judged = self.head.debiased(states, signals[..., :known].flatten(0, 1))
            signals[..., known:] = judged.view(*tokens.shape, -1)
        return signals
