"""Texts as what made-up models say, by tensors: for specdec/simulate/virtual.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specdec.policies.base import MOST_WIDTH, Signal
from specdec.request import Request, SamplingParams
from specdec.simulate.transcripts import Transcript

VOCABULARY = 128
"""Tokens of the made-up vocabulary: enough for a distribution's tail, few enough to be quick."""

WRONG = VOCABULARY - MOST_WIDTH
"""The first of the tokens that are true nowhere; there is one for each choice at a place."""


class Texts:
    """Outputs as what a made-up target says in each *state*: how many tokens of a text are known.

    A text of n tokens has the states 0..n; those of all texts are counted on.

    Args:
        prompts: tokens of each text's prompt.
        lengths: tokens of each text.
        vocabulary: how many tokens there are.

    Attributes:
        first: int64, the state of each text in which nothing is known.
        truth: int64, the next token in each state; any in a text's last one.
    """

    truth: Tensor

    def __init__(self, prompts: Sequence[int], lengths: Sequence[int], vocabulary: int) -> None:
        self.prompts, self.lengths, self.vocabulary = torch.tensor(prompts), lengths, vocabulary
        ends = np.cumsum([n + 1 for n in lengths])
        self.first, self.states = torch.from_numpy(ends - [n + 1 for n in lengths]), int(ends[-1])

    @property
    def longest(self) -> int:
        """Tokens of the longest text with its prompt."""
        return max(int(p) + n for p, n in zip(self.prompts, self.lengths, strict=True))

    def target_logits(self, states: Tensor) -> Tensor:
        """Logits [n, vocabulary] in states [n] that leave no doubt."""
        certain = torch.full((len(states), self.vocabulary), -100.0)
        return certain.scatter_(1, self.truth[states][:, None], 100.0)


class Script(Texts):
    """Transcripts as tensors: what the draft proposes in each state, and what is true.

    A state of a branch is where a wrong choice leads to: so many tokens behind it.

    Args:
        transcripts: of equal depth and width; numbers below are their indices.
    """

    def __init__(self, transcripts: Sequence[Transcript]) -> None:
        lengths = [len(t.ranks) for t in transcripts]
        super().__init__([t.prompt_tokens for t in transcripts], lengths, VOCABULARY)
        self._greedy = [t.free_trimming for t in transcripts]
        # Nothing is proposed in a text's last state.
        self.truth = torch.arange(self.states) * 37 % WRONG
        self.width = transcripts[0].width
        none = np.zeros((1, *transcripts[0].signals.shape[1:]), dtype=np.float32)
        ranks = torch.from_numpy(np.concatenate([np.append(t.ranks, 0) for t in transcripts]))
        signals = np.concatenate([part for t in transcripts for part in (t.signals, none)])
        # Where drafting goes on behind each state's choices, if they are wrong.
        self.depth = transcripts[0].branches.shape[1]
        branches = np.cumsum([0, *[len(t.branches) for t in transcripts]])
        behind = [
            np.append(t.branch_of, 0).clip(0) + start
            for t, start in zip(transcripts, branches, strict=False)
        ]
        self.branch = self.states + torch.from_numpy(np.concatenate(behind)) * self.depth
        rolled = np.concatenate([t.branches.reshape(-1, *none.shape[1:]) for t in transcripts])
        wrong = WRONG + torch.arange(self.width)
        right = torch.arange(self.width) == ranks[:, None]
        along = torch.where(right, self.truth[:, None], wrong)
        self.choices = torch.cat([along, wrong.expand(len(rolled), -1)])
        self.signals = torch.from_numpy(np.concatenate([signals, rolled]))
        self.draft_logits = _logits(self.signals, self.choices)

    def requests(self, rows: int) -> list[Request]:
        """So many requests, which go round the transcripts; ids are their numbers."""
        every = len(self.lengths)
        made = []
        for number in range(rows):
            which = number % every
            prompt = _prompt(number, int(self.prompts[which]))
            temperature = 0.0 if self._greedy[which] else 1.0
            sampling = SamplingParams(self.lengths[which], temperature, ignore_eos=True)
            made.append(Request(str(number), prompt, sampling))
        return made


def _prompt(number: int, length: int) -> tuple[int, ...]:
    """Tokens that no other request's prompt begins with."""
    generator = np.random.default_rng(number)
    return tuple(generator.integers(0, WRONG, length).tolist())


def _logits(signals: Tensor, choices: Tensor) -> Tensor:
    """Logits [n, VOCABULARY] whose softmax has such LOG_Q of the choices [n, width] and LOG_TOP.

    The rest is spread evenly over all other tokens.
    """
    log_q = signals[..., Signal.LOG_Q].clamp(max=-1e-6)
    log_top = signals[:, :1, Signal.LOG_TOP].clamp(max=-1e-6)
    below = (log_q < log_top - 1e-6).all(1, keepdim=True)  # then it is none of the choices
    rest = 1 - log_q.exp().sum(1, keepdim=True) - torch.where(below, log_top.exp(), 0.0)
    others = VOCABULARY - choices.shape[1] - below.long()
    logits = (rest.clamp(min=1e-9) / others).log().expand(-1, VOCABULARY).clone()
    top = (choices.amin(1, keepdim=True) + 1) % WRONG  # true tokens are less than wrong ones
    logits.scatter_(1, top, torch.where(below, log_top, logits.gather(1, top)))
    return logits.scatter_(1, choices, log_q)
