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
from specdec.training.eagle_texts import ROUNDS, EagleTexts
from specdec.training.examples import Example


class EagleRecorder:
    """Records one text after the other.

    Args:
        pair: both models.
        draft: the pair's.
        most: most candidates of a round.
    """

    def __init__(self, pair: Pair, draft: EagleDecoder, most: int) -> None:
        self.pair, self.draft, self.most = pair, draft, most
        self.texts = EagleTexts(pair.target, draft, most)

    @torch.inference_mode()
    def transcript(self, text: Text, by: Choices) -> Transcript:
        """What rounds meet that begin at each place of a text."""
        prompt, n = len(text.request.prompt_ids), len(text.output_ids)
        signals = torch.zeros(n, self.most, len(Signal), device=self.draft.device)
        lengths = torch.zeros(n, dtype=torch.int64, device=self.draft.device)
        # The draft needs a token with a feature, and one behind it.
        first = max(0, 2 - prompt)
        if first < n:
            judging, states = self.texts.read(
                Example(text.request.id, text.request.prompt_ids, text.output_ids)
            )
            output = torch.tensor(text.output_ids, device=self.draft.device)
            for starts in torch.split(torch.arange(first, min(n, by.limit)), ROUNDS):
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
        slots = self.texts.begin(starts.tolist(), prompt)
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
                states = self.texts.go_on(rows, choices[:, 0], states)
        return lengths, signals
