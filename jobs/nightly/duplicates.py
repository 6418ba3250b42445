"""Conversations that are there already: exactly, or nearly (MinHash and LSH), in any night.

Near duplicates share most of their word n-grams: with n-gram sets A and B, |A and B| / |A or B| is
at least the threshold. A signature of k minima estimates it with a standard error of at most
1 / (2 sqrt(k)). LSH finds the texts whose signatures may be near enough; signatures decide.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasketch import MinHash, MinHashLSH

from jobs.nightly.archive import ROOT, Archive, Night
from jobs.nightly.filter_settings import DuplicatesFilter
from jobs.nightly.filters import EXACT, NEAR, words
from pipeline.commit.files import parquet_bytes

_SCHEME = "affine32"  # datasketch's; signatures of another are not comparable
_LSH_WEIGHTS = (0.1, 0.9)
"""How bad it is to look at a text in vain, and to miss one; signatures make up for the former."""

_SETTINGS = b"specbatch.duplicates"


def exact_key(messages: Iterable[Mapping[str, str]]) -> bytes:
    """16 bytes that are equal where messages differ in case and white space at most."""
    plain = [[m["role"], " ".join(_folded(m["content"]).split())] for m in messages]
    return hashlib.sha256(json.dumps(plain).encode()).digest()[:16]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def shingles(text: str, n: int) -> set[bytes]:
    """The text's n-grams of words."""
    tokens = words(text)
    return {" ".join(tokens[i : i + n]).encode() for i in range(len(tokens) - n + 1)}


class DuplicateIndex:
    """Remembers what is kept, and says what is like it.

    Args:
        config: the recipe's.

    Attributes:
        matched, removed: conversations that were found to be duplicates, by kind; the same here.
    """

    def __init__(self, config: DuplicatesFilter) -> None:
        self.config = config
        self.removed: Counter[str] = Counter()
        self._exact: set[bytes] = set()
        self._lsh = MinHashLSH(
            threshold=config.threshold, num_perm=config.permutations, weights=_LSH_WEIGHTS
        )
        self._signatures: list[Any] = []  # uint32 [permutations] each
        self._mine: list[tuple[bytes, Any | None]] = []

    @property
    def matched(self) -> Counter[str]:
        """As `removed`."""
        return self.removed

    @property
    def names(self) -> list[str]:
        """The kinds that are looked for."""
        return [*([EXACT] if self.config.exact else []), *([NEAR] if self.config.near else [])]

    def keep(self, messages: Sequence[Mapping[str, str]], text: str) -> bool:
        """Whether nothing kept is like this conversation; if so, it is kept from now on.

        Args:
            messages: all that was said.
            text: what the target said.
        """
        key, signature = exact_key(messages), self.signature(text)
        if self.config.exact and key in self._exact:
            self.removed[EXACT] += 1
            return False
        if self.config.near and signature is not None and self._near(signature):
            self.removed[NEAR] += 1
            return False
        self._add(key, signature)
        self._mine.append((key, signature))
        return True

    def signature(self, text: str) -> Any | None:
        """uint32 [permutations], or None for a text too short to compare."""
        if len(words(text)) < max(self.config.min_words, self.config.shingle):
            return None
        sketch = MinHash(self.config.permutations, scheme=_SCHEME)
        sketch.update_batch(shingles(text, self.config.shingle))
        return sketch.hashvalues

    def _near(self, signature: Any) -> bool:
        found = self._lsh.query(self._sketch(signature))
        return any(
            float(np.mean(self._signatures[i] == signature)) >= self.config.threshold for i in found
        )

    def _add(self, key: bytes, signature: Any | None) -> None:
        self._exact.add(key)
        if signature is not None:
            self._lsh.insert(len(self._signatures), self._sketch(signature))
            self._signatures.append(signature)

    def _sketch(self, signature: Any) -> MinHash:
        return MinHash(hashvalues=signature, scheme=_SCHEME)

    # --------------------------------------------------------------- other nights

    @property
    def _settings(self) -> bytes:
        parts = [_SCHEME, self.config.shingle, self.config.permutations, self.config.min_words]
        return json.dumps(parts).encode()

    def load(self, archive: Archive, nights: Iterable[Night]) -> None:
        """Remember published nights. An index of other settings is made anew from their rows."""
        for night in nights:
            name = index_name(night.date)
            data = archive.folder.read(name)
            table = archive.table(name) if data is not None else None
            if table is None or (table.schema.metadata or {}).get(_SETTINGS) != self._settings:
                table = self._rebuilt(archive, night)
                archive.folder.put(name, parquet_bytes(table))
            for key, signature in zip(
                table["exact"].to_pylist(), table["signature"].to_pylist(), strict=True
            ):
                sketch = None if signature is None else np.frombuffer(signature, np.uint32)
                self._add(key, sketch)

    def _rebuilt(self, archive: Archive, night: Night) -> pa.Table:
        rows: list[tuple[bytes, Any | None]] = []
        for file in night.files:
            for messages in archive.table(file["name"])["messages"].to_pylist():
                text = assistant_text(messages)
                rows.append((exact_key(messages), self.signature(text)))
        return self._table(rows)

    def table(self) -> pa.Table:
        """What this night added, for those to come."""
        return self._table(self._mine)

    def _table(self, rows: Sequence[tuple[bytes, Any | None]]) -> pa.Table:
        signatures = [None if each is None else each.tobytes() for _, each in rows]
        columns = {
            "exact": pa.array([key for key, _ in rows], pa.binary()),
            "signature": pa.array(signatures, pa.binary()),
        }
        return pa.table(columns).replace_schema_metadata({_SETTINGS: self._settings})


def index_name(date: str) -> str:
    """The file of a night's index."""
    return f"{ROOT}/index/{date}.parquet"


def assistant_text(messages: Iterable[Mapping[str, str]]) -> str:
    """What the target said, as near duplicates are looked for in it."""
    return "\n".join(m["content"] for m in messages if m["role"] == "assistant")
