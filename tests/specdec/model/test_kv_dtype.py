"""Keys and values of eight bits, against transformers over a cache that rounds them likewise."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specdec.kernels.stored import DTYPES, KvDtype, dequantise, quantise
from specdec.model.cache import KEY_BLOCK, LayerLayout, SlotCache
from specdec.model.check import distance
from specdec.model.decoder import PackedDecoder
from specdec.model.features import Features
from specdec.model.pages import PAGE
from specdec.model.stock import UnsupportedModel
from tests.specdec.model.test_adapters import model_of
from tests.specdec.tiny_models import VOCAB, make_pair, tiny_model

CPU = torch.device("cpu")
EIGHT_BITS = [kind for kind in get_args(KvDtype) if kind != "auto"]


def rounded(x: Tensor, kv_dtype: KvDtype) -> Tensor:
    return dequantise(*quantise(x, DTYPES[kv_dtype]), x.dtype)


class Rounding(DynamicCache):
    """transformers' cache, with keys and values as eight bits leave them."""

    def __init__(self, kv_dtype: KvDtype) -> None:
        super().__init__()
        self.kv_dtype = kv_dtype

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        both = (rounded(x, self.kv_dtype) for x in (key_states, value_states))
        return super().update(*both, *args, **kwargs)


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"attn_logit_softcapping": 20.0},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},
}
"""Grouped heads, norms, soft caps and sinks; Bloom besides has a bias of positions."""


def built(name: str) -> PreTrainedModel:
    return model_of(name) if name == "bloom" else tiny_model(name, **FAMILIES[name])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "kv_dtype"),
    [*((name, "int8") for name in FAMILIES), ("llama", "fp8"), ("bloom", "fp8")],
)
def test_logits_are_those_of_transformers_over_a_cache_that_rounds(
    name: str, kv_dtype: KvDtype
) -> None:
    """Prefill in chunks, long rows beside short ones, and a rollback.

    Float sums in another order take a number to its next step now and then, so that equality is
    within a tenth of what eight bits change.
    """
    model = built(name)
    decoder = PackedDecoder(copy.deepcopy(model), fuse=True, kv_dtype=kv_dtype)
    texts = torch.randint(VOCAB, (3, 90), generator=torch.Generator().manual_seed(0))
    cache, found = decoder.new_cache(3, 90), [[], [], []]
    for lengths in ([40, 3, 20], [44, 30, 21], [42, 70, 22], [90, 71, 90]):
        for slot, length in enumerate(lengths):  # one is shorter than before
            back = min(cache.lengths[slot], length - 1)
            cache.rollback(slot, back)
            found[slot] = found[slot][: cache.lengths[slot]]
        rows = [(slot, n - cache.lengths[slot]) for slot, n in enumerate(lengths)]
        tokens = torch.cat([texts[slot, cache.lengths[slot] :][:n] for slot, n in rows])
        logits = decoder.logits(decoder.forward(cache, rows, tokens))
        for (slot, _), own in zip(rows, logits.split([k for _, k in rows]), strict=True):
            found[slot] += own.unbind()
    for slot, own in enumerate(found):
        text = texts[slot : slot + 1, : len(own)]
        expected = model(text, past_key_values=Rounding(kv_dtype), use_cache=True).logits[0]
        plain = model(text, use_cache=False).logits[0]
        gap, _ = distance(torch.stack(own), expected)
        assert gap < 0.1 * distance(expected, plain)[0]


@torch.inference_mode()
@pytest.mark.parametrize("kv_dtype", EIGHT_BITS)
def test_bits_do_not_depend_on_pages_neighbours_or_how_tokens_came(kv_dtype: KvDtype) -> None:
    model = tiny_model()
    pair = make_pair(model, None, precision="float32", invariant=True, kv_dtype=kv_dtype)
    decoder = pair.target
    text = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(0))
    one_by_one, together = decoder.new_cache(2, 256), decoder.new_cache(3, 256)
    together.pages._free.reverse()
    for cache, slot in ((one_by_one, 0), (together, 2)):
        decoder.forward(cache, [(slot, 40)], text[:40])
    alone = [decoder.forward(one_by_one, [(0, 1)], text[at : at + 1]) for at in range(40, 60)]
    both = decoder.forward(together, [(2, 20), (0, 9)], torch.cat([text[40:], text[:9]]))
    assert torch.equal(torch.cat(alone), both[:20])
    for layer in range(len(decoder.layout)):
        stored = [
            cache.read(layer, slice(slot, slot + 1), 60)
            for cache, slot in ((one_by_one, 0), (together, 2))
        ]
        for a, b in zip(*stored, strict=True):
            assert torch.equal(a, b)


LAYOUT = (LayerLayout(2, 16, 8), LayerLayout(0, 0, 0), LayerLayout(1, 8, 8))


@pytest.mark.parametrize("kv_dtype", EIGHT_BITS)
def test_a_cache_of_eight_bits_does_what_one_with_rounded_numbers_does(kv_dtype: KvDtype) -> None:
    """Writes, rollbacks, forks, moves, trees that are cut to a path, and growth."""
    stored = DTYPES[kv_dtype]
    eight = SlotCache(LAYOUT, 3, KEY_BLOCK, torch.float32, CPU, stored=stored)
    plain = SlotCache(LAYOUT, 3, KEY_BLOCK, torch.float32, CPU)
    caches = eight, plain
    draw = torch.Generator().manual_seed(0)

    def write(slot: int, count: int) -> None:
        at = eight.lengths[slot] + torch.arange(count)
        for cache in caches:
            cache.extend([(slot, count)])
            cache.lengths[slot] += count
        places = [cache.places(torch.full((count,), slot), at) for cache in caches]
        for layer, each in enumerate(LAYOUT):
            if not each.heads:
                continue
            key, value = (
                torch.randn(count, each.heads, dim, generator=draw)
                for dim in (each.key_dim, each.value_dim)
            )
            eight.write(layer, key, value, places[0])
            plain.write(layer, rounded(key, kv_dtype), rounded(value, kv_dtype), places[1])

    def check() -> None:
        assert eight.lengths == plain.lengths
        for cache in caches:
            cache.extend([])
        for slot, length in enumerate(eight.lengths):
            for layer in (0, 2):
                both = [cache.read(layer, slice(slot, slot + 1), length) for cache in caches]
                for a, b in zip(*both, strict=True):
                    assert torch.equal(a, b)

    write(0, 2 * PAGE + 9)
    write(1, 5)
    check()
    for cache in caches:
        cache.fork(0, [2], [PAGE + 7])
    write(2, 3)
    write(0, 1)
    check()
    for cache in caches:
        cache.keep([0, 2], [2 * PAGE + 4, PAGE + 4], [[1, 3, 4], [2]])
    check()
    write(0, 40)
    for cache in caches:
        cache.rollback(2, PAGE - 3)
        cache.move(0, 1)
        cache.grow(5, 3 * KEY_BLOCK)
    write(0, 12)
    write(1, 60)
    check()
    for tensor in (*eight.key_scales, *eight.value_scales):
        tensor[eight.pages.rows[1][-1], :, 1:] = torch.nan
    length = (len(eight.pages.rows[1]) - 1) * PAGE + 1
    eight.scrub(1, length)
    for layer in (0, 2):
        for each in eight.read(layer, slice(1, 2), length + PAGE - 1):
            assert each.isfinite().all() and not each[:, :, length:].any()


def test_memory_is_what_the_tensors_take_and_features_keep_their_dtype() -> None:
    layout = (LayerLayout(2, 128, 128),)
    half = SlotCache(layout, 1, 1, torch.bfloat16, CPU)
    eight = SlotCache(layout, 1, 1, torch.bfloat16, CPU, stored=torch.int8)
    assert half.bytes_per_position == 1024
    assert eight.bytes_per_position == 2 * (128 + 4) * 2 == 528
    cache = SlotCache(layout, 0, 0, torch.bfloat16, CPU, stored=torch.int8)
    cache.keep_features(Features((0,), 32, lambda states: states))
    cache.grow(1, 1)
    assert cache.bytes_per_position == 528 + 64
    taken = (*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales)
    assert sum(t.nbytes for t in taken) == (1 + cache.pages.total) * PAGE * (528 + 64)
    cache.extend([(0, 1)])
    places, states = cache.places(torch.tensor([0]), torch.tensor([0])), torch.randn(1, 32)
    cache.write_features([states], places)
    read = cache.read_features(torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(read, states.bfloat16())


def test_models_that_eight_bits_spoil_are_refused() -> None:
    """A large number in each key leaves int8 no steps for the others; fp8 has finer ones."""
    model = tiny_model("qwen2", peak=1.0)
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=weight.shape[-1] ** -0.5, generator=draw)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data[15::16] = 1000.0
    with pytest.raises(UnsupportedModel, match=r"int8 change its distr.*kv_dtype to fp8 or auto"):
        PackedDecoder(copy.deepcopy(model), kv_dtype="int8")
    assert PackedDecoder(model, kv_dtype="fp8").kv_dtype == "fp8"
