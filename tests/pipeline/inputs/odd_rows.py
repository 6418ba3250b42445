"""Every kind of bad row that came to mind, and what becomes of it.

Three tables of odd files, one for each way in which a row becomes a prompt. Each file says what is
expected of every row: OK, or the class of its error row.
"""

from __future__ import annotations

import datetime
import decimal
import json
from typing import Any

import pyarrow as pa

from tests.conftest import CONTEXT
from tests.pipeline.inputs.every_type import EVERY_TYPE

OK = "OK"
HI = [{"role": "user", "content": "hi"}]


def jsonl(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def said(*messages: Any) -> bytes:
    """A line for each conversation."""
    return jsonl(*({"messages": each, "tag": i} for i, each in enumerate(messages)))


def user(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


def table(prompt: Any, type: pa.DataType | None = None, **more: Any) -> pa.Table:
    return pa.table({"prompt": pa.array(prompt, type), **more})


def ipc(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return bytes(sink.getvalue())


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


BROKEN_UTF8 = pa.Array.from_buffers(
    pa.string(),
    2,
    [None, pa.array([0, 2, 4], pa.int32()).buffers()[1], pa.py_buffer(b"ok\xff\xfe")],
)
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
# <s>, <|user|>, </s> and <|assistant|> are a token each, and so is every ASCII letter.
LONGEST = CONTEXT - 1 - 4


# What each row of a file becomes, by the name of the file.
CHAT: dict[str, tuple[bytes | pa.Table, list[str]]] = {
    # ---- messages that are not
    "null-messages.jsonl": (said(None), ["NullPrompt"]),
    "no-key-at-all.jsonl": (said(HI) + b'{"tag": 1}\n', [OK, "NullPrompt"]),
    "no-messages.jsonl": (said([]), ["EmptyMessages"]),
    "a-number.jsonl": (said(7), ["MalformedMessages"]),
    "a-word.jsonl": (said("hello"), ["MalformedMessages"]),
    "one-object.jsonl": (said(HI[0]), ["MalformedMessages"]),
    "list-of-words.jsonl": (said(["hi", "ho"]), ["MalformedMessages"]),
    "list-with-null.jsonl": (said([None]), ["MalformedMessages"]),
    "no-role.jsonl": (said([{"content": "hi"}]), ["MalformedMessages"]),
    "role-is-a-number.jsonl": (said([{"role": 1, "content": "hi"}]), ["MalformedMessages"]),
    "no-content.jsonl": (said([{"role": "user"}]), ["MalformedMessages"]),
    "content-is-null.jsonl": (said(user(None)), ["MalformedMessages"]),
    "content-is-a-number.jsonl": (said(user(3)), ["MalformedMessages"]),
    # ---- messages that are unusual
    "json-as-text.jsonl": (
        said(json.dumps(HI), "[{", "null"),
        [OK, "MalformedMessages", "NullPrompt"],
    ),
    "empty-content.jsonl": (said(user("")), [OK]),
    "unknown-role.jsonl": (said([{"role": "wizard", "content": "hi"}]), ["MalformedMessages"]),
    "system-refused.jsonl": (
        said([{"role": "system", "content": "be"}, *HI]),
        ["MalformedMessages"],
    ),
    "surrogates-in-names.jsonl": (
        said([{"role": "\ud800", "content": "x"}], user([{"type": "\ud800"}])),
        ["MalformedLine"] * 2,
    ),
    "no-tool-calls.jsonl": (said(user("hi", tool_calls=[])), [OK]),
    "content-parts.jsonl": (
        said(user([{"type": "text", "text": "hi"}, {"type": "text", "text": " you"}])),
        [OK],
    ),
    "content-image.jsonl": (
        said(user([{"type": "image_url", "image_url": {"url": "x"}}])),
        ["MalformedMessages"],
    ),
    "tool-calls.jsonl": (
        said([*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}]),
        ["MalformedMessages"],
    ),
    "extra-keys.jsonl": (said(user("hi", name="Ann", weight=1)), [OK]),
    "emoji-and-rtl.jsonl": (
        said(user("👩‍👩‍👧‍👦🏳️‍🌈"), user("مرحبا \u202eabc"), user("שלום"), user("ﷺ\u0301" * 9)),
        [OK] * 4,
    ),
    "null-bytes.jsonl": (said(user("a\0b\0")), [OK]),
    "control-characters.jsonl": (said(user("\x01\x1b[31m\x7f\u2028\ufeff")), [OK]),
    "lone-surrogate.jsonl": (said(user("\ud800"), user("x")), ["MalformedLine", OK]),
    "special-tokens-in-text.jsonl": (said(user("</s><s><|assistant|>")), [OK]),
    # ---- lengths
    "longest-prompt.jsonl": (said(user("x" * LONGEST)), [OK]),
    "one-token-too-long.jsonl": (said(user("x" * (LONGEST + 1))), ["PromptTooLong"]),
    "fifty-megabytes.jsonl": (said(user("x" * 50_000_000), user("x")), ["PromptTooLong", OK]),
    # ---- lines
    "not-json.jsonl": (
        b"hello\n" + said(HI) + b"{'a': 1}\n",
        ["MalformedLine", OK, "MalformedLine"],
    ),
    "cut-off.jsonl": (said(HI) + said(HI)[:-9], [OK, "MalformedLine"]),
    "not-objects.jsonl": (said(HI) + b'[1]\n7\n"x"\nnull\n', [OK, *["MalformedLine"] * 4]),
    "two-on-a-line.jsonl": (said(HI) + said(HI).strip() * 2, [OK, "MalformedLine"]),
    "one-array-over-lines.jsonl": (
        said(HI) + b"[\n{\n}\n]\n",
        [OK, "MalformedLine", "MalformedLine", "MalformedLine", "MalformedLine"],
    ),
    "bom-and-crlf.jsonl": (b"\xef\xbb\xbf" + (said(HI) * 2).replace(b"\n", b"\r\n"), [OK, OK]),
    "bom-amid.jsonl": ((b"\xef\xbb\xbf" + said(HI)) * 2, [OK, OK]),
    "bom-alone.jsonl": (b"\xef\xbb\xbf\r\n", []),
    "blank-lines.jsonl": (b"\n \n" + said(HI) + b"\r\n\n" + said(HI).strip(), [OK, OK]),
    "not-utf8.jsonl": (said(HI) + b'{"messages": "\xff\xfe"}\n', [OK, "MalformedLine"]),
    "nan-and-infinity.jsonl": (
        b'{"messages": [{"role": "user", "content": "x"}], "a": NaN, "b": -Infinity}\n',
        [OK],
    ),
    "beyond-64-bit.jsonl": (
        jsonl({"messages": HI, "n": 2**70}, {"messages": HI, "n": -1}),
        [OK, OK],
    ),
    "five-thousand-digits.jsonl": (
        said(HI) + b'{"messages": null, "n": ' + b"9" * 5000 + b"}\n",
        [OK, "MalformedLine"],
    ),
    "types-differ-by-line.jsonl": (
        jsonl(
            {"messages": HI, "x": 1},
            {"messages": HI, "x": "a"},
            {"messages": HI, "x": [{}]},
            {"messages": HI, "x": {"y": None}},
        ),
        [OK] * 4,
    ),
    "messages-differ-by-line.jsonl": (
        said(HI, "no", 3, user("x", name="A"), user(["x"])),
        [OK, "MalformedMessages", "MalformedMessages", OK, "MalformedMessages"],
    ),
    "nested-100-deep.jsonl": (jsonl({"messages": HI, "deep": json.loads(nested(100))}), [OK]),
    "nested-900-deep.jsonl": (
        said(HI) + jsonl({"messages": HI, "deep": json.loads(nested(900))}),
        [OK, "MalformedLine"],
    ),
    "nested-100000-deep.jsonl": (
        said(HI) + nested(100_000).encode() + b"\n",
        [OK, "MalformedLine"],
    ),
    "duplicate-ids.jsonl": (jsonl(*[{"id": 1, "messages": HI}] * 3), [OK] * 3),
    "duplicate-keys.jsonl": (
        b'{"messages": 1, "messages": [{"role": "user", "content": "x"}]}\n',
        [OK],
    ),
    "empty-key.jsonl": (jsonl({"messages": HI, "": 1, " ": 2, "a.b": 3, "\0": 4}), [OK]),
    "surrogate-key.jsonl": (said(HI) + jsonl({"messages": HI, "\ud800": 1}), [OK, "MalformedLine"]),
    "late-reserved-key.jsonl": (
        said(*[HI] * 9, user("x" * 1_100_000)) + jsonl({"messages": HI, "completion": "mine"}),
        [*[OK] * 9, "PromptTooLong", "ReservedColumn"],
    ),
    "empty-objects.jsonl": (said(HI) + b'{}\n{"x": {}}\n', [OK, "NullPrompt", "NullPrompt"]),
    "zero-bytes.jsonl": (b"", []),
    "only-newlines.jsonl": (b"\n\n\r\n", []),
    "UPPER.JSONL": (said(HI), [OK]),
    "with space %41 ü 漢字 [a]*?.jsonl": (said(HI), [OK]),
}

INT = pa.array([1], pa.int64())
PLAIN: dict[str, tuple[bytes | pa.Table, list[str]]] = {
    "nulls.parquet": (table(["x", None, ""]), [OK, "NullPrompt", "EmptyPrompt"]),
    "all-null.parquet": (table([None, None], pa.null()), ["NullPrompt"] * 2),
    "large-strings.parquet": (table(["x"], pa.large_string()), [OK]),
    "dictionaries.parquet": (
        table(["x", "y", None], None).cast(
            pa.schema([("prompt", pa.dictionary(pa.int32(), pa.string()))])
        ),
        [OK, OK, "NullPrompt"],
    ),
    "every-type.parquet": (table(["x", "y"], **EVERY_TYPE), [OK, OK]),
    "nested-columns.parquet": (table(["x"], a=[[{"b": [{"c": {"d": 1}}]}]]), [OK]),
    "odd-columns.parquet": (
        table(
            ["x"],
            t=pa.array([2**62], pa.timestamp("ns")),
            d=pa.array([decimal.Decimal(10) ** 30], pa.decimal128(38)),
            b=pa.array([b"\0\xff"]),
            m=pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
            e=pa.array([None], pa.null()),
            f=pa.array([float("nan")]),
            h=pa.array([datetime.time(1)]),
        ),
        [OK],
    ),
    "pandas.parquet": (table(["x"]).replace_schema_metadata({"pandas": "{}", "k": "v"}), [OK]),
    "no-rows.parquet": (table([], pa.string()), []),
    "no-rows-other-columns.parquet": (pa.table({"y": pa.array([], pa.string())}), []),
    "numbers.jsonl": (jsonl({"prompt": 1.5}, {"prompt": True}), ["MalformedValue"] * 2),
    "text.csv": (
        b'\xef\xbb\xbfprompt,csv\r\nx,007\r\n"a ""b""\r\n\r\nc",\r\n"",1\r\nonly\r\n"\xff",2\r\n',
        [OK, OK, "EmptyPrompt", "MalformedLine", "MalformedLine"],
    ),
    "text.tsv": (b'csv\tprompt\n5" disk\tx, y', [OK]),
    "file.arrow": (ipc(table(["x", None])), [OK, "NullPrompt"]),
    "blanks.jsonl": (jsonl({"prompt": " \n\t"}), [OK]),
    "surrogates.jsonl": (
        jsonl({"prompt": "x"}, {"prompt": "x", "y": "\udfff"}, {"prompt": "\udfff"}),
        [OK, "MalformedLine", "MalformedLine"],
    ),
    "bytes.jsonl": (jsonl({"prompt": "\u0000"}), [OK]),
    # ---- sampling_params, of every wrong kind
    "sampling.jsonl": (
        jsonl(
            *(
                {"prompt": "x", "sampling_params": params}
                for params in (
                    {"n": 0},
                    {"n": -1},
                    {"n": "two"},
                    {"temperature": -1},
                    {"temperature": "hot"},
                    {"temperature": 1e-9},
                    {"temperature": float("nan")},
                    {"temperature": float("inf")},
                    {"temperature": True},
                    {"top_p": 0},
                    {"top_p": 1.1},
                    {"top_k": -1},
                    {"top_k": 1.5},
                    {"min_p": 2},
                    {"max_new_tokens": 0},
                    {"max_new_tokens": "10"},
                    {"stop": [1]},
                    {"stop": [""]},
                    {"stop": {"a": 1}},
                    {"stop_token_ids": ["a"]},
                    {"stop_token_ids": [1.5]},
                    {"ignore_eos": "yes"},
                    {"seed": "x"},
                    {"temprature": 1},
                    {"max_token": 3},
                    {"max_tokens": 3, "max_new_tokens": 4},
                    {"best_of": 2},
                    {"stop": ["\ud800"]},
                    {"stop": ["\ufffd"]},
                    {"stop_token_ids": [-1, 10**30]},
                    {"\ud800": 1},
                    {"stop_token_ids": "x" * 10_000},
                    7,
                    [1],
                    "text",
                    "[1]",
                    True,
                )
            )
        ),
        [
            *["InvalidSampling"] * 27,
            "MalformedLine",
            *["InvalidSampling"] * 2,
            "MalformedLine",
            *["InvalidSampling"] * 6,
        ],
    ),
    "sampling-extremes.jsonl": (
        jsonl(
            *(
                {"prompt": "x", "sampling_params": params}
                for params in (
                    None,
                    {},
                    "{}",
                    "null",
                    {"n": 1},
                    {"max_new_tokens": 10**30},
                    {"top_k": 10**30},
                    {"seed": -1},
                    {"seed": 2**80},
                    {"temperature": 1e300},
                    {"temperature": 1e-5},
                    {"top_p": 1e-300},
                    {"min_p": 1, "temperature": 5},
                    {"stop": ["\0", "👩", "<|user|>", "</s>", "a<|user|>b"]},
                    {"stop": [str(i) * 9 for i in range(2000)]},
                )
            )
        ),
        [OK] * 15,
    ),
}

TEMPLATE = (
    "{% if kind == 'raise' %}{{ 1 / 0 }}{% elif kind == 'attribute' %}{{ kind.__class__.__mro__ }}"
    "{% elif kind == 'undefined' %}{{ kind.nothing }}{% elif kind == 'range' %}"
    "{{ range(10 ** 9) | list }}{% elif kind == 'loops' %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% endfor %}{% endfor %}{% elif kind == 'product' %}"
    "{{ 'x' * 10 ** 11 }}{% elif kind == 'power' %}{{ 9 ** (9 ** 9) }}{% elif kind == 'doubling' %}"
    "{% set ns = namespace(x='xx') %}"
    "{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    "{% elif kind == 'macro' %}{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}"
    "{% elif kind == 'pad' %}{{ 'x'.ljust(10 ** 11) }}{% elif kind == 'filter' %}"
    "{{ 'x' | center(10 ** 11) }}{% elif kind == 'width' %}{{ '%99999999999d' | format(1) }}"
    "{% else %}Q: {{ kind }}{% endif %}"
)
BOMBS = (
    "raise",
    "attribute",
    "undefined",
    "range",
    "loops",
    "product",
    "power",
    "doubling",
    "macro",
    "pad",
    "filter",
    "width",
)
TEMPLATED: dict[str, tuple[bytes | pa.Table, list[str]]] = {
    "bombs.jsonl": (jsonl(*({"kind": kind} for kind in BOMBS)), ["TemplateError"] * len(BOMBS)),
    "data.jsonl": (jsonl({"kind": "{{ 1 / 0 }}"}, {"kind": "{% for %}"}), [OK] * 2),
    "nulls.jsonl": (b'{"kind": "x"}\n{"kind": null}\n{}\n', [OK, "NullValue", "NullValue"]),
}

# Files whose columns have other types than those above: each is a job of its own.
CHAT_ALONE: dict[str, tuple[bytes | pa.Table, list[str]]] = {
    "messages-as-struct.parquet": (
        pa.table({"messages": pa.array([{"role": "user", "content": "x"}])}),
        ["MalformedMessages"],
    ),
    "messages-as-map.parquet": (
        pa.table(
            {
                "messages": pa.array(
                    [[[("role", "user"), ("content", "x")]]],
                    pa.list_(pa.map_(pa.string(), pa.string())),
                )
            }
        ),
        [OK],
    ),
    "messages-broken-utf8.parquet": (
        pa.table({"messages": BROKEN_UTF8}),
        ["MalformedMessages", "MalformedText"],
    ),
    "fields-others-have.parquet": (
        pa.table({"messages": [HI, user("x", name="A", tool_calls=None)]}),
        [OK, OK],
    ),
    "strays.jsonl": (
        said(HI, "no", 3, user("x", name="A"), user(4), HI),
        [OK, "MalformedValue", "MalformedValue", OK, "MalformedValue", OK],
    ),
}
PLAIN_ALONE: dict[str, tuple[bytes | pa.Table, list[str]]] = {
    "broken-utf8.parquet": (table(BROKEN_UTF8), [OK, "MalformedText"]),
    "broken-utf8-elsewhere.parquet": (table(["x", "y"], other=BROKEN_UTF8), [OK, OK]),
    "ten-thousand-columns.parquet": (table(["x"], **{f"c{i}": INT for i in range(10_000)}), [OK]),
    "integers.parquet": (table([7]), ["MalformedPrompt"]),
    "structs.parquet": (table([{"a": "x"}]), ["MalformedPrompt"]),
    "lists.parquet": (table([["x"]]), ["MalformedPrompt"]),
    "binary.parquet": (table([b"x", b"\xff"]), ["MalformedPrompt"] * 2),
    "decimals.parquet": (table([decimal.Decimal("1.5")]), ["MalformedPrompt"]),
    "timestamps.parquet": (table([2**62], pa.timestamp("us")), ["MalformedValue"]),
    "dates.parquet": (table([datetime.date(2026, 1, 1)]), ["MalformedPrompt"]),
    "numbers.jsonl": (jsonl({"prompt": 1.5}, {"prompt": 2.5}), ["MalformedPrompt"] * 2),
    # A column without a type is one of texts, here of JSON; true is not to become 1.0.
    "fraction-or-truth.jsonl": (jsonl({"prompt": 1.5}, {"prompt": True}), [OK] * 2),
    "sampling-ints.parquet": (table(["x"], sampling_params=INT), ["InvalidSampling"]),
    "sampling-bytes.parquet": (table(["x"], sampling_params=[b"{}"]), ["InvalidSampling"]),
    "sampling-map.parquet": (
        table(["x"], sampling_params=pa.array([[("top_k", 3)]], pa.map_(pa.string(), pa.int64()))),
        [OK],
    ),
}
TEMPLATED_ALONE: dict[str, tuple[bytes | pa.Table, list[str]]] = {
    "nan.parquet": (pa.table({"kind": [1.5, float("nan"), None]}), [OK, "NullValue", "NullValue"]),
    "odd.parquet": (
        pa.table({"kind": pa.array([2**62, 1], pa.timestamp("us"))}),
        ["MalformedValue", OK],
    ),
}
