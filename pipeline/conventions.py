"""How models mark reasoning and tool calls, and what a completion says behind the marks.

A tokenizer that declares it (`response_template`) is read by transformers. For all others the chat
template tells the family: what it writes of earlier turns is what the model writes of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.texts import Texts
from specdec.request import Completion, Request

Tools = Sequence[Mapping[str, Any]]
"""Functions that a model may call, in OpenAI's form."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a function: its name, and its arguments as JSON text of an object."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """What a completion says.

    Attributes:
        content: the answer, without what stands in the others.
        reasoning: what the model marked as such; None if it did not.
        tool_calls: in order. A call that cannot be read is part of the content.
        reasoning_tokens: output tokens up to the end of the reasoning, its marks among them.
    """

    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    reasoning_tokens: int = field(default=0, compare=False)  # no part of what it says


@dataclass(frozen=True)
class _Thoughts:
    """How a family marks reasoning.

    Attributes:
        sign: what its chat template has.
        open, close: the marks.
        before: a pattern of what may stand in front of the first.
    """

    sign: str
    open: str
    close: str
    before: str = ""

    def begin(self, text: str) -> re.Match[str] | None:
        """Where a text that begins with reasoning goes on inside of it."""
        return re.match(rf"\s*(?:{self.before})?{re.escape(self.open)}", text)


_START = r"<\|start\|>assistant"
_THOUGHTS = (
    _Thoughts("[/THINK]", "[THINK]", "[/THINK]"),
    _Thoughts("</seed:think>", "<seed:think>", "</seed:think>"),
    _Thoughts("<|channel>thought", "<|channel>thought", "<channel|>"),
    _Thoughts("<|channel|>analysis", "<|channel|>analysis<|message|>", "<|end|>", _START),
    _Thoughts("think>", "<think>", "</think>"),
)
"""Of Magistral; Seed-OSS; Gemma 4; gpt-oss; Qwen, DeepSeek and most others."""


@dataclass(frozen=True)
class _Calls:
    """How a family writes a tool call.

    Attributes:
        marks: what its chat template has, all of them.
        open: begins a call, with its `name` if that stands there. JSON follows, or tags.
        close: ends it. Behind JSON it may be missing: some models end there.
        tags: an argument, with its `key` and `value`; None: the arguments are JSON.
        marked: whether nothing else begins so; otherwise the name must be a tool's.
    """

    marks: tuple[str, ...]
    open: re.Pattern[str]
    close: re.Pattern[str]
    tags: re.Pattern[str] | None = None
    marked: bool = True


def _calls(*marks: str, open: str, close: str = "", tags: str = "", marked: bool = True) -> _Calls:
    begins, ends, inside = (re.compile(each, re.DOTALL) for each in (open, close, tags))
    return _Calls(marks, begins, ends, inside if tags else None, marked)


_FAMILIES = (
    _calls(  # Qwen3-Coder, Qwen3.5
        *("<tool_call>", "<function="),
        open=r"<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        close=r"</function>\s*</tool_call>",
        tags=r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>",
    ),
    _calls(  # GLM
        *("<tool_call>", "<arg_key>"),
        open=r"<tool_call>(?P<name>[^\n<{]+?)\s*(?=<arg_key>|</tool_call>)",
        close=r"</tool_call>",
        tags=r"<arg_key>(?P<key>.*?)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>",
    ),
    # Hermes, Qwen, SmolLM3 and many others
    _calls("<tool_call>", open=r"<tool_call>\s*", close=r"\s*</tool_call>"),
    _calls(  # Granite, Phi-4-mini
        "<|tool_call|>", open=r"<\|tool_call\|>\s*", close=r"\s*<\|/tool_call\|>"
    ),
    _calls(  # Mistral: a list of objects, or name and arguments in turn
        "[TOOL_CALLS]",
        open=r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)?(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=[\[{])",
    ),
    _calls(  # DeepSeek
        "<｜tool▁call▁begin｜>",
        open=r"(?:<｜tool▁calls▁begin｜>)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?"
        r"(?P<name>[^\n<]+?)(?:<｜tool▁sep｜>|\n```json\n)\s*",
        close=r"\s*(?:```)?\s*<｜tool▁call▁end｜>(?:\s*<｜tool▁calls▁end｜>)?",
    ),
    _calls(  # gpt-oss
        *("<|channel|>", "to=functions."),
        open=rf"(?:{_START})?(?:<\|channel\|>commentary)? ?to=functions\.(?P<name>[\w.-]+)"
        r"(?:<\|channel\|>commentary)?[^<{]*(?:<\|constrain\|>\w+)?<\|message\|>\s*",
        close=r"\s*<\|(?:call|end)\|>",
    ),
    _calls(  # Llama 3: nothing marks a call but that it stands alone
        "ipython",
        open=r"(?:\A\s*(?:<\|python_tag\|>)?|;)\s*(?=\{)",
        close=r"\s*\Z|(?=\s*;)",
        marked=False,
    ),
)
_AROUND = re.compile(rf"(?:{_START})?<\|channel\|>(?:final|commentary)<\|message\|>")
"""What gpt-oss writes in front of an answer."""


class Conventions:
    """Reads the completions of a target's chats.

    Args:
        tokenizer: the target's (transformers).
        texts: of the same.

    Attributes:
        known: whether anything is known of how the target marks reasoning or tool calls.
    """

    def __init__(self, tokenizer: Any, texts: Texts) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        template = tokenizer.chat_template or ""
        text = template if isinstance(template, str) else json.dumps(template, ensure_ascii=False)
        self._declared = getattr(tokenizer, "response_template", None)
        self._thoughts = next((each for each in _THOUGHTS if each.sign in text), None)
        families = (each for each in _FAMILIES if all(mark in text for mark in each.marks))
        self._calls = next(families, None)
        self.known = any((self._declared, self._thoughts, self._calls))

    def message(
        self, request: Request, done: Completion, tools: Tools | None, choice: Any = None
    ) -> Message:
        """What a completion says; what cannot be read is its content.

        Args:
            request: what was asked for, a chat.
            done: what the engine returned.
            tools: that the model was told of; None: it calls none.
            choice: which call the completion must be, as OpenAI has it; None: it need not be one.
        """
        if choice is not None:
            text = self._texts.completion(request, done)
            calls = _forced(text, choice)
            return Message("", None, tuple(calls)) if calls else Message(text)
        text = self._texts.marked(request, done)
        if self._declared is not None:
            found = self._as_declared(text, request, tools)
        else:
            found = self._as_family(text, request, tools)
        if found is None:
            return Message(self._texts.completion(request, done))
        message, thought = found
        parts = [message.content, message.reasoning or ""]
        if request.sampling.skip_special_tokens:
            parts = [*map(self._texts.visible, parts)]
        content, said = (part.strip() for part in parts)
        return replace(
            message,
            content=content,
            reasoning=None if message.reasoning is None else said,
            reasoning_tokens=self._texts.covering(request, done, thought),
        )

    def _as_family(
        self, text: str, request: Request, tools: Tools | None
    ) -> tuple[Message, int] | None:
        """As the chat template's family writes, and the characters up to the end of reasoning.

        None: nothing is marked.
        """
        reasoning, content = self._split(text, self._begun(request))
        thought = len(text) - len(content)
        content, calls = self._without_calls(content, tools) if tools else (content, [])
        if reasoning is None and not calls:
            return None
        return Message(_AROUND.sub("", content), reasoning, tuple(calls)), thought

    def _begun(self, request: Request) -> bool:
        """Whether the prompt ends within reasoning, which many templates begin."""
        if self._thoughts is None:
            return False
        opened, closed = self._thoughts.open, self._thoughts.close
        # Only there: further up a user may have written such a mark.
        turn = self._texts.last_turn(request.prompt_ids, marks=(opened, closed))
        return turn.rfind(opened) > turn.rfind(closed)

    def _split(self, text: str, begun: bool) -> tuple[str | None, str]:
        """Reasoning, and what stands behind it. It is all that there is if it is not closed."""
        found: list[str] = []
        thoughts = self._thoughts
        while thoughts is not None:
            opened = None if begun else thoughts.begin(text)
            if not begun and opened is None:
                break
            inside = text[opened.end() if opened else 0 :]
            said, _, text = inside.partition(thoughts.close)
            found.append(said)
            begun = False
        return ("\n".join(found) if found else None), text

    def _without_calls(self, text: str, tools: Tools) -> tuple[str, list[ToolCall]]:
        """The text without the tool calls in it, and these."""
        calls: list[ToolCall] = []
        rest, at, family = "", 0, self._calls
        while family is not None and (begun := family.open.search(text, at)):
            read = _read(family, begun, text, tools)
            made, end = read or ([], begun.end())
            rest += text[at : begun.start() if made else end]
            calls += made
            at = max(end, at + 1)
        return rest + text[at:], calls

    def _as_declared(
        self, text: str, request: Request, tools: Tools | None
    ) -> tuple[Message, int] | None:
        """As transformers reads it by the tokenizer's own declaration; otherwise as `_as_family`.

        None: it cannot.
        """
        prompt = self._texts.decode(request.prompt_ids)
        try:
            said = self._tokenizer.parse_response(text, prefix=prompt, tools=tools)
            called = (said.get("tool_calls") or []) if tools else []
            calls = [_call(each["function"]) for each in called]
        except Exception:  # a declaration may run into anything that a model writes
            return None
        made = tuple(call for call in calls if call is not None)
        reasoning = next((said[name] for name in _REASONING if said.get(name)), None)
        if len(made) < len(calls) or (reasoning is None and not made):
            return None
        thought = text.find(reasoning) + len(reasoning) if reasoning else 0
        return Message(said.get("content") or "", reasoning, made), thought


_REASONING = ("reasoning_content", "reasoning", "thinking")
"""What declarations call reasoning."""


def _strict(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_strict)


def _read(
    family: _Calls, begun: re.Match[str], text: str, tools: Tools
) -> tuple[list[ToolCall], int] | None:
    """The calls that begin in a text, and where they end; None if they cannot be read."""
    name, at = begun.groupdict().get("name"), begun.end()
    if family.tags is not None:
        closed = family.close.search(text, at)
        if closed is None or name is None:
            return None
        types = _types(tools, name)
        given = family.tags.finditer(text[at : closed.start()])
        values = {each["key"]: _typed(each["value"], types.get(each["key"])) for each in given}
        return [ToolCall(name, _dumped(values))], closed.end()
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None
    if name is not None:
        value = {"name": name, "arguments": value}
    calls = [_call(each) for each in (value if isinstance(value, list) else [value])]
    closed = family.close.match(text, end)
    named = {tool["function"]["name"] for tool in tools}
    if not calls or None in calls:
        return None
    made = [call for call in calls if call is not None]
    if not family.marked and (closed is None or not {call.name for call in made} <= named):
        return None
    return made, closed.end() if closed else end


def _forced(text: str, choice: Any) -> list[ToolCall]:
    """The calls of a completion that must be some (`inputs.tools`); none if it is cut off."""
    try:
        value = _DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return []
    named = choice.get("function") if isinstance(choice, Mapping) else None
    if named is not None:
        value = {**named, "arguments": value}
    calls = [_call(each) for each in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call is not None]


def _call(value: Any) -> ToolCall | None:
    """A call of its name and arguments, an object or JSON text of one; None: it is none."""
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError):
            return None
    return ToolCall(value["name"], _dumped(arguments)) if isinstance(arguments, dict) else None


def _types(tools: Tools, name: str) -> Mapping[str, Any]:
    """What a tool's parameters are, by their names."""
    functions = {tool["function"]["name"]: tool["function"] for tool in tools}
    parameters = functions.get(name, {}).get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _typed(text: str, schema: Any) -> Any:
    """An argument between tags: JSON, unless its tool wants a text."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
