"""A model of rowwise layers gives a row the same bits in any batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from specdec.model.cache import SlotCache
from specdec.model.decoder import PackedDecoder
from tests.specdec.tiny_models import VOCAB, make_pair, tiny_model


class Alone:
    """Logits of one row fed token by token, nobody else in the cache."""

    def __init__(self, decoder: PackedDecoder, prompt: Sequence[int]) -> None:
        self.decoder, self.prompt = decoder, prompt

    def decode(self, tokens: Sequence[int]) -> Tensor:
        cache = self.decoder.new_cache(1, len(self.prompt) + len(tokens))
        feed(self.decoder, cache, [(0, self.prompt)])
        return torch.cat([feed(self.decoder, cache, [(0, [token])]) for token in tokens])


def feed(
    decoder: PackedDecoder, cache: SlotCache, rows: Sequence[tuple[int, Sequence[int]]]
) -> Tensor:
    tokens = torch.tensor([token for _, row in rows for token in row])
    hidden = decoder.forward(cache, [(slot, len(row)) for slot, row in rows], tokens)
    return decoder.logits(hidden)


def text(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (length,), generator=generator).tolist()


@pytest.fixture(scope="module", params=["float32", "int8", "int8wo"])
def invariant(request: pytest.FixtureRequest) -> PackedDecoder:
    return make_pair(tiny_model("qwen3"), None, precision=request.param, invariant=True).target


@pytest.mark.parametrize("prompt", [3, 100, 125, 130, 255, 300])
def test_logits_have_the_same_bits_alone_verified_and_among_others(
    invariant: PackedDecoder, prompt: int
) -> None:
    """Eight tokens behind prompts on all sides of the key blocks' edges."""
    prefix, tokens = text(prompt, 1), text(8, 2)
    alone = Alone(invariant, prefix).decode(tokens)

    cache = invariant.new_cache(1, 400)
    feed(invariant, cache, [(0, prefix)])
    assert torch.equal(feed(invariant, cache, [(0, tokens)]), alone)

    # In the middle of 15 others: longer and shorter contexts, other numbers of tokens.
    cache = invariant.new_cache(16, 400)
    for slot in range(16):
        feed(invariant, cache, [(slot, prefix if slot == 6 else text(1 + 25 * slot, 10 + slot))])
    rows = [(slot, tokens if slot == 6 else text(1 + slot % 9, 30 + slot)) for slot in range(16)]
    begin = sum(len(row) for _, row in rows[:6])
    assert torch.equal(feed(invariant, cache, rows)[begin : begin + 8], alone)

    # One by one among rows that prefill long prompts at the same time.
    cache.rollback(6, prompt)
    for i, token in enumerate(tokens):
        cache.rollback(2, 0)
        among = feed(invariant, cache, [(2, text(90 + i, 50)), (6, [token])])
        assert torch.equal(among[-1], alone[i])


@pytest.mark.parametrize("chunks", [[40], [30, 10], [1] * 12 + [28]], ids=len)
def test_logits_after_a_prefill_have_the_same_bits_whatever_else_is_prefilled(
    invariant: PackedDecoder, chunks: list[int]
) -> None:
    """A prompt chunked alike gives the same bits alone, among others, and in another slot."""
    prompt, tail = text(40, 3), text(3, 4)

    def fed(slot: int, others: Sequence[int]) -> Tensor:
        cache = invariant.new_cache(6, 300)
        begin = 0
        for n in chunks:
            rows = [(other, text(7 * other + 20, other)) for other in others]
            for other in others:
                cache.rollback(other, 0)
            feed(invariant, cache, [*rows, (slot, prompt[begin : begin + n])])
            begin += n
        return feed(invariant, cache, [(slot, tail)])

    alone = fed(0, [])
    assert torch.equal(fed(5, [0, 2, 3]), alone)
    assert torch.equal(fed(2, [4]), alone)
