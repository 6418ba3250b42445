"""An EAGLE-3 draft as the drafter, by itself: its logits are those of a plain implementation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters.base import Drawn
from specdec.drafters.eagle import READ_AGAIN, EagleDrafter
from specdec.measure.clock import PhaseClock
from specdec.model.sharing import SharedCaches
from tests.specdec.drafters.test_model import Row
from tests.specdec.eagle_drafts import (
    Shape,
    Weights,
    fused,
    load,
    plain_draft,
    random_weights,
    save,
    target_states,
)
from tests.specdec.tiny_models import DEVICE, TinyPair, make_pair, tiny_model
from tests.specdec.workloads import prompts

FULL = Shape(draft_vocab=None)
SHAPES: dict[str, Shape] = {
    "reduced": Shape(),
    "whole vocabulary": FULL,
    "target's head": replace(FULL, own_head=False, own_embedding=False),
    "target's embedding": Shape(own_embedding=False),
    "tied": replace(FULL, own_head=False, tied=True),
    "wider than the target": Shape(hidden=96, heads=6, kv_heads=6),
    "biases": Shape(bias=True),
}
VARIANTS: dict[str, Shape] = {
    "qwen3": Shape(kind="qwen3"),
    "norm before residual": Shape(norm_before_residual=True),
    "norm before fc": Shape(norm_before_fc=True),
    "EAGLE-3.1": Shape(fc_norm=True, norm_output=True),
    "two layers": Shape(layers=2),
}
CASES = [
    *((name, form) for name in SHAPES for form in ("speculators", "sglang")),
    *((name, "speculators") for name in VARIANTS),
    ("norm before fc", "sglang"),
]
TARGETS: dict[str, dict[str, Any]] = {
    "llama": {"layers": 3},
    "qwen3": {"layers": 3, "kv_heads": 4},
    "gemma2": {"layers": 3, "sliding_window": 16},
}


@dataclass
class Seen:
    """Chooses the likeliest token, and keeps the logits."""

    logits: list[Tensor] = field(default_factory=list)
    likeliest: bool = False
    recordable, key, inputs = True, None, ()

    def __call__(self, logits: Tensor, hidden: Tensor, *inputs: Tensor) -> Drawn:
        self.logits.append(logits.clone())
        return logits.argmax(-1), None, None


@dataclass
class Bench:
    """A target's cache, a drafter over it, and three rows."""

    pair: TinyPair
    drafter: EagleDrafter
    shared: SharedCaches
    rows: list[Row]

    def feed_target(self) -> None:
        """All but the last token of each row, in forwards of several rows and chunks."""
        cache = self.shared.caches[0]
        while any(len(row.tokens) - 1 > cache.lengths[s] for s, row in enumerate(self.rows)):
            fed, packed = [], []
            for slot, row in enumerate(self.rows):
                if tokens := row.tokens[cache.lengths[slot] : -1][:13]:
                    fed.append((slot, len(tokens)))
                    packed += tokens
            self.pair.target.forward(cache, fed, torch.tensor(packed, device=DEVICE))


def bench(target: PreTrainedModel, folder: Path, fused_layers: bool = False) -> Bench:
    pair = make_pair(target, None, precision="float32" if fused_layers else "plain")
    cache = pair.target.new_cache(0, 0)
    drafter = EagleDrafter(
        load(folder, pair), cache, vocab_size=pair.vocab_size, chunk=16, clock=PhaseClock(DEVICE)
    )
    shared = SharedCaches([cache, drafter.cache])
    shared.grow(3, 256, 24)
    rows = [Row(list(prompt), len(prompt)) for prompt in prompts((3, 70, 22), seed=2)]
    for slot, row in enumerate(rows):
        assert shared.place(row, slot, 256)
    return Bench(pair, drafter, shared, rows)


def by_hand(
    w: Weights, shape: Shape, model: PreTrainedModel, tokens: list[int], n: int
) -> tuple[list[Tensor], list[int]]:
    """Logits of n candidates behind a row and the likeliest ones, each from a forward of all."""
    features = fused(w, target_states(model, tokens[:-1]))
    text, said, drawn = tokens[1:], list[Tensor](), list[int]()
    for _ in range(n):
        logits, states = plain_draft(w, shape, model, text, features)
        said.append(logits[-1])
        drawn.append(int(logits[-1].argmax()))
        text, features = [*text, drawn[-1]], torch.cat([features, states[-1:]])
    return said, drawn


@torch.inference_mode()
def check(target: PreTrainedModel, shape: Shape, w: Weights, made: Bench) -> None:
    """Two rounds of three candidates: of all rows, then of two, then of one.

    In the second one the draft is told that tokens are numbers only.
    """
    for likeliest in (False, True):
        made.feed_target()
        expected = [by_hand(w, shape, target, row.tokens, 3) for row in made.rows]
        seen = Seen(likeliest=likeliest)
        drafting = made.drafter.begin(made.rows, [0, 1, 2], [()] * 3, made.shared)
        for step, active in enumerate(([0, 1, 2], [0, 2], [2])):
            if step:
                before = [0, 1, 2] if step == 1 else [0, 2]
                drafting.go_on([before.index(slot) for slot in active])
            found = drafting.step(seen).tokens.tolist()
            assert found == [expected[slot][1][step] for slot in active]
            if likeliest:
                continue
            wanted = torch.stack([expected[slot][0][step] for slot in active])
            mine = seen.logits[-1].cpu()
            assert torch.equal(mine.isinf(), wanted.isinf())
            known = ~wanted.isinf()
            torch.testing.assert_close(mine[known], wanted[known], rtol=2e-4, atol=2e-4)
        drafting.go_on([])
        cache = made.drafter.cache
        assert cache.lengths == [len(row.tokens) - 1 for row in made.rows]
        # Two candidates of each stand, and one token of the target's comes after them. One row has
        # rounds without candidates then.
        for slot, row in enumerate(made.rows):
            row.tokens += [*expected[slot][1][:2], 7, *([5, 9] * 10 if slot == 0 else [])]
            made.shared.rollback(slot, len(row.tokens) - 1)
            read = made.drafter.cache.lengths[slot]
            assert made.drafter.lacking(row, read) == (23 if slot == 0 else 3)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_its_logits_are_those_of_a_plain_implementation(
    name: str, form: Any, tmp_path: Path
) -> None:
    target, shape = tiny_model(layers=3), (SHAPES | VARIANTS)[name]
    w = random_weights(shape)
    check(target, shape, w, bench(target, save(tmp_path / "d", shape, w, form)))


@pytest.mark.parametrize("fused_layers", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_it_reads_what_goes_into_the_layers_of_its_target(
    family: str, fused_layers: bool, tmp_path: Path
) -> None:
    target, shape = tiny_model(family, **TARGETS[family]), Shape(own_embedding=False)
    w = random_weights(shape)
    if family == "gemma2":  # whose embedding scales what it gives
        w["embed_tokens.weight"] = torch.randn(97, 64)
        shape = Shape()
    made = bench(target, save(tmp_path / "d", shape, w, "speculators"), fused_layers)
    check(target, shape, w, made)


def test_a_row_of_one_token_has_nothing_to_read_yet(tmp_path: Path) -> None:
    shape = Shape()
    folder = save(tmp_path / "d", shape, random_weights(shape), "sglang")
    drafter = bench(tiny_model(layers=3), folder).drafter
    assert drafter.room(Row([5], 1)) == 0
    assert drafter.room(Row([5, 6], 2)) == 1024 - 2


def test_what_is_read_again_in_each_round_is_no_debt_of_a_row(tmp_path: Path) -> None:
    shape = Shape()
    folder = save(tmp_path / "d", shape, random_weights(shape), "sglang")
    drafter = bench(tiny_model(layers=3), folder).drafter
    for tokens, expected in ((1, 0), (2, 1), (9, 1), (READ_AGAIN + 2, 1), (READ_AGAIN + 101, 100)):
        assert drafter.pending(Row([3] * tokens, tokens), 0) == expected


@torch.inference_mode()
@pytest.mark.parametrize("left", [False, True])
def test_features_and_what_was_read_of_a_beginning_are_shared(tmp_path: Path, left: bool) -> None:
    """Of a row that is there, or of one that has left; candidates are those of the whole text."""
    target, shape = tiny_model(layers=3), Shape()
    w = random_weights(shape)
    made = bench(target, save(tmp_path / "d", shape, w, "speculators"))
    made.feed_target()
    drafting = made.drafter.begin(made.rows, [0, 1, 2], [()] * 3, made.shared)
    drafting.step(Seen())
    drafting.go_on([])
    text = made.rows[1].tokens
    row = Row([*text[:66], (text[66] + 1) % 97, 5, 6], 66)
    if left:
        made.shared.release(1)
        made.rows[1] = Row([1, 2], 2)
        assert made.shared.place(made.rows[1], 1, 64)
    made.shared.release(0)
    made.rows[0] = row
    assert made.shared.place(row, 0, 128)
    # A position of the draft's is computed of the token behind it, too; pages have 32 positions.
    lengths = [cache.lengths[0] for cache in made.shared.caches]
    assert lengths == ([64, 64] if left else [66, 65])
    made.feed_target()
    drafting, seen = made.drafter.begin(made.rows, [0], [()], made.shared), Seen()
    assert sum(drafting.step(seen).fed) == 68 - lengths[1]
    (wanted,), _ = by_hand(w, shape, target, row.tokens, 1)
    known = ~wanted.isinf()
    torch.testing.assert_close(seen.logits[0][0][known], wanted[known], rtol=2e-4, atol=2e-4)


@torch.inference_mode()
def test_no_page_is_shared_whose_last_position_was_computed_of_another_token(
    tmp_path: Path,
) -> None:
    """Rows that have 64 tokens in common share 63 positions of the draft's."""
    shape = Shape()
    folder = save(tmp_path / "d", shape, random_weights(shape), "speculators")
    made = bench(tiny_model(layers=3), folder)
    made.feed_target()
    made.drafter.begin(made.rows, [0, 1, 2], [()] * 3, made.shared).step(Seen())
    made.shared.release(1)
    made.shared.release(0)
    text = made.rows[1].tokens[:64]
    row = Row([*text, (made.rows[1].tokens[64] + 1) % 97, 5, 6, 7], 64)
    assert made.shared.place(row, 0, 128)
    assert [cache.lengths[0] for cache in made.shared.caches] == [64, 32]
