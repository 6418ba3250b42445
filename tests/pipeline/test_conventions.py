"""What completions say, by the conventions of the families of chat templates."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.conventions import Conventions, Message, ToolCall
from pipeline.texts import Texts
from specdec.request import Completion, Request, SamplingParams
from tests.pipeline.tiny_tokenizers import chat_like

FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Hermes": ("<tool_call> </think>", ()),
    "Qwen3-Coder": ("<tool_call> <function= </think>", ()),
    "GLM": ("<tool_call> <arg_key> </think>", ()),
    "Mistral": ("[TOOL_CALLS] [/THINK]", ("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]")),
    "DeepSeek": (
        "<｜tool▁call▁begin｜> </think>",
        (
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
        ),
    ),
    "gpt-oss": (
        "<|channel|>analysis<|message|> to=functions.",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>"),
    ),
    "Llama 3": ("Environment: ipython", ("<|python_tag|>",)),
    "Granite": ("<|tool_call|>", ("<|tool_call|>",)),
    "none": ("{{ messages }}", ()),
}
"""What stands in their chat templates, and their special tokens."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
PARIS = ToolCall("weather", '{"city": "Paris", "days": 2}')
ASKED = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'


@cache
def tokenizer_of(family: str) -> Any:
    text, special = FAMILIES[family]
    return chat_like("{# " + text + " #}{{ messages }}", special, ("<think>", "</think>"))


def ids_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def read(
    family: str, text: str, prompt: str = "", tools: Any = (WEATHER,), **sampling: Any
) -> Message:
    tokenizer = tokenizer_of(family)
    prompt_ids = ids_of(tokenizer, f"<|im_start|>user\nHi<think><|im_end|>\n<|im_start|>{prompt}")
    output = ids_of(tokenizer, text)
    ended = output[-1] if text.endswith("<|im_end|>") else None
    request = Request("a", prompt_ids, SamplingParams(**sampling))
    done = Completion("a", len(prompt_ids), output, "stop" if ended else "length", ended)
    return Conventions(tokenizer, Texts(tokenizer)).message(request, done, tools and list(tools))


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("Hermes", "Paris.<|im_end|>", Message("Paris.")),
        (
            "Hermes",
            f"<think>\nHm.\n</think>\n\nI ask.\n<tool_call>\n{ASKED}\n</tool_call>\n<tool_call>"
            f"{ASKED}</tool_call><|im_end|>",
            Message("I ask.", "Hm.", (PARIS, PARIS)),
        ),
        # What a text argument holds ends nothing; a missing end does no harm.
        (
            "Hermes",
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>}"}}<|im_end|>',
            Message("", None, (ToolCall("f", '{"x": "</tool_call>}"}'),)),
        ),
        (
            "Qwen3-Coder",
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
            "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call><|im_end|>",
            Message("", None, (PARIS,)),
        ),
        (
            "GLM",
            "\n<think>Hm.</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n"
            "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key><arg_value>2</arg_value>\n"
            "</tool_call><|im_end|>",
            Message("", "Hm.", (PARIS,)),
        ),
        ("Mistral", f"[TOOL_CALLS] [{ASKED}, {ASKED}]<|im_end|>", Message("", None, (PARIS,) * 2)),
        (
            "Mistral",
            '[THINK]Hm.[/THINK]So:[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 2}<|im_end|>',
            Message("So:", "Hm.", (PARIS,)),
        ),
        (
            "DeepSeek",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
            '{"city": "Paris", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><|im_end|>',
            Message("", None, (PARIS,)),
        ),
        (
            "DeepSeek",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
            '{"city": "Paris", "days": 2}<｜tool▁call▁end｜><|im_end|>',
            Message("", None, (PARIS,)),
        ),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
            'to=functions.weather <|constrain|>json<|message|>{"city": "Paris", "days": 2}'
            "<|call|>",
            Message("", "Hm.", (PARIS,)),
        ),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final"
            "<|message|>Paris.<|im_end|>",
            Message("Paris.", "Hm."),
        ),
        (
            "Llama 3",
            '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris", "days": 2}}; '
            f"{ASKED}<|im_end|>",
            Message("", None, (PARIS, PARIS)),
        ),
        # JSON that calls none of the tools is an answer.
        (
            "Llama 3",
            '{"name": "Paris", "parameters": {}}',
            Message('{"name": "Paris", "parameters": {}}'),
        ),
        ("Granite", f"<|tool_call|>[{ASKED}]<|im_end|>", Message("", None, (PARIS,))),
        ("none", f"<tool_call>{ASKED}</tool_call>", Message(f"<tool_call>{ASKED}</tool_call>")),
    ],
)
def test_what_each_family_writes(family: str, text: str, expected: Message) -> None:
    assert read(family, text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{bad}</tool_call>",
        '<tool_call>{"name": "weather", "argu',
        '<tool_call>{"name": 7, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>',
        "<tool_call>" + "[" * 5000,
    ],
)
def test_what_is_no_call_stays_text_beside_those_that_are(text: str) -> None:
    assert read("Hermes", text) == Message(text)
    assert read("Hermes", f"<tool_call>{ASKED}</tool_call>{text}") == Message(text, None, (PARIS,))


def test_a_model_that_was_told_of_no_tools_calls_none() -> None:
    text = f"<think>Hm.</think><tool_call>{ASKED}</tool_call>"
    assert read("Hermes", text, tools=None) == Message(f"<tool_call>{ASKED}</tool_call>", "Hm.")


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("assistant\n<think>\n", "Hm.\n</think>\n\nParis.", Message("Paris.", "Hm.")),
        ("assistant\n<think>\n", "Hm", Message("", "Hm")),  # cut off
        ("assistant\n<think>\n\n</think>\n\n", "Paris.", Message("Paris.")),
        ("assistant\n<think>\nSo", " it is.</think>Paris.", Message("Paris.", "it is.")),
        ("assistant\n", "Paris. <think>", Message("Paris. <think>")),
    ],
)
def test_reasoning_that_the_prompt_has_begun(prompt: str, text: str, expected: Message) -> None:
    """A mark in a user's message begins nothing."""
    assert read("Hermes", text, prompt) == expected


def test_special_tokens_in_the_parts() -> None:
    text = "<think>a<|im_start|></think>b<|im_start|>"
    assert read("Hermes", text) == Message("b", "a")
    shown = read("Hermes", text, skip_special_tokens=False)
    assert shown == Message("b<|im_start|>", "a<|im_start|>")


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", ASKED, "{", '"', " a", "\n", "é"]


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12))
def test_nothing_that_a_model_writes_is_an_error_or_is_lost(pieces: list[str]) -> None:
    text = "".join(pieces)
    found = read("Hermes", text)
    assert len(found.tool_calls) <= text.count(ASKED)
    parts = [found.content, found.reasoning or "", *(ASKED for _ in found.tool_calls)]
    marks = sum(map(len, ("<think>", "</think>", "<tool_call>", "</tool_call>")))
    kept = sum(len("".join(part.split())) for part in parts)
    assert len("".join(text.split())) - kept <= marks * max(1, len(pieces))


@pytest.mark.parametrize(
    ("family", "prompt", "thought", "rest"),
    [
        ("Hermes", "", "<think>Hm, hm.</think>", "\n\nParis.<|im_end|>"),
        ("Hermes", "assistant\n<think>", "Hm.</think>", "Paris.<|im_end|>"),
        ("Hermes", "assistant\n<think>", "Hm, and no end", ""),
        ("Mistral", "", "[THINK]Hm.[/THINK]", "So.<|im_end|>"),
        ("Hermes", "", "", "Paris.<|im_end|>"),
    ],
)
def test_tokens_of_reasoning_end_with_its_mark(
    family: str, prompt: str, thought: str, rest: str
) -> None:
    said = read(family, thought + rest, prompt)
    assert said.reasoning_tokens == len(ids_of(tokenizer_of(family), thought))


@pytest.mark.parametrize(
    ("choice", "text", "expected"),
    [
        ("required", f"[{ASKED}, {ASKED}]", Message("", None, (PARIS, PARIS))),
        ({"function": {"name": "weather"}}, PARIS.arguments, Message("", None, (PARIS,))),
        ("required", f"[{ASKED}, ", Message(f"[{ASKED}, ")),
    ],
)
def test_calls_that_had_to_be(choice: Any, text: str, expected: Message) -> None:
    """Also behind a prompt that begins reasoning: the structure leaves none."""
    tokenizer = tokenizer_of("Hermes")
    prompt = ids_of(tokenizer, "<|im_start|>assistant\n<think>\n")
    done = Completion("a", len(prompt), ids_of(tokenizer, text), "stop")
    conventions = Conventions(tokenizer, Texts(tokenizer))
    assert conventions.message(Request("a", prompt), done, [WEATHER], choice) == expected


def test_a_declaration_of_the_tokenizer_goes_before() -> None:
    tokenizer = chat_like("{{ messages }}")
    tokenizer.response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "reasoning_content": {"open": "<r>", "close": "</r>"},
            "tool_calls": {
                "open": "<c>",
                "close": "</c>",
                "repeats": True,
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"close": "<|im_end|>"},
        },
    }
    conventions = Conventions(tokenizer, Texts(tokenizer))
    prompt = ids_of(tokenizer, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<r>")

    def said(text: str) -> Message:
        output = ids_of(tokenizer, text)
        done = Completion("a", len(prompt), output, "stop", output[-1])
        return conventions.message(Request("a", prompt), done, [WEATHER])

    called = f"<c>{ASKED}</c>"
    assert conventions.known
    thought = said(f"Hm.</r>{called}<|im_end|>")
    assert thought == Message("", "Hm.", (PARIS,))
    assert thought.reasoning_tokens == len(ids_of(tokenizer, "Hm."))
    assert said("Hm.</r><c>{bad</c><|im_end|>") == Message("Hm.</r><c>{bad</c>")
    assert json.loads(PARIS.arguments)["days"] == 2
