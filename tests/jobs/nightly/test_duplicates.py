from __future__ import annotations

import random

from jobs.nightly.duplicates import DuplicateIndex, exact_key, shingles
from jobs.nightly.filter_settings import DuplicatesFilter
from jobs.nightly.filters import EXACT, NEAR

WORDS = [f"word{i}" for i in range(500)]


def text(seed: int, count: int = 80) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def keep(index: DuplicateIndex, question: str, answer: str) -> bool:
    return index.keep(messages(question, answer), answer)


def test_exact() -> None:
    index = DuplicateIndex(DuplicatesFilter())
    assert keep(index, "What is two and two?", "Four.")
    assert not keep(index, "what is  two\nand two?", "FOUR.")
    assert keep(index, "What is three and one?", "Four.")  # too short to be a near duplicate
    assert index.removed == {EXACT: 1}
    assert exact_key(messages("a", "b")) != exact_key(messages("ab", ""))


def test_near() -> None:
    index = DuplicateIndex(DuplicatesFilter())
    one = text(1)
    assert keep(index, "a", " ".join(one))
    few = [*one[:40], "other", *one[41:]]  # 3 of 78 3-grams: Jaccard 75 / 81
    assert not keep(index, "b", " ".join(few).upper() + "!")
    many = [w if i % 5 else "other" for i, w in enumerate(one)]
    assert keep(index, "c", " ".join(many))
    assert keep(index, "d", " ".join(text(2)))
    assert index.removed == {NEAR: 1}
    off = DuplicateIndex(DuplicatesFilter(near=False))
    assert keep(off, "a", " ".join(one))
    assert keep(off, "b", " ".join(few))
    assert off.names == [EXACT]


def test_signatures_estimate_jaccard_similarity() -> None:
    index = DuplicateIndex(DuplicatesFilter(permutations=1024))
    one = text(3, 200)
    other = [*one[:150], *text(4, 50)]
    a, b = (shingles(" ".join(each), 3) for each in (one, other))
    truth = len(a & b) / len(a | b)
    first, second = (index.signature(" ".join(each)) for each in (one, other))
    assert first is not None
    assert second is not None
    # Standard error of at most 1 / 64: five of them.
    assert abs(float((first == second).mean()) - truth) < 5 / 64
