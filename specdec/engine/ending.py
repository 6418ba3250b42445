"""Where a row's output ends: end of sequence, stop tokens, stop strings, length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from specdec.request import INVALID_LOGITS, NO_CHARACTER, FinishReason, SamplingParams

if TYPE_CHECKING:
    from specdec.lossless.grammars import RowGrammar  # torch: whoever reads rows loads without

Decode = Callable[[Sequence[int]], str]
"""Token ids to text. Special tokens are part of it: stop strings may hold them."""

_CONTEXT = tuple(size + more for size in (8, 32, 128) for more in range(4))
"""How many tokens may stand for all before them. Four in a row: a character has up to four bytes,
each may be a token, and one of four tokens in a row then begins a character."""

_KEPT = 24
"""As often as this many tokens are in front of a new one they are cut down to a context."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How many tokens the output has, and why it has no more.

    Attributes:
        length: tokens of the output.
        finish_reason, stop_reason: as of the `Completion`.
        error: what went wrong, if the reason is "error", and `error_class` its class.
    """

    length: int
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    error: str | None = None
    error_class: str | None = None


def context_of(ids: Sequence[int], decode: Decode) -> Sequence[int]:
    """The last tokens, as few as give what follows the text that it has behind all of them.

    Many decoders treat the first token of a text in a way of its own: its space is lost, or a sign
    that it continues a word is shown. So tokens are decoded behind others, and these are cut off.
    """
    for size in _CONTEXT:
        if size >= len(ids):
            break
        text = decode(ids[-size:])
        if text and NO_CHARACTER not in text:
            return ids[-size:]
    return ids


class StopSearch:
    """Looks for stop strings in a row's output, one token after another.

    Each token is decoded once, behind a few others, so a token costs the same in a long output. The
    prompt is context alone: no stop string begins in it.

    Args:
        stops: the stop strings, at least one.
        prompt_ids: the row's prompt.
        decode: token ids to text.
    """

    def __init__(self, stops: Sequence[str], prompt_ids: Sequence[int], decode: Decode) -> None:
        self._stops, self._decode = stops, decode
        self._ids = [*context_of(prompt_ids, decode)]
        self._text = decode(self._ids).rstrip(NO_CHARACTER)
        self._tail = ""  # of the output's text: what a stop string may begin in
        self._reach = max(map(len, stops)) - 1

    def add(self, token: int) -> str | None:
        """Take the next token of the output; return the stop string that it completes, if any."""
        if self._ids and len(self._ids) % _KEPT == 0:
            self._forget()
        self._ids.append(token)
        decoded = self._decode(self._ids)
        text = decoded.rstrip(NO_CHARACTER)
        if text != decoded and self._text.startswith(text):
            return None  # half of a character: the next tokens may bring the rest
        same = _common(self._text, text)
        kept = len(self._tail) - (len(self._text) - same)
        tail = self._tail[: max(0, kept)] + text[same:]
        found = [(tail.find(stop), stop) for stop in self._stops if stop in tail]
        self._text, self._tail = text, tail[max(0, len(tail) - self._reach) :]
        return min(found)[1] if found else None

    def skip(self) -> None:
        """Look for stop strings behind the tokens so far: none begins in them."""
        self._tail = ""

    def _forget(self) -> None:
        """Let go of tokens that those behind them no longer need."""
        decoded = self._decode(self._ids)
        broken = len(self._ids) >= 4 * _KEPT  # bytes that never become characters
        if decoded != self._text and not broken:
            return  # in the middle of a character
        kept = context_of(self._ids, self._decode)
        self._ids = [*(self._ids[1 - _KEPT :] if broken else kept)]
        self._text = self._decode(self._ids).rstrip(NO_CHARACTER)


def _common(before: str, after: str) -> int:
    """How many characters two texts begin with alike."""
    if after.startswith(before):
        return len(before)
    pairs = enumerate(zip(before, after, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(before), len(after)))


class EndingRow(Protocol):
    """What an ending depends on: the sampling, and what has read the output so far."""

    sampling: SamplingParams
    stops: StopSearch | None
    grammar: RowGrammar | None


def find_ending(
    tokens: Sequence[int], known: int, row: EndingRow, eos_token_ids: frozenset[int]
) -> Ending | None:
    """The first end of an output among the tokens that it grew by, or None.

    Looks at one token after another, so the answer does not depend on how many of them one round
    committed. Before `min_tokens` nothing ends it but the length, and a grammar that is at its end.

    Args:
        tokens: what the output grew by.
        known: how many tokens it had before.
        row: has read these, and reads those up to the end.
        eos_token_ids: the model's end-of-sequence tokens.
    """
    sampling, stops, grammar = row.sampling, row.stops, row.grammar
    if grammar is not None:
        grammar.forget()
    for length, token in enumerate(tokens, known + 1):
        found = stops.add(token) if stops is not None else None
        if length <= sampling.min_tokens:
            if stops is not None:
                stops.skip()
            found = None
        if found is not None:
            return Ending(length, "stop", found)
        if token in sampling.stop_token_ids:
            return Ending(length, "stop", token)
        if token in eos_token_ids and not sampling.ignore_eos:
            return Ending(length, "stop", token)
        if grammar is not None and grammar.commit(token):
            if error := grammar.matcher.get_error():
                return Ending(length, "error", error=error, error_class="GrammarFailed")
            return Ending(length, "stop")
        if length == sampling.max_new_tokens:
            return Ending(length, "length")
    return None


def failure(length: int, adjusts: bool) -> Ending:
    """The end of a row whose target has no distribution of the token after `length` of them.

    Args:
        length: tokens of the output.
        adjusts: whether the row asks for anything of its logits, which may leave no token.
    """
    said = (
        f"the target's logits at output token {length + 1} are NaN, infinite or all -inf; "
        "float16 overflows to that: try models.dtype bfloat16 or float32"
    )
    if adjusts:
        said += ". Or what the row asks for bans every token there"
    return Ending(length, "error", error=said, error_class=INVALID_LOGITS)
