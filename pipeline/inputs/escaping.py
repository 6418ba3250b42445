"""What rows bring as plain text, also where it reads like a special token of the target.

The tokenizer itself cannot tell who wrote `<|im_end|>`: the chat template, or a user in a message.
So before a prompt is put together, such text in a row's values is hidden behind a mark; the special
tokens that the prompt then has are the template's. They are tokenized by a copy of the tokenizer
that knows them by other names, and the hidden text is plain to it.
"""

from __future__ import annotations

import json
import re
import secrets
from typing import Any

from pipeline.errors import UserError

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
"""Around what stands for a special token: characters that Unicode leaves to programs."""


class Escaping:
    """Hides special tokens in a row's values, and tokenizes prompts in which they are hidden.

    A prompt without such text has the tokens that it would have anyway.

    Args:
        tokenizer: the target's (transformers).

    Raises:
        UserError: the tokenizer has no fast form.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                "input.escape_special_tokens: the target's tokenizer has no fast form, which this "
                "needs; remove the key"
            )
        tokens = backend.get_added_tokens_decoder()
        added = {index: str(token) for index, token in tokens.items()}
        special = {*map(str, tokenizer.all_special_tokens)}
        special |= {str(token) for token in tokens.values() if token.special}
        # Nobody can write these marks into a row: they are others in each process.
        self._key = secrets.token_hex(4)
        # The longest first, as the tokenizer finds them.
        texts = sorted(special & {*added.values()}, key=len, reverse=True)
        self._texts = texts
        self._special = re.compile("|".join(map(re.escape, texts)) or "(?!)")
        self._hidden = re.compile(f"{_OPEN}{self._key}h([0-9]+){_CLOSE}")
        self._numbers = {text: number for number, text in enumerate(texts)}
        self._copy, self._ids = self._renamed(backend, added)

    def hide(self, value: Any) -> Any:
        """A value in which no text holds a special token: lists and objects are gone through."""
        if isinstance(value, str):
            return self._special.sub(lambda found: self._mark("h", found[0]), value)
        if isinstance(value, dict):
            return {self.hide(key): self.hide(each) for key, each in value.items()}
        return [self.hide(each) for each in value] if isinstance(value, list) else value

    def ids(self, text: str) -> list[int]:
        """Tokens of a prompt made of hidden values, without any that the tokenizer adds."""
        text = self._special.sub(lambda found: self._mark("t", found[0]), text)
        text = self._hidden.sub(lambda found: self._texts[int(found[1])], text)
        ids = self._copy.encode(text, add_special_tokens=False).ids
        return [self._ids.get(index, index) for index in ids]

    def _mark(self, kind: str, text: str) -> str:
        return f"{_OPEN}{self._key}{kind}{self._numbers[text]}{_CLOSE}"

    def _renamed(self, backend: Any, added: dict[int, str]) -> tuple[Any, dict[int, int]]:
        """A copy that knows special tokens by their marks alone, and whose ids are others there."""
        from tokenizers import Tokenizer

        written = json.loads(backend.to_str())
        names = {text: self._mark("t", text) for text in self._texts}
        for token in written["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        written["post_processor"] = None  # it names special tokens, and adds none here
        copy = Tokenizer.from_str(json.dumps(written))
        there = {index: copy.token_to_id(names.get(text, text)) for index, text in added.items()}
        return copy, {new: index for index, new in there.items() if new not in (None, index)}
