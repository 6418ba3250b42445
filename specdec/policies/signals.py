"""What a candidate shows: `Signal`s, read off the device once per draft step.

Of each candidate: how likely it was to the draft, how likely the likeliest token was, and how
spread out the distribution. A trained head adds what the draft's hidden state says of acceptance.
This is all of a policy that runs on the device; the rest works with these numbers on the host.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from specdec.kernels.choose import kernels_over
from specdec.measure.calibration import Array
from specdec.policies.base import HEAD_SIGNALS, TOKEN_SIGNALS, Head, Signal

LEAST_LOG = math.log(torch.finfo(torch.float32).tiny)
"""What the logarithm of less is taken for, so that all are finite: of the least normal float32."""


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        # As the identity at first: training starts from a linear head.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.linear(x))


class AcceptanceHead(nn.Module):
    """Predicts acceptance from the draft's last hidden state (SpecDec++, arXiv 2405.19715, §3.2).

    D residual blocks, each with weights of its own, then a linear layer. The published head reads
    the state after y_k was fed, and so judges y_k one draft step late. This one reads the state
    that y_k is drawn from; a second linear layer sees y_k's `LOG_Q`, `LOG_TOP` and `ENTROPY` too,
    and so judges y_k at once.

    Args:
        width: size of the hidden state.
        depth: D.
        reject_weight: w_rej / w_acc of the training loss. A head trained with it estimates
            P / (P + w (1 - P)); ln w added to the logit takes that back.
    """

    def __init__(self, width: int, depth: int = 3, reject_weight: float = 1.0) -> None:
        super().__init__()
        self.width, self.depth, self.reject_weight = width, depth, reject_weight
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
        self.before = nn.Linear(width, 1)
        self.after = nn.Linear(width + len(TOKEN_SIGNALS), 1)

    def forward(self, hidden: Tensor, token_signals: Tensor) -> Tensor:
        """Weighted logits, as trained.

        Args:
            hidden: float32 [n, width], states that the candidates are drawn from.
            token_signals: float32 [n, 3]: LOG_Q, LOG_TOP, ENTROPY.

        Returns:
            float32 [n, 2]: before and after.
        """
        state = self.blocks(hidden)
        after = self.after(torch.cat([state, token_signals], -1))
        return torch.cat([self.before(state), after], -1)

    def debiased(self, hidden: Tensor, token_signals: Tensor) -> Tensor:
        """As `forward`, with the bias of the training weights taken back."""
        logits: Tensor = self(hidden, token_signals)
        return logits + float(np.log(self.reject_weight))


def read_signals(
    logits: Tensor,
    tokens: Tensor,
    hidden: Tensor,
    wanted: frozenset[Signal],
    head: Head | None = None,
) -> Tensor:
    """What policies and estimators want to know of the candidates just drawn.

    Args:
        logits: [n, V], raw; tokens: int64 [n]; hidden: [n, width], the states behind the logits.
        wanted: the columns to compute; the others are 0.
        head: needed for its own columns.

    Returns:
        float32 [n, len(Signal)] on the device.
    """
    judging = head is not None and bool(wanted & HEAD_SIGNALS)
    of_tokens = frozenset(TOKEN_SIGNALS) if judging else wanted & frozenset(TOKEN_SIGNALS)
    signals = torch.zeros(len(tokens), len(Signal), device=logits.device)
    if (kernels := kernels_over(logits)) is not None:
        kernels.token_signals(logits, tokens, signals, of_tokens)
    else:
        _token_signals(logits, tokens, signals, of_tokens)
    if head is not None and judging:
        judged = head.debiased(hidden.float(), signals[:, : len(TOKEN_SIGNALS)])
        signals[:, len(TOKEN_SIGNALS) :] = judged
    return signals


def readable(signals: Array) -> Array:
    """Signals on the host [n, len(Signal)] without NaN and infinity, changed in place.

    A draft without a softmax says nothing: its candidate has the signals of a hopeless one.
    """
    odd = ~np.isfinite(signals).all(1)
    if odd.any():
        signals[odd] = LEAST_LOG
        signals[odd, Signal.ENTROPY] = 0.0
    return signals


def _token_signals(logits: Tensor, tokens: Tensor, out: Tensor, wanted: frozenset[Signal]) -> None:
    """`Kernels.token_signals` by torch's operators."""
    # As few as there can be: after a forward each takes longer to begin than to run.
    log_q = torch.log_softmax(logits.float(), -1)
    if Signal.LOG_Q in wanted:
        out[:, Signal.LOG_Q] = log_q.gather(1, tokens[:, None])[:, 0].clamp_(min=LEAST_LOG)
    if Signal.LOG_TOP in wanted:
        out[:, Signal.LOG_TOP] = log_q.amax(-1)
    if Signal.ENTROPY in wanted:
        probs = log_q.exp()
        log_q.clamp_(min=LEAST_LOG)  # 0 * -inf is no number
        out[:, Signal.ENTROPY] = torch.linalg.vecdot(probs, log_q).neg_().clamp_(min=0)
