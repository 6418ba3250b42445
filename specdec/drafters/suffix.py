"""Candidates from what was written before: which token followed the last few tokens so far?

Batch jobs repeat themselves: samples of one prompt, one template over a thousand rows, quotations
of the prompt, JSON keys, last night's data. So each row's next tokens are looked up among those
that followed the same tokens elsewhere: in its own prompt and in the outputs of that prompt's
samples, in the outputs of all other rows of the engine, and in what earlier jobs wrote, if there is
a corpus of it. It takes no model, and nothing is drawn: a candidate is its distribution's only
mass.

The index is a table from a hash of the last n tokens, for each n of `LENGTHS`, to the token that
mostly followed them and to how often it did. A token of a text costs a few entries, and a candidate
a few look-ups, however much has been read. Tokens that share a hash propose nonsense, at worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from specdec.drafters.corpus import LENGTHS, Corpus
from specdec.policies.chains import Chain

DOUBTS = dict(zip(LENGTHS, (0.1, 0.5, 1.0), strict=True))
"""For each length of a context, how often something else is taken to have followed than was seen,
so that a chain of short contexts ends early. About what was seen in outputs of a small model.
"""

MOST_ENTRIES = 1_000_000
"""Contexts that are remembered, at most; the oldest are forgotten.

An entry takes some 140 bytes, a token of a prompt three entries and one of an output six. Raised,
rows find what others wrote longer ago.
"""

MOST_COUNT = 255
"""Up to this it is counted how often a context was followed by what; then counts are halved.

Raised, a context follows a change of the text more slowly.
"""

LEAST_HOPE = 0.1
"""A chain ends where its counts leave it less: no policy takes what is so unlikely.

Lowered, chains are longer, and take the host more time.
"""


class ReadRow(Protocol):
    """What the index needs of a row.

    Attributes:
        tokens: prompt and output so far.
        output_start: where the output begins in them.
        own: a number that rows of the same prompt share.
        read: how many of the tokens the index has read.
    """

    tokens: list[int]
    output_start: int
    own: int
    read: int


class SuffixIndex:
    """Which token followed which tokens, in bounded memory.

    Two tables take turns: what is new goes to one until it is full, then the other is emptied. What
    is met again moves on with its counts.

    Args:
        corpus: what was written before there were rows, if anything.
        most: contexts that it remembers.

    Attributes:
        identity: of the corpus; 0: there is none.
    """

    def __init__(self, corpus: Corpus | None = None, most: int = MOST_ENTRIES) -> None:
        self._corpus, self._half = corpus, most // 2
        self.identity = corpus.identity if corpus is not None else 0
        # Token, how often it followed the context, how often anything did: 8 bits each count.
        self._new: dict[int, int] = {}
        self._old: dict[int, int] = {}

    def __len__(self) -> int:
        """Contexts that it holds."""
        return len(self._new) + len(self._old)

    def read(self, row: ReadRow, until: int | None = None) -> None:
        """Take in what a row has written since it was read last.

        Args:
            row: its `read` is moved on.
            until: where its text ends, if some of its tokens are beyond that.
        """
        tokens, own, end = row.tokens, row.own, len(row.tokens) if until is None else until
        if not row.read:  # samples of one prompt read it once: an entry of its own says so
            row.read = row.output_start if own in self._new else 0
            self._count(own, 0)
        for at in range(row.read, end):
            token, written = tokens[at], at >= row.output_start
            for n in LENGTHS:
                if at >= n:
                    key = hash(tuple(tokens[at - n : at]))
                    self._count(key ^ own, token)
                    if written:
                        self._count(key, token)
        row.read = max(row.read, end)

    def _count(self, key: int, token: int) -> None:
        """Note that a token followed a context."""
        entry = self._new.get(key)
        if entry is None:
            entry = self._old.pop(key, None)
            if len(self._new) >= self._half:
                self._new, self._old = {}, self._new
        if entry is None:
            self._new[key] = token << 16 | 0x0101
            return
        token_so_far, followed, seen = entry >> 16, entry >> 8 & 255, entry & 255
        if seen == MOST_COUNT:
            followed, seen = followed + 1 >> 1, seen + 1 >> 1
        if token == token_so_far:
            self._new[key] = token << 16 | followed + 1 << 8 | seen + 1
        elif 2 * followed > seen + 1:
            self._new[key] = token_so_far << 16 | followed << 8 | seen + 1
        else:  # no longer what mostly follows: the latest begins anew
            self._new[key] = token << 16 | 0x0102

    def chain(self, row: ReadRow, most: int, known: Sequence[int] = ()) -> Chain:
        """What may come next in a row: at most so many candidates behind those that are known."""
        new, old, own, corpus = self._new.get, self._old.get, row.own, self._corpus
        context = [*row.tokens[-LENGTHS[0] :], *known]
        found: list[int] = []
        evidence: list[tuple[int, int, int, bool, int]] = []
        hope = 1.0
        while len(found) < most:
            token, mine, length = None, False, 0
            for length in LENGTHS:
                if length > len(context):
                    continue
                last = context[-length:]
                key = hash(tuple(last))
                entry = new(key ^ own) or old(key ^ own)
                mine = entry is not None
                entry = entry or new(key) or old(key)
                if entry is not None:
                    token, followed, seen, theirs = entry >> 16, entry >> 8 & 255, entry & 255, 0
                    break
                if corpus is not None and (there := corpus.after(last)) is not None:
                    (token, followed, seen), theirs = there, 1
                    break
            if token is None:
                break
            hope *= followed / (seen + DOUBTS[length])
            if hope < LEAST_HOPE:
                break
            found.append(token)
            evidence.append((length, followed, seen, mine, theirs))
            context.append(token)
        return Chain(found, evidence)
