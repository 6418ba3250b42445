"""One ragged forward for prefill, draft steps, catch-up and verification.

`PackedDecoder.forward` takes rows of (slot, number of tokens), lays their tokens end to end in one
sequence [1, N], and lets a transformers decoder run over it. Linear layers see N tokens and no
padding. Attention is ours (specdec/model/attention.py), through `transformers.AttentionInterface`.
Decoder layers of the Llama family are replaced by ones with fewer operators
(specdec/model/fused.py); any other decoder runs with its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kernels.stored import DTYPES, KvDtype
from specdec.measure.clock import PhaseClock
from specdec.model.attention import ATTENTION, packed_attention
from specdec.model.cache import LayerLayout, SlotCache
from specdec.model.check import CPU_CHECK, GPU_CHECK, GRID_CHECK, Reference, distance, products_for
from specdec.model.features import collecting, readable_layers
from specdec.model.fused import fuse_layers
from specdec.model.graphs import HIDDEN, Out, RecordingFailed, Recordings, Tail, record
from specdec.model.linear import outputs_of
from specdec.model.masks import layer_layouts, short_windows
from specdec.model.mixers import Mixers
from specdec.model.packing import GRID_TOKENS, Packing
from specdec.model.recurrent import RecurrentStates
from specdec.model.rows import Row
from specdec.model.stock import StockModel, UnsupportedModel
from specdec.model.trees import Trees

STATES = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
"""Kinds of layers, as configs name them, whose state runs on."""

ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers that attend to what came before, as far as their masks say."""

STATELESS = {"mlp", "moe"}
"""Kinds of layers that keep nothing."""

MOST_SHIFT = 0.25
"""Total variation between distributions with keys and values of eight bits and with their own.

Raised, a model that they spoil may pass.
"""

log = logging.getLogger(__name__)


class PackedDecoder:
    """A causal language model that runs ragged packed rows against a `SlotCache`.

    Args:
        model: a transformers causal LM in evaluation mode; its attention is switched to packed.
        invariant: compute attention so that no token's result depends on the rest of the batch.
        fuse: replace decoder layers by faster ones, which let no gradient through.
        kv_dtype: of the keys and values in its caches.

    Raises:
        UnsupportedModel: the architecture cannot roll back or does not give the same logits packed
            as plain, or far from plain ones with keys and values of eight bits.

    Attributes:
        kv_dtype: as above.
        recurrent: whether it has layers whose state runs on. A row then has at most GRID_TOKENS
            tokens that may be taken back.
    """

    reads_features, ahead = False, 0
    """Whether it is fed a state with each token (specdec/model/eagle.py); language models are not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        invariant: bool = False,
        fuse: bool = False,
        kv_dtype: KvDtype = "auto",
    ) -> None:
        name = type(model).__name__
        self.model, self.invariant = model, invariant
        self.use_kernels = True
        self.recordings: Recordings | None = None
        self._records_tails = True
        self.dtype: torch.dtype = model.dtype
        self.kv_dtype: KvDtype = "auto"
        self.layout: tuple[LayerLayout, ...] = ()
        try:
            self._mixers = Mixers(model)
            self.recurrent = bool(self._mixers)
            _refuse_by_config(model, self.recurrent, invariant)
            self._stock = StockModel(model, self.recurrent)
            self.context_length = self._stock.context_length
            embedding: Any = model.get_input_embeddings()
            self.device: torch.device = embedding.weight.device
            self.vocab_size = outputs_of(self._stock.head)
            self._pack_and_check(fuse, kv_dtype)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{name} cannot run packed: {error}") from error
        except Exception as error:  # whatever code of an architecture that nobody here knows raises
            reason = f"{type(error).__name__}: {error}"
            raise UnsupportedModel(f"{name} cannot run packed: {reason}") from error
        if self.device.type == "cuda" and self.use_kernels and not self.recurrent:
            self.recordings = Recordings(record)

    @property
    def decoder(self) -> Any:
        """What runs over tokens: transformers' decoder, with the layers it has by now."""
        return self._stock.decoder

    @property
    def layers(self) -> int:
        """How many layers have hidden states that can be kept as features; 0: none has."""
        return readable_layers(self._stock.decoder)

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        """An empty cache for this model."""
        states = None
        if self.recurrent:
            states = RecurrentStates(self._mixers.layouts, GRID_TOKENS, self.device)
        return SlotCache(
            self.layout,
            slots,
            capacity,
            self.dtype,
            self.device,
            stored=DTYPES.get(self.kv_dtype),
            use_kernels=self.use_kernels,
            states=states,
            ahead=self.ahead,
        )

    def forward(
        self, cache: SlotCache, rows: Sequence[Row], tokens: Tensor, trees: Trees = None
    ) -> Tensor:
        """Append tokens to slots and return their last hidden states.

        Args:
            cache: changed in place: keys, values and lengths of the rows' slots.
            rows: (slot, number of tokens) with distinct slots and at least one token each.
            tokens: int64 [N], the rows' tokens end to end.
            trees: of each row; in one that has none, each token follows the one before it.

        Raises:
            OutOfPages: the cache has too few for them.
            ValueError: a tree does not end where its row does, or the model is `recurrent`.

        Returns:
            [N, hidden], good until the next call; give the rows that need logits to `logits`.
        """
        return self.forward_into(cache, rows, tokens, HIDDEN, trees)

    @torch.inference_mode()
    def forward_into(
        self,
        cache: SlotCache,
        rows: Sequence[Row],
        tokens: Tensor,
        tail: Tail[Out],
        trees: Trees = None,
    ) -> Out:
        """As `forward`, but return what `tail` makes of the hidden states [N, hidden].

        A GPU records the tail together with the forward. What it returns is good until the next
        call of this size.
        """
        cache.extend(rows)
        trees = trees if any(trees or ()) else None
        out = self._recorded(cache, rows, tokens, trees, tail)
        if out is None:
            packing = Packing.plan(cache, rows, self.invariant, trees)
            out = tail(self._run(tokens, packing.positions, packing), *tail.inputs)
            if packing.replay is not None:
                packing.replay.finish()
        for slot, count in rows:
            cache.lengths[slot] += count
        return out

    @torch.inference_mode()
    def warm_up(
        self,
        cache: SlotCache,
        rows: Sequence[Row],
        tokens: Tensor,
        clock: PhaseClock,
        tail: Tail[Any] = HIDDEN,
        trees: Trees = None,
    ) -> None:
        """Record the forward that is to come, if its size is new, in time that is set aside.

        Args:
            cache, rows, tokens, tail, trees: as for `forward_into`; the cache stays as it is.
            clock: books it as `warmup`, and leaves it out of what rounds are measured to cost.
        """
        recorded = tail if self._records(tail) else HIDDEN
        trees = trees if any(trees or ()) else None
        if self.recordings is not None and self.recordings.lacks(cache, rows, trees, recorded):
            with clock.aside("warmup"):
                cache.extend(rows)
                self._recorded(cache, rows, tokens, trees, recorded)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [M, V] of hidden states [M, hidden]."""
        return self._stock.logits(hidden)

    def _records(self, tail: Tail[Any]) -> bool:
        """Whether a tail is recorded with its forward; otherwise it is computed behind it."""
        return tail is HIDDEN or (tail.recordable and self._records_tails)

    def _recorded(
        self,
        cache: SlotCache,
        rows: Sequence[Row],
        tokens: Tensor,
        trees: Trees,
        tail: Tail[Out],
    ) -> Out | None:
        """What `forward_into` returns, if it can be recorded; a new size is recorded first."""
        if self.recordings is None:
            return None
        given = cache, rows, tokens, trees
        try:
            if self._records(tail):
                return self.recordings.forward(self._run_places, *given, tail)
            hidden = self.recordings.forward(self._run_places, *given, HIDDEN)
            return None if hidden is None else tail(hidden, *tail.inputs)
        except RecordingFailed as error:
            if tail is not HIDDEN and self._records(tail):
                log.warning("draft steps are recorded without their sampling: %s", error)
                self._records_tails = False
                return self._recorded(*given, tail)
            log.warning("forwards are not recorded, which is slower: %s", error)
            self.recordings = None
            return None

    def _run_places(self, cache: SlotCache, tokens: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        """Hidden states of tokens [N] at places [2 or 5, N] in rows [R, 4]."""
        return self._run(tokens, places[1], Packing.of_places(cache, places, rows))

    def _run(self, tokens: Tensor, positions: Tensor, packing: Packing) -> Tensor:
        features, cache = packing.cache.features, packing.cache
        with self._mixers.over(packing):
            if features is None:
                return self._stock.run(tokens, positions, packed_attention, packing)
            with collecting(self._stock.decoder, features.layers, cache.device) as states:
                hidden = self._stock.run(tokens, positions, packed_attention, packing)
        cache.write_features(states, packing.places)
        return hidden

    @torch.inference_mode()
    def _pack_and_check(self, fuse: bool, kv_dtype: KvDtype) -> None:
        """Have the model run packed; refuse it if that gives other logits than its plain forward.

        Decoder layers are fused if asked. Both forwards run with short windows, which a short text
        is longer than.
        """
        with self._mixers.noting():
            layout = layer_layouts(self._stock, self.recurrent)
        self.use_kernels = bool(layout)
        with short_windows(self.model.config), products_for(self.dtype, self.device):
            windows = any(layer.window for layer in layout)
            self.layout = layer_layouts(self._stock, self.recurrent) if windows else layout
            on_gpu = self.device.type == "cuda"
            in_blocks = self.invariant and self.new_cache(0, 0).kernels is None
            lengths = GRID_CHECK if in_blocks else CPU_CHECK
            reference = Reference.of(
                self._stock,
                self.vocab_size,
                self.context_length,
                GPU_CHECK if on_gpu else lengths,
            )
            self._stock.set_attention(ATTENTION)
            if fuse:
                fuse_layers(self._stock.decoder)
            if on_gpu:
                one_device = len({parameter.device for parameter in self.model.parameters()}) == 1
                self.use_kernels = (
                    self.use_kernels and one_device and self._kernels_agree(reference)
                )
            checked = on_gpu and self.use_kernels
            problem = "" if checked else self._difference(reference)
            if not problem and kv_dtype != "auto":
                self.kv_dtype = kv_dtype
                problem = self._shifted_too_far(reference)
        if problem:
            raise UnsupportedModel(problem)
        self.layout = layout

    def _shifted_too_far(self, reference: Reference) -> str:
        """What speaks against keys and values of eight bits; "" if nothing does.

        A GPU's kernels must give what torch's operators do with them, or are given up.
        """
        use_kernels, self.use_kernels = self.use_kernels, False
        rounded, plain = self._tails(reference)
        self.use_kernels = use_kernels
        shift, most = distance(rounded, plain)
        if not shift < MOST_SHIFT:  # NaN is not
            other = "fp8 or auto" if self.kv_dtype == "int8" else "int8 or auto"
            return (
                f"keys and values in {self.kv_dtype} change its distributions by {shift:.2g} in "
                f"total variation, which spoils its output; set models.kv_dtype to {other}"
            )
        log.info("keys and values in %s change distributions by %.2g", self.kv_dtype, shift)
        if self.device.type == "cuda" and use_kernels:
            # Rounding takes some numbers over the edge to the next step of eight bits.
            noise = reference.noise[0] + shift, reference.noise[1] + most
            self.use_kernels = self._kernels_agree(replace(reference, noise=noise), rounded)
        return ""

    def _kernels_agree(self, reference: Reference, expected: Tensor | None = None) -> bool:
        """Whether a GPU's kernels run here and give the logits that they should."""
        try:
            problem = self._difference(reference, expected)
        except Exception as error:  # a compiler that does not work here may raise anything
            problem = str(error)
        if problem:
            log.warning("layers run without GPU kernels, which is slower: %s", problem)
        return not problem

    def _difference(self, reference: Reference, expected: Tensor | None = None) -> str:
        """What the rows run packed differ by from what is expected; "" if that is rounding.

        By default the plain forward's logits are.
        """
        packed, plain = self._tails(reference)
        return reference.difference(packed, plain if expected is None else expected)

    def _tails(self, reference: Reference) -> tuple[Tensor, Tensor]:
        """Logits [m, V] of two interleaved rows run packed, and those of the plain forward."""
        m, n = map(len, reference.rows)
        cache, found, places = self.new_cache(2, m), list[Tensor](), list[tuple[int, int]]()
        cache.kernels_read_prompts = False  # torch's operators do in longer ones than these
        for step in (
            [(0, 0, m - 8), (1, 0, n - 6)],
            [(1, n - 6, n), (0, m - 8, m - 3)],
            [(0, m - 5, m - 1), (1, n - 3, n)],
            [(0, m - 1, m)],
        ):  # each of rows (slot, length that it is rolled back to, length then)
            for slot, length, _ in step:
                cache.rollback(slot, length)
            begins = [cache.lengths[slot] for slot, _, _ in step]
            tokens = [
                reference.rows[slot][at:end]
                for at, (slot, _, end) in zip(begins, step, strict=True)
            ]
            rows = [(slot, len(own)) for (slot, _, _), own in zip(step, tokens, strict=True)]
            hidden = self.forward(cache, rows, torch.cat(tokens))
            if not found:
                self._stock.find_what_follows_the_head(hidden[:4])
            at = [
                (slot, place)
                for begin, (slot, _, end) in zip(begins, step, strict=True)
                for place in range(begin, end)
            ]
            kept = [i for i, place in enumerate(at) if reference.has(*place)]
            found.append(hidden[kept])
            places += [at[i] for i in kept]
        return self.logits(torch.cat(found)), reference.at(places)


def _refuse_by_config(model: PreTrainedModel, recurrent: bool, invariant: bool) -> None:
    """Refuse what is known not to work, with the reason."""
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        raise UnsupportedModel("it is an encoder-decoder; specbatch runs decoder-only models")
    if recurrent and invariant:
        raise UnsupportedModel(
            "it has layers whose state runs on; what is replayed together gives them other bits, "
            "so that it cannot be deterministic"
        )
    kinds = set(getattr(config, "layer_types", None) or ())
    if not recurrent and (kinds & STATES or getattr(model, "_is_stateful", False)):
        kind = ", ".join(sorted(kinds & STATES)) or "recurrent layers"
        raise UnsupportedModel(
            f"it has {kind}: state that cannot be rolled back to before a rejected candidate"
        )
    if others := sorted(kinds - ATTENTIONS - (STATES | STATELESS if recurrent else set())):
        raise UnsupportedModel(f"it has layers of {others[0]}, which specbatch does not know")
