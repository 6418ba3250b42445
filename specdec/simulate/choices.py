"""How a draft's choices along a text are drawn, and what a policy sees of them.

Numbers are keyed by a seed of the recording's own, the position, the rank and what they are for;
those behind a choice that is not the text's also by where it was drawn, as if that were its round.
None is drawn twice.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from specdec.engine.admission import Pair
from specdec.lossless.sampling import (
    Draw,
    SamplingBatch,
    exponential_noise,
    probabilities,
    sample,
    uniform,
)
from specdec.lossless.verification import MODES, Mode
from specdec.policies.base import HEAD_SIGNALS, Signal
from specdec.policies.signals import LEAST_LOG, AcceptanceHead, read_signals
from specdec.request import Request
from specdec.simulate.coupling import choices_given, without

Verification = Literal["rejection", "coupled"]


@dataclass(frozen=True, slots=True)
class Choices:
    """Draws a draft's choices for one request.

    Attributes:
        mode: how they would be verified.
        matching: whether the target's own choice decides, and no number.
        sampling: of the request, as one row.
        limit: no candidate has an output position of `limit` or more.
        width: choices at each place.
        head: fills the head's signals, if there is one.
    """

    mode: Mode
    matching: bool
    sampling: SamplingBatch
    limit: int
    width: int
    head: AcceptanceHead | None

    @classmethod
    def of(
        cls,
        pair: Pair,
        request: Request,
        verification: Verification,
        head: AcceptanceHead | None,
        width: int,
        device: torch.device,
    ) -> Choices:
        """Those of a request that a pair completes."""
        prompt = len(request.prompt_ids)
        longest = min(request.sampling.max_new_tokens, pair.context_length - prompt)
        matching = verification == "coupled" or request.sampling.temperature == 0
        # Coupled choices share the row's noise. Sampled candidates must not share what drew x.
        seed = request.sampling.seed if matching else _own_seed(request)
        return cls(
            MODES["coupled" if matching else "rejection"],
            matching,
            SamplingBatch.of([replace(request.sampling, seed=seed)], device),
            min(longest - 1, pair.draft_context_length - prompt),
            width,
            head,
        )

    def rows(self, at: Tensor) -> SamplingBatch:
        """The request's sampling at each of n places."""
        return self.sampling.rows(torch.zeros_like(at))

    def given(self, target_logits: Tensor, logits: Tensor, x: Tensor, at: Tensor) -> Tensor:
        """Choices int64 [n, width] given what the target wrote, x int64 [n]; see `choices_given`.

        Args:
            target_logits, logits: [n, V] each.
            at: int64 [n], output positions.
        """
        rows = self.rows(at)
        p, q = probabilities(target_logits, rows), probabilities(logits, rows)
        return choices_given(p, q, x, self.width, rows, at)

    def own(self, logits: Tensor, at: Tensor, since: Tensor) -> Tensor:
        """The draft's own choices int64 [n, width] from logits [n, V]; -1 where there are none.

        Args:
            at: int64 [n], output positions.
            since: int64 [n], where what was drawn without the text began. Such rollouts meet at a
                position: where numbers decide, each draws by its own.
        """
        params = self.rows(at)
        if not self.matching:
            params = params.in_round(since)
        y, q = self.mode.propose(logits, params, at)
        if self.width == 1:
            return y[:, None]
        if q is None:
            if params.all_greedy:
                scores = logits
            else:
                scores = probabilities(logits, params)
                scores = scores / exponential_noise(params.seed, at, scores.shape[1])
            best = scores.topk(min(self.width, scores.shape[1]))
            return torch.where(best.values == 0, -1, best.indices)
        found = [y]
        for rank in range(1, self.width):
            q = without(q, found[-1])
            u = uniform(params.in_round(torch.full_like(at, rank)).seed, at, Draw.CANDIDATE)
            found.append(torch.where(q.sum(-1) > 0, sample(q, u), -1))
        return torch.stack(found, 1)

    def signals(self, logits: Tensor, choices: Tensor, hidden: Tensor) -> Tensor:
        """float32 [n, width, len(Signal)]; choices that are none look hopeless."""
        wanted = frozenset(Signal) if self.head else frozenset(Signal) - HEAD_SIGNALS
        each = [
            read_signals(logits, y.clamp(min=0), hidden, wanted, self.head)
            for y in choices.unbind(1)
        ]
        signals = torch.stack(each, 1)
        signals[..., Signal.LOG_Q].masked_fill_(choices < 0, LEAST_LOG)
        return signals


def _own_seed(request: Request) -> int:
    key = f"trace:{request.sampling.seed}:{request.id}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
