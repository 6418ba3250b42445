"""Where everything lies in the target forward of a round."""

from __future__ import annotations

import doctest
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.engine import layout as module
from specdec.engine.layout import VerifyLayout


@dataclass
class Row:
    """A row with as many output tokens as it says."""

    tokens: list[int]
    generated: int


def row(prompt: list[int], output: list[int]) -> Row:
    return Row([*prompt, *output], len(output))


def test_the_example_in_the_docstring_is_right() -> None:
    failed, tried = doctest.testmod(module, extraglobs={"row": row})
    assert tried > 5 and not failed


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[Row], list[int], list[int], int]:
    """Rows, how much of each is cached, how much each submits, and the chunk."""
    chunk = draw(st.integers(1, 5))
    rows, cached, submitted = [], [], []
    for number in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 9))
        there = draw(st.integers(0, length - 1))
        k = draw(st.integers(0, 3)) if length - there == 1 else 0
        tokens = [100 * (number + 1) + i for i in range(length)]
        rows.append(Row(tokens, draw(st.integers(0, length - 1))))
        cached.append(there)
        submitted.append(k)
    return rows, cached, submitted, chunk


@settings(max_examples=200, deadline=None, derandomize=True)
@given(rounds())
def test_rows_lie_end_to_end_each_with_what_it_lacks_and_then_its_candidates(
    round_: tuple[list[Row], list[int], list[int], int],
) -> None:
    rows, cached, submitted, chunk = round_
    width = max(submitted)
    layout = VerifyLayout.of(rows, cached, submitted, width, chunk)
    candidates = [[-(100 * (b + 1) + i) for i in range(width)] for b in range(len(rows))]
    table = [token for each in candidates for token in each] + layout.pending
    packed = [table[i] for i in layout.order]

    at = 0
    for slot, (each, k) in enumerate(zip(rows, submitted, strict=True)):
        fed = each.tokens[cached[slot] : cached[slot] + chunk]
        assert layout.rows[slot] == (slot, len(fed) + k)
        assert packed[at : at + len(fed) + k] == fed + candidates[slot][:k]
        at += len(fed) + k
        # The last token fed and the candidates are scored, and predict the next output positions.
        first = layout.first[slot]
        own = layout.scored[first : first + k + 1]
        assert [packed[i] for i in own] == [fed[-1], *candidates[slot][:k]]
        assert own[-1] == at - 1
        assert layout.owner[first : first + k + 1] == [slot] * (k + 1)
        expected = list(range(each.generated, each.generated + k + 1))
        assert layout.at[first : first + k + 1] == expected
        assert layout.complete[slot] == (cached[slot] + len(fed) == len(each.tokens))
    assert at == len(layout.order)
    assert len(layout.scored) == len(layout.owner) == len(layout.at) == sum(submitted) + len(rows)
