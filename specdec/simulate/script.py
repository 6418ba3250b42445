"""Transcripts as what two made-up models say, by tensors: for specdec/simulate/virtual.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.policies.base import Signal
from specdec.request import Request, SamplingParams
from specdec.simulate.transcripts import Transcript

VOCABULARY = 128
"""Tokens of the made-up vocabulary: enough for a distribution's tail, few enough to be quick."""

WRONG = VOCABULARY - 1
"""The token that is true nowhere."""


class Script:
    """Transcripts as tensors: what the draft proposes in each *state*, and what is true.

    The state of a text is how many of its tokens are known. A state of a branch is where a wrong
    candidate leads to: so many candidates behind it.

    Args:
        transcripts: of equal depth; numbers below are their indices.
    """

    def __init__(self, transcripts: Sequence[Transcript]) -> None:
        self.prompts = torch.tensor([t.prompt_tokens for t in transcripts])
        self.lengths = [len(t.accepted) for t in transcripts]
        # A text of n tokens has the states 0..n; nothing is proposed in the last one.
        ends = np.cumsum([n + 1 for n in self.lengths])
        self.first = torch.from_numpy(ends - [n + 1 for n in self.lengths])
        states = int(ends[-1])
        self.truth = torch.arange(states) * 37 % WRONG
        none = np.zeros((1, transcripts[0].signals.shape[2]), dtype=np.float32)
        right = torch.from_numpy(np.concatenate([np.append(t.accepted, True) for t in transcripts]))
        signals = np.concatenate([part for t in transcripts for part in (t.signals[:, 0], none)])
        # Where drafting goes on behind each state's candidate, if that is wrong.
        self.depth = transcripts[0].branches.shape[1]
        branches = np.cumsum([0, *[len(t.branches) for t in transcripts]])
        behind = [
            np.append(t.branch_of, 0).clip(0) + start
            for t, start in zip(transcripts, branches, strict=False)
        ]
        self.branch = states + torch.from_numpy(np.concatenate(behind)) * self.depth
        chains = [t.branches[:, :, 0] for t in transcripts]
        rolled = np.concatenate([chain.reshape(-1, none.shape[1]) for chain in chains])
        off = torch.full((len(rolled),), WRONG)
        self.candidates = torch.cat([torch.where(right, self.truth, WRONG), off])
        self.draft_logits = _logits(np.concatenate([signals, rolled]), self.candidates)
        certain = torch.full((states + len(rolled), VOCABULARY), -100.0)
        self.target_logits = certain.scatter(1, torch.cat([self.truth, off])[:, None], 100.0)

    def requests(self, rows: int) -> list[Request]:
        """So many requests, which go round the transcripts; ids are their numbers."""
        every = len(self.lengths)
        made = []
        for number in range(rows):
            prompt = _prompt(number, int(self.prompts[number % every]))
            sampling = SamplingParams(self.lengths[number % every], 1.0, ignore_eos=True)
            made.append(Request(str(number), prompt, sampling))
        return made


def _prompt(number: int, length: int) -> tuple[int, ...]:
    """Tokens that no other request's prompt begins with."""
    generator = np.random.default_rng(number)
    return tuple(generator.integers(0, WRONG, length).tolist())


def _logits(signals: Any, candidates: Tensor) -> Tensor:
    """Logits [n, VOCABULARY] whose softmax has such LOG_Q of the candidates and LOG_TOP.

    The rest is spread evenly over all other tokens, so entropy is not the recorded one.
    """
    log_q = torch.from_numpy(signals[:, Signal.LOG_Q]).clamp(max=-1e-6)[:, None]
    log_top = torch.from_numpy(signals[:, Signal.LOG_TOP]).clamp(max=-1e-6)[:, None]
    below = log_q < log_top - 1e-6
    rest = 1 - log_q.exp() - torch.where(below, log_top.exp(), 0.0)
    logits = (rest.clamp(min=1e-9) / (VOCABULARY - 1 - below.long())).log()
    logits = logits.expand(-1, VOCABULARY).clone()
    top = ((candidates + 1) % VOCABULARY)[:, None]
    logits.scatter_(1, top, torch.where(below, log_top, logits.gather(1, top)))
    return logits.scatter_(1, candidates[:, None], log_q)
