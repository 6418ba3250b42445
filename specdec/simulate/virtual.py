"""A GPU's clock without a GPU: the real Engine over decoders that take the time of a device.

A forward returns at once and ends on a `VirtualDevice`'s clock, behind what was queued before it,
as on a CUDA stream. Who reads a result waits until its time has come; the host runs on meanwhile.
So what an Engine takes here is what its host code and a device of these costs would take together.

What tokens the models choose comes from transcripts (specdec/simulate/replay.py): the target writes
a transcript's text, and the draft proposes what was recorded, right or wrong, with its signals.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.base import Candidates, Choose, Drafter, Drawn
from specdec.drafters.model import ModelDrafter, ModelDrafting
from specdec.engine.engine import Engine
from specdec.engine.round import Round
from specdec.engine.scheduler import LiveRow
from specdec.measure.clock import PhaseClock, RoundTimer
from specdec.model.cache import LayerLayout, SlotCache
from specdec.model.decoder import PackedDecoder
from specdec.model.graphs import Out, Recordings, Run, Tail
from specdec.model.packing import Packing
from specdec.model.rows import Row
from specdec.model.sharing import SharedCaches, TokenRow
from specdec.model.trees import MOST_NODES, Trees
from specdec.policies.base import Signal, StopPolicy
from specdec.policies.costs import CostTable
from specdec.request import Request
from specdec.simulate.script import VOCABULARY, Script

RECORDING = 0.025
"""Seconds that recording a forward of a new size takes the host: measured on an H200."""

TRANSFER = 15e-6
"""Seconds from the end of a device's work until the host has its result: an estimate."""

MADE_UP = "made up"
"""The phase of what a device would do."""

CPU = torch.device("cpu")


class VirtualDevice(PhaseClock):
    """A stream of work that runs beside the host, and the clock of both.

    The clock stands while the host makes up what the device would compute.

    Attributes:
        busy: seconds of work so far.
    """

    def __init__(self) -> None:
        super().__init__(CPU)
        self.busy, self._idle_from = 0.0, 0.0

    def launch(self, seconds: float) -> None:
        """Queue work behind what is there."""
        self._idle_from = max(self._idle_from, self.now()) + seconds
        self.busy += seconds

    @property
    def asynchronous(self) -> bool:
        return True

    @contextmanager
    def aside(self, name: str) -> Iterator[None]:
        busy = self.busy
        with super().aside(name):
            yield
        if name != MADE_UP:  # whatever was queued has ended meanwhile
            self.busy, self._idle_from = busy, min(self._idle_from, self.now())

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        ends = max(self._idle_from, self.now()) + TRANSFER

        def wait() -> Tensor:
            while self.now() < ends:
                pass  # as CUDA waits: who sleeps finds cold caches when woken
            return tensor

        return wait


@dataclass(frozen=True, slots=True)
class ForwardCosts:
    """What a forward takes the device.

    Attributes:
        seconds: by packed tokens, whatever the context.
        position: seconds of each cached position that is read.
    """

    seconds: CostTable
    position: float

    def __call__(self, tokens: int, context: int) -> float:
        """Seconds of a forward of so many tokens, whose rows have `context` positions together."""
        return float(self.seconds(tokens)) + self.position * context


class VirtualDecoder(PackedDecoder):
    """Plays a `Script` at a `VirtualDevice`'s pace; the host code is that of a recorded decoder.

    Args:
        device: where its forwards run.
        costs: what they take.
        script: what comes out of them.
        proposes: whether it is the draft.
    """

    def __init__(
        self, device: VirtualDevice, costs: ForwardCosts, script: Script, *, proposes: bool
    ) -> None:
        self.device, self.dtype, self.invariant = CPU, torch.float32, False
        self.vocab_size, self._records_tails, self.recurrent = VOCABULARY, True, False
        self.recordings = Recordings(self._record)
        self._stream, self._costs, self.script, self._proposes = device, costs, script, proposes
        self._logits = script.draft_logits if proposes else script.target_logits
        self._seconds = 0.0
        self.seat([])

    def seat(self, owners: Sequence[int]) -> None:
        """Say which transcript the row in each slot follows."""
        self._owners = torch.tensor(owners)
        # By slot and place in it: the state in which the first wrong choice up to it was made.
        self._wrong = torch.full((len(owners), self.script.longest + MOST_NODES), -1)

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        return SlotCache((LayerLayout(1, 16, 16),), slots, capacity, self.dtype, self.device)

    def forward_into(
        self,
        cache: SlotCache,
        rows: Sequence[Row],
        tokens: Tensor,
        tail: Tail[Out],
        trees: Trees = None,
    ) -> Out:
        context = sum(cache.lengths[slot] for slot, _ in rows)
        self._seconds = self._costs(len(tokens), context)
        return super().forward_into(cache, rows, tokens, tail, trees)

    def logits(self, hidden: Tensor) -> Tensor:
        with self._stream.aside(MADE_UP):
            return self._logits[hidden[:, 0].long() - 1]

    def _record(self, run: Run) -> Run:
        ends = self._stream.now() + RECORDING
        while self._stream.now() < ends:
            pass

        def replay() -> Any:
            with self._stream.aside(MADE_UP):
                return run()

        return replay

    def _run_places(self, cache: SlotCache, tokens: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        return self._run(tokens, places[1], Packing.of_places(cache, places, rows))

    def _run(self, tokens: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """Hidden states [N, 1] as far as the Engine can see: one more than numbers of states."""
        self._stream.launch(self._seconds)
        with self._stream.aside(MADE_UP):
            return 1.0 + self._states(tokens, positions, packing)[:, None].float()

    def _states(self, tokens: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """int64 [N]: the script's states behind tokens."""
        script, slots, stored = self.script, packing.slots, packing.stored
        owner = self._owners[slots]
        known = positions + 1 - script.prompts[owner]
        at = script.first[owner] + known.clamp(min=0)
        if not self._proposes:  # what it says of a wrong candidate's successors is not looked at
            return at
        # Text is on a branch from its first wrong token on.
        wrong = (known > 0) & (tokens != script.truth[at - 1])
        since = self._wrong[slots, _before(stored, packing.paths).clamp(min=0)]
        since = torch.where(wrong & (since >= 0), since, at - 1)
        self._wrong[slots, stored] = torch.where(wrong, since, -1)
        further = (at - 1 - since).clamp(0, script.depth - 1)
        return torch.where(wrong, script.branch[since.clamp(min=0)] + further, at)


def _before(stored: Tensor, paths: Tensor | None) -> Tensor:
    """int64 [N]: where what each token follows is stored; arguments as of `Packing`."""
    if paths is None:
        return stored - 1
    bases, masks = paths
    nodes = torch.arange(MOST_NODES)
    above = (masks[:, None] >> nodes & 1 > 0) & (nodes < (stored - bases)[:, None])
    parent = bases + torch.where(above, nodes, -1).amax(1)
    return torch.where(masks == 0, stored - 1, parent)


class _Drafter(ModelDrafter):
    """Draws what the script says, after all the work of drawing."""

    def begin(
        self,
        rows: Sequence[TokenRow],
        slots: Sequence[int],
        known: Sequence[Sequence[int]],
        shared: SharedCaches,
    ) -> ModelDrafting:
        return _Drafting(self, rows, slots, known, shared)


class _Drafting(ModelDrafting):
    def _draw(
        self,
        rows: Sequence[Row],
        tokens: Tensor,
        choose: Choose,
        last: Tensor | None,
        trees: Trees = None,
    ) -> Candidates:
        decoder: Any = self._drafter.decoder
        return super()._draw(rows, tokens, _Scripted(choose, decoder.script), last, trees)


@dataclass(frozen=True, slots=True, eq=False)
class _Scripted:
    """Draws, and then takes the choices that belong to the state."""

    choose: Any
    script: Script

    @property
    def recordable(self) -> bool:
        return bool(self.choose.recordable)

    @property
    def key(self) -> Hashable:
        key: Hashable = self.choose.key
        return key

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        inputs: tuple[Tensor, ...] = self.choose.inputs
        return inputs

    def __call__(self, logits: Tensor, hidden: Tensor, *inputs: Tensor) -> Drawn:
        _, q, signals = self.choose(logits, hidden, *inputs)
        states = hidden[:, 0].long() - 1
        width = self.choose.width
        which = slice(width) if width > 1 else 0
        if signals is not None:
            wanted = [signal in self.choose.wanted for signal in Signal]
            signals = self.script.signals[states, which] * torch.tensor(wanted)
        return self.script.choices[states, which], q, signals


@dataclass
class VirtualPair:
    """Two `VirtualDecoder`s; what the Engine asks of a pair."""

    target: PackedDecoder
    draft: PackedDecoder | None
    vocab_size: int = VOCABULARY
    context_length: int = 1 << 20
    draft_context_length: int = 1 << 20
    eos_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Steady:
    """Rounds in which all slots had a row, from the first on in which all rows decoded.

    Attributes:
        rounds, tokens: how many, and what they committed.
        seconds: on the clock; `busy`, those in which the device worked.
    """

    rounds: int
    tokens: int
    seconds: float
    busy: float

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second."""
        return self.tokens / self.seconds

    @property
    def idle(self) -> float:
        """Share of the time in which the device had nothing to do."""
        return 1 - self.busy / self.seconds

    def __str__(self) -> str:
        return f"{self.tokens_per_second:.0f} tokens/s, {self.rounds} rounds, idle {self.idle:.1%}"


class VirtualEngine(Engine):
    """An Engine over two `VirtualDecoder`s of one device and script.

    Args:
        script: what models say.
        draft, target: what their forwards cost.
        policy: when to stop drafting.
        slots: most rows in flight.
    """

    def __init__(
        self,
        script: Script,
        draft: ForwardCosts,
        target: ForwardCosts,
        policy: StopPolicy,
        slots: int,
    ) -> None:
        self.stream, self._script = VirtualDevice(), script
        writing = VirtualDecoder(self.stream, target, script, proposes=False)
        proposing = VirtualDecoder(self.stream, draft, script, proposes=True)
        self._decoders = writing, proposing
        super().__init__(
            VirtualPair(writing, proposing),
            policy=policy,
            slots=slots,
            lookup=False,  # scripts come again and again
            clock=self.stream,
        )
        self._seated: list[LiveRow] = []

    def _new_drafter(self) -> Drafter:
        drafter = _Drafter(
            self._decoders[1],
            vocab_size=VOCABULARY,
            context_length=self.pair.draft_context_length,
            chunk=self.prefill_chunk,
            clock=self.clock,
        )
        drafter.branches = self._script.width > 1
        return drafter

    def _begin(self, rows: list[LiveRow], timer: RoundTimer) -> Round:
        with self.clock.aside(MADE_UP):
            if rows != self._seated:
                self._seated = rows
                owners = [int(row.request.id) % len(self._script.lengths) for row in rows]
                for decoder in self._decoders:
                    decoder.seat(owners)
        return super()._begin(rows, timer)

    def steady(self, requests: Sequence[Request], seconds: float) -> Steady:
        """Complete requests, more than there are slots, for so many seconds at most."""
        for request in requests:
            self.submit(request)
        slots, found, begun = self.scheduler.slots, np.zeros(4), False
        ends = self.clock.now() + seconds
        before = self._read_off()
        while self.has_work and self.clock.now() < ends and (self.waiting or self.live == slots):
            self.step()
            after = self._read_off()
            passed, before = after - before, after
            rounds, tokens, rows, bare = passed[:4]
            begun = begun or bare == slots
            if begun and rows == slots:
                found += [rounds, tokens, *passed[4:]]
        return Steady(int(found[0]), int(found[1]), float(found[2]), float(found[3]))

    def _read_off(self) -> Any:
        """So far: rounds, tokens, rows, the target's tokens but candidates, seconds, busy ones."""
        stats, counts = self.stats, self.stats.counts
        bare = stats.target_tokens - counts.verified
        now = self.clock.now()
        return np.array(
            [stats.rounds, counts.committed, stats.live_rows, bare, now, self.stream.busy]
        )
