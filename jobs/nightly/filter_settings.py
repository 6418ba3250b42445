"""The section `filters` of the recipe."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from pipeline.config.section import Section, StringList, example


class LengthFilter(Section):
    """Bounds on a completion's length."""

    min_chars: int = Field(default=1, ge=0, description="Least characters.")
    max_chars: int | None = Field(
        default=None, ge=1, description="Most characters. `null`: no limit."
    )
    min_words: int = Field(default=1, ge=0, description="Least words.")
    max_words: int | None = Field(default=None, ge=1, description="Most words. `null`: no limit.")


class RepetitionFilter(Section):
    """A text that goes round in circles: few different n-grams, or one that compresses well."""

    ngram: int = Field(default=4, ge=1, description="Words of an n-gram.")
    max_repeated: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Most that may repeat: share of n-grams that occurred before.",
    )
    max_compression: float = Field(
        default=5.0, gt=1, description="Most bytes per byte of zlib's. Prose has 1 to 3."
    )


class RegexFilter(Section):
    """Patterns that a completion must match somewhere, and that it must not."""

    require: StringList = Field(
        default=(), description="Regular expressions, all of which must match somewhere."
    )
    forbid: StringList = Field(
        default=(), description="Regular expressions, none of which may match anywhere."
    )

    @field_validator("require", "forbid")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled(patterns)


class LanguageFilter(Section):
    """Languages that a completion may be in (py3langid)."""

    allow: StringList = Field(
        min_length=1, description="Languages by ISO 639-1 code, such as `en`."
    )
    min_confidence: float = Field(
        default=0.5, ge=0, le=1, description="Least confidence in the language, from 0 to 1."
    )
    min_chars: int = Field(default=40, ge=0, description="Shorter completions are not judged.")

    @field_validator("allow")
    @classmethod
    def _codes(cls, codes: tuple[str, ...]) -> tuple[str, ...]:
        if bad := [code for code in codes if not re.fullmatch("[a-z]{2,3}", code)]:
            raise ValueError(f"{bad[0]!r} is not a language code such as en or de")
        return codes


class DuplicatesFilter(Section):
    """Conversations that are there already, in this night or in one published before."""

    exact: bool = Field(
        default=True,
        description="Remove conversations with the same messages, but for case and white space.",
    )
    near: bool = Field(
        default=True,
        description="Remove completions that share most of their n-grams with another.",
    )
    threshold: float = Field(
        default=0.6,
        gt=0,
        lt=1,
        description="Jaccard similarity from which two are near duplicates. Lower finds more.",
    )
    shingle: int = Field(default=3, ge=1, description="Words of an n-gram.")
    permutations: int = Field(
        default=128,
        ge=16,
        le=1024,
        description="Permutations of MinHash. More are surer of the similarity, and take memory.",
    )
    min_words: int = Field(
        default=10, ge=1, description="Shorter completions are compared exactly only."
    )


class FiltersConfig(Section):
    """What is not published. Each completion must pass all; null turns a filter off.

    Completions of structured turns are no prose: of these filters, `finish_reason` and `duplicates`
    alone judge them, and they must be what their turn asks for.
    """

    model_config = example(
        {
            "finish_reason": ["stop"],
            "length": {"min_words": 4, "max_words": 300},
            "regex": {"forbid": ["https?://"]},
            "language": {"allow": ["en"]},
            "duplicates": {"threshold": 0.6},
        }
    )

    finish_reason: StringList | None = Field(
        default=("stop",),
        description="Reasons to end that are kept: `stop`, `length`. `null`: both.",
    )
    length: LengthFilter | None = Field(
        default_factory=LengthFilter, description="Bounds on the length. `null`: none."
    )
    repetition: RepetitionFilter | None = Field(
        default_factory=RepetitionFilter, description="Texts that go round in circles. `null`: off."
    )
    regex: RegexFilter | None = Field(
        default=None, description="Patterns to require or forbid. `null`: none."
    )
    language: LanguageFilter | None = Field(
        default=None, description="Languages to keep. `null`: all."
    )
    refusals: bool = Field(
        default=True,
        description="Remove completions in which the model declines instead of answering.",
    )
    refusal_patterns: StringList = Field(
        default=(), description="More regular expressions that mean a refusal."
    )
    duplicates: DuplicatesFilter | None = Field(
        default_factory=DuplicatesFilter,
        description="Conversations that are there already, in any night. `null`: off.",
    )

    @field_validator("refusal_patterns")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiled(patterns)

    @field_validator("finish_reason")
    @classmethod
    def _reasons(cls, reasons: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if bad := [reason for reason in reasons or () if reason not in {"stop", "length"}]:
            raise ValueError(f"{bad[0]!r} is not a finish reason: stop, length")
        return reasons


def _compiled(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return patterns
