"""Recording `Transcript`s: what speculation would meet along texts that the target wrote itself.

Both models read a text x once (teacher forcing). At each output position the draft's choices are
drawn *given* what the target wrote there, so that the two have the joint law that they have in
speculative sampling (specdec/simulate/coupling.py). So one pass over the text gives, for every
position at once, which of the draft's choices would be accepted, whatever policy is asked later. In
matching modes the choices are the draft's own best, and x_t is accepted among them or not.

A policy drafts on behind a candidate that will be rejected, since it cannot know. What it would see
there is recorded too: at every place the draft is rolled out by its own sampling behind its best
wrong choice. Where its first choice is right this takes ASIDE steps, the last of which stands for
those behind it.

What an EAGLE-3 draft proposes depends on where its round began: specdec/simulate/record_eagle.py.
What could be looked up is recorded beside it, if asked for (specdec/simulate/lookups.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.suffix import SuffixIndex
from specdec.engine.admission import Pair
from specdec.engine.engine import Engine
from specdec.model.decoder import PackedDecoder
from specdec.model.eagle import EagleDecoder
from specdec.policies.base import Signal
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.profiling import profile_costs
from specdec.policies.signals import AcceptanceHead
from specdec.request import Completion, Request
from specdec.simulate.choices import Choices, Verification
from specdec.simulate.lookups import look_up
from specdec.simulate.record_eagle import EagleRecorder
from specdec.simulate.transcripts import LookedUp, Text, Transcript
from specdec.training.examples import Example
from specdec.training.scores import target_states

MOST = 20
"""Most candidates of a round that the transcripts can answer for.

Recording takes a draft forward for each, and files grow with it. 20 is the usual `k_max`.
"""

WIDTH = 4
"""Choices of the draft at each place that transcripts know. Files grow with it."""

ASIDE = 6
"""Steps that the draft is rolled out behind a second choice where the first one is right.

Raised, recording takes longer: most places are such.
"""

_LOGIT_ROWS = 256
"""Positions whose logits are held at once: 150 MB at 150,000 tokens. More gain no time."""

_BRANCHES = 64
"""Rejected candidates that the draft is rolled out from at once. More take more cache."""


def write_texts(engine: Engine, requests: Sequence[Request]) -> Iterator[Completion]:
    """Complete requests, as they end. The engine's policy must be `none`."""
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        yield from engine.step()


def record(
    pair: Pair,
    texts: Sequence[Text],
    *,
    verification: Verification = "rejection",
    head: AcceptanceHead | None = None,
    most: int = MOST,
    width: int = 1,
    lookup: SuffixIndex | None = None,
    live: int = 16,
) -> Iterator[Transcript]:
    """Record texts one by one.

    Args:
        pair: both models.
        texts: the target's. One with a prompt that the draft cannot read is left out; one that
            outgrows the draft's context is cut there.
        verification: as in the Engine that is to be simulated. Greedy rows match in both.
        head: fills the head's signals, if there is one.
        most: most candidates of a round, one behind another.
        width: choices of the draft at each place; an EAGLE-3 draft, which has no trees, has one.
        lookup: reads the texts, as `live` rows side by side write them, and says what might be
            looked up on the way. A draft that goes on behind a wrong candidate of these is taken to
            see what it sees behind a wrong choice of its own, so that `width` must be above 1.

    Raises:
        ValueError: the pair has no draft, or one that cannot go on from anywhere in a text; or
            `width` is 1 where candidates are looked up.
    """
    draft = pair.draft
    if draft is None:
        raise ValueError("transcripts need a pair with a draft")
    if draft.recurrent:
        raise ValueError(
            "transcripts need a draft that can go on from anywhere in a text; this one has layers "
            "whose state runs on, so compare policies in jobs"
        )
    recorder: _Recorder | EagleRecorder
    if isinstance(draft, EagleDecoder):
        recorder, width = EagleRecorder(pair, draft, most), 1
    else:
        recorder = _Recorder(pair, draft, most)
    if lookup is not None and width == 1:
        raise ValueError("transcripts with what is looked up need a width above 1")
    readable: list[Text] = []
    for text in texts:
        room = pair.draft_context_length - len(text.request.prompt_ids) + 1
        if output := text.output_ids[: max(room, 0)]:
            readable.append(replace(text, output_ids=output))
    found: list[LookedUp] | list[None] = [None] * len(readable)
    if lookup is not None:
        found = look_up([(each.request, each.output_ids) for each in readable], lookup, live)
    for text, looked_up in zip(readable, found, strict=True):
        choices = Choices.of(pair, text.request, verification, head, width, draft.device)
        yield replace(recorder.transcript(text, choices), looked_up=looked_up)


class _Recorder:
    """Holds the draft's cache from text to text: slot 0 for the text, the others for branches."""

    def __init__(self, pair: Pair, draft: PackedDecoder, most: int) -> None:
        self.pair, self.draft, self.most = pair, draft, most
        self.cache = draft.new_cache(1 + _BRANCHES, 0)

    @torch.inference_mode()
    def transcript(self, text: Text, by: Choices) -> Transcript:
        request, output = text.request, text.output_ids
        prompt, n = len(request.prompt_ids), len(output)
        choices, signals = self._choices(text, by)
        right = (choices.cpu() == torch.tensor(output)[:, None]).numpy()
        ranks = np.where(right.any(1), right.argmax(1), by.width)
        branches = torch.zeros(n, self.most - 1, *signals.shape[1:], device=signals.device)
        # An accepted end of the text is drafted past as well: the draft does not know of it.
        wrong = [t for t in range(n) if ranks[t] or t == n - 1]
        aside = [t for t in range(n - 1) if not ranks[t]] if by.width > 1 else []
        depth = self.most - 1
        for starts, rank, steps in ((wrong, 0, depth), (aside, 1, min(ASIDE, depth))):
            if starts and steps:
                from_ = choices[starts, rank].clamp(min=0)
                rolled = self._branches(starts, from_, prompt, steps, by)
                branches[starts, :steps] = rolled
                branches[starts, steps:] = rolled[:, -1:]
        known = sorted([*wrong, *aside])
        branch_of = np.full(n, -1, dtype=np.int64)
        branch_of[known] = np.arange(len(known))
        return Transcript(
            id=request.id,
            group=text.group,
            prompt_tokens=prompt,
            limit=by.limit,
            free_trimming=by.matching,
            ranks=ranks,
            signals=signals.cpu().numpy(),
            branch_of=branch_of,
            branches=branches[known].cpu().numpy(),
        )

    def _choices(self, text: Text, by: Choices) -> tuple[Tensor, Tensor]:
        """Choices int64 [n, width] along the text and their signals; slot 0 then holds the text."""
        pair, draft, request = self.pair, self.draft, text.request
        example = Example(request.id, request.prompt_ids, text.output_ids)
        tokens = torch.tensor(example.input_ids, device=draft.device)
        need = len(tokens) + self.most
        self.cache.grow(1 + _BRANCHES, need)
        self.cache.rollback(0, 0)
        states = draft.forward(self.cache, [(0, len(tokens))], tokens)
        states = states[len(request.prompt_ids) - 1 :]
        _, target_states_ = next(target_states(pair.target, [example]))
        x = torch.tensor(text.output_ids, device=draft.device)
        found: list[tuple[Tensor, Tensor]] = []
        for at in torch.split(torch.arange(len(x), device=draft.device), _LOGIT_ROWS):
            logits = draft.logits(states[at])[:, : pair.vocab_size]
            if by.matching:
                y = by.own(logits, at, since=at)
            else:
                judged = target_states_[at.to(target_states_.device)]
                target_logits = pair.target.logits(judged)[:, : pair.vocab_size]
                y = by.given(target_logits.to(draft.device), logits, x[at], at)
            found.append((y, by.signals(logits, y, states[at])))
        choices, signals = (torch.cat(parts) for parts in zip(*found, strict=True))
        return choices, signals

    def _branches(
        self, starts: Sequence[int], candidates: Tensor, prompt: int, depth: int, by: Choices
    ) -> Tensor:
        """Signals of what the draft proposes behind candidates at `starts` (rising).

        Returns:
            float32 [len(starts), depth, width, len(Signal)]; zeros from the limit on.
        """
        device = self.draft.device
        result = torch.zeros(len(starts), depth, by.width, len(Signal), device=device)
        for begin in range(0, len(starts), _BRANCHES):
            part = starts[begin : begin + _BRANCHES]
            slots = range(1, 1 + len(part))
            self.cache.fork(0, slots, [prompt + t for t in part])
            tokens = candidates[begin : begin + len(part)]
            for step in range(depth):
                # The later a branch begins, the sooner it is at the limit: rows leave at the end.
                at = [t + 1 + step for t in part if t + 1 + step < by.limit]
                if not at:
                    break
                rows = [(slot, 1) for slot in slots[: len(at)]]
                hidden = self.draft.forward(self.cache, rows, tokens[: len(at)])
                logits = self.draft.logits(hidden)[:, : self.pair.vocab_size]
                places = torch.tensor(at, device=device)
                choices = by.own(logits, places, since=places - step)
                result[begin : begin + len(at), step] = by.signals(logits, choices, hidden)
                tokens = choices[:, 0]
        return result


# ------------------------------------------------------------------------- costs


def measure_costs(pair: Pair, slots: int, prompt: int, seconds: float) -> CostModel:
    """A virtual clock for transcripts: both models' curves as they are on this machine, now.

    Measured twice, the smaller counts, against what else the machine was doing. What the draft
    takes to read a typical prompt is measured too, if the profile ends before it. Without a draft
    its steps cost nothing.

    Args:
        slots: most live rows.
        prompt: tokens of a typical prompt.
        seconds: for all of it, about.
    """
    draft = pair.draft
    passes = [profile_costs(pair.target, draft, slots, seconds / 2).points() for _ in range(2)]
    curves: list[list[tuple[int, float]]] = []
    for name in ("draft", "verify"):
        first, second = (dict(each[name]) for each in passes)
        tokens = sorted({*first, *second})
        curves.append([(n, min(first.get(n, inf), second.get(n, inf))) for n in tokens])
    if draft is not None and prompt > curves[0][-1][0]:
        ids = torch.zeros(prompt, dtype=torch.int64, device=draft.device)
        taken = []
        for _ in range(3):
            cache = draft.new_cache(1, prompt)
            began = time.perf_counter()
            draft.logits(draft.forward(cache, [(0, prompt)], ids)[-1:]).argmax(-1).tolist()
            taken.append(time.perf_counter() - began)
        curves[0].append((prompt, max(min(taken), curves[0][-1][1])))
    draft_table, verify_table = (
        CostTable([n for n, _ in curve], [seconds for _, seconds in curve]) for curve in curves
    )
    return CostModel(draft_table, verify_table)
