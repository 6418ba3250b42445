"""Transcripts of an EAGLE-3 draft, whose candidates depend on where their round began.

The first candidate of a round is proposed from the target's features, each further one from the
draft's own state of the one before it. So from every place of a text the draft runs a whole round,
as the engine has it: along the text as long as its choices are the text's, and behind the first one
that is not by its own sampling.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from specdec.engine.admission import Pair
from specdec.model.eagle import EagleDecoder
from specdec.policies.base import Signal
from specdec.simulate.choices import Choices
from specdec.simulate.transcripts import Text, Transcript
from specdec.training.examples import Example
from specdec.training.scores import read_states

_ROUNDS = 64
"""Places of a text whose rounds are run at once. More take more cache."""


class EagleRecorder:
    """Holds the draft's cache from text to text: slot 0 for the text, the others for rounds.

    Args:
        pair: both models.
        draft: the pair's.
        most: most candidates of a round.
    """

    def __init__(self, pair: Pair, draft: EagleDecoder, most: int) -> None:
        self.pair, self.draft, self.most = pair, draft, most
        self.cache = draft.new_cache(1 + _ROUNDS, 0)

    @torch.inference_mode()
    def transcript(self, text: Text, by: Choices) -> Transcript:
        """What rounds meet that begin at each place of a text."""
        prompt, n = len(text.request.prompt_ids), len(text.output_ids)
        signals = torch.zeros(n, self.most, len(Signal), device=self.draft.device)
        lengths = torch.zeros(n, dtype=torch.int64, device=self.draft.device)
        # The draft needs a token with a feature, and one behind it.
        first = max(0, 2 - prompt)
        if first < n:
            judging, states = self._read(text)
            output = torch.tensor(text.output_ids, device=self.draft.device)
            for starts in torch.split(torch.arange(first, min(n, by.limit)), _ROUNDS):
                at = starts.to(self.draft.device)
                given = states[at + prompt - 2], judging, output
                lengths[at], signals[at] = self._rounds(starts, prompt, by, *given)
        whole = signals.cpu().numpy()[:, :, None]
        counts = lengths.cpu().numpy()
        return Transcript(
            id=text.request.id,
            group=text.group,
            prompt_tokens=prompt,
            limit=by.limit,
            free_trimming=by.matching,
            ranks=np.where(counts > 0, 0, 1),
            signals=whole[:, 0],
            branch_of=np.arange(n),
            branches=whole[:, 1:],
            lengths=counts,
        )

    def _read(self, text: Text) -> tuple[Tensor, Tensor]:
        """States that the target chose the output tokens from, [n, hidden], and the draft's.

        Those of the draft are [prompt + n - 2, hidden], by position; slot 0 then holds the text.
        """
        draft, request, wanted = self.draft, text.request, self.draft.features.layers
        example = Example(request.id, request.prompt_ids, text.output_ids)
        hidden, inputs = read_states(self.pair.target, [example], wanted)
        features = draft.features.fuse(torch.cat([inputs[layer] for layer in wanted], -1))
        tokens = torch.tensor(example.input_ids[1:], device=draft.device)
        self.cache.grow(1 + _ROUNDS, len(tokens) + self.most)
        self.cache.rollback(0, 0)
        known = features[:-1].to(draft.device, self.pair.target.dtype)
        states: Tensor = draft.read(self.cache, [(0, len(tokens))], tokens, known)
        return hidden[len(request.prompt_ids) - 1 :], states.clone()

    def _rounds(
        self,
        starts: Tensor,
        prompt: int,
        by: Choices,
        states: Tensor,
        judging: Tensor,
        output: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Rounds that begin at `starts` (int64 [m], rising, on the host), below the limit.

        Args:
            prompt: tokens of the prompt.
            by: draws choices.
            states: [m, hidden], which first candidates are proposed from.
            judging: [n, hidden], the target's, of the text's places.
            output: int64 [n], the text.

        Returns:
            int64 [m], how many candidates stand; float32 [m, most, len(Signal)], zeros from the
            limit on.
        """
        draft, n = self.draft, len(output)
        lengths = torch.zeros_like(starts, device=draft.device)
        signals = torch.zeros(len(starts), self.most, len(Signal), device=draft.device)
        slots = range(1, 1 + len(starts))
        self.cache.fork(0, slots, [prompt + int(t) - 1 for t in starts])
        since = starts.to(draft.device)
        right = torch.ones_like(since, dtype=torch.bool)
        for step in range(self.most):
            # The later a round begins, the sooner it is at the limit: rows leave at the end.
            m = int((starts + step < by.limit).sum())
            if not m:
                break
            since, right, states = since[:m], right[:m], states[:m]
            places = since + step
            normed = draft.normed(states)
            logits = draft.model.logits(normed)[:, : self.pair.vocab_size]
            choices = by.own(logits, places, since)
            right = right & (places < n)
            if not by.matching and right.any():
                at = places[right]
                judged = self.pair.target.logits(judging[at.to(judging.device)])
                target_logits = judged[:, : self.pair.vocab_size].to(draft.device)
                choices[right] = by.given(target_logits, logits[right], output[at], at)
            right = right & (choices[:, 0] == output[places.clamp(max=n - 1)])
            lengths[:m] += right
            signals[:m, step] = by.signals(logits, choices, normed)[:, 0]
            if step + 1 < self.most:
                rows = [(slot, 1) for slot in slots[:m]]
                states = draft.read(self.cache, rows, choices[:, 0], states).clone()
        return lengths, signals
