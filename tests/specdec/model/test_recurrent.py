"""States that run on: packed rows, rolled back to anywhere, give what the plain model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from hypothesis import HealthCheck, given, settings

from specdec.model.decoder import PackedDecoder
from specdec.model.packing import GRID_TOKENS
from specdec.model.recurrent import RecurrentStates, StateLayout
from specdec.model.rows import PackedRow
from specdec.model.stock import UnsupportedModel
from tests.specdec.model.test_decoder import STEPS, Bench, bench_of
from tests.specdec.recurrent_models import RECURRENT, recurrent_model
from tests.specdec.tiny_models import VOCAB


@pytest.fixture(scope="module", params=RECURRENT)
def bench(request: pytest.FixtureRequest) -> Bench:
    return bench_of(recurrent_model(request.param))


@pytest.fixture(scope="module")
def qwen() -> Bench:
    return bench_of(recurrent_model("qwen3_next"))


def test_ragged_rows_long_and_short_equal_plain(bench: Bench) -> None:
    bench.clear()
    bench.check((0, 17), (1, 21), (2, 5), (3, GRID_TOKENS + 1), (4, 1))
    bench.check((3, 5), (0, 2), (4, 70), (1, GRID_TOKENS), (2, 1))
    for chunk in (30, 1, 64, 7):
        bench.check((2, chunk), (0, 3), (3, 1))


@settings(
    max_examples=4,
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


def test_a_verified_row_is_rolled_back_to_any_of_its_tokens_without_being_computed_again(
    qwen: Bench,
) -> None:
    qwen.clear(capacity=512)
    qwen.check((0, 40), (1, 3))
    for accepted in range(GRID_TOKENS):
        qwen.check((0, GRID_TOKENS), (1, 1))
        kept = qwen.cache.lengths[0] - GRID_TOKENS + 1 + accepted
        qwen.rollback(0, kept)
        qwen.rollback(1, qwen.cache.lengths[1])
        assert qwen.cache.lengths[0] == kept


@pytest.mark.parametrize("prompt", [1, 9, GRID_TOKENS, 60])
def test_a_draft_takes_all_its_candidates_back_whatever_it_read_before(
    qwen: Bench, prompt: int
) -> None:
    """It reads its prompt and candidates one by one before anything is rolled back."""
    qwen.clear()
    qwen.check((0, prompt))
    for k in (1, 8, 2, GRID_TOKENS - 1, GRID_TOKENS - 2, 5):
        begin = qwen.cache.lengths[0]
        for _ in range(k):
            qwen.check((0, 1))
        qwen.rollback(0, begin + k % 2)
        assert qwen.cache.lengths[0] == begin + k % 2


def test_what_lies_further_back_than_states_is_forgotten_and_computed_again(qwen: Bench) -> None:
    qwen.clear()
    qwen.check((0, 100), (1, 5))
    qwen.rollback(0, 99)
    assert qwen.cache.lengths[0] == 0
    qwen.check((0, 30), (1, 5))


def test_rows_move_fork_and_leave_with_their_states(qwen: Bench) -> None:
    qwen.clear()
    qwen.check((0, 40), (1, 7), (2, 12))
    qwen.check((2, 5), (1, 1))
    qwen.rollback(2, 14)
    qwen.cache.move(2, 0)
    qwen.texts[0], qwen.texts[2] = qwen.texts[2], []
    qwen.cache.grow(6, 512)
    assert qwen.cache.holds(0, 13) and not qwen.cache.holds(0, 15)
    qwen.cache.fork(0, [3, 4], [14, 13])
    qwen.texts[3], qwen.texts[4] = qwen.texts[0][:14], qwen.texts[0][:13]
    qwen.check((0, 4), (3, 2), (4, 6), (2, 1))
    qwen.cache.release(4)
    qwen.texts[4] = []
    qwen.check((4, 30), (3, 20), (1, 1))
    assert not qwen.cache.holds(4, 29)


def test_half_precision_agrees_to_its_precision() -> None:
    bench = bench_of(recurrent_model("qwen3_5_text", peak=1.0).to(torch.bfloat16))
    assert {x.dtype for x in bench.cache.states.inputs[0]} == {torch.bfloat16}  # type: ignore[union-attr]
    bench.check((0, 17), (1, 3), (2, 40), tolerance=0.03)
    bench.check((2, 4), (0, 1), tolerance=0.03)


def test_memory_is_counted_by_slot(qwen: Bench) -> None:
    states = qwen.cache.states
    assert states is not None
    tensors = [*states.states, *(ring for rings in states.inputs for ring in rings)]
    assert sum(tensor.nbytes for tensor in tensors) == qwen.cache.slots * qwen.cache.bytes_per_slot
    layouts = [StateLayout((2, 3), (((4,), torch.bfloat16),))]
    small = RecurrentStates(layouts, reach=8, device=torch.device("cpu"))
    assert small.bytes_per_slot == 4 * 6 + (8 + 8) * 4 * 2


def test_the_check_at_loading_covers_inputs_that_are_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = RecurrentStates.replay

    def careless(
        self: RecurrentStates, short: list[PackedRow], long: list[PackedRow]
    ) -> object:  # forgets what is not in the states yet
        for row in (*short, *long):
            self.kept[row.slot] = row.start
        return honest(self, short, long)

    monkeypatch.setattr(RecurrentStates, "replay", careless)
    with pytest.raises(UnsupportedModel, match="its distributions differ"):
        PackedDecoder(recurrent_model("qwen3_5_text"))


def test_what_depends_on_what_is_replayed_is_not_deterministic() -> None:
    with pytest.raises(UnsupportedModel, match="cannot be deterministic"):
        PackedDecoder(recurrent_model("qwen3_next"), invariant=True)


def test_convolutions_wider_than_what_is_kept_are_refused() -> None:
    model = recurrent_model("qwen3_5_text", linear_conv_kernel_dim=12)
    with pytest.raises(UnsupportedModel, match="convolves over 12 tokens"):
        PackedDecoder(model)


def test_a_plain_forward_of_the_model_stays_what_it_was(qwen: Bench) -> None:
    text = torch.arange(30)[None] % VOCAB
    with torch.inference_mode():
        plain = qwen.plain(input_ids=text, use_cache=False).logits
    qwen.decoder.model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        again = qwen.decoder.model(input_ids=text, use_cache=False).logits
    qwen.decoder.model.set_attn_implementation("specbatch_packed")
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-4)


def test_what_accelerate_puts_around_layers_stays() -> None:
    """It does where a model is spread over several devices."""
    seen: list[str] = []

    class Noting(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module).__name__)
            return args, kwargs

    model = recurrent_model("qwen3_5_text")
    for module in model.modules():
        if hasattr(module, "conv1d"):
            add_hook_to_module(module, Noting())
    bench = bench_of(model)
    bench.check((0, 7), (1, 30))
    bench.rollback(0, 5)
    seen.clear()
    bench.check((0, 3), (1, 2))
    assert len(seen) == 2 * (1 + 2)  # packed, and two rows plain
