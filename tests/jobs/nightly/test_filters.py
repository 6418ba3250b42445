from __future__ import annotations

import pytest

from jobs.nightly.filter_settings import FiltersConfig
from jobs.nightly.filters import (
    COMPRESSION,
    FINISH_REASON,
    LANGUAGE,
    LENGTH,
    NGRAMS,
    REFUSAL,
    REGEX,
    TextFilters,
    compression_ratio,
    repeated_share,
    words,
)
from pipeline.errors import UserError

GOOD = (
    "The train leaves at nine and arrives at noon, so the journey takes three hours. "
    "Walking the same way would take about four days, with rests."
)


def stops(text: str, reason: str = "stop", **config: object) -> list[str]:
    """The filters that would stop a text by themselves."""
    filters = TextFilters(FiltersConfig.model_validate(config))
    kept = filters.keep(text, reason)
    assert kept == (not filters.matched)
    assert filters.removed.total() == (not kept)
    return [name for name in filters.names if filters.matched[name]]


def test_a_good_text_passes_everything() -> None:
    everything = {
        "regex": {"require": ["train"], "forbid": ["<b>"]},
        "language": {"allow": ["en"]},
        "length": {"min_words": 5, "max_words": 80},
    }
    assert stops(GOOD, **everything) == []


def test_finish_reason() -> None:
    assert stops(GOOD, "length") == [FINISH_REASON]
    assert stops(GOOD, "length", finish_reason=["stop", "length"]) == []
    assert stops(GOOD, "length", finish_reason=None) == []


def test_length() -> None:
    assert stops("  \n") == [LENGTH]
    assert stops("One two.", length={"min_words": 3}) == [LENGTH]
    assert stops("One two.", length={"max_chars": 7}) == [LENGTH]
    assert stops("One two.", length={"min_chars": 8, "max_chars": 8, "max_words": 2}) == []


def test_repetition() -> None:
    around = "and then we went home " * 12
    assert stops(around) == [NGRAMS, COMPRESSION]
    assert stops("ab" * 200) == [COMPRESSION]  # one word
    assert repeated_share(["a", "b", "a", "b", "a", "b"], 2) == pytest.approx(0.6)
    assert repeated_share(["a"], 2) == 0
    assert compression_ratio("") == 1
    assert 1 < compression_ratio(GOOD) < 2


def test_regex() -> None:
    assert stops(GOOD, regex={"require": [r"\bplane\b"]}) == [REGEX]
    assert stops(GOOD, regex={"forbid": [r"n[io]ne"]}) == [REGEX]


def test_language() -> None:
    german = "Der Zug fährt um neun Uhr ab und kommt mittags an, die Fahrt dauert drei Stunden."
    assert stops(german, language={"allow": ["en"]}) == [LANGUAGE]
    assert stops(german, language={"allow": ["en", "de"]}) == []
    assert stops("Zug", language={"allow": ["en"]}) == []  # too short to tell
    with pytest.raises(UserError, match="'xx' cannot be recognised"):
        TextFilters(FiltersConfig.model_validate({"language": {"allow": ["xx"]}}))


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I can’t help you with this request.",
        "I apologize, but I am unable to provide that information.",
        "As an AI language model, I cannot have opinions.",
        "Unfortunately, I cannot answer this.",
        "I must decline.",
        "That goes against my guidelines.",
    ],
)
def test_refusals(text: str) -> None:
    assert stops(text) == [REFUSAL]
    assert stops(text, refusals=False) == []


@pytest.mark.parametrize(
    "text",
    [
        "She said she was sorry that he could not come to the party.",
        "You cannot divide by zero, so the answer is undefined.",
        "I can't wait to provide you with the answer: it is four.",
        "An AI language model is a program that predicts text.",
        "The firm was unable to provide the goods. " + GOOD,
    ],
)
def test_what_is_no_refusal(text: str) -> None:
    assert stops(text) == []


def test_more_refusals() -> None:
    text = "Dazu sage ich nichts, auch wenn du mich noch so nett bittest."
    assert stops(text, refusal_patterns=["dazu sage ich nichts"]) == [REFUSAL]


def test_each_removed_text_is_counted_once() -> None:
    filters = TextFilters(FiltersConfig())
    for text in ("", GOOD, "and so on " * 50):
        filters.keep(text, "length")
    assert filters.removed == {FINISH_REASON: 3}
    assert filters.matched == {FINISH_REASON: 3, LENGTH: 1, NGRAMS: 1, COMPRESSION: 1}


def test_words() -> None:
    assert words("It's ＡＢＣ, 42!") == ["it", "s", "abc", "42"]
    assert words("東京に行く") == ["東", "京", "に", "行", "く"]
