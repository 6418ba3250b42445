"""Which completions are not published, and how many each filter stops."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from jobs.nightly.filter_settings import (
    FiltersConfig,
    LanguageFilter,
    LengthFilter,
    RegexFilter,
    RepetitionFilter,
)
from pipeline.errors import UserError

FINISH_REASON, LENGTH, NGRAMS, COMPRESSION = "finish reason", "length", "n-grams", "compression"
REGEX, LANGUAGE, REFUSAL = "regex", "language", "refusal"
SCHEMA, JUDGE = "schema", "judge"
EXACT, NEAR = "exact duplicate", "near duplicate"
SELECT = "select"
ORDER = (
    FINISH_REASON,
    LENGTH,
    NGRAMS,
    COMPRESSION,
    REGEX,
    LANGUAGE,
    REFUSAL,
    SCHEMA,
    JUDGE,
    EXACT,
    NEAR,
    SELECT,
)
"""All filters, in the order in which they are asked."""

_REFUSAL_REACH = 300
"""Characters from the beginning in which a refusal says that it is one."""

_NEGATED = (
    r"(?:can(?:no|')t|can not|could not|couldn't|won't|will not|(?:am|'m) (?:not able|unable))"
)
_REFUSALS = (
    rf"\b(?:sorry|apologi[sz]e)\b.{{0,60}}\bI(?: {_NEGATED}|'m (?:not able|unable))",
    rf"\bI(?: {_NEGATED}|'m (?:not able|unable))(?: to)? "
    r"(?:assist|help|comply|fulfil|provide|answer|engage|complete|do that|generate|create|write|"
    r"discuss|support|respond)",
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b.{0,120}"
    r"(?:\bcan(?:no|')t\b|\bcan not\b|\bunable\b|\bnot able\b|\bdo(?: not|n't) have\b)",
    r"\bI (?:must|have to) (?:decline|refuse)\b",
    r"\b(?:against|violates?) my (?:guidelines|programming|policies|principles)\b",
)
"""Openings of chat models that decline, in English; typographic apostrophes count as plain ones."""

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+")


def words(text: str) -> list[str]:
    """Words in lower case, punctuation left out; scripts without spaces give characters."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def repeated_share(tokens: Sequence[str], n: int) -> float:
    """Share of n-grams that occurred before in the same text.

    >>> repeated_share("a b a b a b".split(), 2)
    0.6
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def compression_ratio(text: str) -> float:
    """Bytes of a text over those of its zlib stream; a short text has about 1."""
    data = text.encode(errors="replace")
    return len(data) / len(zlib.compress(data, 6)) if data else 1.0


Judge = Callable[[str, str], bool]
"""Says of a completion and its finish reason whether the filter stops it."""


class TextFilters:
    """Judges completions one by one, and counts. Duplicates are another matter.

    Args:
        config: the recipe's filters.
        structured: whether there are completions that must be something.

    Attributes:
        matched: completions that each filter would stop by itself.
        removed: completions, each counted for the first filter that stops it.

    Raises:
        UserError: a language that cannot be recognised.
    """

    def __init__(self, config: FiltersConfig, *, structured: bool = False) -> None:
        self.matched: Counter[str] = Counter()
        self.removed: Counter[str] = Counter()
        self._judges = dict(_judges(config))
        self._structured = structured

    @property
    def names(self) -> list[str]:
        """The filters that are on."""
        return [*self._judges, *([SCHEMA] if self._structured else [])]

    def keep(self, text: str, finish_reason: str, fits: bool | None = None) -> bool:
        """Whether no filter stops this completion.

        Args:
            text: the completion.
            finish_reason: why it ended.
            fits: whether it is what it must be. Then it is no prose, which filters of texts are
                for. None: it may be anything.
        """
        judges = self._judges
        if fits is not None:
            judges = {name: judges[name] for name in (FINISH_REASON,) if name in judges}
            judges[SCHEMA] = lambda text, reason: not fits
        stops = [name for name, stops in judges.items() if stops(text, finish_reason)]
        self.matched.update(stops)
        self.removed.update(stops[:1])
        return not stops


def _judges(config: FiltersConfig) -> Iterator[tuple[str, Judge]]:
    if (reasons := config.finish_reason) is not None:
        yield FINISH_REASON, lambda text, reason: reason not in reasons
    if config.length is not None:
        yield LENGTH, _length(config.length)
    if config.repetition is not None:
        yield NGRAMS, _ngrams(config.repetition)
        most = config.repetition.max_compression
        yield COMPRESSION, lambda text, reason: compression_ratio(text) > most
    if config.regex is not None:
        yield REGEX, _regex(config.regex)
    if config.language is not None:
        yield LANGUAGE, _language(config.language)
    if config.refusals:
        yield REFUSAL, _refusal(config.refusal_patterns)


def _length(config: LengthFilter) -> Judge:
    def stops(text: str, reason: str) -> bool:
        for count, least, most in (
            (len(text.strip()), config.min_chars, config.max_chars),
            (len(text.split()), config.min_words, config.max_words),
        ):
            if count < least or (most is not None and count > most):
                return True
        return False

    return stops


def _ngrams(config: RepetitionFilter) -> Judge:
    return lambda text, reason: repeated_share(words(text), config.ngram) > config.max_repeated


def _regex(config: RegexFilter) -> Judge:
    required = [re.compile(pattern) for pattern in config.require]
    forbidden = [re.compile(pattern) for pattern in config.forbid]

    def stops(text: str, reason: str) -> bool:
        if any(pattern.search(text) for pattern in forbidden):
            return True
        return not all(pattern.search(text) for pattern in required)

    return stops


def _language(config: LanguageFilter) -> Judge:
    identifier = _identifier()
    if unknown := sorted(set(config.allow) - set(identifier.labels)):
        raise UserError(
            f"filters.language.allow: {unknown[0]!r} cannot be recognised; "
            f"known: {', '.join(sorted(identifier.labels))}"
        )

    def stops(text: str, reason: str) -> bool:
        if len(text.strip()) < config.min_chars:
            return False
        language, confidence = identifier.classify(text)
        return language not in config.allow or confidence < config.min_confidence

    return stops


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _refusal(more: Sequence[str]) -> Judge:
    patterns = [re.compile(p, re.IGNORECASE | re.DOTALL) for p in (*_REFUSALS, *more)]

    def stops(text: str, reason: str) -> bool:
        opening = text.strip()[:_REFUSAL_REACH].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        return any(pattern.search(opening) for pattern in patterns)

    return stops
