"""The best samples of a prompt, of which none is a duplicate."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from jobs.nightly.conversations import Conversation, Generated
from jobs.nightly.duplicates import DuplicateIndex
from jobs.nightly.expressions import Expression, TurnError
from jobs.nightly.filter_settings import DuplicatesFilter
from jobs.nightly.filters import EXACT, SELECT
from jobs.nightly.judge_settings import SelectConfig
from jobs.nightly.seeds import Prompt
from jobs.nightly.selection import Selection


def conversation(prompt: str, sample: int, text: str, score: float, *logprobs: float) -> Any:
    return Conversation(
        Prompt(prompt, "t", "d", {}),
        sample,
        completions=[text],
        messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": text}],
        score=score,
        logprobs=[*logprobs],
        judged={"clear": sample},
    )


def samples() -> list[Conversation]:
    return [
        conversation("a", 0, "one", 1, -2.0, -4.0),
        conversation("a", 1, "two", 3, -1.0),
        conversation("a", 2, "three", 3, -2.0, -1.0),
        conversation("b", 1, "two", 2, -1.0),
        conversation("b", 4, "five", 1, -9.0),
    ]


@pytest.mark.parametrize(
    ("by", "keep", "expected"),
    [
        ("score", 1, ["a1", "b1"]),  # of equals the first
        ("score", 2, ["a1", "a2", "b1", "b4"]),
        ("logprob", 1, ["a1", "b1"]),  # of the mean, so that short ones have no advantage
        ("-logprob", 1, ["a0", "b4"]),
        ("judgement.clear", 1, ["a2", "b4"]),
        ("completions[0] | length", 1, ["a2", "b4"]),
    ],
)
def test_the_best_are_kept_in_their_order(by: str, keep: int, expected: list[str]) -> None:
    made = Generated(samples(), 5, Counter(), [], [])
    selection = Selection(SelectConfig(by=by, keep=keep), None)
    kept = selection.keep(made, made.conversations)
    assert [f"{each.prompt.seed_id}{each.sample}" for each in kept] == expected
    assert selection.removed[SELECT] == selection.matched[SELECT] == 5 - len(expected)
    assert not made.lost


def test_a_duplicate_makes_room_for_the_next_best() -> None:
    made = Generated(samples(), 5, Counter(), [], [])
    duplicates = DuplicateIndex(DuplicatesFilter())
    selection = Selection(SelectConfig(by="score", keep=1), duplicates)
    kept = selection.keep(made, made.conversations)
    assert [each.text for each in kept] == ["two", "five"]
    assert duplicates.removed == {EXACT: 1}
    assert (selection.removed[SELECT], selection.matched[SELECT]) == (2, 3)


def test_without_a_selection_all_are_kept() -> None:
    made = Generated(samples(), 5, Counter(), [], [])
    selection = Selection(None, DuplicateIndex(DuplicatesFilter()))
    assert selection.keep(made, made.conversations) == [*samples()[:3], samples()[4]]
    assert selection.names == []


def test_what_cannot_be_ranked_is_lost() -> None:
    made = Generated(samples(), 5, Counter(), [], [])
    by = "1 / (score - 3)"
    assert [each.sample for each in Selection(SelectConfig(by=by), None).keep(made, samples())] == [
        0,
        4,
    ]
    assert made.lost == {"SelectError": 2}


@pytest.mark.parametrize("text", ["x.y", "'a'", "none", "x / 0", "''.__class__", "1e999"])
def test_an_expression_gives_a_number_or_says_why(text: str) -> None:
    with pytest.raises(TurnError):
        Expression(text)({"x": 1})


def test_expressions_name_what_they_use() -> None:
    by = Expression("{'good': 1}[kind] + [a, 2] | max")
    assert by.names == {"kind", "a"}
    assert by({"kind": "good", "a": 5}) == 6
    assert Expression("a > 1")({"a": 2}) == 1
