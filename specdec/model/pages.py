"""Which pages hold the tokens of each slot: bookkeeping without tensors.

A page holds PAGE positions of all layers. Slots whose rows begin alike share the pages that these
beginnings fill; nobody writes to such a page. A page that no slot uses any more stays as it is as
long as others are free, so that a later row that begins alike finds it by its tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

PAGE = 32
"""Positions of a page.

Raised, kernels look up fewer pages; rows leave more of their last page empty and share less. It
divides KEY_BLOCK, and specdec/kernels/attention.h has the same number.
"""

EMPTY = 0
"""The page that a table names where a slot has none: never given out, and always finite."""

_Key = tuple[int, tuple[Hashable, ...]]
"""What a page is found by: the number of the page before it, and its own tokens."""


class OutOfPages(RuntimeError):
    """Too few pages are free, or a row outgrows the table; nothing was changed."""


def pages_of(positions: int) -> int:
    """How many pages hold so many positions."""
    return -(-positions // PAGE)


class Pages:
    """The pages of one cache, and who uses them.

    Args:
        slots: rows of the table.
        width: most pages of a slot.
        total: pages there are, numbered from 1.

    Attributes:
        rows: the pages of each slot, in order.
        changed: what a table on a device lacks: (slot, place in its row) to page.
    """

    def __init__(self, slots: int, width: int, total: int) -> None:
        self.width, self.total = width, 0
        self.rows: list[list[int]] = [[] for _ in range(slots)]
        self.changed: dict[tuple[int, int], int] = {}
        self._users = [0]
        self._free: list[int] = []
        self._kept: dict[int, None] = {}  # findable and unused, the longest unused first
        self._found: dict[_Key, tuple[int, int]] = {}  # to page and its number
        self._keys: dict[int, _Key] = {}  # of findable pages
        self._numbers = 0  # given to findable pages; none is given twice
        self.grow(slots, width, total)

    def grow(self, slots: int, width: int, total: int) -> None:
        """Add slots, places and pages, up to these numbers."""
        self.rows += [[] for _ in range(slots - len(self.rows))]
        self.width = width
        self._free[:0] = range(total, self.total, -1)
        self._users += [0] * (total - self.total)
        self.total = total

    @property
    def available(self) -> int:
        """Pages that no slot uses."""
        return len(self._free) + len(self._kept)

    def lacking(self, slot: int, positions: int) -> int:
        """How many pages a slot lacks to hold so many positions."""
        return max(0, pages_of(positions) - len(self.rows[slot]))

    def extend(self, slot: int, positions: int) -> None:
        """Give a slot pages of its own for what it lacks of so many positions.

        Raises:
            OutOfPages: there are not that many, or they do not fit the table.
        """
        row = self.rows[slot]
        if positions <= len(row) * PAGE:
            return
        lacking = self.lacking(slot, positions)
        if lacking > self.available or len(row) + lacking > self.width:
            raise OutOfPages(f"slot {slot} lacks {lacking} pages of {self.available}")
        for _ in range(lacking):
            page = self._take()
            self.changed[slot, len(row)] = page
            row.append(page)

    def share(self, slot: int, pages: Sequence[int]) -> None:
        """Let a slot begin with pages that others use or that were found; its own are given up."""
        row = self.rows[slot]
        for at, page in enumerate(pages):
            self._users[page] += 1
            self._kept.pop(page, None)
            if at == len(row):
                row.append(page)
            else:
                self._drop(row[at])
                row[at] = page
            self.changed[slot, at] = page

    def cut(self, slot: int, pages: int) -> None:
        """Leave a slot its first pages only."""
        row = self.rows[slot]
        while len(row) > pages:  # from behind: what many rows may begin with is kept longest
            self._drop(row.pop())
            self.changed[slot, len(row)] = EMPTY

    def own(self, slot: int, positions: int) -> int:
        """Make sure that a slot may write behind so many positions.

        Pages there that are not its alone are given up.

        Returns:
            The positions that are left to it of these: all, unless the last page was given up.
        """
        row, at = self.rows[slot], positions // PAGE
        if at < len(row) and (self._users[row[at]] > 1 or row[at] in self._keys):
            self.cut(slot, at)
            return at * PAGE
        return positions

    def alone(self, slot: int, at: int) -> list[int]:
        """Of a slot's pages from the one at `at` on, those that it alone has written.

        No other slot uses them, and they were not found by what an earlier row has left in them:
        later rows will find that again.
        """
        rest = self.rows[slot][at:]
        return [page for page in rest if self._users[page] == 1 and page not in self._keys]

    def move(self, source: int, target: int) -> None:
        """Give a slot's pages to another slot, which gives up its own."""
        pages = self.rows[source]
        self.share(target, pages)
        self.cut(target, len(pages))
        self.cut(source, 0)

    def publish(self, slot: int, tokens: Sequence[Hashable]) -> None:
        """Let others find the pages of a slot that the first tokens of its row fill."""
        number = 0
        for at in range(len(tokens) // PAGE):
            key, page = self._key(number, tokens, at), self.rows[slot][at]
            if key not in self._found:
                if page in self._keys:  # the page before it is not what it was found behind
                    del self._found[self._keys[page]]
                self._numbers += 1
                self._found[key], self._keys[page] = (page, self._numbers), key
            _, number = self._found[key]

    def find(self, tokens: Sequence[Hashable]) -> list[int]:
        """The pages that are known to hold the beginning of a row, in order."""
        found, number = list[int](), 0
        for at in range(len(tokens) // PAGE):
            known = self._found.get(self._key(number, tokens, at))
            if known is None:
                break
            page, number = known
            found.append(page)
        return found

    @staticmethod
    def _key(number: int, tokens: Sequence[Hashable], at: int) -> _Key:
        return number, tuple(tokens[at * PAGE : (at + 1) * PAGE])

    def used(self, page: int) -> bool:
        """Whether a slot uses a page."""
        return self._users[page] > 0

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page = next(iter(self._kept))
            del self._kept[page]
            del self._found[self._keys.pop(page)]
        self._users[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self._users[page] -= 1
        if self._users[page]:
            return
        if page in self._keys:
            self._kept[page] = None
        else:
            self._free.append(page)
