"""Continuous batching of speculative rounds: admit, draft, verify, commit, retire.

A row's life: its prompt is fed to the target in chunks; the forward that feeds the last prompt
token also yields the first output token. From then on each round drafts candidates, verifies them
in the one target forward that all rows share, and commits the accepted ones plus one bonus token,
until the row ends and its slot goes to the next request.

At any time a model's cache holds a prefix of the row's tokens, and what it lacks is *pending*:
prefill, catch-up after a full acceptance and plain decoding are all "feed what is pending".
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

import torch

from specdec.drafters.base import Drafter
from specdec.drafters.corpus import Corpus
from specdec.drafters.making import drafter_of
from specdec.drafters.suffix import SuffixIndex
from specdec.engine.admission import Pair, divide, memory_by_default, row_of
from specdec.engine.asked import AskedFor
from specdec.engine.draft_loop import DraftLoop
from specdec.engine.ending import Decode, Ending, failure, find_ending
from specdec.engine.known_loop import MOST_FORCED, KnownLoop
from specdec.engine.layout import VerifyLayout
from specdec.engine.room import Room
from specdec.engine.round import Round
from specdec.engine.scheduler import LiveRow, Scheduler
from specdec.engine.scoring import score
from specdec.engine.stats import EngineStats
from specdec.engine.traced import trace
from specdec.lossless.grammars import Grammars
from specdec.lossless.proposal import Proposal
from specdec.lossless.sampling import NO_TOKEN
from specdec.lossless.verification import MODES
from specdec.measure.clock import PhaseClock, RoundTimer
from specdec.measure.speedup import ControlSchedule
from specdec.model.prefill import feed_again, feed_shared
from specdec.model.rows import upload
from specdec.model.sharing import LEAST_SHARED, SharedCaches
from specdec.policies.base import RoundOutcome, RoundStart, StopPolicy
from specdec.request import Completion, Counts, InvalidRequest, Request

INVARIANT_CHUNK = 128
"""Most prompt tokens in one forward where bits must repeat.

A prompt's bits there are those of its chunks, which begin at multiples of their size, so that rows
can share whole chunks only: small ones cost little and share more.
"""


class Engine:
    """Generates for many requests at once with a target and a draft.

    Args:
        pair: the models; without a draft there are candidates only if the policy looks them up.
        policy: when to stop drafting.
        verification: "rejection" or "coupled" (specdec/lossless/verification.py). Greedy rows match
            in both.
        slots: most rows in flight.
        kv_memory_bytes: memory for keys and values of both models; by default half of what is free.
        prefill_chunk: most prompt tokens of one row in one forward; see INVARIANT_CHUNK.
        decode: token ids to text with special tokens; only requests with stop strings need it.
        grammars: makes matchers of grammars; only requests with grammars need it.
        control_share: share of rounds without speculation, by which `stats.speedup` is measured.
        trace: keep for each row what was predicted, decided and accepted in each round.
        lookup: whether a policy that looks candidates up may do so; None: unless a device would
            wait for it that could draft, and there is no corpus.
        corpus: where they are looked up besides.
        least_shared: rows that begin with this many equal tokens share their prefill.
        clock: times phases and reads results; by default one for the target's device.
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
        grammars: Grammars | None = None,
        control_share: float = 0.0,
        trace: bool = False,
        lookup: bool | None = None,
        corpus: Corpus | None = None,
        least_shared: int = LEAST_SHARED,
        clock: PhaseClock | None = None,
    ) -> None:
        self.pair, self.policy, self.trace = pair, policy, trace
        self.decode, self.grammars = decode, grammars
        self.mode, self.device = MODES[verification], pair.target.device
        self.clock = clock or PhaseClock(self.device)
        self.stats = EngineStats(seconds=self.clock.seconds)
        invariant = pair.target.invariant
        self.prefill_chunk = min(prefill_chunk, INVARIANT_CHUNK) if invariant else prefill_chunk
        self.target_cache = pair.target.new_cache(0, 0)
        self.drafter = self._new_drafter()
        caches = [self.target_cache, *([self.drafter.cache] if self.drafter else [])]
        self.shared = SharedCaches(caches, self.prefill_chunk if invariant else 1, least_shared)
        # A longer row would leave the grid, whose kernels are what makes bits repeat; and states
        # could not be taken back to before it.
        short = invariant or any(cache.states is not None for cache in caches)
        slots, pages = divide(caches, slots, kv_memory_bytes or memory_by_default(self.device))
        self.drafting = self.known = None
        if self.drafter is not None:
            self.drafting = DraftLoop(self.drafter, policy, self.clock, self.stats)
        if policy.looks_up or self.drafting:
            if lookup is None:
                lookup = not (self.drafter and self.clock.asynchronous) or corpus is not None
            index = SuffixIndex(corpus) if policy.looks_up and lookup else None
            self.known = KnownLoop(index, policy, self.clock)
        ahead = policy.most + (MOST_FORCED if grammars else 0) if self.known else 0
        self._room = Room(ahead, pair.context_length, short, self.drafter)
        # States that run on have one past; candidates that are looked up do not branch.
        branches = self.drafter is not None and self.drafter.branches and policy.grows
        self._branches = branches and not pair.target.recurrent
        self.scheduler = Scheduler(self.shared, slots, pages, pair.context_length, ahead)
        # What waits for a moment in which nothing else does: see `_catch_up`.
        self._outcome: tuple[RoundOutcome, list[LiveRow], list[Ending | None]] | None = None
        self._ended: list[tuple[LiveRow, Ending, float]] = []
        self._next: RoundTimer | None = None  # of a round that has begun ahead
        self.completed: list[Completion] = []
        self._asked = AskedFor(pair, self.target_cache, self.prefill_chunk, self.clock, grammars)
        self._controls = ControlSchedule(control_share if self.known else 0.0)
        self._prepared = False

    def _new_drafter(self) -> Drafter | None:
        draft = self.pair.draft if self.policy.drafts else None
        return drafter_of(draft, self.target_cache, self.pair, self.prefill_chunk, self.clock)

    # ---------------------------------------------------------------- requests

    def submit(self, request: Request) -> None:
        """Queue a request. One that cannot be served comes back from `step` as an error."""
        try:
            row = row_of(request, self.pair, self.scheduler.pages, self.decode, self.grammars)
            self.scheduler.queue.append(row)
        except InvalidRequest as error:
            prompt, kind = len(request.prompt_ids), type(error).__name__
            self.completed.append(
                Completion(request.id, prompt, (), "error", error=str(error), error_class=kind)
            )

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
        return bool(self.waiting or self.live or self._ended or self.completed)

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
        self._prepare()

        # 1. Admit: waiting requests take free slots. What prompts have in common is fed once.
        this = self._admit()
        if this is not None:
            # 2. Draft: known candidates of each row, then one more of all rows at a time, until the
            #    policy has had enough. A control round drafts nothing.
            self._draft(this)

            # 3. Verify: one target forward over what each row has pending and its candidates. It
            #    says how many candidates stand, and gives one token of the target's own after them.
            self._verify(this)

            # 4. Commit: outputs grow by these tokens, caches fall back to them, the policy learns.
            endings = self._commit(this)

            # 5. Retire: rows that ended leave their slots.
            for slot, ending in endings:
                self.scheduler.retire(slot)
                self._ended.append((this.rows[slot], ending, time.perf_counter()))
            self._go_ahead(this)
        if this is None or not self.clock.asynchronous:
            self._catch_up()
        completed, self.completed = self.completed, []
        return completed

    def _go_ahead(self, last: Round) -> None:
        """Let a device begin with the next round's candidates, if it works beside the host."""
        if not self.clock.asynchronous or self.drafting is None or self._controls.due:
            return
        self._next = timer = RoundTimer(self.clock)
        with self.clock.phase({"host": 1.0}):
            self.scheduler.secure()
            rooms = self._room.depths(self.scheduler.seats, self.target_cache.lengths)
        self.drafting.go_ahead(last, rooms, self._number, self.shared)
        timer.pause()

    @property
    def _number(self) -> int | None:
        """Of the next round, if rows learn from each other: see `Round`."""
        return self.known.number(self.stats.rounds) if self.known else None

    def _prepare(self) -> None:
        """Let the policy look at the models, once and in the thread that will run them."""
        if not self._prepared and self.known is not None:
            draft = self.pair.draft if self.drafter else None
            with self.clock.phase({"profile": 1.0}):
                self.policy.prepare(self.pair.target, draft, self.scheduler.slots)
        self._prepared = True

    def _admit(self) -> Round | None:
        """Fill the slots and begin a round over their rows; None if there is none."""
        timer, self._next = self._next or RoundTimer(self.clock), None
        timer.go_on()
        with self.clock.phase({"host": 1.0}):
            rows = self.scheduler.admit()
        if any(row.request.given_ids for row in rows):
            rows, timer = self._score(rows), RoundTimer(self.clock)
        if not rows:
            return None
        with timer.apart() as lap, self.clock.phase({"prefill": 1.0}):
            target, cache, chunk = self.pair.target, self.target_cache, self.prefill_chunk
            fed = feed_shared(target, cache, self.shared, rows, range(len(rows)), chunk)
            fed += feed_again(target, cache, rows, chunk)
        if fed:
            self.stats.count_target(fed)
            self.stats.speedup.book_mixed(lap.seconds, lap.seconds, 0)
        self.stats.shared_tokens = self.shared.taken_over
        self.stats.preempted = self.scheduler.preempted
        return self._begin(rows, timer)

    def _score(self, rows: Sequence[LiveRow]) -> list[LiveRow]:
        """End rows whose completions are given, some of many; return the others once all have."""
        if self.drafting is not None:
            self.drafting.drop_ahead(rows, self.shared)  # until all are scored, others come and go
        endings, forwards = score(rows, self._asked.prompts, self.shared)
        for slot, ending in endings.items():
            self.scheduler.retire(slot)
            self._ended.append((rows[slot], ending, time.perf_counter()))
        self.clock.settle()  # what was told has arrived, and so has all before it
        self.stats.count_target(forwards)
        self.stats.shared_tokens = self.shared.taken_over
        self.scheduler.compact()
        left = self.scheduler.rows
        return [] if any(row.request.given_ids for row in left) else left

    def _begin(self, rows: list[LiveRow], timer: RoundTimer) -> Round:
        """A new round, and what the policy may know before it drafts."""
        asked = self._asked.by(rows)
        mode = MODES["coupled"] if asked.sampling.all_greedy else self.mode
        pending = [len(row.tokens) - self.target_cache.lengths[s] for s, row in enumerate(rows)]
        room = self._room
        start = RoundStart(
            rows=[row.memory for row in rows],
            room=room.depths(rows, self.target_cache.lengths),
            decoding=[n == 1 for n in pending],
            contexts=[len(row.tokens) for row in rows],
            draft_pending=self.drafting.pending(rows) if self.drafting else [0] * len(rows),
            target_tokens=sum(min(n, self.prefill_chunk) for n in pending),
            free_trimming=mode is MODES["coupled"],
            beside=self.clock.asynchronous and not self.trace,  # who is traced is looked at
            draws_behind=not self.drafter or self.drafter.reads_known,
            nodes=[room.nodes(row) for row in rows] if self._branches else (),
        )
        control = any(start.room) and self._controls.next()
        nothing = Proposal(len(rows), 0, self.device)
        given = rows, timer, asked, mode, start, control, nothing, nothing.lengths
        return Round(*given, number=self._number)

    def _draft(self, this: Round) -> None:
        """Collect candidates, as many as the policy wants: first those that need no draft."""
        if self.known is not None and not this.control:
            self.known.run(this)
            if self.drafting is not None:
                self.drafting.run(this, self.shared)
        elif self.drafting is not None:
            self.drafting.drop_ahead(this.rows, self.shared)

    def _verify(self, this: Round) -> None:
        """Feed every row's pending tokens and submitted candidates to the target in one forward."""
        target, cache, drafted = self.pair.target, self.target_cache, this.proposal.candidates
        given = this.submitted, drafted.shape[1], self.prefill_chunk, this.proposal.depths
        layout = VerifyLayout.of(this.rows, cache.lengths, *given)
        pending, order, scored, first, owner, at, lengths = upload(
            self.device, *layout.numbers, this.submitted
        )
        verifying = len(layout.scored) / len(layout.order)
        phase = "control" if this.control else "verify"
        tokens = torch.cat([drafted.flatten(), pending])[order]
        target.warm_up(cache, layout.rows, tokens, self.clock, trees=this.branches)
        with self.clock.phase({phase: verifying, "prefill": 1 - verifying}):
            hidden = target.forward(cache, layout.rows, tokens, this.branches)
            hidden = hidden[scored]
            logits = target.logits(hidden)[:, : self.pair.vocab_size]
        self.stats.count_target([len(layout.order)])
        with self.clock.phase({"sample": 1.0}):
            adjusted, parameters = this.adjusted(logits, owner, at), this.parameters(owner)
            accepted, bonus = this.mode.verify(
                adjusted, parameters, at, first, lengths, this.proposal
            )
            odd = (~hidden.isfinite().all(-1)).long()
            odd = torch.zeros_like(accepted).index_add_(0, owner, odd)  # by row
            verdict = torch.cat([torch.stack([accepted, bonus, odd], 1), drafted], 1)
            arriving = self.clock.fetch(verdict)
        if self.clock.asynchronous:
            self._catch_up()
        with self.clock.phase({"sample": 1.0}):
            result: list[list[int]] = arriving().tolist()  # the round's one transfer to the host
        this.take(result, layout.complete)
        this.read(logits, adjusted, parameters, layout.first)
        self.clock.settle()

    def _commit(self, this: Round) -> list[tuple[int, Ending]]:
        """Append what was committed, roll the caches back to it; return the slots that ended."""
        with self.clock.phase({"host": 1.0}):
            if self.trace:
                trace(this, self.policy)
            this.keep_paths(self.target_cache, self.drafter)
            endings = [self._grow(this, slot) for slot in range(len(this.rows))]
        self.stats.rounds += 1
        self.stats.live_rows += len(this.rows)
        self._outcome = this.outcome(), this.rows, endings
        if not (self.clock.asynchronous and self.policy.learns_late):
            self._learn()
        # What the policy learns takes its time, too, and is part of what speculation costs.
        this.book(self.stats.speedup)
        return [(slot, ending) for slot, ending in enumerate(endings) if ending]

    def _grow(self, this: Round, slot: int) -> Ending | None:
        """Append a row's committed tokens to its output; return its end if they hold one."""
        row, tokens = this.rows[slot], this.committed[slot]
        if not tokens:  # its prompt is not yet fed to its end
            row.doubtful = row.doubtful or slot in this.infected
            return None
        known, before, accepted = row.generated, len(row.tokens), len(tokens) - 1
        failed = tokens[-1] == NO_TOKEN
        # States that are not finite reach others through a mask. They may be those of a candidate
        # that does not stand, so a row fails only by a round without any. What was accepted before
        # stays: to draw it again for what comes behind it would make it less likely.
        row.doubtful = failed and this.submitted[slot] > 0
        over = failed and not row.doubtful
        tokens = tokens[:-1] if failed else tokens
        row.tokens += tokens
        ending = find_ending(tokens, known, row, self.pair.eos_token_ids)
        if over:
            ending = failure(known, row.adjusts or row.grammar is not None)
        kept = this.kept[slot] = ending.length - known if ending else len(tokens)
        drafted, verified = this.drafted[slot], this.submitted[slot]
        # An output that ends inside the accepted prefix drops the rest and the bonus token.
        counts = Counts(1, drafted, verified, min(accepted, kept), kept)
        row.counts.add(counts)
        self.stats.count_row(counts, accepted, this.taken(slot))
        # What is not finite may lie in the prompt: a row that failed leaves nothing in its slot.
        length = 0 if over else (before if failed else len(row.tokens)) - 1
        if failed or slot in this.infected:
            self.shared.scrub(slot, length)
        self.shared.rollback(slot, length)
        return ending

    def _catch_up(self) -> None:
        """Do what no round waits for: beside a device, while it verifies the next round."""
        with self.clock.phase({"host": 1.0}):
            self._learn()
            self.completed += [row.completed(end, at) for row, end, at in self._ended]
            self._ended = []

    def _learn(self) -> None:
        """Let the policy and the index learn from the last round, if they have not."""
        last, self._outcome = self._outcome, None
        if last is None:
            return
        outcome, rows, endings = last
        self.stats.count_shapes(outcome)
        self.policy.observe(outcome)
        if self.known is not None:
            self.known.read(rows, endings)
