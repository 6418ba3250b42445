"""From chat messages to token ids, through the target's chat template.

What the template is told besides the messages comes from the job, and from the row or request. A
variable that the template does not read would change nothing, so it is refused.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.job import InputConfig
from pipeline.errors import RowError
from pipeline.inputs.escaping import Escaping
from pipeline.inputs.messages import Message, as_object, spellings, without_nulls
from pipeline.inputs.openai_requests import KWARGS_COLUMN
from pipeline.inputs.tools import CHOICE, TOOLS, check_tools

CHAT_FLAGS = ("add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class ChatSettings:
    """What a chat template is told besides the messages.

    Attributes:
        variables: by name.
        tools: functions that the model may call, as OpenAI has them.
        begins: whether the template begins an answer (`add_generation_prompt`).
        continues: whether the last message is left open (`continue_final_message`).
        choice: which call a completion must be, as OpenAI has it; None: it need not be one.
    """

    variables: Mapping[str, Any]
    tools: Sequence[Any] | None
    begins: bool
    continues: bool
    choice: Any = None

    @classmethod
    def of(cls, config: InputConfig, cells: Mapping[str, Any]) -> ChatSettings:
        """The settings of a row: its own where it has any, otherwise the job's.

        Args:
            config: the job's.
            cells: the row's columns; of a request, its keys.

        Raises:
            RowError: a cell is not what it must be.
        """
        request = cells if config.format is not None else {}
        own = _parsed(cells.get(KWARGS_COLUMN), KWARGS_COLUMN) or {}
        if not isinstance(own, dict):
            raise RowError("InvalidChat", f"{KWARGS_COLUMN} must be an object")
        column = config.tools_column
        tools = _parsed(cells.get(column) if column else request.get(TOOLS), TOOLS)
        tools = config.tools if tools is None else tools
        begins = request.get("add_generation_prompt", config.add_generation_prompt)
        continues = request.get("continue_final_message", config.continue_final_message)
        for name, value in zip(CHAT_FLAGS, (begins, continues), strict=True):
            if value not in (None, True, False):
                raise RowError("InvalidChat", f"{name} must be true or false, got {value!r}")
        if begins and continues:
            raise RowError("InvalidChat", f"{' and '.join(CHAT_FLAGS)} do not go together")
        return cls(
            variables={**config.chat_template_kwargs, **without_nulls(own)},
            tools=check_tools(tools) if tools is not None else None,
            begins=not continues if begins is None else begins,
            continues=bool(continues),
            choice=request.get(CHOICE),
        )


def _parsed(cell: Any, name: str) -> Any:
    """A cell that holds an object or a list, or JSON text of one."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise RowError("InvalidChat", f"{name} is text, but not JSON") from None
    return as_object(cell)


class ChatTemplate:
    """The target's chat template.

    Args:
        tokenizer: the target's (transformers).
        escaping: makes plain text of special tokens in what it is told; None: they are tokens.
    """

    def __init__(self, tokenizer: Any, escaping: Escaping | None = None) -> None:
        self._tokenizer, self._text = tokenizer, str(tokenizer.chat_template)
        self._escaping = escaping
        named = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved = {*named, "messages"}

    @property
    def knows_calls(self) -> bool:
        """Whether it writes the tool calls of earlier messages."""
        return self._reads("tool_calls")

    def check(self, settings: ChatSettings) -> None:
        """Check that the template reads what it is told.

        Raises:
            RowError: names what it does not read.
        """
        for name in settings.variables:
            if name in self._reserved:
                raise RowError("InvalidChat", f"{KWARGS_COLUMN}: {name} is no template variable")
            if not self._reads(name):
                raise RowError(
                    "InvalidChat",
                    f"{KWARGS_COLUMN}: the target's chat template does not read {name}",
                )
        if settings.tools and not self._reads("tools"):
            raise RowError("InvalidChat", "tools: the target's chat template does not read them")

    def ids(self, messages: Sequence[Message], settings: ChatSettings) -> list[int]:
        """Token ids of a chat.

        Args:
            messages: checked.
            settings: checked.

        Raises:
            RowError: the template refuses it, or the last message cannot be continued.
        """
        last = messages[-1]
        if settings.continues and (last["role"] != "assistant" or not last["content"]):
            raise RowError(
                "MalformedMessages",
                "continue_final_message: the last message must be the assistant's, with a content",
            )
        refused: Exception | None = None
        for spelled in spellings(messages):
            try:
                return self._applied(spelled, settings)
            except Exception as error:  # a template may run into anything the messages hold
                refused = refused or error
        raise RowError("MalformedMessages", f"the chat template refused it: {refused}")

    def _applied(self, messages: Sequence[Message], settings: ChatSettings) -> list[int]:
        # The template writes the special tokens itself, so none are added here.
        said = (messages, settings.tools, settings.variables)
        if self._escaping is not None:
            said = (*map(self._escaping.hide, said),)
        messages, tools, variables = said
        made = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            tokenize=self._escaping is None,
            add_generation_prompt=settings.begins,
            continue_final_message=settings.continues,
            return_dict=False,
            **variables,
        )
        return list(made) if self._escaping is None else self._escaping.ids(made)

    def _reads(self, name: str) -> bool:
        return re.search(rf"\b{re.escape(name)}\b", self._text) is not None
