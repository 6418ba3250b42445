"""Between a target's tokens and text: the one way, which every command takes.

A completion's text is what its tokens add to the text of the prompt. Decoders of many tokenizers
treat the first token of a text in a way of its own, and the space in front of it is lost. So output
tokens are decoded behind the end of the prompt, whose text is cut off again.
"""

from __future__ import annotations

import codecs
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from specdec.engine.ending import Decode, context_of
from specdec.request import NO_CHARACTER, Completion, Request, SamplingParams

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A token that is one byte, in tokenizers that fall back to bytes."""

_MOST_PENDING = 3
"""Most bytes that half of a character has."""


class Texts:
    """Turns tokens into text, and text into tokens.

    Args:
        tokenizer: the target's (transformers).

    Attributes:
        vocab_size: how many tokens there are.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self._special = {str(token): int(index) for token, index in special}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        added = backend.get_added_tokens_decoder() if backend is not None else {}
        self._special |= {str(token): i for i, token in added.items() if token.special}
        self._special_ids = frozenset(self._special.values())
        longest = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._special_text = re.compile("|".join(longest) or "(?!)")
        decoder = str(getattr(backend, "decoder", ""))
        self._letters = _byte_letters() if "ByteLevel" in decoder else None
        # Engines decode each token of rows with stop strings: what transformers puts around the
        # backend takes longer than the backend. Some tokenizers decode in a way of their own.
        self._backend = None if _decodes_itself(tokenizer) else backend

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones included: what an engine finds stop strings in."""
        return self._decode(ids, skip_special=False)

    def completion(self, request: Request, done: Completion) -> str:
        """The text of a completion, as its request wants it.

        By default it has no special tokens, and is cut before a stop string. Where the limit of
        tokens fell in the middle of a character, the text ends before it.

        Args:
            request: what was asked for.
            done: what the engine returned.
        """
        prompt_ids, ids, wanted = request.prompt_ids, done.output_ids, request.sampling
        visible = self._visible if wanted.skip_special_tokens else self.decode
        text = _behind(prompt_ids, ids, visible)
        if isinstance(done.stop_reason, str):
            # None is looked for in the first `min_tokens`.
            least = _behind(prompt_ids, ids[: wanted.min_tokens], self.decode)
            stop = done.stop_reason
            cut = self._through if wanted.include_stop_str_in_output else self._before
            return cut(stop, prompt_ids, ids, text, len(least))
        if done.finish_reason == "length" and text.endswith(NO_CHARACTER):
            pending = self._pending(ids)
            if pending and self._letters is None:  # each of its bytes is a token
                return _behind(prompt_ids, ids[:-pending], visible)
            return text[:-1] if pending else text
        return text

    def marked(self, request: Request, done: Completion) -> str:
        """The text of a completion with special tokens, but for one that ended it."""
        ended = isinstance(done.stop_reason, int)
        ids = done.output_ids[:-1] if ended else done.output_ids
        sampling = replace(request.sampling, skip_special_tokens=False)
        return self.completion(replace(request, sampling=sampling), replace(done, output_ids=ids))

    def covering(self, request: Request, done: Completion, characters: int) -> int:
        """How many output tokens the first characters of a completion are of.

        Args:
            request: what was asked for.
            done: what the engine returned.
            characters: of its text with special tokens (`marked`).
        """
        prompt_ids, ids = request.prompt_ids, done.output_ids

        def shown(count: int) -> int:
            return len(_behind(prompt_ids, ids[:count], self.decode))

        return min(len(ids), bisect_left(range(len(ids) + 1), characters, key=shown))

    def visible(self, text: str) -> str:
        """A text without special tokens."""
        return self._special_text.sub("", text)

    def last_turn(self, prompt_ids: Sequence[int], marks: Sequence[str]) -> str:
        """The end of a prompt, behind its last special token that is none of some marks."""
        begin = len(prompt_ids)
        while begin and (
            prompt_ids[begin - 1] not in self._special_ids
            or self.decode(prompt_ids[begin - 1 : begin]).strip() in marks
        ):
            begin -= 1
        return self.decode(prompt_ids[begin:])

    def output_ids(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Tokens that give this text behind a prompt; seldom others than it was made of.

        Args:
            prompt_ids: the prompt.
            text: of a completion.
        """
        # Where decoders drop the space in front of a text, encoders put one there.
        line = len(self._encode("\n"))
        ways = ((text, 0), (text.removeprefix(" "), 0), ("\n" + text, line))
        tried = (self._encode(encoded)[skipped:] for encoded, skipped in ways)
        right = (ids for ids in tried if _behind(prompt_ids, ids, self.decode) == text)
        found = next(right, None)
        return self._encode(text) if found is None else found

    def with_special_stops(self, sampling: SamplingParams) -> SamplingParams:
        """The sampling, in which a stop string that is a special token is a stop token, too.

        Its text is found as any other; but some decoders do not write it as it is.
        """
        ids = [self._special[stop] for stop in sampling.stop if stop in self._special]
        new = tuple(index for index in ids if index not in sampling.stop_token_ids)
        if not new:
            return sampling
        return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *new))

    def with_bad_words(self, sampling: SamplingParams) -> SamplingParams:
        """The sampling, in which bad words are token sequences: at the start of a text and in it.

        A word in it has a space in front, as in vLLM. Other tokens may make the same word.
        """
        if all(not isinstance(word, str) for word in sampling.bad_words):
            return sampling
        sequences: list[tuple[int, ...]] = []
        for word in sampling.bad_words:
            if not isinstance(word, str):
                sequences.append(tuple(word))
                continue
            first, inside = (tuple(self._encode(way + word.lstrip())) for way in ("", " "))
            sequences += {first: None, inside: None} if inside else [first]
        return replace(sampling, bad_words=tuple(sequences))

    def _decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        if self._backend is not None:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _visible(self, ids: Sequence[int]) -> str:
        return self._decode(ids, skip_special=True)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _before(
        self, stop: str, prompt_ids: Sequence[int], ids: Sequence[int], text: str, least: int
    ) -> str:
        """The part of a completion's text that is before a stop string.

        Args:
            stop: the stop string.
            prompt_ids, ids: tokens of prompt and output.
            text: the output's, without special tokens.
            least: characters, special tokens among them, in which no stop string begins.
        """
        shown = _behind(prompt_ids, ids, self.decode)
        at = shown.find(stop, least)
        if at < 0 or shown == text:
            return text[:at] if at >= 0 else text
        # Special tokens are among them: go back to the token in which the stop string begins.
        for count in range(len(ids) - 1, -1, -1):
            begun = _behind(prompt_ids, ids[:count], self.decode)
            if shown[:at].startswith(begun):
                break
        rest = "" if ids[count] in self._special_ids else shown[len(begun) : at]
        return _behind(prompt_ids, ids[:count], self._visible) + rest

    def _through(
        self, stop: str, prompt_ids: Sequence[int], ids: Sequence[int], text: str, least: int
    ) -> str:
        """The part of a completion's text up to the end of a stop string; as `_before`."""
        shown = _behind(prompt_ids, ids, self.decode)
        at = shown.find(stop, least)
        more = len(shown) - at - len(stop) if at >= 0 else 0  # of the token that completes it
        return text[: len(text) - more]

    def _pending(self, ids: Sequence[int]) -> int:
        """How many bytes of a character that is not whole are at the end."""
        end = b""
        for index in reversed(ids):
            more = self._bytes(index)
            end = more + end
            if not more or len(end) >= _MOST_PENDING:
                break
        _, read = codecs.utf_8_decode(end, "replace", False)
        return len(end) - read

    def _bytes(self, index: int) -> bytes:
        """The bytes of a token, as far as it may hold less than whole characters."""
        token = str(self._tokenizer.convert_ids_to_tokens(index))
        if index in self._special_ids:
            return b""
        if self._letters is None:
            byte = _BYTE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else b""
        if all(letter in self._letters for letter in token):
            return bytes(self._letters[letter] for letter in token)
        return token.encode(errors="replace")


def _behind(prompt_ids: Sequence[int], ids: Sequence[int], decode: Decode) -> str:
    """What tokens add to the text of those in front of them."""
    context = context_of(prompt_ids, decode)
    whole = decode([*context, *ids])
    before = decode(context)
    # A prompt of token ids may end in the middle of a character, which becomes whole here.
    most = _MOST_PENDING if before.endswith(NO_CHARACTER) else 0
    for less in range(most + 1):
        if less:
            before = decode(context[: len(context) - less])
        if whole.startswith(before):
            return whole[len(before) :]
    return decode(ids)


def _decodes_itself(tokenizer: Any) -> bool:
    """Whether a tokenizer decodes otherwise than its backend (tokenizers) does."""
    from transformers import PreTrainedTokenizerFast

    usual: Any = PreTrainedTokenizerFast
    own: Any = type(tokenizer)
    return own.decode is not usual.decode or own._decode is not usual._decode


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies, and its byte.

    Visible characters of Latin-1 stand for themselves, other bytes for what follows U+0100.
    """
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    letters = {chr(byte): byte for byte in itself}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}
