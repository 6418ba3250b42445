"""What a row asks for: the token ids of its prompt (see `requests`).

Chat `messages` go through the target's chat template. A plain prompt, and what a `template` over
the columns renders to, are completed as they are: no chat template is put around them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.job import InputConfig
from pipeline.config.templates import PromptTemplate
from pipeline.errors import RowError, UserError
from pipeline.inputs.chats import ChatSettings, ChatTemplate
from pipeline.inputs.escaping import Escaping
from pipeline.inputs.messages import check_messages
from pipeline.inputs.openai_requests import REQUEST

TRUNCATE = "truncate_prompt_tokens"
"""A key of the section `input`, and of a request."""

_DROPPED = 4
"""Characters of a text for each that a normalizer of a tokenizer keeps: more than any drops.
Lower, and texts that fit might be refused; higher, and longer ones are tokenized in vain."""


def required_columns(config: InputConfig) -> list[str]:
    """The columns that every input file must have."""
    if config.format is not None:
        return [REQUEST]
    made_of = [config.messages_column or config.prompt_column, config.tools_column]
    if config.template is not None:
        made_of = [*PromptTemplate(config.template).columns]
    return [*dict.fromkeys(column for column in (*made_of, config.completion_column) if column)]


class PromptRenderer:
    """Renders rows to token ids with the target's tokenizer.

    Args:
        config: which column or template is the prompt.
        tokenizer: the target's (transformers).
        context: the target's most positions; texts far beyond it are not even tokenized.

    Raises:
        UserError: messages are asked for and the tokenizer has no chat template, or it does not
            read what the job tells it; or special tokens cannot be escaped.
    """

    def __init__(self, config: InputConfig, tokenizer: Any, context: int | None = None) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._template = PromptTemplate(config.template) if config.template is not None else None
        self._opening: list[int] | None = None  # known from the first text on
        bos: Any = getattr(tokenizer, "bos_token", None)
        self._template_has_bos = bool(bos) and bos in (config.template or "")
        self._most_characters = _longest_text(tokenizer, context) if context else math.inf
        if config.messages_column is not None and not tokenizer.chat_template:
            raise UserError(
                "input.messages_column: the target's tokenizer has no chat template; "
                "use prompt_column or template, or an instruction-tuned target"
            )
        self._escaping = Escaping(tokenizer) if config.escape_special_tokens else None
        self._chats = ChatTemplate(tokenizer, self._escaping)
        try:
            self._chats.check(ChatSettings.of(config, {}))
        except RowError as error:
            raise UserError(f"input.{error.message}") from None

    def prompt_ids(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of the row's prompt.

        Args:
            row: the input columns; of an OpenAI request, its cells.

        Raises:
            RowError: the row has no usable prompt.
        """
        if self._config.format is not None:
            if "messages" in row:
                ids = self._chat(row["messages"], row)
            elif "prompt_ids" in row:
                ids = row["prompt_ids"]
            else:
                ids = self._plain(self._hidden(row["prompt"]))
        elif self._config.messages_column is not None:
            ids = self._chat(row[self._config.messages_column], row)
        else:
            ids = self._plain(self._text(row))
        if not ids:
            raise RowError("EmptyPrompt", "the prompt has no tokens")
        most = self._config.truncate_prompt_tokens
        if self._config.format is not None:
            most = row.get(TRUNCATE, most)
        return tuple(ids if most is None else self._last(ids, most))

    def _last(self, ids: Sequence[int], most: Any) -> Sequence[int]:
        """The last tokens of a prompt, behind what the tokenizer puts in front of a text."""
        if type(most) is not int or most < 1:
            raise RowError("InvalidSampling", f"{TRUNCATE} must be at least 1, got {most!r}")
        if len(ids) <= most:
            return ids
        opening = self._opening or []
        kept = most - len(opening)
        if kept < 1 or list(ids[: len(opening)]) != opening:
            return ids[-most:]
        return [*opening, *ids[-kept:]]

    def _text(self, row: Mapping[str, Any]) -> str:
        if self._template is not None:
            try:
                return self._template.render(self._hidden(dict(row)))
            except RowError:
                raise
            except Exception as error:  # a template may run into anything the row holds
                raise RowError("TemplateError", f"{type(error).__name__}: {error}") from None
        column = self._config.prompt_column
        prompt = row[column or ""]
        if prompt is None:
            raise RowError("NullPrompt", f"column {column!r} is null")
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise RowError("MalformedPrompt", f"column {column!r} holds a {kind}, not text")
        return str(self._hidden(prompt))

    def _hidden(self, value: Any) -> Any:
        """What a row brings, without special tokens if they are escaped."""
        return value if self._escaping is None else self._escaping.hide(value)

    def _plain(self, text: str) -> list[int]:
        if not text:
            raise RowError("EmptyPrompt", "the prompt is empty")
        self._check_length(text)
        try:
            ids = _encoded(self._tokenizer, text)
            if not ids:
                return []
            if self._opening is None:
                self._opening = _opening(self._tokenizer, text, ids)
            if self._escaping is not None:
                ids = self._escaping.ids(text)
            return ids if self._begins_itself(ids) else [*self._opening, *ids]
        except (UnicodeError, TypeError, ValueError) as error:
            raise RowError("MalformedPrompt", f"the tokenizer refused it: {error}") from None

    def _begins_itself(self, ids: list[int]) -> bool:
        """Whether a text brings its own beginning-of-sequence token, as one made elsewhere may.

        In front of it may be white space, and whatever the job's template has there. The same
        letters further on in a row's data begin nothing.
        """
        bos = self._tokenizer.bos_token_id
        if bos is None or bos not in ids:
            return False
        if self._template_has_bos:
            return True
        before = ids[: ids.index(bos)]
        return not before or not str(self._tokenizer.decode(before)).strip()

    def _chat(self, value: Any, row: Mapping[str, Any]) -> list[int]:
        messages = check_messages(value)
        for number, message in enumerate(messages):
            self._check_length(message["content"] or "")
            if message.get("tool_calls") and not self._chats.knows_calls:
                raise RowError(
                    "MalformedMessages",
                    f"message {number} has tool_calls, which the target's chat template ignores",
                )
        settings = ChatSettings.of(self._config, row)
        self._chats.check(settings)
        return self._chats.ids(messages, settings)

    def _check_length(self, text: str) -> None:
        """Refuse what no tokenizer makes short enough, before it takes minutes to find out."""
        if len(text) > self._most_characters:
            raise RowError(
                "PromptTooLong",
                f"a text of {len(text):,} characters does not fit the target's context",
            )


def _opening(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """What the tokenizer puts in front of a text, such as a beginning of sequence.

    What it puts behind it, such as an end of sequence, has no place in a prompt.

    Args:
        tokenizer: the tokenizer.
        text: any text that has tokens.
        ids: these, without special tokens.
    """
    whole = _encoded(tokenizer, text, special=True)
    starts = range(len(whole) - len(ids) + 1)
    start = next((s for s in starts if whole[s : s + len(ids)] == ids), 0)
    return whole[:start]


def _encoded(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _longest_text(tokenizer: Any, context: int) -> int:
    """Characters above which a text cannot fit the context.

    No token stands for more characters than it has itself, but a normalizer may drop some.
    """
    return _DROPPED * context * max(map(len, tokenizer.get_vocab()))
