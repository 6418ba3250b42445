"""What goes into the engine and what comes out: frozen values in token ids, counts and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from specdec.measure.calibration import Calibration

FinishReason = Literal["stop", "length", "error"]

NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"
"""What a text has for bytes that are no character, such as half of one."""


class InvalidRequest(ValueError):
    """A request that cannot be served as asked. It is that request's error, never the engine's."""


INVALID_LOGITS = "InvalidLogits"
"""The class of a row's error where the target's logits have no softmax: NaN, infinite, all -inf."""


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

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise InvalidRequest(f"{name} must be {rule}, got {getattr(self, name)!r}")

        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            require(name, isinstance(value, int) and not isinstance(value, bool), "an integer")
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(name, number and math.isfinite(value), "a finite number")
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
        require("ignore_eos", isinstance(self.ignore_eos, bool), "true or false")


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
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()


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
class RoundTrace:
    """One round of one row, kept on request: what was predicted, decided and met.

    Attributes:
        context: tokens of the row before the round.
        live: rows that decoded in the round.
        candidates: the drafted tokens.
        predicted: estimated probability of acceptance of each candidate, if the policy has one.
        submitted, accepted: how many of the candidates.
        reason: why there were not more candidates.
    """

    context: int
    live: int
    candidates: tuple[int, ...]
    predicted: tuple[float, ...]
    submitted: int
    accepted: int
    reason: str


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
