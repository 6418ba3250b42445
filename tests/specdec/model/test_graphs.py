"""Recorded forwards: on a GPU if there is one, otherwise repeated without a graph."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from specdec.engine.engine import Engine
from specdec.kernels.cpu import CpuKernels
from specdec.model.cache import SlotCache
from specdec.model.check import CPU_CHECK, Reference
from specdec.model.decoder import PackedDecoder
from specdec.model.graphs import (
    LARGEST,
    Recorder,
    RecordingFailed,
    Recordings,
    Run,
    padded,
    record,
)
from specdec.model.stock import StockModel
from specdec.model.trees import Tree
from specdec.policies.registry import make_policy
from specdec.request import Request, SamplingParams
from tests.specdec.tiny_models import DEVICE, make_pair, noisy_copy, tiny_model
from tests.specdec.workloads import prompts


def again(run: Run) -> Run:
    """Records nothing: runs it once more, on the same memory."""
    return run


RECORDER: Recorder = record if DEVICE.type == "cuda" else again


def decoder(recorder: Recorder | None) -> PackedDecoder:
    found = PackedDecoder(tiny_model().to(DEVICE), fuse=True)
    found.recordings = Recordings(recorder) if recorder is not None else None
    return found


def sizes(decoder: PackedDecoder, cache: SlotCache) -> list[int]:
    """Of what a decoder recorded over a cache."""
    assert decoder.recordings is not None
    return sorted({size for size, *_ in decoder.recordings.over(cache)})


def test_sizes_are_few_and_hardly_larger() -> None:
    found = {padded(n) for n in range(1, LARGEST + 1)}
    assert len(found) < 40
    assert max(found) == LARGEST
    for n in range(1, LARGEST + 1):
        assert n <= padded(n) <= n + max(3, n / 4)


@torch.inference_mode()
@pytest.mark.parametrize("row_tokens", [None, 4])
def test_a_recorded_forward_gives_what_a_plain_one_does(
    row_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuKernels, "row_tokens", row_tokens)  # on a GPU they have a limit anyway
    recording, plain = decoder(RECORDER), decoder(None)
    caches = [each.new_cache(5, 128) for each in (recording, plain)]
    generator = torch.Generator().manual_seed(0)
    for counts in ([4, 1, 0, 3, 9], [1, 1, 1, 1, 1], [2, 0, 3, 1, 5], [1, 2, 3, 1, 2]) * 2:
        rows = [(slot, count) for slot, count in enumerate(counts) if count]
        tokens = torch.randint(90, (sum(counts),), generator=generator).to(DEVICE)
        outs = [
            each.forward(cache, rows, tokens)
            for each, cache in zip((recording, plain), caches, strict=True)
        ]
        torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
        assert caches[0].lengths == caches[1].lengths
    assert sizes(recording, caches[0]) == [8, 12, 20]
    for slot, length in enumerate(caches[0].lengths):
        for layer in range(len(recording.layout)):
            whole = [cache.read(layer, slice(slot, slot + 1), 128) for cache in caches]
            for a, b in zip(*whole, strict=True):
                torch.testing.assert_close(a[0, :, :length], b[0, :, :length], atol=1e-4, rtol=1e-4)
                assert not a[0, :, length:].any()  # padding goes nowhere else


@torch.inference_mode()
@pytest.mark.parametrize("row_tokens", [None, 4])
def test_a_recorded_forward_of_trees_gives_what_a_plain_one_does(
    row_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuKernels, "row_tokens", row_tokens)
    recording, plain = decoder(RECORDER), decoder(None)
    caches = [each.new_cache(3, 128) for each in (recording, plain)]
    generator = torch.Generator().manual_seed(0)
    wide, deep = [-1, -1, 0, 0, 2], [-1, 0, 1, 1, 2, 4]
    for trees in ([wide, deep, []], [deep, [], wide], [[-1] * 30, wide, deep]) * 2:
        rows = [(slot, 1 + len(parents)) for slot, parents in enumerate(trees)]
        tokens = torch.randint(90, (sum(n for _, n in rows),), generator=generator).to(DEVICE)
        bases = [caches[0].lengths[slot] + 1 for slot in range(3)]
        asked = [
            Tree(base, parents) if parents else None
            for base, parents in zip(bases, trees, strict=True)
        ]
        outs = [
            each.forward(cache, rows, tokens, asked)
            for each, cache in zip((recording, plain), caches, strict=True)
        ]
        torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
        for cache in caches:
            cache.keep([0, 1, 2], bases, [[1], [0][: len(trees[1])], []])
        assert caches[0].lengths == caches[1].lengths
    assert recording.recordings is not None
    assert {key[::2] for key in recording.recordings.over(caches[0])} == {(16, True), (48, True)}


def record_once(run: Run) -> Run:
    """Keeps what a graph keeps: the tensors that it wrote, and not what made them."""
    written = run()
    return lambda: written


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Whatever goes must go at once: recordings are gigabytes, and may go while others are made."""
    gc.disable()
    yield
    gc.enable()


@torch.inference_mode()
@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("first", ["the cache", "the decoder"])
def test_a_cache_and_its_recordings_go_when_nobody_needs_them(first: str) -> None:
    recording = decoder(record_once)
    cache, other = recording.new_cache(1, 128), recording.new_cache(1, 128)
    for each in (cache, other):
        recording.forward(each, [(0, 3)], torch.arange(3, device=DEVICE))
    assert recording.recordings is not None
    recorded = weakref.ref(recording.recordings.over(cache)[4, None, False])
    gone = weakref.ref(cache)
    if first == "the decoder":
        del recording
    else:
        del cache, each
        assert gone() is None
        assert sizes(recording, other) == [4]
    assert recorded() is None


@torch.inference_mode()
@pytest.mark.usefixtures("no_collection")
def test_recordings_over_tensors_that_were_replaced_are_not_repeated() -> None:
    """A cache that grew is at other addresses."""
    recording, plain = decoder(RECORDER), decoder(None)
    caches = [each.new_cache(2, 128) for each in (recording, plain)]
    tokens = torch.arange(3, device=DEVICE)

    def forward() -> None:
        outs = [
            each.forward(cache, [(1, 2), (0, 1)], tokens)
            for each, cache in zip((recording, plain), caches, strict=True)
        ]
        torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)

    forward()
    assert recording.recordings is not None
    first = weakref.ref(recording.recordings.over(caches[0])[4, None, False])
    for cache in caches:
        cache.grow(3, 256)
    assert not sizes(recording, caches[0])
    assert first() is None
    forward()
    assert sizes(recording, caches[0]) == [4]


@torch.inference_mode()
def test_two_caches_have_recordings_of_their_own() -> None:
    recording, plain = decoder(RECORDER), decoder(None)
    generator = torch.Generator().manual_seed(0)
    pairs = [tuple(each.new_cache(2, 128) for each in (recording, plain)) for _ in range(2)]
    for _ in range(3):
        for caches in pairs:
            tokens = torch.randint(90, (5,), generator=generator).to(DEVICE)
            outs = [
                each.forward(cache, [(0, 2), (1, 3)], tokens)
                for each, cache in zip((recording, plain), caches, strict=True)
            ]
            torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
    assert [sizes(recording, cache) for cache, _ in pairs] == [[8], [8]]


@torch.inference_mode()
@pytest.mark.parametrize("why", ["it raises", "it repeats something else"])
def test_what_cannot_be_recorded_runs_as_it_is(why: str, caplog: pytest.LogCaptureFixture) -> None:
    def fails(run: Run) -> Run:
        if why == "it raises":
            raise RecordingFailed("no graphs here")
        return lambda: (torch.zeros_like(run()[0]), None)

    failing, plain = decoder(fails), decoder(None)
    tokens = torch.arange(3, device=DEVICE)
    for _ in range(2):
        caches = [each.new_cache(2, 128) for each in (failing, plain)]
        outs = [
            each.forward(cache, [(1, 2), (0, 1)], tokens)
            for each, cache in zip((failing, plain), caches, strict=True)
        ]
        torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-4)
    assert failing.recordings is None
    assert caplog.text.count("forwards are not recorded") == 1


@pytest.mark.parametrize("policy", ["fixed", "confidence"])
@pytest.mark.parametrize(
    ("verification", "temperature"), [("rejection", 0.0), ("rejection", 1.0), ("coupled", 1.0)]
)
def test_an_engine_that_records_gives_the_same_tokens(
    policy: str, verification: Any, temperature: float
) -> None:
    """Rows of several lengths that come and go, caches that are resized in between."""
    target = tiny_model()
    pair = make_pair(target, noisy_copy(target, 0.1))
    requests = [
        Request(
            str(i),
            prompt,
            SamplingParams(temperature=temperature, max_new_tokens=12 + i, seed=i),
        )
        for i, prompt in enumerate(prompts((4, 30, 1, 100, 12, 200, 7)))
    ]
    outputs = []
    for recorder in (None, RECORDER):
        assert pair.draft is not None
        for each in (pair.target, pair.draft):
            each.recordings = Recordings(recorder) if recorder is not None else None
        engine = Engine(pair, policy=make_policy(policy, k=3), verification=verification, slots=3)
        outputs.append([each.output_ids for each in engine.generate(requests)])
    assert outputs[0] == outputs[1]
    assert sizes(pair.target, engine.target_cache)
    assert pair.draft is not None and engine.drafter is not None
    assert sizes(pair.draft, engine.drafter.cache)


def test_a_tail_that_cannot_be_recorded_is_computed_behind_the_forward(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Sampling that a GPU cannot record leaves its forwards recorded."""

    def only_states(run: Run) -> Run:
        if isinstance(run()[1], tuple):
            raise RecordingFailed("no sampling here")
        return run

    target = tiny_model()
    pair = make_pair(target, noisy_copy(target, 0.1))
    assert pair.draft is not None
    requests = [Request("a", prompts((9,))[0], SamplingParams(max_new_tokens=12))]
    outputs = []
    for recordings in (None, Recordings(only_states)):
        pair.draft.recordings = recordings
        engine = Engine(pair, policy=make_policy("fixed", k=3), slots=1)
        outputs.append(engine.generate(requests)[0].output_ids)
    assert outputs[0] == outputs[1]
    assert caplog.text.count("recorded without their sampling") == 1
    assert engine.drafter is not None and sizes(pair.draft, engine.drafter.cache)


@torch.inference_mode()
@pytest.mark.parametrize("why", ["they do not compile", "they compute something else"])
def test_kernels_that_do_not_work_here_are_left_out(
    why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a model on a GPU asks when it is loaded."""

    class Broken:
        row_tokens = 1

        def attend(self, *arguments: Any, **_: Any) -> None:
            if why == "they do not compile":
                raise RuntimeError("no compiler here")
            arguments[-1].zero_()

    found = PackedDecoder(tiny_model().to(DEVICE))
    reference = Reference.of(
        StockModel(tiny_model().to(DEVICE)), found.vocab_size, found.context_length, CPU_CHECK
    )
    assert found._kernels_agree(reference)
    monkeypatch.setattr("specdec.model.cache.layer_kernels", lambda *_: Broken())
    assert not found._kernels_agree(reference)
    assert caplog.text.count("layers run without GPU kernels") == 1
