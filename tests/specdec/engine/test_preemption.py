"""Rows that are sent back for want of pages go on as if they had stayed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.model.pages import PAGE
from specdec.policies.base import StopPolicy
from specdec.policies.simple import Fixed
from tests.specdec.engine.test_memory import bytes_for
from tests.specdec.model.test_pages import check_pages
from tests.specdec.tiny_models import TinyPair, make_pair
from tests.specdec.workloads import GREEDY, SAMPLED, Prompt, outputs, prompts, requests_of

PROMPTS = prompts((40, 3, 25, 60, 12, 90), seed=3)
LONG = 50
"""Output tokens: rows outgrow the pages that they are admitted with."""

EVERY_LAW = pytest.mark.parametrize(
    ("sampling", "mode"),
    [(GREEDY, "rejection"), (SAMPLED, "coupled"), (SAMPLED, "rejection")],
    ids=["greedy", "coupled", "rejection"],
)
"""How tokens are chosen: by the target alone, or by numbers in either mode."""


def run(
    pair: TinyPair, sampling: Any, pages: int | None, policy: StopPolicy, mode: Any, slots: int = 6
) -> tuple[list[Prompt], Engine]:
    memory = bytes_for(pair, pages * PAGE) if pages is not None else None
    engine = Engine(
        pair,
        policy=policy,
        verification=mode,
        slots=slots,
        kv_memory_bytes=memory,
        prefill_chunk=32,
    )
    for _ in range(40):  # outputs seem to be short, so that too many rows are admitted
        engine.scheduler._lengths.add(4)
    return outputs(engine.generate(requests_of(PROMPTS, sampling))), engine


@EVERY_LAW
@pytest.mark.parametrize("k", [0, 3])
def test_they_draw_the_same_tokens(pair: TinyPair, sampling: Any, mode: Any, k: int) -> None:
    sampling = replace(sampling, max_new_tokens=LONG)
    plenty, engine = run(pair, sampling, None, Fixed(k), mode)
    assert engine.stats.preempted == 0
    for pages in (5, 9):
        short, engine = run(pair, sampling, pages, Fixed(k), mode)
        assert short == plenty
        assert engine.stats.preempted > 0
        for cache in engine.shared.caches:
            check_pages(cache.pages)
            assert cache.pages.available == cache.pages.total <= pages


def test_with_batch_invariant_models_their_logits_are_the_same_to_the_bit(
    target_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their prompts are fed in the same chunks again, and their output in short rows."""
    pair = make_pair(target_model, target_model, precision="float32", invariant=True)
    honest = pair.target.logits
    seen: set[bytes] = set()

    def recorded(hidden: Tensor) -> Tensor:
        logits = honest(hidden)
        seen.update(row.numpy().tobytes() for row in logits)
        return logits

    monkeypatch.setattr(pair.target, "logits", recorded)
    sampling = replace(GREEDY, max_new_tokens=LONG)
    plenty, _ = run(pair, sampling, None, Fixed(0), "coupled")
    known = set(seen)
    short, engine = run(pair, sampling, 5, Fixed(0), "coupled")
    assert short == plenty and engine.stats.preempted > 0
    assert seen == known


@torch.inference_mode()
@pytest.mark.parametrize("invariant", [False, True])
def test_bits_do_not_depend_on_where_pages_lie(
    target_model: PreTrainedModel, invariant: bool
) -> None:
    precision: Any = "float32" if invariant else "plain"
    decoder = make_pair(target_model, target_model, precision=precision, invariant=invariant).target
    generator = torch.Generator().manual_seed(0)
    steps = [(70, 33, 5), (1, 4, 1), (40, 1, 20), (2, 30, 24)]
    tokens = [torch.randint(90, (sum(step),), generator=generator) for step in steps]

    def hidden(seed: int) -> list[Tensor]:
        cache = decoder.new_cache(3, 256)
        order = torch.randperm(cache.pages.total, generator=torch.Generator().manual_seed(seed))
        cache.pages._free = [1 + int(page) for page in order]
        for tensor in (*cache.keys, *cache.values):
            tensor[1:] = torch.randn(tensor[1:].shape)  # as rows before left it
        return [
            decoder.forward(cache, list(enumerate(step)), ids).clone()
            for step, ids in zip(steps, tokens, strict=True)
        ]

    first = hidden(0)
    for seed in range(1, 4):
        assert all(torch.equal(a, b) for a, b in zip(first, hidden(seed), strict=True))
