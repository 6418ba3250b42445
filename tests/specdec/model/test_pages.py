"""Pages against a plain model of them: every slot a list of tokens, nothing shared."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from specdec.model.pages import EMPTY, PAGE, OutOfPages, Pages, pages_of


def check_pages(pages: Pages) -> None:
    """Every page is used, kept or free, once; and is used as often as slots have it."""
    users = Counter(page for row in pages.rows for page in row)
    assert users == Counter({page: n for page, n in enumerate(pages._users) if n})
    unused = [*pages._free, *pages._kept]
    assert sorted([*users, *unused]) == list(range(1, pages.total + 1))
    assert set(pages._kept) <= set(pages._keys)
    assert {page: key for key, (page, _) in pages._found.items()} == pages._keys


class Model:
    """What every page holds, written as an engine writes; and what every slot should hold."""

    def __init__(self, slots: int, pages: int) -> None:
        self.pages = Pages(slots, 16, pages)
        self.texts: list[list[int]] = [[] for _ in range(slots)]
        self.contents = [[-1] * PAGE for _ in range(1 + pages)]
        self.table = [[EMPTY] * 16 for _ in range(slots)]

    def append(self, slot: int, tokens: list[int]) -> None:
        """Write behind what a slot holds; nothing happens where pages run out."""
        start = len(self.texts[slot])
        try:
            self.pages.extend(slot, start + len(tokens))
        except OutOfPages:
            lacking = self.pages.lacking(slot, start + len(tokens))
            assert lacking > self.pages.available or start + len(tokens) > 16 * PAGE
            return
        for at, token in enumerate(tokens, start):
            page = self.pages.rows[slot][at // PAGE]
            assert self.pages._users[page] == 1 and page not in self.pages._keys
            self.contents[page][at % PAGE] = token
        self.texts[slot] += tokens

    def rollback(self, slot: int, length: int) -> None:
        left = self.pages.own(slot, length)
        assert left == length or left == length // PAGE * PAGE
        del self.texts[slot][left:]

    def fork(self, source: int, slot: int, length: int) -> None:
        """As `SlotCache.adopt` does it."""
        full = length // PAGE
        self._adopt(slot, self.pages.rows[source][:full], self.texts[source][: full * PAGE])
        self.append(slot, self.texts[source][full * PAGE : length])

    def find(self, slot: int, tokens: list[int]) -> None:
        """A row that begins with these tokens comes to an empty slot."""
        pages = self.pages.find(tokens)
        self._adopt(slot, pages, tokens[: len(pages) * PAGE])

    def _adopt(self, slot: int, pages: list[int], tokens: list[int]) -> None:
        self.pages.share(slot, pages)
        self.texts[slot] = list(tokens)
        assert self.pages.own(slot, len(tokens)) == len(tokens)

    def leave(self, slot: int) -> None:
        """A row ends or is preempted."""
        self.pages.publish(slot, self.texts[slot])
        self.pages.cut(slot, 0)
        self.texts[slot] = []

    def move(self, source: int, target: int) -> None:
        self.pages.move(source, target)
        self.texts[target], self.texts[source] = self.texts[source], []

    def check(self) -> None:
        check_pages(self.pages)
        for (slot, at), page in self.pages.changed.items():
            self.table[slot][at] = page
        self.pages.changed.clear()
        for slot, text in enumerate(self.texts):
            row = self.pages.rows[slot]
            assert self.table[slot] == row + [EMPTY] * (16 - len(row))
            held = [token for page in row for token in self.contents[page]]
            assert held[: len(text)] == text


@pytest.mark.parametrize("pages", [5, 14, 40])
def test_ten_thousand_rounds_lose_and_confuse_no_page(pages: int) -> None:
    random, slots = Random(pages), 6
    model = Model(slots, pages)
    beginnings = [[random.randrange(9) for _ in range(12 * PAGE)] for _ in range(4)]
    for step in range(4000):
        slot, other = random.sample(range(slots), 2)
        length = len(model.texts[slot])
        action = random.randrange(10)
        if action < 4:
            model.append(slot, [random.randrange(9) for _ in range(random.randint(1, 40))])
        elif action == 4:
            model.rollback(slot, random.randint(max(0, length - 8), length))
        elif action == 5:
            model.rollback(slot, random.randint(0, length))
        elif action == 6:
            model.fork(slot, other, random.randint(0, length))
        elif action == 7:
            model.leave(slot)
        elif action == 8:
            model.move(slot, other)
        else:
            model.leave(slot)
            beginning = random.choice(beginnings)[: random.randint(0, 12) * PAGE]
            model.find(slot, beginning)
            model.append(slot, beginning[len(model.texts[slot]) :])
        if step % 5 == 0 or pages == 5:
            model.check()
    for slot in range(slots):
        model.leave(slot)
    model.check()
    assert model.pages.available == pages


def test_pages_that_are_found_are_those_of_the_same_beginning_to_their_last_token() -> None:
    pages = Pages(3, 8, 10)
    text = list(range(3 * PAGE + 5))
    pages.extend(0, len(text))
    row = list(pages.rows[0])
    pages.publish(0, text)
    assert pages.find(text) == row[:3]
    assert pages.find(text[: 2 * PAGE - 1]) == row[:1]
    assert pages.find([*text[:PAGE], 7, *text[PAGE + 1 :]]) == row[:1]
    assert pages.find(text[PAGE:]) == []


def test_unused_pages_are_taken_from_behind_and_the_longest_unused_first() -> None:
    pages = Pages(2, 8, 4)
    old, new = [1] * 2 * PAGE, [2] * 2 * PAGE
    for text in (old, new):
        pages.extend(0, len(text))
        pages.publish(0, text)
        pages.cut(0, 0)
    assert pages.available == 4
    pages.extend(0, PAGE)
    assert (len(pages.find(old)), len(pages.find(new))) == (1, 2)
    pages.extend(0, 2 * PAGE)
    assert (len(pages.find(old)), len(pages.find(new))) == (0, 2)


def test_growing_keeps_what_there_is() -> None:
    pages = Pages(1, 2, 2)
    pages.extend(0, 2 * PAGE)
    with pytest.raises(OutOfPages):
        pages.extend(0, 3 * PAGE)
    pages.grow(2, 4, 5)
    pages.extend(0, 3 * PAGE)
    assert pages.available == 2 and len(set(pages.rows[0])) == pages_of(3 * PAGE) == 3
    check_pages(pages)
