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

What could be looked up is recorded beside it, if asked for (specdec/simulate/lookups.py).

Numbers are keyed by a seed of the recording's own, the position, the rank and what they are for;
those of a rollout also by the candidate that it starts from, as if that were its round. None is
drawn twice.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.suffix import SuffixIndex
from specdec.engine.admission import Pair
from specdec.engine.engine import Engine
from specdec.lossless.sampling import (
    Draw,
    SamplingBatch,
    exponential_noise,
    probabilities,
    sample,
    uniform,
)
from specdec.lossless.verification import MODES
from specdec.model.decoder import PackedDecoder
from specdec.policies.base import HEAD_SIGNALS, Signal
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.profiling import profile_costs
from specdec.policies.signals import LEAST_LOG, AcceptanceHead, read_signals
from specdec.request import Completion, Request
from specdec.simulate.coupling import choices_given, without
from specdec.simulate.lookups import look_up
from specdec.simulate.transcripts import LookedUp, Transcript
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


@dataclass(frozen=True, slots=True)
class Text:
    """A request and the target's own completion of it.

    Attributes:
        request: with the sampling that the completion was drawn by.
        output_ids: the completion, to its end.
        group: results are reported by it.
    """

    request: Request
    output_ids: tuple[int, ...]
    group: str = ""


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
    verification: Literal["rejection", "coupled"] = "rejection",
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
        width: choices of the draft at each place.
        lookup: reads the texts, as `live` rows side by side write them, and says what might be
            looked up on the way. A draft that goes on behind a wrong candidate of these is taken to
            see what it sees behind a wrong choice of its own, so that `width` must be above 1.

    Raises:
        ValueError: the pair has no draft, or one that cannot go on from anywhere in a text; or
            `width` is 1 where candidates are looked up.
    """
    if pair.draft is None or pair.draft.reads_features:
        raise ValueError("transcripts need a pair with a draft that is a language model")
    if pair.draft.recurrent:
        raise ValueError(
            "transcripts need a draft that can go on from anywhere in a text; this one has layers "
            "whose state runs on, so compare policies in jobs"
        )
    if lookup is not None and width == 1:
        raise ValueError("transcripts with what is looked up need a width above 1")
    recorder = _Recorder(pair, pair.draft, verification, head, most, width)
    readable: list[Text] = []
    for text in texts:
        room = pair.draft_context_length - len(text.request.prompt_ids) + 1
        if output := text.output_ids[: max(room, 0)]:
            readable.append(replace(text, output_ids=output))
    found: list[LookedUp] | list[None] = [None] * len(readable)
    if lookup is not None:
        found = look_up([(each.request, each.output_ids) for each in readable], lookup, live)
    for text, looked_up in zip(readable, found, strict=True):
        yield replace(recorder.transcript(text), looked_up=looked_up)


class _Recorder:
    """Holds the draft's cache from text to text: slot 0 for the text, the others for branches."""

    def __init__(
        self,
        pair: Pair,
        draft: PackedDecoder,
        verification: Literal["rejection", "coupled"],
        head: AcceptanceHead | None,
        most: int,
        width: int,
    ) -> None:
        self.pair, self.draft, self.head = pair, draft, head
        self.most, self.width = most, width
        self.verification = verification
        self.wanted = frozenset(Signal) if head else frozenset(Signal) - HEAD_SIGNALS
        self.cache = draft.new_cache(1 + _BRANCHES, 0)

    @torch.inference_mode()
    def transcript(self, text: Text) -> Transcript:
        request, output = text.request, text.output_ids
        prompt, n = len(request.prompt_ids), len(output)
        longest = min(request.sampling.max_new_tokens, self.pair.context_length - prompt)
        limit = min(longest - 1, self.pair.draft_context_length - prompt)
        matching = self.verification == "coupled" or request.sampling.temperature == 0
        self.mode = MODES["coupled" if matching else "rejection"]
        # Coupled choices share the row's noise. Sampled candidates must not share what drew x.
        seed = request.sampling.seed if matching else _own_seed(request)
        sampling = SamplingBatch.of([replace(request.sampling, seed=seed)], self.draft.device)

        choices, signals = self._choices(text, sampling, matching)
        right = (choices.cpu() == torch.tensor(output)[:, None]).numpy()
        ranks = np.where(right.any(1), right.argmax(1), self.width)
        branches = torch.zeros(n, self.most - 1, *signals.shape[1:], device=signals.device)
        # An accepted end of the text is drafted past as well: the draft does not know of it.
        wrong = [t for t in range(n) if ranks[t] or t == n - 1]
        aside = [t for t in range(n - 1) if not ranks[t]] if self.width > 1 else []
        depth = self.most - 1
        for starts, rank, steps in ((wrong, 0, depth), (aside, 1, min(ASIDE, depth))):
            if starts and steps:
                from_ = choices[starts, rank].clamp(min=0)
                rolled = self._branches(starts, from_, prompt, limit, steps, sampling)
                branches[starts, :steps] = rolled
                branches[starts, steps:] = rolled[:, -1:]
        known = sorted([*wrong, *aside])
        branch_of = np.full(n, -1, dtype=np.int64)
        branch_of[known] = np.arange(len(known))
        return Transcript(
            id=request.id,
            group=text.group,
            prompt_tokens=prompt,
            limit=limit,
            free_trimming=matching,
            ranks=ranks,
            signals=signals.cpu().numpy(),
            branch_of=branch_of,
            branches=branches[known].cpu().numpy(),
        )

    def _choices(
        self, text: Text, sampling: SamplingBatch, matching: bool
    ) -> tuple[Tensor, Tensor]:
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
            rows = sampling.rows(torch.zeros_like(at))
            if matching:
                y = self._drawn(logits, rows, at)
            else:
                judged = target_states_[at.to(target_states_.device)]
                target_logits = pair.target.logits(judged)[:, : pair.vocab_size]
                p = probabilities(target_logits.to(draft.device), rows)
                y = choices_given(p, probabilities(logits, rows), x[at], self.width, rows, at)
            found.append((y, self._signals(logits, y, states[at])))
        choices, signals = (torch.cat(parts) for parts in zip(*found, strict=True))
        return choices, signals

    def _drawn(self, logits: Tensor, params: SamplingBatch, at: Tensor) -> Tensor:
        """The draft's own choices int64 [n, width] from logits [n, V]; -1 where there are none."""
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

    def _signals(self, logits: Tensor, choices: Tensor, hidden: Tensor) -> Tensor:
        """float32 [n, width, len(Signal)]; choices that are none look hopeless."""
        each = [
            read_signals(logits, y.clamp(min=0), hidden, self.wanted, self.head)
            for y in choices.unbind(1)
        ]
        signals = torch.stack(each, 1)
        signals[..., Signal.LOG_Q].masked_fill_(choices < 0, LEAST_LOG)
        return signals

    def _branches(
        self,
        starts: Sequence[int],
        candidates: Tensor,
        prompt: int,
        limit: int,
        depth: int,
        sampling: SamplingBatch,
    ) -> Tensor:
        """Signals of what the draft proposes behind candidates at `starts` (rising).

        Returns:
            float32 [len(starts), depth, width, len(Signal)]; zeros from position `limit` on.
        """
        device = self.draft.device
        result = torch.zeros(len(starts), depth, self.width, len(Signal), device=device)
        for begin in range(0, len(starts), _BRANCHES):
            part = starts[begin : begin + _BRANCHES]
            slots = range(1, 1 + len(part))
            self.cache.fork(0, slots, [prompt + t for t in part])
            tokens = candidates[begin : begin + len(part)]
            for step in range(depth):
                # The later a branch begins, the sooner it is at the limit: rows leave at the end.
                at = [t + 1 + step for t in part if t + 1 + step < limit]
                if not at:
                    break
                rows = [(slot, 1) for slot in slots[: len(at)]]
                hidden = self.draft.forward(self.cache, rows, tokens[: len(at)])
                logits = self.draft.logits(hidden)[:, : self.pair.vocab_size]
                places = torch.tensor(at, device=device)
                same = sampling.rows(torch.zeros_like(places))
                if self.mode is MODES["rejection"]:
                    same = same.in_round(places - step)  # rollouts meet at a position
                choices = self._drawn(logits, same, places)
                result[begin : begin + len(at), step] = self._signals(logits, choices, hidden)
                tokens = choices[:, 0]
        return result


def _own_seed(request: Request) -> int:
    key = f"trace:{request.sampling.seed}:{request.id}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


# ------------------------------------------------------------------------- costs


def measure_costs(pair: Pair, slots: int, prompt: int, seconds: float) -> CostModel:
    """A virtual clock for transcripts: both models' curves as they are on this machine, now.

    Measured twice, the smaller counts, against what else the machine was doing. What the draft
    takes to read a typical prompt is measured too, if the profile ends before it.

    Args:
        slots: most live rows.
        prompt: tokens of a typical prompt.
        seconds: for all of it, about.

    Raises:
        ValueError: the pair has no draft.
    """
    draft = pair.draft
    if draft is None:
        raise ValueError("costs of speculation need a pair with a draft")
    passes = [profile_costs(pair.target, draft, slots, seconds / 2).points() for _ in range(2)]
    curves: list[list[tuple[int, float]]] = []
    for name in ("draft", "verify"):
        first, second = (dict(each[name]) for each in passes)
        tokens = sorted({*first, *second})
        curves.append([(n, min(first.get(n, inf), second.get(n, inf))) for n in tokens])
    if prompt > curves[0][-1][0]:
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
