"""A small model as the drafter, by itself."""

from __future__ import annotations

import doctest
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.drafters import model as module
from specdec.drafters.base import Choose, Drawn
from specdec.drafters.model import DraftLayout, ModelDrafter
from specdec.measure.clock import PhaseClock
from specdec.model.sharing import SharedCaches
from tests.specdec.tiny_models import DEVICE, TinyPair
from tests.specdec.workloads import SOME


@dataclass
class Row:
    tokens: list[int]
    output_start: int

    @property
    def sharable(self) -> int:
        return len(self.tokens) - 2


def test_the_example_in_the_docstring_is_right() -> None:
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_the_layout_has_what_each_slot_lacks_end_to_end() -> None:
    layout = DraftLayout.of([[1, 2], [3, 4, 5], [6]], cached=[1, 0, 0], slots=[1, 0])
    assert layout == DraftLayout([(1, 3), (0, 1)], [3, 4, 5, 2], [2, 3])


class Greedy:
    """Chooses the likeliest token, and has nothing to say about it."""

    recordable, likeliest, key, inputs = True, True, None, ()

    def __call__(self, logits: Tensor, hidden: Tensor, *inputs: Tensor) -> Drawn:
        return logits.argmax(-1), None, None


GREEDY: Choose = Greedy()


@torch.inference_mode()
def continued(model: PreTrainedModel, tokens: list[int], n: int) -> list[int]:
    """A text's next tokens by plain forwards."""
    text = list(tokens)
    for _ in range(n):
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(tokens) :]


def test_candidates_are_the_models_own_continuation_of_each_row(
    pair: TinyPair, draft_model: PreTrainedModel
) -> None:
    """Through long prompts, rows that stop early, and a round that goes on from the last."""
    assert pair.draft is not None
    drafter = ModelDrafter(
        pair.draft,
        vocab_size=pair.vocab_size,
        context_length=1024,
        chunk=16,
        clock=PhaseClock(DEVICE),
    )
    shared = SharedCaches([drafter.cache])
    rows = [Row(list(SOME[i]), len(SOME[i])) for i in (1, 5, 8)]
    shared.grow(3, 256, 24)
    for slot, row in enumerate(rows):
        assert shared.place(row, slot, 256)
    for _ in range(2):
        expected = [continued(draft_model, row.tokens, 3) for row in rows]
        lacking = sum(len(row.tokens) - drafter.cache.lengths[s] for s, row in enumerate(rows))
        with torch.inference_mode():
            drafting = drafter.begin(rows, [0, 1, 2], [()] * 3, shared)
            first = drafting.step(GREEDY)
            assert first.tokens.tolist() == [each[0] for each in expected]
            assert sum(first.fed) == lacking and max(first.fed) <= 16 * len(rows)
            drafting.go_on([0, 2])
            second = drafting.step(GREEDY)
            assert second.tokens.tolist() == [expected[0][1], expected[2][1]]
            assert second.fed == [2]
            drafting.go_on([0, 1])
            assert drafting.step(GREEDY).tokens.tolist() == [expected[0][2], expected[2][2]]
        # One candidate of each stands, and one token of the target's comes after it.
        for slot, row in enumerate(rows):
            row.tokens += [expected[slot][0], 7]
            shared.rollback(slot, len(row.tokens) - 1)
