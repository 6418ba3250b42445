"""What goes into the engine and what comes out: frozen values in token ids, counts and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from specdec.measure.calibration import Calibration

FinishReason = Literal["stop", "length", "error"]

PROCESSED = "processed_logprobs"
LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]
"""Log-probabilities of the target's own distribution, or of the one that is sampled from."""

MOST_LOGPROBS = 100
"""Most likeliest tokens that are told of each position; each takes part of a row's output."""

NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What a text has for bytes that are no character, such as half of one."""


class InvalidRequest(ValueError):
    """A request that cannot be served as asked. It is that request's error, never the engine's."""


INVALID_LOGITS = "InvalidLogits"
"""The class of a row's error where the target's logits have no softmax: NaN, infinite, all -inf."""


INTEGERS = ("max_new_tokens", "top_k", "seed", "min_tokens", "no_repeat_ngram_size")
LOGPROBS = ("logprobs", "prompt_logprobs")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

MOST_NGRAM = 64
"""Longest n-gram that can be kept from repeating: each round compares its tokens one by one."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose mass reaches top_p; 1 keeps all.
        min_p: drop tokens less likely than min_p times the likeliest one; 0 drops none.
        seed: with the position, and under `rejection` the row's round, the key of every random
            number this request uses.
        stop_token_ids: tokens that end the output besides the model's own end-of-sequence tokens.
        stop: strings that end the output, found in its text with special tokens. The token that
            completes one is the last token returned.
        ignore_eos: generate past the model's end-of-sequence tokens.
        skip_special_tokens, include_stop_str_in_output: what a text made of the output shows.
        logprobs: with each token of the output comes its log-probability, and those of so many of
            the likeliest ones, at most MOST_LOGPROBS; None: none.
        prompt_logprobs: the same of the prompt's tokens, always of the target's distribution.
        logprobs_mode: of the target's distribution ("raw_logprobs"), or of the one that the token
            was drawn from ("processed_logprobs"): a greedy row's without temperature.
        repetition_penalty: of each token of prompt and output, a positive logit is divided by it
            and a negative one multiplied.
        presence_penalty: taken off the logit of each token of the output.
        frequency_penalty: taken off as often as the token stands in the output.
        logit_bias: added to the logits of these tokens, -100 to 100 each.
        min_tokens: nothing ends the output before it has so many tokens. Until then the tokens
            that would are banned, and stop strings are looked for behind them. Only a grammar that
            nothing can follow ends all the same.
        bad_words: token sequences that the output never holds. A text must be made such a sequence
            by who has the tokenizer: the engine refuses texts.
        allowed_token_ids: the only tokens that the output may hold; None: all.
        grammar: what the output is, as a grammar of llguidance; it ends where the grammar does.
            An engine needs `grammars` for it. None: anything.
        no_repeat_ngram_size: no so many tokens follow each other twice in prompt and output, at
            most MOST_NGRAM; 0 is off.

    Raises:
        InvalidRequest: a value is outside its range; the message names it.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: LogprobsMode = "raw_logprobs"
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    no_repeat_ngram_size: int = 0
    grammar: str | None = None

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} must be {rule}, got {getattr(self, name)!r}")

        for name in INTEGERS:
            require(name, type(getattr(self, name)) is int, "an integer")
        for name in ("temperature", "top_p", "min_p", *PENALTIES):
            require(name, _is_number(getattr(self, name)), "a finite number")
        require("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        hot = self.temperature == 0 or self.temperature >= 1e-5
        require("temperature", hot, "0 (greedy) or at least 1e-5")
        require("top_k", self.top_k >= 0, "0 (off) or more")
        require("top_p", 0 < self.top_p <= 1, "in (0, 1]")
        require("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
        for name, kind in (("stop", str), ("stop_token_ids", int)):
            value = getattr(self, name)
            listed = isinstance(value, tuple | list) and all(type(v) is kind for v in value)
            require(name, listed, f"a list of {kind.__name__}")
        for stop in self.stop:
            fault = stop_fault(stop)
            require("stop", fault is None, f"strings that a text can hold ({stop!r} {fault})")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            require(name, isinstance(getattr(self, name), bool), "true or false")
        for name in LOGPROBS:
            told = getattr(self, name)
            number = told is None or (type(told) is int and 0 <= told <= MOST_LOGPROBS)
            require(name, number, f"0 to {MOST_LOGPROBS}, or null (none)")
        modes = get_args(LogprobsMode)
        require("logprobs_mode", self.logprobs_mode in modes, " or ".join(modes))
        require("repetition_penalty", self.repetition_penalty > 0, "more than 0 (1 is off)")
        for name in ("presence_penalty", "frequency_penalty"):
            require(name, -2 <= getattr(self, name) <= 2, "in [-2, 2]")
        biases = isinstance(self.logit_bias, Mapping) and all(
            type(token) is int and _is_number(bias) and -100 <= bias <= 100
            for token, bias in self.logit_bias.items()
        )
        require("logit_bias", biases, "numbers from -100 to 100 by token id")
        least = 0 <= self.min_tokens <= self.max_new_tokens
        require("min_tokens", least, f"0 (off) to max_new_tokens, {self.max_new_tokens}")
        words = isinstance(self.bad_words, tuple | list) and all(map(_is_word, self.bad_words))
        require("bad_words", words, "a list of words or of lists of token ids, none of them empty")
        allowed = self.allowed_token_ids
        if allowed is not None:
            listed = isinstance(allowed, tuple | list) and all(type(v) is int for v in allowed)
            require(
                "allowed_token_ids", listed and bool(allowed), "a list of at least one token id"
            )
        text = self.grammar is None or isinstance(self.grammar, str)
        require("grammar", text, "the text of a grammar, or null (none)")
        ngram = 0 <= self.no_repeat_ngram_size <= MOST_NGRAM
        require("no_repeat_ngram_size", ngram, f"0 (off) to {MOST_NGRAM}")

    @property
    def adjusts(self) -> bool:
        """Whether it asks for anything of the logits themselves."""
        return bool(
            self.reads_prefix
            or self.logit_bias
            or self.min_tokens
            or self.allowed_token_ids is not None
        )

    @property
    def reads_prefix(self) -> bool:
        """Whether what it asks of the logits depends on the tokens before them."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.bad_words
            or self.no_repeat_ngram_size
        )


def _is_number(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]


def _is_word(word: object) -> bool:
    """Whether it is a text or a sequence of token ids, and not empty."""
    return bool(word.strip()) if isinstance(word, str) else _is_ids(word)


def _is_ids(value: object) -> bool:
    listed = isinstance(value, tuple | list) and bool(value)
    return listed and all(type(token) is int for token in value)  # type: ignore[attr-defined]


def stop_fault(stop: str) -> str | None:
    """Why a stop string can never be found in a text, or None if it can."""
    if not stop:
        return "is empty, which would stop every row at once"
    if NO_CHARACTER in stop:
        return "holds U+FFFD, which a text has in place of what is no character"
    if any("\ud800" <= letter <= "\udfff" for letter in stop):
        return "holds half of a character"
    return None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to complete.

    Attributes:
        id: the caller's name for it, returned in its `Completion`.
        prompt_ids: token ids, at least one.
        sampling: how to sample it.
        given_ids: a completion that is scored: nothing is generated, and the completion's
            `logprobs` are those of these tokens.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    given_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Counts:
    """What speculation did, in counts; ratios are derived from them here and nowhere else.

    The same counts serve a request, a unit, an actor and a job: they add up.

    Attributes:
        rounds: target forwards that committed tokens for a row (one row, one forward: one round).
        drafted: candidates drawn from the draft.
        verified: candidates submitted to the target.
        accepted: verified candidates that stand in the output.
        committed: tokens committed to the output: accepted ones plus at most one bonus token a
            round.
    """

    rounds: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    committed: int = 0

    def add(self, other: Counts) -> None:
        """Add `other` in place."""
        self.rounds += other.rounds
        self.drafted += other.drafted
        self.verified += other.verified
        self.accepted += other.accepted
        self.committed += other.committed

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / verified; None where nothing was verified."""
        return self.accepted / self.verified if self.verified else None

    @property
    def block_efficiency(self) -> float | None:
        """Committed tokens per row and target forward; None before the first round."""
        return self.committed / self.rounds if self.rounds else None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was to the target.

    Attributes:
        token: the token, and `logprob` its log-probability (natural).
        top: the likeliest tokens and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class RoundTrace:
    """One round of one row, kept on request: what was predicted, decided and met.

    Attributes:
        context: tokens of the row before the round.
        live: rows that decoded in the round.
        candidates: the drafted tokens.
        predicted: estimated probability of acceptance of each candidate, if the policy has one.
        submitted, accepted: how many of the candidates.
        reason: why there were not more candidates.
        parents: if the candidates are a tree, which of them each follows; -1: none. Else empty,
            and each follows the one before it.
        kept, path: of a tree, which candidates were submitted, and which were accepted.
        sources: where the first candidates come from, those that no draft proposed: "forced",
            "prompt", "rows" or "corpus" each.
    """

    context: int
    live: int
    candidates: tuple[int, ...]
    predicted: tuple[float, ...]
    submitted: int
    accepted: int
    reason: str
    parents: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    path: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one request.

    Attributes:
        id: the request's id.
        prompt_tokens: length of the prompt.
        output_ids: generated tokens, never past an end, a stop or max_new_tokens. The token that
            ended the output (end-of-sequence, stop token, last token of a stop string) is included.
        finish_reason: "stop" (end of sequence, stop token, stop string), "length", or "error".
        stop_reason: the token id or stop string that ended the output, if one did.
        counts: what speculation did for this request.
        error: what was wrong with the request, if finish_reason is "error".
        error_class: "InvalidRequest", or INVALID_LOGITS if it went wrong on its way.
        seconds: from its slot to its end, shared with the rows beside it.
        calibration: predicted against observed acceptance by class of context length, for policies
            that predict.
        trace: its rounds, if the engine keeps them.
        logprobs: of each output token, if the request asks for them; of each given one.
        prompt_logprobs: of each token of the prompt, if the request asks for them; None of the
            first, which nothing predicts.
    """

    id: str
    prompt_tokens: int
    output_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    counts: Counts = field(default_factory=Counts)
    error: str | None = None
    error_class: str | None = None
    seconds: float = field(default=0.0, compare=False)
    calibration: Mapping[int, Calibration] = field(default_factory=dict, compare=False)
    trace: tuple[RoundTrace, ...] = field(default=(), compare=False)
    logprobs: tuple[TokenLogprob, ...] | None = field(default=None, compare=False)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = field(default=None, compare=False)
