"""Continuous batching of speculative rounds: admit -> draft -> verify -> commit -> retire.

A row's life: its prompt is fed to the target in chunks; the forward that feeds the last prompt
token also yields the first output token. From then on each round drafts candidates, verifies them
in the one target forward that all rows share, and commits the accepted ones plus one bonus token,
until the row ends and its slot goes to the next request. At any time a model's cache holds a prefix
of the row's tokens, and what it lacks is *pending*: prefill, catch-up after a full acceptance and
plain decoding are all "feed what is pending". A long prefix that several rows lack is fed once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from specdec.engine.ending import Decode, Ending, find_ending
from specdec.engine.prefill import feed, feed_shared
from specdec.engine.round import Round
from specdec.engine.scheduler import LEAST_SHARED, LiveRow, Scheduler
from specdec.lossless.sampling import SamplingBatch
from specdec.lossless.verification import MODES, Proposal
from specdec.measure.clock import PhaseClock
from specdec.measure.speedup import ControlSchedule, SpeedupMeter
from specdec.model.cache import round_to_blocks
from specdec.model.decoder import PackedDecoder
from specdec.model.packing import GRID_TOKENS
from specdec.model.rows import Row, upload
from specdec.policies.base import DraftStep, RoundStart, StopPolicy
from specdec.policies.estimators import read_signals
from specdec.request import Completion, Counts, InvalidRequest, Request

INVARIANT_CHUNK = 128
"""Most prompt tokens in one forward where bits must repeat.

A prompt's bits there are those of its chunks, which begin at multiples of their size, so that rows
can share whole chunks only: small ones cost little and share more.
"""


class Pair(Protocol):
    """What the engine needs of a `ModelPair`."""

    target: PackedDecoder
    draft: PackedDecoder | None
    vocab_size: int
    context_length: int
    draft_context_length: int
    eos_token_ids: frozenset[int]


@dataclass(slots=True)
class EngineStats:
    """What an engine did since it was made.

    Attributes:
        counts: summed over rows.
        rounds: steps that ran a target forward.
        live_rows: summed over these rounds; divided by `rounds`, the mean live batch.
        target_forwards, draft_forwards, target_tokens, draft_tokens: forwards and tokens through
            each.
        shared_tokens: prompt tokens that the target did not compute, since another row had.
        seconds: by phase: profile, prefill, draft, decide (the policy, between draft steps),
            verify, sample, host; control: target forwards of control rounds.
        speedup: rounds with speculation and control rounds.
        outcomes: rounds of rows by (candidates verified, candidates that verification accepted).
    """

    counts: Counts = field(default_factory=Counts)
    rounds: int = 0
    live_rows: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    target_tokens: int = 0
    draft_tokens: int = 0
    shared_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    speedup: SpeedupMeter = field(default_factory=SpeedupMeter)
    outcomes: Counter[tuple[int, int]] = field(default_factory=Counter)


class Engine:
    """Generates for many requests at once with a target and a draft.

    Args:
        pair: the models; without a draft, or with the policy `none`, decoding is plain.
        policy: when to stop drafting.
        verification: "rejection" or "coupled" (DESIGN.md §3). Greedy rows match in both.
        slots: most rows in flight.
        kv_memory_bytes: memory for keys and values of both models; by default half of what is free.
        prefill_chunk: most prompt tokens of one row in one forward. With batch-invariant models at
            most INVARIANT_CHUNK.
        decode: token ids to text, needed only for requests with stop strings.
        control_share: share of rounds without speculation, by which `stats.speedup` is measured.
        trace: keep for each row what was predicted, decided and accepted in each round.
        least_shared: rows that begin with this many equal tokens share their prefill.
    """

    def __init__(
        self,
        pair: Pair,
        *,
        policy: StopPolicy,
        verification: Literal["rejection", "coupled"] = "rejection",
        slots: int = 16,
        kv_memory_bytes: int | None = None,
        prefill_chunk: int = 512,
        decode: Decode | None = None,
        control_share: float = 0.0,
        trace: bool = False,
        least_shared: int = LEAST_SHARED,
    ) -> None:
        self.pair, self.policy, self.decode, self.trace = pair, policy, decode, trace
        self.mode, self.device = MODES[verification], pair.target.device
        invariant = pair.target.invariant
        self.prefill_chunk = min(prefill_chunk, INVARIANT_CHUNK) if invariant else prefill_chunk
        decoders = [decoder for decoder in (pair.target, pair.draft) if decoder is not None]
        caches = [decoder.new_cache(0, 0) for decoder in decoders]
        self.target_cache, self.draft_cache = caches[0], caches[-1]
        memory = kv_memory_bytes or _free_memory(self.device) // 2
        position = sum(cache.bytes_per_position for cache in caches)
        grain = self.prefill_chunk if invariant else 1
        self.scheduler = Scheduler(caches, slots, memory // position, grain, least_shared)
        self.rejected: list[Completion] = []
        self.clock = PhaseClock(self.device)
        self.stats = EngineStats(seconds=self.clock.seconds)
        self._sampling: tuple[list[LiveRow], SamplingBatch] | None = None
        self._controls = ControlSchedule(control_share if pair.draft is not None else 0.0)
        self._prepared = False

    # ---------------------------------------------------------------- requests

    def submit(self, request: Request) -> None:
        """Queue a request. One that cannot be served comes back from `step` as an error."""
        try:
            self.scheduler.queue.append(self._checked(request))
        except InvalidRequest as error:
            prompt = len(request.prompt_ids)
            self.rejected.append(Completion(request.id, prompt, (), "error", error=str(error)))

    def _checked(self, request: Request) -> LiveRow:
        prompt, context = len(request.prompt_ids), self.pair.context_length
        if not prompt:
            raise InvalidRequest("the prompt has no tokens")
        if not all(0 <= token < self.pair.vocab_size for token in request.prompt_ids):
            raise InvalidRequest(
                f"the prompt has a token outside the vocabulary of {self.pair.vocab_size}"
            )
        if prompt >= context:
            raise InvalidRequest(
                f"the prompt has {prompt} tokens, but the model's context of {context} must also "
                "hold at least one new token"
            )
        if request.sampling.stop and self.decode is None:
            raise InvalidRequest("stop strings need an engine with a decode function")
        room = min(request.sampling.max_new_tokens, context - prompt)
        row = LiveRow(
            request,
            replace(request.sampling, max_new_tokens=room),
            list(request.prompt_ids),
            prompt,
        )
        if round_to_blocks(row.need) > self.scheduler.max_positions:
            raise InvalidRequest(
                f"prompt and max_new_tokens need {row.need} cache positions, but the memory for "
                f"keys and values holds {self.scheduler.max_positions}"
            )
        return row

    @property
    def live(self) -> int:
        """Rows in slots."""
        return self.scheduler.live

    @property
    def live_ids(self) -> list[str]:
        """Ids of the requests in slots."""
        return [row.request.id for row in self.scheduler.rows]

    @property
    def waiting(self) -> int:
        """Requests queued for a slot."""
        return len(self.scheduler.queue)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return bool(self.waiting or self.rejected or self.live)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Complete all requests, whose ids must differ; completions come in their order."""
        for request in requests:
            self.submit(request)
        done: dict[str, Completion] = {}
        while self.has_work:
            done.update((completion.id, completion) for completion in self.step())
        return [done[request.id] for request in requests]

    # --------------------------------------------------------------- one round

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Run one round over the live rows; return the requests that ended."""
        finished, self.rejected = self.rejected, []
        self._prepare()
        began = time.perf_counter()
        with self.clock.phase({"host": 1.0}):
            rows = self.scheduler.admit()
        if not rows:
            return finished
        began += self._feed_shared(rows)
        this = self._begin(rows)
        if not this.control:
            self._draft(this)
        self._verify(this)
        self.clock.settle()
        with self.clock.phase({"host": 1.0}):
            if self.trace:
                this.trace(self.policy)
            ended = self._commit(this)
        drafting = sum(seconds for _, seconds in this.draft_costs)
        this.seconds = time.perf_counter() - began - drafting
        self.policy.observe(this.outcome())
        # What the policy learns takes its time, too, and is part of what speculation costs.
        this.seconds = time.perf_counter() - began - drafting
        this.book(self.stats.speedup)
        return finished + [self._retire(slot, rows[slot], ending) for slot, ending in ended]

    def _prepare(self) -> None:
        """Let the policy look at the models, once and in the thread that will run them."""
        if not self._prepared and self.pair.draft is not None:
            with self.clock.phase({"profile": 1.0}):
                self.policy.prepare(self.pair.target, self.pair.draft, self.scheduler.slots)
        self._prepared = True

    def _feed_shared(self, rows: list[LiveRow]) -> float:
        """Feed the target the beginnings that prompts share. Returns the seconds it took."""
        began = time.perf_counter()
        target, cache, scheduler = self.pair.target, self.target_cache, self.scheduler
        with self.clock.phase({"prefill": 1.0}):
            slots = range(len(rows))
            fed = feed_shared(target, cache, scheduler, rows, slots, self.prefill_chunk)
        self.stats.target_forwards += len(fed)
        self.stats.target_tokens += sum(fed)
        self.stats.shared_tokens = scheduler.shared_tokens
        if not fed:
            return 0.0
        seconds = time.perf_counter() - began
        self.stats.speedup.book_mixed(seconds, seconds, 0)
        return seconds

    def _begin(self, rows: list[LiveRow]) -> Round:
        """A new round, and what the policy may know before it drafts."""
        if self._sampling is None or self._sampling[0] != rows:
            self._sampling = rows, SamplingBatch.of([row.sampling for row in rows], self.device)
        sampling = self._sampling[1]
        mode = MODES["coupled"] if sampling.all_greedy else self.mode
        # A longer row would leave the grid, whose kernels are what makes bits repeat.
        most = GRID_TOKENS - 1 if self.pair.target.invariant else self.pair.context_length
        room, decoding, target_tokens = [], [], 0
        for slot, row in enumerate(rows):
            pending = len(row.tokens) - self.target_cache.lengths[slot]
            target_tokens += min(pending, self.prefill_chunk)
            decoding.append(pending == 1)
            left = row.sampling.max_new_tokens - row.generated - 1  # the bonus token takes one
            left = min(left, self.pair.draft_context_length - len(row.tokens), most)
            room.append(max(0, left) if pending == 1 and self.pair.draft is not None else 0)
        start = RoundStart(
            rows=[row.memory for row in rows],
            room=room,
            decoding=decoding,
            contexts=[len(row.tokens) for row in rows],
            draft_pending=[
                len(row.tokens) - self.draft_cache.lengths[slot] for slot, row in enumerate(rows)
            ],
            target_tokens=target_tokens,
            free_trimming=mode is MODES["coupled"],
        )
        control = any(room) and self._controls.next()
        nothing = Proposal(len(rows), 0, self.device)
        return Round(rows, sampling, mode, start, control, nothing, nothing.lengths)

    def _draft(self, this: Round) -> None:
        """Draw candidates until the policy has had enough, one draft forward for all rows."""
        draft, cache, rows = self.pair.draft, self.draft_cache, this.rows
        if draft is None:
            return
        wanted = self.policy.budget(this.start)
        budget = [min(k, room) for k, room in zip(wanted, this.start.room, strict=True)]
        active = [slot for slot, k in enumerate(budget) if k > 0]
        if not active:
            return
        proposal = this.proposal = Proposal(len(rows), max(budget), self.device)

        began = time.perf_counter()
        # The first step reads all that the draft lacks; what is shared or long, in forwards before.
        chunk = self.prefill_chunk
        with self.clock.phase({"prefill": 1.0}):
            fed = feed_shared(draft, cache, self.scheduler, rows, active, chunk)
            for slot in active:
                fed += feed(draft, cache, slot, rows[slot], len(rows[slot].tokens) - chunk, chunk)
        self.stats.draft_forwards += len(fed)
        self.stats.draft_tokens += sum(fed)
        pending = [rows[slot].tokens[cache.lengths[slot] :] for slot in active]
        counts = [len(tokens) for tokens in pending]
        (tokens,) = upload(self.device, [token for tokens in pending for token in tokens])
        packed = sum(fed) + len(tokens)
        for depth in range(max(budget)):
            with self.clock.phase({"draft": 1.0}):
                hidden = draft.forward(cache, list(zip(active, counts, strict=True)), tokens)
                self.stats.draft_forwards += 1
                self.stats.draft_tokens += len(tokens)
                outputs = [rows[slot].generated + depth for slot in active]
                index, at, counted = upload(self.device, active, outputs, counts)
                hidden = hidden[counted.cumsum(0) - 1]
                logits = draft.logits(hidden)[:, : self.pair.vocab_size]
            with self.clock.phase({"sample": 1.0}):
                tokens, q = this.mode.propose(logits, this.parameters(index), at)
                proposal.add(active, index, tokens, q)
            with self.clock.phase({"decide": 1.0}):
                going = self._going_on(active, depth + 1, logits, tokens, hidden, budget)
            ended = time.perf_counter()
            this.draft_costs.append((packed, ended - began))
            began = ended
            if not going:
                break
            if len(going) < len(active):
                active = [active[i] for i in going]
                tokens = tokens[upload(self.device, going)[0]]
            counts, packed = [1] * len(active), len(active)
        this.submitted = self.policy.submit(proposal.lengths)

    def _going_on(
        self,
        active: Sequence[int],
        depth: int,
        logits: Tensor,
        tokens: Tensor,
        hidden: Tensor,
        budget: Sequence[int],
    ) -> list[int]:
        """Which of the active rows draft another candidate, as indices into `active`."""
        policy = self.policy
        within = [i for i, slot in enumerate(active) if budget[slot] > depth]
        if not policy.wanted:
            return within
        signals = read_signals(logits, tokens, hidden, policy.wanted, policy.head)
        # A policy that looks at candidates makes the host wait for them: once per draft step.
        host = signals.cpu().numpy().astype(np.float64)
        flags = policy.go_on(DraftStep(np.array(active), depth, host))
        return [i for i in within if flags[i]]

    def _verify(self, this: Round) -> None:
        """Feed every row's pending tokens and submitted candidates to the target in one forward."""
        rows, proposal = this.rows, this.proposal
        candidates, most = proposal.candidates.flatten(), proposal.candidates.shape[1]
        feed: list[Row] = []
        pending: list[int] = []
        order: list[int] = []  # the packed tokens, as indices into candidates followed by pending
        scored: list[int] = []  # packed tokens that need logits: the last submitted + 1 of a row
        first: list[int] = []  # where each row's begin among the scored
        owner: list[int] = []  # the row of each scored token, and the output position it predicts
        at: list[int] = []
        for slot, (row, k) in enumerate(zip(rows, this.submitted, strict=True)):
            fed = self.target_cache.lengths[slot]
            chunk = row.tokens[fed : fed + self.prefill_chunk]
            known = len(candidates) + len(pending)
            order += [*range(known, known + len(chunk)), *range(slot * most, slot * most + k)]
            pending += chunk
            feed.append((slot, len(chunk) + k))
            first.append(len(scored))
            scored += range(len(order) - k - 1, len(order))
            owner += [slot] * (k + 1)
            at += range(row.generated, row.generated + k + 1)

        tensors = upload(self.device, pending, order, scored, first, this.submitted, owner, at)
        pending_, order_, scored_, first_, lengths, owner_, at_ = tensors
        verifying = len(scored) / len(order)
        phase = "control" if this.control else "verify"
        with self.clock.phase({phase: verifying, "prefill": 1 - verifying}):
            tokens = torch.cat([candidates, pending_])[order_]
            hidden = self.pair.target.forward(self.target_cache, feed, tokens)
            logits = self.pair.target.logits(hidden[scored_])[:, : self.pair.vocab_size]
        self.stats.target_forwards += 1
        self.stats.target_tokens += len(order)
        with self.clock.phase({"sample": 1.0}):
            accepted, bonus = this.mode.verify(
                logits, this.parameters(owner_), at_, first_, lengths, proposal
            )
            verdict = torch.cat([accepted[:, None], bonus[:, None], proposal.candidates], 1)
            result: list[list[int]] = verdict.tolist()  # the round's one transfer to the host
        whole = [
            self.target_cache.lengths[slot] == len(row.tokens) + k
            for slot, (row, k) in enumerate(zip(rows, this.submitted, strict=True))
        ]
        this.committed = [
            [*drafted[:n], extra] if ready else []
            for ready, (n, extra, *drafted) in zip(whole, result, strict=True)
        ]

    def _commit(self, this: Round) -> list[tuple[int, Ending]]:
        """Append what was committed, roll the caches back to it; return the slots that ended."""
        ended = []
        this.grown = grown = [0] * len(this.rows)
        self.stats.rounds += 1
        self.stats.live_rows += len(this.rows)
        for slot, (row, tokens) in enumerate(zip(this.rows, this.committed, strict=True)):
            if not tokens:
                continue
            known = row.generated
            row.tokens += tokens
            output = row.tokens[row.output_start :]
            ending = find_ending(output, known, row.sampling, self.pair.eos_token_ids, self.decode)
            kept = grown[slot] = (ending.length if ending else len(output)) - known
            # An output that ends inside the accepted prefix drops the rest and the bonus token.
            stands = min(len(tokens) - 1, kept)
            drafted, verified = this.proposal.lengths[slot], this.submitted[slot]
            counts = Counts(1, drafted, verified, stands, kept)
            row.counts.add(counts)
            self.stats.counts.add(counts)
            self.stats.outcomes[verified, len(tokens) - 1] += 1
            for cache in self.scheduler.caches:
                cache.rollback(slot, len(row.tokens) - 1)
            if ending:
                ended.append((slot, ending))
        return ended

    def _retire(self, slot: int, row: LiveRow, ending: Ending) -> Completion:
        """Free the slot of a row that ended; after the policy has learnt from its last round."""
        self.scheduler.retire(slot)
        end = row.output_start + ending.length
        return Completion(
            row.request.id,
            row.output_start,
            tuple(row.tokens[row.output_start : end]),
            ending.finish_reason,
            ending.stop_reason,
            row.counts,
            seconds=time.perf_counter() - row.admitted,
            calibration=row.memory.calibration(),
            trace=tuple(row.trace),
        )


def _free_memory(device: torch.device) -> int:
    """Free bytes on the device that holds the caches."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
