"""Texts of real tokens, which a made-up target writes again: for specdec/simulate/virtual.py.

What is looked up depends on the tokens, and on which rows run beside which. So these are played by
the real engine with its real index, and not from transcripts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from specdec.request import Request, SamplingParams
from specdec.simulate.script import Texts

Tokens = Sequence[int]


class Written(Texts):
    """What a target wrote, as what it says.

    Tokens are numbered anew: the vocabulary has those that occur, so that logits are few.

    Args:
        texts: token ids of each prompt and of its output, which has at least one.
        earlier: token ids of texts that were written before, if there are any.

    Attributes:
        earlier: these, in the new numbers.
    """

    def __init__(
        self, texts: Sequence[tuple[Tokens, Tokens]], earlier: Sequence[Tokens] = ()
    ) -> None:
        numbers: defaultdict[int, int] = defaultdict(lambda: len(numbers))
        renamed = [
            tuple(tuple(numbers[token] for token in part) for part in text) for text in texts
        ]
        self.earlier = [[numbers[token] for token in text] for text in earlier]
        self._prompts = [prompt for prompt, _ in renamed]
        outputs = [output for _, output in renamed]
        super().__init__([*map(len, self._prompts)], [*map(len, outputs)], len(numbers))
        self.truth = torch.tensor([token for output in outputs for token in (*output, 0)])

    def requests(self, rows: int, seed: int | None = None) -> list[Request]:
        """The first so many texts as greedy requests; ids are their numbers.

        Args:
            rows: how many; at most as many as there are texts.
            seed: None leaves their order; else prompts come in another, whose texts stay together.
        """
        groups = dict[tuple[int, ...], list[int]]()
        for number, prompt in enumerate(self._prompts[:rows]):
            groups.setdefault(prompt, []).append(number)
        order = [*groups.values()]
        if seed is not None:
            order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
        return [
            Request(
                str(number),
                self._prompts[number],
                SamplingParams(self.lengths[number], 0.0, ignore_eos=True),
            )
            for numbers in order
            for number in numbers
        ]
