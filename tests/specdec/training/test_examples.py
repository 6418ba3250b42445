from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specdec.training.examples import Example, cut, from_lines, packs, split, to_lines


def test_a_prompt_is_on_one_side_whatever_else_there_is(examples: list[Example]) -> None:
    train, held_out = split(examples, 0.3)
    assert sorted(e.id for e in train + held_out) == sorted(e.id for e in examples)
    assert 12 <= len(held_out) <= 60
    again = [replace(e, id="other", output_ids=(1,)) for e in held_out]
    assert split(again, 0.3) == ([], again)
    assert split(reversed(train[:5]), 0.3)[1] == []


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_packs_hold_every_example_once_within_the_budget(
    examples: list[Example], seed: int | None
) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found = packs(examples, 40, generator)
    assert sorted(i for pack in found for i in pack) == list(range(len(examples)))
    for pack in found:
        assert max(len(examples[i].input_ids) for i in pack) * len(pack) <= 40
    assert len(found) == len(packs(examples, 40))
    assert packs(examples[:3], 1) == [[i] for pack in packs(examples[:3], 1) for i in pack]


def test_examples_are_cut_to_what_a_model_can_read() -> None:
    whole = [Example("a", (1, 2, 3), (4, 5, 6)), Example("b", (1,) * 5, (2,))]
    assert cut(whole, 4) == [Example("a", (1, 2, 3), (4, 5))]
    assert cut(whole, 5) == whole


def test_examples_as_lines(examples: list[Example]) -> None:
    assert from_lines(to_lines(examples)) == examples


def test_an_example_has_tokens() -> None:
    with pytest.raises(ValueError, match="example x"):
        Example("x", (1,), ())
