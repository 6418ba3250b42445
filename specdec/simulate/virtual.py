"""A GPU's clock without a GPU: the real Engine over decoders that take the time of a device.

A forward returns at once and ends on a `VirtualDevice`'s clock, behind what was queued before it,
as on a CUDA stream. Who reads a result waits until its time has come; the host runs on meanwhile.
So what an Engine takes here is what its host code and a device of these costs would take together,
or the device alone.

What tokens the models choose comes from transcripts (specdec/simulate/replay.py): the target writes
a transcript's text, and the draft proposes what was recorded, right or wrong, with its signals. Or
there is no draft, and the target writes texts of real tokens (specdec/simulate/written.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.drafters.base import Candidates, Choose, Drafter, Drawn
from specdec.drafters.corpus import Corpus
from specdec.drafters.model import ModelDrafter, ModelDrafting
from specdec.engine.engine import Engine
from specdec.engine.scheduler import LiveRow
from specdec.model.cache import LayerLayout, SlotCache
from specdec.model.decoder import PackedDecoder
from specdec.model.graphs import Out, Recordings, Run, Tail
from specdec.model.packing import Packing
from specdec.model.rows import Row
from specdec.model.sharing import SharedCaches, TokenRow
from specdec.model.trees import MOST_NODES, Trees
from specdec.policies.base import Signal, StopPolicy
from specdec.request import Request
from specdec.simulate.script import Script, Texts
from specdec.simulate.virtual_device import CPU, MADE_UP, ForwardCosts, Host, VirtualDevice

RECORDING = 0.025
"""Seconds that recording a forward of a new size takes the host: measured on an H200."""


class VirtualDecoder(PackedDecoder):
    """Writes texts at a `VirtualDevice`'s pace; the host code is that of a recorded decoder.

    Args:
        device: where its forwards run.
        costs: what they take.
        texts: what comes out of them.

    Attributes:
        seating: called before each forward, for who wants to `seat` rows then.
    """

    def __init__(self, device: VirtualDevice, costs: ForwardCosts, texts: Texts) -> None:
        self.device, self.dtype, self.invariant = CPU, torch.float32, False
        self.vocab_size, self._records_tails, self.recurrent = texts.vocabulary, True, False
        self.recordings = Recordings(self._record)
        self._stream, self._costs, self.texts = device, costs, texts
        self._seconds = 0.0
        self.seating: Callable[[], None] = lambda: None
        self._owners = torch.zeros(0, dtype=torch.int64)

    def seat(self, owners: Sequence[int]) -> None:
        """Say which text the row in each slot follows."""
        self._owners = torch.tensor(owners, dtype=torch.int64)

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
            return self._said(hidden[:, 0].long() - 1)

    def _said(self, states: Tensor) -> Tensor:
        """Logits [n, vocabulary] in states [n]."""
        return self.texts.target_logits(states)

    def _record(self, run: Run) -> Run:
        self._stream.wait(self._stream.now() + RECORDING)

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
            self.seating()
            return 1.0 + self._states(tokens, positions, packing)[:, None].float()

    def _states(self, tokens: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        """int64 [N]: the states behind tokens, as if all of them were the text's.

        What the target says of a wrong candidate's successors is not looked at.
        """
        owner = self._owners[packing.slots]
        return self.texts.first[owner] + (positions + 1 - self.texts.prompts[owner]).clamp(min=0)


class ProposingDecoder(VirtualDecoder):
    """Plays the draft of a `Script`; arguments as of `VirtualDecoder`."""

    def __init__(self, device: VirtualDevice, costs: ForwardCosts, script: Script) -> None:
        self.script = script
        # By slot and place in it: the state in which the first wrong choice up to it was made.
        self._wrong = torch.zeros(0, script.longest + MOST_NODES, dtype=torch.int64)
        super().__init__(device, costs, script)

    def seat(self, owners: Sequence[int]) -> None:
        before, wrong = self._owners, self._wrong
        super().seat(owners)
        self._wrong = torch.full((len(owners), wrong.shape[1]), -1)
        n = min(len(before), len(owners))
        stay = (before[:n] == self._owners[:n]).nonzero()[:, 0]  # rows that may be drafting
        self._wrong[stay] = wrong[stay]

    def _said(self, states: Tensor) -> Tensor:
        return self.script.draft_logits[states]

    def _states(self, tokens: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        script, slots, stored = self.script, packing.slots, packing.stored
        at = super()._states(tokens, positions, packing)
        # Text is on a branch from its first wrong token on.
        wrong = (at > script.first[self._owners[slots]]) & (tokens != script.truth[at - 1])
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
    def likeliest(self) -> bool:
        return False  # but what the script says

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
    """One or two `VirtualDecoder`s; what the Engine asks of a pair."""

    target: PackedDecoder
    draft: PackedDecoder | None
    vocab_size: int
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
    """An Engine over one or two `VirtualDecoder`s of one device.

    Args:
        texts: what models say; a `Script` if there is a draft.
        draft, target: what their forwards cost; None: there is no draft.
        policy: when to stop drafting.
        slots: most rows in flight.
        lookup: whether candidates are looked up. Scripts come again and again, and are no texts.
        corpus: where they are looked up besides.
        host: see `VirtualDevice`.
    """

    def __init__(
        self,
        texts: Texts,
        draft: ForwardCosts | None,
        target: ForwardCosts,
        policy: StopPolicy,
        slots: int,
        *,
        lookup: bool = False,
        corpus: Corpus | None = None,
        host: Host = time.perf_counter,
    ) -> None:
        self.stream, self._texts = VirtualDevice(host), texts
        writing = VirtualDecoder(self.stream, target, texts)
        self._proposing: ProposingDecoder | None = None
        if draft is not None:
            assert isinstance(texts, Script), "a draft proposes what a script says"
            self._proposing = ProposingDecoder(self.stream, draft, texts)
        self._decoders = [each for each in (writing, self._proposing) if each is not None]
        super().__init__(
            VirtualPair(writing, self._proposing, texts.vocabulary),
            policy=policy,
            slots=slots,
            lookup=lookup,
            corpus=corpus,
            clock=self.stream,
        )
        self._seated: list[LiveRow | None] = []
        for decoder in self._decoders:
            decoder.seating = self._seat

    def _new_drafter(self) -> Drafter | None:
        if self._proposing is None:
            return None
        drafter = _Drafter(
            self._proposing,
            vocab_size=self._texts.vocabulary,
            context_length=self.pair.draft_context_length,
            chunk=self.prefill_chunk,
            clock=self.clock,
        )
        drafter.branches = self._proposing.script.width > 1
        return drafter

    def _seat(self) -> None:
        """Tell the decoders which row is in which slot, if that has changed."""
        rows = [*self.scheduler.seats]
        if rows != self._seated:
            self._seated, texts = rows, len(self._texts.lengths)
            owners = [int(row.request.id) % texts if row is not None else 0 for row in rows]
            for decoder in self._decoders:
                decoder.seat(owners)

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
