from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
)

from specdec.model.cache import KEY_BLOCK, SlotCache
from specdec.model.decoder import PackedDecoder
from specdec.model.linear import pack_linears
from specdec.model.packing import GRID_TOKENS
from specdec.model.stock import UnsupportedModel
from tests.specdec.tiny_models import VOCAB, seeded, tiny_model

WINDOW = 12
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}

FUSED = ("llama", "qwen2", "qwen3", "mistral")
"""Families whose layers are known; the others run with their own."""


@dataclass
class Bench:
    """A packed decoder beside the plain model, and what each slot of a cache should hold."""

    plain: PreTrainedModel
    decoder: PackedDecoder
    cache: SlotCache = field(init=False)
    texts: list[list[int]] = field(init=False)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def __post_init__(self) -> None:
        self.clear()

    def clear(self, slots: int = 5, capacity: int = 2 * KEY_BLOCK) -> None:
        self.cache = self.decoder.new_cache(slots, capacity)
        self.texts = [[] for _ in range(slots)]

    def rollback(self, slot: int, length: int) -> None:
        self.cache.rollback(slot, length)
        del self.texts[slot][self.cache.lengths[slot] :]

    def check(self, *rows: tuple[int, int], tolerance: float = 2e-3) -> None:
        """Append random tokens to slots in one packed forward; the logits must be plain ones."""
        new = [torch.randint(VOCAB, (n,), generator=self.generator) for _, n in rows]
        hidden = self.decoder.forward(self.cache, rows, torch.cat(new))
        packed = self.decoder.logits(hidden).split([n for _, n in rows])
        for (slot, n), tokens, logits in zip(rows, new, packed, strict=True):
            self.texts[slot] += tokens.tolist()
            assert self.cache.lengths[slot] == len(self.texts[slot])
            torch.testing.assert_close(
                logits, plain_logits(self.plain, self.texts[slot])[-n:], rtol=0, atol=tolerance
            )

    def check_rollbacks(self) -> None:
        """Rows of all lengths, beyond a block, of which a long one is rolled back."""
        self.clear(capacity=3 * KEY_BLOCK)
        self.check((0, 5), (3, 150), (1, 20))
        self.check((0, 1), (3, 4), (1, 30), (4, 2))
        self.rollback(3, 140)
        self.check((3, 3), (4, 1))

    def check_steps(self, steps: list[tuple[list[int], list[tuple[int, int]]]]) -> None:
        """`STEPS`: rows in some slot order, each rolled back to some length before it appends."""
        self.clear()
        for slots, actions in steps:
            rows = []
            for slot, (keep, append) in zip(slots, actions, strict=False):
                self.rollback(slot, keep)
                rows.append((slot, append))
            self.check(*rows)


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, text: list[int]) -> Tensor:
    return model(torch.tensor([text]), use_cache=False).logits[0]


def bench_of(model: PreTrainedModel, *, pack: bool = False, **options: bool) -> Bench:
    bench = Bench(model, PackedDecoder(copy.deepcopy(model), **options))
    if pack:
        pack_linears(bench.decoder.model, None)
    return bench


@pytest.fixture(
    scope="module",
    params=[
        *FAMILIES,
        *(f"{family}, fuse" for family in FUSED),
        *(f"{family}, fuse, torch" for family in FUSED),
        *(f"{family}, fuse, pack" for family in FUSED),
        "mistral, torch",
        "llama, invariant",
        "llama, fuse, invariant",
    ],
)
def bench(request: pytest.FixtureRequest) -> Bench:
    family, *options = request.param.split(", ")
    # Heads of 8 numbers are none that the compiled kernels take.
    heads = 8 if "torch" in options else 4
    model = tiny_model(family, heads=heads, **FAMILIES[family])
    return bench_of(model, **dict.fromkeys(set(options) - {"torch"}, True))


@pytest.fixture
def clean(bench: Bench) -> Bench:
    bench.clear()
    return bench


def test_ragged_prefill_then_ragged_verification_equals_plain(clean: Bench) -> None:
    clean.check((0, 17), (1, 21), (2, 5), (3, 24), (4, 1))
    clean.check((0, 1), (1, 5), (2, 3), (3, 2), (4, 4))


def test_long_rows_beside_short_ones_in_any_slot_order_equal_plain(clean: Bench) -> None:
    clean.check((3, GRID_TOKENS + 1), (0, 1), (4, 70), (1, GRID_TOKENS))
    clean.check((1, 2), (4, 1), (2, 100), (0, GRID_TOKENS), (3, GRID_TOKENS + 9))


@pytest.mark.parametrize("longest", [0, 60])
def test_rows_that_kernels_leave_to_torch_beside_those_that_they_take_equal_plain(
    clean: Bench, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    if clean.cache.kernels is not None:
        monkeypatch.setattr(clean.cache.kernels, "prompt_tokens", longest)
    clean.check((3, GRID_TOKENS + 1), (0, 1), (4, 70), (1, GRID_TOKENS))
    clean.check((1, 61), (4, 1), (2, 60), (0, GRID_TOKENS))


def test_chunked_prefill_equals_plain(clean: Bench) -> None:
    for chunk in (30, 1, 64, 7, 64):
        clean.check((2, chunk), (0, 3))


def test_holes_between_slots_are_never_attended(clean: Bench) -> None:
    clean.check((0, 6), (1, 20), (2, 6), (3, 50), (4, 6))
    clean.check((4, 3), (0, 2))
    clean.check((2, 1))


def test_contexts_beyond_one_and_two_key_blocks_equal_plain(clean: Bench) -> None:
    clean.clear(capacity=3 * KEY_BLOCK)
    clean.check((0, KEY_BLOCK - 1), (1, 2 * KEY_BLOCK - 3), (2, 4))
    for n in (1, 2, 4):
        clean.check((0, n), (1, n), (2, 1))
    assert clean.cache.lengths[1] > 2 * KEY_BLOCK


def test_rows_that_moved_to_other_slots_go_on_as_before(clean: Bench) -> None:
    clean.check((0, 9), (1, 30), (2, 14))
    clean.cache.move(2, 0)
    clean.texts[0], clean.texts[2] = clean.texts[2], []
    clean.cache.grow(6, 3 * KEY_BLOCK)
    clean.check((0, 4), (2, 5), (1, 1))


STEPS = st.lists(
    st.tuples(
        st.permutations(range(5)),
        st.lists(
            st.tuples(st.integers(0, 60), st.one_of(st.integers(1, 8), st.integers(20, 40))),
            min_size=1,
            max_size=5,
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS)
def test_rollback_then_append_is_a_fresh_prefill(
    bench: Bench, steps: list[tuple[list[int], list[tuple[int, int]]]]
) -> None:
    """Any rows in any slot order, rolled back to anywhere before each append."""
    bench.check_steps(steps)


def test_a_rolled_back_row_gives_the_same_bits_as_a_fresh_one() -> None:
    decoder = bench_of(tiny_model()).decoder
    tokens = torch.arange(20) % VOCAB
    fresh, used = decoder.new_cache(1, 20), decoder.new_cache(1, 20)
    decoder.forward(fresh, [(0, 8)], tokens[:8])
    decoder.forward(used, [(0, 8)], tokens[:8])
    decoder.forward(used, [(0, 12)], tokens[:12])
    used.rollback(0, 8)
    again, first = (decoder.forward(cache, [(0, 5)], tokens[8:13]) for cache in (used, fresh))
    assert torch.equal(again, first)


def test_the_lm_head_runs_only_on_what_is_asked() -> None:
    bench = bench_of(tiny_model())
    seen: list[int] = []
    bench.decoder.model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.shape[0])
    )
    hidden = bench.decoder.forward(bench.cache, [(0, 9), (1, 3)], torch.arange(12))
    assert hidden.shape == (12, 64) and not seen
    assert bench.decoder.logits(hidden[[8, 11]]).shape == (2, VOCAB)
    assert seen == [2]


def test_half_precision_agrees_to_its_precision() -> None:
    model = tiny_model(peak=1.0).to(torch.bfloat16)
    bench = bench_of(model)
    assert bench.cache.dtype == torch.bfloat16
    bench.check((0, 17), (1, 3), (2, 40), tolerance=0.02)
    bench.check((2, 4), (0, 1), tolerance=0.02)


# -------------------------------------------------------------------- other architectures

SMALL = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
ABSOLUTE: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=300, **SMALL),
    "gpt_neox": lambda: GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **SMALL
    ),
    "opt": lambda: OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        max_position_embeddings=300,
        **(SMALL | {"pad_token_id": 1}),
    ),
}


@pytest.mark.parametrize("name", ABSOLUTE)
def test_older_architectures_that_load_also_agree(name: str) -> None:
    model = seeded(AutoModelForCausalLM.from_config, ABSOLUTE[name]()).eval()
    bench = bench_of(model)
    bench.check((1, 40), (0, 5), (4, 1))
    bench.rollback(1, 33)
    bench.check((4, 3), (1, 2), (0, 30))


UNSUPPORTED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "recurrent state": (
        lambda: AutoModelForCausalLM.from_config(
            RecurrentGemmaConfig(
                hidden_size=32, num_hidden_layers=3, num_attention_heads=4, **SMALL
            )
        ),
        "cannot be rolled back",
    ),
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        ),
        "encoder-decoder",
    ),
    "attention of its own": (
        lambda: AutoModelForCausalLM.from_config(
            XLMConfig(emb_dim=32, n_layers=2, n_heads=4, **SMALL | {"pad_token_id": 1})
        ),
        "AttentionInterface",
    ),
    "a mask that depends on the values": (lambda: tiny_model("doge"), "a mask of its own"),
}


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_what_cannot_run_packed_is_refused_with_the_reason(why: str) -> None:
    build, reason = UNSUPPORTED[why]
    model = build().eval()
    with pytest.raises(UnsupportedModel, match=reason) as error:
        PackedDecoder(model)
    assert type(model).__name__ in str(error.value)
