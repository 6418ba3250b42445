"""What the index of earlier text proposes, by itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from specdec.drafters.suffix import LENGTHS, MOST_COUNT, SuffixIndex
from specdec.policies.chains import Evidence


@dataclass
class Row:
    tokens: list[int]
    output_start: int
    own: int = field(init=False)
    read: int = 0

    def __post_init__(self) -> None:
        self.own = hash(tuple(self.tokens[: self.output_start]))


def row(prompt: list[int], output: list[int]) -> Row:
    return Row([*prompt, *output], len(prompt))


def index_of(*rows: Row) -> SuffixIndex:
    index = SuffixIndex()
    for each in rows:
        index.read(each)
    return index


TEXT = list(range(100, 140))


def test_a_row_quotes_its_prompt() -> None:
    mine = row(TEXT, [1, 2, *TEXT[:10]])
    chain = index_of(mine).chain(mine, 6)
    assert chain.tokens == TEXT[10:16]
    assert chain.evidence[0] == (LENGTHS[0], 1, 1, True, 0)


def test_prompts_of_others_are_not_quoted_and_their_outputs_are() -> None:
    mine, other = row([1, 2, 3], TEXT[:10]), row(TEXT, [7])
    assert index_of(mine, other).chain(mine, 6).tokens == []
    other = row([7], TEXT)
    chain = index_of(mine, other).chain(mine, 6)
    assert chain.tokens == TEXT[10:16]
    assert not chain.evidence[0][Evidence.OWN]


def test_a_later_sample_goes_on_as_an_earlier_one_did() -> None:
    """From its first token on, and its prompt is read once."""
    prompt = [5, 6, 7, 8]
    first, later = row(prompt, TEXT), row(prompt, [])
    index = index_of(first)
    entries = len(index)
    index.read(later)
    assert len(index) == entries
    chain = index.chain(later, 6)
    assert chain.tokens == TEXT[:6]
    assert chain.evidence[0][Evidence.OWN]


def test_the_longest_context_decides() -> None:
    """After 1 2 comes 50 mostly, but not after these eight."""
    tail = [9, 8, 7, 6, 5, 4, 1, 2]
    often = row([0], [1, 2, 50] * 4)
    mine = row([0, 3], tail)
    index = index_of(often, row([0, 0], [*tail, 60, 61]))
    chain = index.chain(mine, 2)
    assert chain.tokens == [60, 61]
    assert [each[Evidence.LENGTH] for each in chain.evidence] == [8, 8]


def test_what_mostly_followed_is_proposed_with_its_counts() -> None:
    index = index_of(*(row([at], [1, 2, 50 if at % 4 else 51]) for at in range(3, 15)))
    chain = index.chain(row([99], [1, 2]), 1)
    assert chain.tokens == [50]
    ((length, followed, seen, own, _),) = chain.evidence
    assert (length, own) == (LENGTHS[-1], False)
    assert 1 < followed < seen <= 12


def test_a_context_follows_a_change_of_the_text() -> None:
    index = index_of(*(row([at], [1, 2, 50]) for at in range(30)))
    for at in range(100, 140):
        index.read(row([at], [1, 2, 51]))
    assert index.chain(row([99], [1, 2]), 1).tokens == [51]


def test_counts_stay_within_their_bits() -> None:
    index = SuffixIndex()
    for at in range(3 * MOST_COUNT):
        index.read(row([1000 + at], [1, 2, 50]))
    ((_, followed, seen, *_),) = index.chain(row([99], [1, 2]), 1).evidence
    assert MOST_COUNT // 2 <= followed == seen <= MOST_COUNT


def test_tokens_beyond_an_end_are_not_read() -> None:
    ended = row([7], TEXT)
    index = SuffixIndex()
    index.read(ended, until=6)
    assert index.chain(row([1], TEXT[:5]), 6).tokens == []
    assert index.chain(row([1], TEXT[:4]), 6).tokens == [TEXT[4]]


def test_no_more_candidates_than_there_is_room_for() -> None:
    mine = row(TEXT, TEXT[:10])
    index = index_of(mine)
    assert [len(index.chain(mine, most).tokens) for most in (0, 1, 5)] == [0, 1, 5]


@pytest.mark.parametrize("most", [50, 1000])
def test_memory_is_bounded_and_the_latest_is_kept(most: int) -> None:
    index, generator = SuffixIndex(most=most), random.Random(0)
    for at in range(200):
        index.read(row([at], [generator.randrange(50_000) for _ in range(40)]))
        assert len(index) <= most
    latest = row([-1], TEXT[:12])
    index.read(latest)
    assert len(index) <= most
    assert index.chain(row([-2], TEXT[:8]), 2).tokens == TEXT[8:10]


def test_a_text_that_is_met_again_is_not_forgotten() -> None:
    index, generator = SuffixIndex(most=2000), random.Random(0)
    for at in range(100):
        index.read(row([at], TEXT[:12]))
        index.read(row([-1 - at], [generator.randrange(50_000) for _ in range(40)]))
    ((_, followed, *_),) = index.chain(row([-9], TEXT[:8]), 1).evidence
    assert followed > 50


class Counting(dict[int, int]):
    """A table that counts what it is asked."""

    asked = 0

    def get(self, key: int, default: int | None = None) -> int | None:  # type: ignore[override]
        Counting.asked += 1
        return super().get(key, default)


def test_work_does_not_grow_with_what_has_been_read() -> None:
    """Neither a token of a text nor a candidate takes more look-ups late than it may early."""
    generator = random.Random(0)

    def asked(texts: int) -> tuple[float, int]:
        index = SuffixIndex()
        index._new, index._old = Counting(), Counting()
        Counting.asked = 0
        for at in range(texts):
            index.read(row([at], [generator.randrange(9) for _ in range(100)]))
        reading = Counting.asked / (100 * texts)
        Counting.asked = 0
        index.chain(row([-1], [generator.randrange(9) for _ in range(20)]), 8)
        return reading, Counting.asked

    for texts in (5, 50):
        reading, looking = asked(texts)
        assert reading <= 2 * len(LENGTHS) + 0.1
        assert looking <= 9 * 4 * len(LENGTHS)
