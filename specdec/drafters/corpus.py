"""What earlier jobs have written, as a file that all processes of a machine map into memory.

The file is a table from a hash of the last n tokens, for each n of LENGTHS, to the token that
mostly followed them and to how often it did: what `SuffixIndex` keeps of the job's own rows. It
does not depend on the order of the texts, so that the same texts give the same file.

Layout, little-endian: a line of JSON, filled up to HEADER bytes; then uint32 arrays. `starts` says
where the entries of each bucket begin, by the upper bits of the hash. `keys` holds the lower bits
of each entry's hash. `values` holds token << 12 | followed << 6 | seen. The header has the CRC-32
of all three: a damaged one would propose tokens that no model has.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specdec.atomic import atomic_file

LENGTHS = (8, 4, 2)
"""Tokens of a context, the longest first: what the longest known one says counts. More of them tell
better how much of a text repeats; each takes an entry a token here, two in `SuffixIndex`.
"""

MOST_TOKENS = 20_000_000
"""Tokens that are read at most. Raised, building takes longer, and about 100 bytes a token."""

MOST_ENTRIES = 1 << 25
"""Contexts that a file holds at most, 8 bytes each, or 270 MB; those that say least stay out."""

MOST_COUNT = 63
"""Counts beyond are scaled down: a context's followers keep their shares."""

VERSION = 2
HEADER = 4096
HASH_BITS = 44
_TOKEN_BITS = 20
_MASK = (1 << 64) - 1
_PRIME, _MIX = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93

Words = NDArray[np.uint64]


class CorpusError(ValueError):
    """A corpus that cannot be built or used; the message says why."""


def build_corpus(
    texts: Iterable[Sequence[int]],
    path: Path,
    tokenizer: str,
    *,
    most_tokens: int = MOST_TOKENS,
    most_entries: int = MOST_ENTRIES,
) -> int:
    """Write the corpus of some texts; return how many tokens it was made of.

    Args:
        texts: token ids of each. What is beyond `most_tokens` is not read.
        path: of the file; its folder exists.
        tokenizer: what tells tokenizers apart: who opens the file must have the same.

    Raises:
        CorpusError: there are no texts, or a token is beyond 2**20.
    """
    tokens, begins = _end_to_end(texts, most_tokens)
    if not len(begins):
        raise CorpusError("there is not one text to make a corpus of")
    if len(tokens) and int(tokens.max()) >> _TOKEN_BITS:
        raise CorpusError(f"a corpus holds tokens below {1 << _TOKEN_BITS}, not {tokens.max()}")
    parts = [_contexts(tokens, begins, n) for n in LENGTHS]
    hashes, values = (np.concatenate(each) for each in zip(*parts, strict=True))
    if len(hashes) > most_entries:
        # What followed most often first, of long contexts before short ones.
        length = np.repeat(LENGTHS, [len(part[0]) for part in parts])
        order = np.lexsort((hashes, -length, -(values >> 6 & MOST_COUNT).astype(np.int64)))
        hashes, values = hashes[order[:most_entries]], values[order[:most_entries]]
    order = np.argsort(hashes, kind="stable")
    hashes, values = hashes[order], values[order]
    bits = min(max(len(hashes).bit_length() - 1, HASH_BITS - 32), 28)
    edges = np.arange((1 << bits) + 1, dtype=np.uint64)
    starts = np.searchsorted(hashes >> np.uint64(HASH_BITS - bits), edges).astype("<u4")
    keys = (hashes & np.uint64(0xFFFFFFFF)).astype("<u4")
    arrays = np.concatenate([starts, keys, values.astype("<u4")])
    header = {
        "format": "specbatch corpus",
        "version": VERSION,
        "tokenizer": tokenizer,
        "lengths": LENGTHS,
        "tokens": len(tokens),
        "texts": len(begins),
        "bits": bits,
        "entries": len(keys),
        "crc32": zlib.crc32(arrays.data),
    }
    with atomic_file(path) as fresh, fresh.open("wb") as file:
        file.write(json.dumps(header).encode().ljust(HEADER - 1) + b"\n")
        arrays.tofile(file)
    return len(tokens)


def _end_to_end(
    texts: Iterable[Sequence[int]], most: int
) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """The tokens of all texts, and where each text begins."""
    parts: list[NDArray[np.uint32]] = []
    begins: list[int] = []
    read = 0
    for text in texts:
        part = np.asarray(text[: most - read], dtype=np.uint32)
        parts.append(part)
        begins.append(read)
        read += len(part)
        if read >= most:
            break
    joined = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)
    return joined, np.array(begins, dtype=np.int64)


def _contexts(
    tokens: NDArray[np.uint32], begins: NDArray[np.int64], n: int
) -> tuple[Words, NDArray[np.uint32]]:
    """Hash and value of each context of n tokens."""
    if len(tokens) <= n:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint32)
    hashed = np.full(len(tokens) - n, n * _MIX & _MASK, dtype=np.uint64)
    for i in range(n):
        hashed ^= tokens[i : len(tokens) - n + i]
        hashed *= np.uint64(_PRIME)
    hashed = _mixed(hashed)
    # A context lies in one text, with the token behind it.
    at = np.arange(n, len(tokens))
    inside = at - begins[np.searchsorted(begins, at, side="right") - 1] >= n
    followed = hashed >> np.uint64(64 - HASH_BITS) << np.uint64(_TOKEN_BITS)
    followed = np.sort((followed | tokens[n:])[inside])
    if not len(followed):
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.uint32)
    first = np.flatnonzero(np.diff(followed, prepend=followed[0] ^ np.uint64(1)))
    counts = np.diff(first, append=len(followed))
    followed = followed[first]
    contexts = followed >> np.uint64(_TOKEN_BITS)
    begin = np.flatnonzero(np.diff(contexts, prepend=contexts[0] ^ np.uint64(1)))
    seen, most = np.add.reduceat(counts, begin), np.maximum.reduceat(counts, begin)
    sizes = np.diff(begin, append=len(contexts))
    likeliest = np.flatnonzero(counts == np.repeat(most, sizes))
    # Of several followers that are as frequent the smallest token, which comes first.
    _, one = np.unique(np.searchsorted(begin, likeliest, side="right"), return_index=True)
    token = followed[likeliest[one]] & np.uint64((1 << _TOKEN_BITS) - 1)
    scale = np.minimum(1.0, MOST_COUNT / seen)
    often = np.maximum(np.rint(most * scale), 1).astype(np.uint32)
    all_ = np.rint(seen * scale).astype(np.uint32)
    return contexts[begin], token.astype(np.uint32) << 12 | often << 6 | all_


def _mixed(hashed: Words) -> Words:
    """Spread over all 64 bits; in `Corpus.after` the same of one number."""
    hashed = hashed ^ hashed >> np.uint64(32)
    hashed = hashed * np.uint64(_MIX)
    return hashed ^ hashed >> np.uint64(29)


class Corpus:
    """A corpus, mapped into memory: processes that open the same file share its pages.

    Args:
        path: of the file.
        tokenizer: as of `build_corpus`.

    Attributes:
        tokens: of how many it was made.
        identity: below 2**32; other texts have another one.

    Raises:
        CorpusError: it is no corpus, is damaged, or was made by another tokenizer.
    """

    def __init__(self, path: Path, tokenizer: str) -> None:
        header = _header(path)
        if header["tokenizer"] != tokenizer:
            raise CorpusError(
                f"the corpus {path} was made by another tokenizer than the target's; build it "
                "again, or take the corpus away"
            )
        bits, entries = int(header["bits"]), int(header["entries"])
        sizes = (1 << bits) + 1, entries, entries
        if path.stat().st_size != HEADER + 4 * sum(sizes):
            raise CorpusError(f"the corpus {path} is not whole; build it again")
        whole = np.memmap(path, dtype="<u4", mode="r", offset=HEADER)
        if zlib.crc32(whole.data) != header["crc32"]:
            raise CorpusError(f"the corpus {path} is damaged; build it again")
        # Through a memoryview a single number is read in a tenth of the time that numpy takes.
        parts: Any = np.split(whole, np.cumsum(sizes)[:2])
        self._starts, self._keys, self._values = (memoryview(part) for part in parts)
        self.tokens, self._shift = int(header["tokens"]), HASH_BITS - bits
        self.identity = int(header["crc32"])

    def after(self, context: Sequence[int]) -> tuple[int, int, int] | None:
        """The token that mostly followed a context, how often, and how often anything did.

        Args:
            context: as many tokens as one of LENGTHS says.
        """
        hashed = len(context) * _MIX & _MASK
        for token in context:
            hashed = (hashed ^ token) * _PRIME & _MASK
        hashed ^= hashed >> 32
        hashed = hashed * _MIX & _MASK
        hashed = (hashed ^ hashed >> 29) >> 64 - HASH_BITS
        bucket, key, keys = hashed >> self._shift, hashed & 0xFFFFFFFF, self._keys
        for at in range(self._starts[bucket], self._starts[bucket + 1]):
            if keys[at] == key:
                value = self._values[at]
                return value >> 12, value >> 6 & MOST_COUNT, value & MOST_COUNT
        return None


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(HEADER))
        version = header["version"] if header["format"] == "specbatch corpus" else None
    except (OSError, ValueError, KeyError, TypeError):
        version = None
    if version != VERSION:
        raise CorpusError(f"{path} is no corpus of this version; build it again")
    found: dict[str, Any] = header
    return found
