"""A corpus says what followed what, and does not depend on how it was put together."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from specdec.drafters.corpus import LENGTHS, MOST_COUNT, Corpus, CorpusError, build_corpus
from specdec.drafters.suffix import SuffixIndex
from tests.specdec.drafters.test_suffix import Row

Text = list[int]


def some_texts(seed: int = 0, vocab: int = 20) -> list[Text]:
    generator = random.Random(seed)
    return [[generator.randrange(vocab) for _ in range(generator.randrange(60))] for _ in range(99)]


def built(folder: Path, texts: list[Text], **limits: int) -> Corpus:
    build_corpus(texts, folder / "a.corpus", "mine", **limits)
    return Corpus(folder / "a.corpus", "mine")


def test_it_says_what_mostly_followed_each_context_and_how_often(tmp_path: Path) -> None:
    texts = some_texts()
    corpus = built(tmp_path, texts)
    assert corpus.tokens == sum(map(len, texts))
    for n in LENGTHS:
        followers = defaultdict[tuple[int, ...], Counter[int]](Counter)
        for text in texts:
            for at in range(n, len(text)):
                followers[tuple(text[at - n : at])][text[at]] += 1
        for context, counts in followers.items():
            token = min(counts, key=lambda token: (-counts[token], token))
            assert corpus.after(context) == (token, counts[token], counts.total())
    assert corpus.after((99, 98)) is None


def test_counts_that_are_too_large_keep_their_shares(tmp_path: Path) -> None:
    corpus = built(tmp_path, [[1, 2, 3]] * 300 + [[1, 2, 4]] * 100)
    assert corpus.after((1, 2)) == (3, round(MOST_COUNT * 3 / 4), MOST_COUNT)


def test_the_same_texts_in_any_order_make_the_same_file(tmp_path: Path) -> None:
    texts, file = some_texts(), tmp_path / "a.corpus"
    built(tmp_path, texts)
    before = file.read_bytes()
    built(tmp_path, sorted(texts))
    assert file.read_bytes() == before


def test_it_is_bounded(tmp_path: Path) -> None:
    texts = [*some_texts(), *[[*range(30, 45)]] * 5]
    whole = built(tmp_path, texts)
    size = (tmp_path / "a.corpus").stat().st_size
    corpus = built(tmp_path, texts, most_entries=60)
    assert (tmp_path / "a.corpus").stat().st_size < size
    assert corpus.after(range(30, 38)) == whole.after(range(30, 38)) == (38, 5, 5)
    rare = next(t for t in texts if len(t) > 20)[:8]
    assert corpus.after(rare) is None and whole.after(rare) is not None
    assert built(tmp_path, texts, most_tokens=100).tokens == 100


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.corpus"
    built(tmp_path, some_texts())
    with pytest.raises(CorpusError, match=r"a\.corpus was made by another tokenizer"):
        Corpus(file, "yours")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(CorpusError, match="is not whole"):
        Corpus(file, "mine")
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a token that there is not
    with pytest.raises(CorpusError, match="is damaged"):
        Corpus(file, "mine")
    file.write_bytes(b"{}")
    with pytest.raises(CorpusError, match="is no corpus of this version"):
        Corpus(file, "mine")
    with pytest.raises(CorpusError, match="not one text"):
        build_corpus([], file, "mine")
    with pytest.raises(CorpusError, match="tokens below"):
        build_corpus([[1, 2, 1 << 20]], file, "mine")


def test_texts_that_are_too_short_for_a_context_say_nothing(tmp_path: Path) -> None:
    """As those of a job that answers yes or no."""
    corpus = built(tmp_path, [[1, 2], []])
    assert corpus.tokens == 2
    assert corpus.after([1, 2]) is None
    assert not SuffixIndex(corpus).chain(Row([5, 1, 2], 1), 4).tokens


def test_rows_find_what_earlier_jobs_wrote_where_nothing_else_is_known(tmp_path: Path) -> None:
    corpus = built(tmp_path, [[*range(10, 30)]])
    index = SuffixIndex(corpus)
    chain = index.chain(Row([5, 13, 14], 1), 4)
    assert list(chain.tokens) == [15, 16, 17, 18]
    assert [each[-1] for each in chain.evidence] == [1] * 4
    index.read(Row([5, 13, 14, 99, 98], 1))
    chain = index.chain(Row([7, 13, 14], 1), 4)
    assert list(chain.tokens) == [99, 98]
    assert [each[-1] for each in chain.evidence] == [0, 0]
