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
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.model.attention import ATTENTION, UnsupportedModel
from specdec.model.cache import SlotCache
from specdec.model.fused import fuse_layers
from specdec.model.graphs import RecordingFailed, Recordings, record
from specdec.model.packing import LayoutProbe, Packing
from specdec.model.rows import Row

CPU_CHECK = 9
"""Tokens of each row that a model on a CPU is checked with: enough to roll back and go on.

Raised, loading takes longer. An odd number fills no block of a kernel.
"""

GPU_CHECK = 401
"""Tokens of each row that a model on a GPU is checked with: several blocks of its kernels.

Raised, loading takes longer; at 64 or less only one block of keys would be checked.
"""

log = logging.getLogger(__name__)


class PackedDecoder:
    """A causal language model that runs ragged packed rows against a `SlotCache`.

    Args:
        model: a transformers causal LM in evaluation mode; its attention is switched to packed.
        invariant: compute attention so that no token's result depends on the rest of the batch.
        fuse: replace decoder layers by faster ones, which let no gradient through.

    Raises:
        UnsupportedModel: the architecture cannot roll back or does not give the same logits packed
            as plain.
    """

    def __init__(
        self, model: PreTrainedModel, *, invariant: bool = False, fuse: bool = False
    ) -> None:
        self.model, self.invariant = model, invariant
        self.use_kernels = True
        self.recordings: Recordings | None = None
        embedding: Any = model.get_input_embeddings()
        self.device: torch.device = embedding.weight.device
        self.dtype: torch.dtype = model.dtype
        self.vocab_size: int = self._lm_head().weight.shape[0]
        _refuse_by_config(model)
        self._check_against_plain(fuse)
        if self.device.type == "cuda" and self.use_kernels:
            self.recordings = Recordings(record)

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        """An empty cache for this model, in its dtype."""
        return SlotCache(
            self.layout, slots, capacity, self.dtype, self.device, use_kernels=self.use_kernels
        )

    @torch.inference_mode()
    def forward(self, cache: SlotCache, rows: Sequence[Row], tokens: Tensor) -> Tensor:
        """Append tokens to slots and return their last hidden states.

        Args:
            cache: changed in place: keys, values and lengths of the rows' slots.
            rows: (slot, number of tokens) with distinct slots and at least one token each.
            tokens: int64 [N], the rows' tokens end to end.

        Returns:
            [N, hidden], good until the next call; give the rows that need logits to `logits`.
        """
        hidden = self._recorded(cache, rows, tokens)
        if hidden is None:
            packing = Packing.plan(cache, rows, self.invariant)
            hidden = self._run(tokens, packing.positions, packing)
        for slot, count in rows:
            cache.lengths[slot] += count
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [M, V] of hidden states [M, hidden]."""
        logits: Tensor = self._lm_head()(hidden)
        return logits

    def _lm_head(self) -> Any:
        return self.model.get_output_embeddings()

    def _recorded(self, cache: SlotCache, rows: Sequence[Row], tokens: Tensor) -> Tensor | None:
        """What `forward` returns, if it can be recorded, as it is when its size first comes."""
        if self.recordings is None:
            return None
        try:
            return self.recordings.forward(self._run_places, cache, rows, tokens)
        except RecordingFailed as error:
            log.warning("forwards are not recorded, which is slower: %s", error)
            self.recordings = None
            return None

    def _run_places(self, cache: SlotCache, tokens: Tensor, places: Tensor, rows: Tensor) -> Tensor:
        """Hidden states of tokens [N] at places [2, N] in rows [R, 4]."""
        return self._run(tokens, places[1], Packing.of_places(cache, places, rows))

    def _run(self, tokens: Tensor, positions: Tensor, packing: Packing | LayoutProbe) -> Tensor:
        out = self.model.base_model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, packing=packing
        )
        hidden: Tensor = out.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def _check_against_plain(self, fuse: bool) -> None:
        """Run two interleaved rows packed and plain; refuse a model whose logits differ.

        In between, decoder layers are fused if asked. The comparison catches whatever an
        architecture does that packed attention or a fused layer does not know of, and a GPU whose
        kernels are not what they were when they were written.
        """
        name, config = type(self.model).__name__, self.model.config
        on_gpu = self.device.type == "cuda"
        length = min(GPU_CHECK, config.max_position_embeddings) if on_gpu else CPU_CHECK
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocab_size, (2, length), generator=generator).to(self.device)
        try:
            self.model.set_attn_implementation("sdpa")
            plain = self.model(tokens, use_cache=False).logits.float()
            self.model.set_attn_implementation(ATTENTION)
            if fuse:
                fuse_layers(self.model)
            probe = LayoutProbe()
            self._run(tokens[0], torch.arange(length, device=self.device), probe)
            self.layout = tuple(probe.layers[i] for i in range(len(probe.layers)))
            if on_gpu:
                one_device = len({parameter.device for parameter in self.model.parameters()}) == 1
                self.use_kernels = one_device and self._kernels_agree(tokens, plain)
            checked = on_gpu and self.use_kernels
            problem = "" if checked else self._difference(tokens, plain)
        except (ValueError, KeyError, TypeError) as error:
            raise UnsupportedModel(f"{name} cannot run packed: {error}") from error
        if problem:
            raise UnsupportedModel(f"{name} cannot run packed: {problem}")

    def _kernels_agree(self, tokens: Tensor, plain: Tensor) -> bool:
        """Whether a GPU's kernels run here and give the logits that they should."""
        try:
            problem = self._difference(tokens, plain)
        except Exception as error:  # a compiler that does not work here may raise anything
            problem = str(error)
        if problem:
            log.warning("layers run without GPU kernels, which is slower: %s", problem)
        return not problem

    def _difference(self, tokens: Tensor, plain: Tensor) -> str:
        """What two rows [2, n] run packed differ from `plain` by; "" if that is rounding."""
        n = tokens.shape[1]
        cache = self.new_cache(2, n)
        self.forward(cache, [(0, n - 4), (1, n - 6)], torch.cat([tokens[0, :-4], tokens[1, :-6]]))
        cache.rollback(0, n - 5)
        rest = torch.cat([tokens[1, -6:], tokens[0, -5:]])
        hidden = self.forward(cache, [(1, 6), (0, 5)], rest)
        cache.rollback(0, n - 1)
        alone = self.forward(cache, [(0, 1)], tokens[0, -1:])
        packed = self.logits(torch.cat([hidden, alone])).float()
        expected = torch.cat([plain[1, -6:], plain[0, -5:], plain[0, -1:]])
        # Two right forwards of SmolLM2-135M differ by 0.03 to 0.1 in bfloat16, by 1e-5 in float32.
        tolerance = 1e-3 if self.dtype == torch.float32 else 0.25
        gap = ((packed - expected).square().mean().sqrt() / expected.std()).item()
        if gap < tolerance:
            return ""
        return (
            f"its logits differ from the plain forward's by {gap:.2g} standard deviations "
            f"(at most {tolerance:g} is rounding)"
        )


def _refuse_by_config(model: PreTrainedModel) -> None:
    """Refuse what is known not to work, with the reason."""
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder; specbatch runs decoder-only models")
    recurrent = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if recurrent or getattr(model, "_is_stateful", False):
        kind = ", ".join(sorted(recurrent)) or "recurrent layers"
        raise UnsupportedModel(
            f"{name} has {kind}: state that cannot be rolled back to before a rejected candidate"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if each.get("rope_type") in ("dynamic", "longrope"):
            raise UnsupportedModel(
                f"{name} has {each['rope_type']} rotary embeddings, which give a row other angles "
                "when a longer row is in the same forward"
            )
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"{name} does not take its attention from transformers' AttentionInterface"
        )
