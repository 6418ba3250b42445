"""Every kind of bad input that came to mind, and what becomes of it.

Three jobs over folders of odd files, one for each way in which a row becomes a prompt. Each file
says what is expected of every row: OK, or the class of its error row. Whatever it is, the row is
there once, with its original columns. Files that no job may begin with are further down.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit.footer import from_footer
from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import UserError
from pipeline.inputs.source import read_units
from pipeline.run.plan import JobPlan, plan_job
from tests.conftest import CONTEXT, TinyModels
from tests.pipeline.small_jobs import run

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
        ["MalformedMessages"] * 2,
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
    "lone-surrogate.jsonl": (said(user("\ud800"), user("x")), ["MalformedMessages", OK]),
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
    # ---- Parquet
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
}

INT = pa.array([1], pa.int64())
PLAIN: dict[str, tuple[bytes | pa.Table, list[str]]] = {
    "nulls.parquet": (table(["x", None, ""]), [OK, "NullPrompt", "EmptyPrompt"]),
    "all-null.parquet": (table([None, None], pa.null()), ["NullPrompt"] * 2),
    "integers.parquet": (table([7]), ["MalformedPrompt"]),
    "structs.parquet": (table([{"a": "x"}]), ["MalformedPrompt"]),
    "lists.parquet": (table([["x"]]), ["MalformedPrompt"]),
    "binary.parquet": (table([b"x", b"\xff"]), ["MalformedPrompt"] * 2),
    "decimals.parquet": (table([decimal.Decimal("1.5")]), ["MalformedPrompt"]),
    "timestamps.parquet": (table([2**62], pa.timestamp("us")), ["MalformedValue"]),
    "dates.parquet": (table([datetime.date(2026, 1, 1)]), ["MalformedPrompt"]),
    "large-strings.parquet": (table(["x"], pa.large_string()), [OK]),
    "dictionaries.parquet": (
        table(["x", "y", None], None).cast(
            pa.schema([("prompt", pa.dictionary(pa.int32(), pa.string()))])
        ),
        [OK, OK, "NullPrompt"],
    ),
    "broken-utf8.parquet": (table(BROKEN_UTF8), [OK, "MalformedText"]),
    "broken-utf8-elsewhere.parquet": (table(["x", "y"], other=BROKEN_UTF8), [OK, OK]),
    "ten-thousand-columns.parquet": (table(["x"], **{f"c{i}": INT for i in range(10_000)}), [OK]),
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
    "blanks.jsonl": (jsonl({"prompt": " \n\t"}), [OK]),
    "numbers.jsonl": (jsonl({"prompt": 1.5}, {"prompt": 2.5}), ["MalformedPrompt"] * 2),
    # A column without a type is one of texts, here of JSON; true is not to become 1.0.
    "fraction-or-truth.jsonl": (jsonl({"prompt": 1.5}, {"prompt": True}), [OK] * 2),
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
                    {"max_tokens": 3},
                    {"best_of": 2},
                    {"stop": ["\ud800"]},
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
        ["InvalidSampling"] * 34,
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
                    {"stop_token_ids": [-1, 10**30]},
                    {"stop": ["\0", "👩"]},
                    {"stop": [str(i) * 9 for i in range(2000)]},
                )
            )
        ),
        [OK] * 16,
    ),
    "sampling-ints.parquet": (table(["x"], sampling_params=INT), ["InvalidSampling"]),
    "sampling-bytes.parquet": (table(["x"], sampling_params=[b"{}"]), ["InvalidSampling"]),
    "sampling-map.parquet": (
        table(["x"], sampling_params=pa.array([[("top_k", 3)]], pa.map_(pa.string(), pa.int64()))),
        [OK],
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
    "data.jsonl": (jsonl({"kind": "{{ 1 / 0 }}"}, {"kind": None}, {"kind": "{% for %}"}), [OK] * 3),
    "odd.parquet": (
        pa.table({"kind": pa.array([2**62, 1], pa.timestamp("us"))}),
        ["MalformedValue", OK],
    ),
}


def write(folder: Path, files: dict[str, tuple[bytes | pa.Table, list[str]]]) -> Path:
    for name, (content, _) in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            pq.write_table(content, folder / name)
    return folder


@pytest.fixture(scope="module")
def strict_target(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny target with a chat template that refuses roles, as many models' do."""
    folder = tmp_path_factory.mktemp("models") / "strict"
    shutil.copytree(tiny_models.target, folder)
    template = folder / "chat_template.jinja"
    roles = "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    roles += "{{ raise_exception('no role ' ~ m['role']) }}{% endif %}{% endfor %}"
    template.write_text(roles + template.read_text())
    return str(folder)


def classes(output: Path, kind: str) -> dict[str, str]:
    """Error classes (or OK) of rows by row id."""
    found: dict[str, str] = {}
    for file in (output / kind).glob("*.parquet"):
        rows = pq.read_table(file)
        names = rows["row_id"].to_pylist()
        assert not found.keys() & set(names)
        what = rows["error_class"].to_pylist() if kind == "errors" else [OK] * len(names)
        found.update(zip(names, what, strict=True))
    return found


JOBS = {
    "chat": ({"messages_column": "messages"}, CHAT),
    "plain": ({"prompt_column": "prompt"}, PLAIN),
    "templated": ({"template": TEMPLATE}, TEMPLATED),
}


@pytest.mark.ray
@pytest.mark.parametrize(
    "job", [pytest.param(job, marks=[pytest.mark.slow] * (job == "chat")) for job in JOBS]
)
def test_every_row_becomes_what_the_table_says(
    local_ray: None, tiny_models: TinyModels, strict_target: str, tmp_path: Path, job: str
) -> None:
    how, files = JOBS[job]
    folder, output = tmp_path / "in %41 ü", tmp_path / "out"
    folder.mkdir()
    write(folder, files)
    values = {
        "input": {"paths": [f"{tmp_path}/x/../{folder.name}"], **how},
        "output": str(output),
        "models": {"target": strict_target, "draft": tiny_models.draft},
        "sampling": {"max_new_tokens": 4},
        "speculation": {"policy": "fixed", "k": 2, "verification": "coupled"},
        "actors": {"num_cpus": 2},
    }
    run(values)
    expected = {
        f"{name}:{i}:0": outcome
        for name, (_, outcomes) in files.items()
        for i, outcome in enumerate(outcomes)
    }
    assert classes(output, "completions") | classes(output, "errors") == expected
    for name, (content, outcomes) in files.items():
        rows = written_rows(output, name)
        assert rows is not None or not outcomes
        if rows is None:
            continue
        assert rows.num_rows == len(outcomes)
        if isinstance(content, bytes):
            lines = [line for line in content.split(b"\n") if line.strip()]
            for line, row in zip(lines, rows.to_pylist(), strict=True):
                assert kept(line.strip(b"\r\n"), row), name
        else:
            original = content.replace_schema_metadata(None)
            copy = rows.select(original.column_names)
            assert copy.schema.equals(original.schema), name
            # Parquet calls a list's items `element`, which is no difference, but would be shown.
            assert shown(copy) == shown(original.cast(copy.schema)), name
    # Whatever the names were, nothing was written elsewhere.
    assert {each.name for each in tmp_path.iterdir()} == {folder.name, "out"}


def shown(table: pa.Table) -> list[str]:
    """All of a table as text: NaN is not equal to itself, and some values are none of Python's."""
    columns = [column.combine_chunks() for column in table.columns]
    return [column.to_string(window=10_000, container_window=10_000) for column in columns]


def written_rows(output: Path, name: str) -> pa.Table | None:
    """All rows that came of an input file, completed or not, in its order."""
    tables = []
    for file in (output / "completions").glob("*.parquet"):
        record = from_footer(pq.read_metadata(file).metadata)
        if record.input == name:
            tables.append(pq.read_table(file))
            if record.files.errors:
                tables.append(pq.read_table(output / record.files.errors.name))
    if not tables:
        return None
    rows = pa.concat_tables(tables, promote_options="default")
    numbers = [int(each.split(":")[-2]) for each in rows["row_id"].to_pylist()]
    return rows.take(sorted(range(len(numbers)), key=numbers.__getitem__))


def kept(line: bytes, row: dict[str, Any]) -> bool:
    """Whether an output row still says all that an input line said."""
    if row.get("raw_line") is not None:
        return bool(row["raw_line"] == line.decode(errors="replace"))
    values = json.loads(line)
    return all(
        plain(row[key]) == plain(value) or as_value(row[key]) == plain(value)
        for key, value in values.items()
    )


def plain(value: Any) -> str:
    """A value as text, without the nulls that Arrow fills missing fields with."""

    def full(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: full(v) for k, v in value.items() if v is not None}
        return [full(v) for v in value] if isinstance(value, list) else value

    return json.dumps(full(value), sort_keys=True)


def as_value(text: Any) -> str | None:
    """The same for a value that had no column's type and was kept as JSON."""
    try:
        return plain(json.loads(text))
    except (TypeError, ValueError):
        return None


# ----------------------------------------------------- files that no job begins with

TABLE = table(["x"])


def parquet(rows: pa.Table = TABLE) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    return bytes(sink.getvalue())


TWICE = pa.table([pa.array(["x"]), INT, INT], names=["prompt", "a", "a"])
LINE = jsonl({"prompt": "x"})

REFUSED = {
    "empty.parquet": (b"", "not a readable Parquet file"),
    "text.parquet": (b"prompt\nhello\n" * 9, "not a readable Parquet file"),
    "cut-off.parquet": (parquet()[:-20], "not a readable Parquet file"),
    "beginning-lost.parquet": (parquet()[200:], "not a readable Parquet file"),
    "broken-footer.parquet": (
        parquet()[:-60] + b"\xff" * 52 + parquet()[-8:],
        "not a readable Parquet file",
    ),
    "lines.parquet": (LINE, "not a readable Parquet file"),
    "gzip.jsonl": (gzip.compress(LINE), "is compressed with gzip, though its name says JSON li"),
    "zstd.jsonl": (pa.compress(LINE, "zstd", asbytes=True), "is compressed with zstd"),
    "parquet.jsonl": (parquet(), "is a Parquet file, though its name says JSON lines"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), "is text in UTF-16, not UTF-8"),
    "named.jsonl.gz": (gzip.compress(LINE), "compressed files cannot be cut into units"),
    "named.parquet.zst": (b"", "compressed files cannot be cut into units"),
    "table.csv": (b"prompt\nx", "not one of .parquet, .jsonl, .ndjson"),
    "reserved.parquet": (parquet(table(["x"], completion=INT)), "column 'completion' has the name"),
    "reserved.jsonl": (jsonl({"prompt": "x", "row_id": 1}), "column 'row_id' has the name of an"),
    "columns-twice.parquet": (parquet(TWICE), "two columns are named 'a'; rename one"),
    "no-such-column.parquet": (parquet(pa.table({"q": ["x"]})), "no column 'prompt'; its columns"),
    "no-such-key.jsonl": (jsonl({"q": "x"}), "no column 'prompt'; its columns: q"),
    "no-object-at-all.jsonl": (b"hello\n", "no column 'prompt'; its columns: none"),
}


def planned(path: Path | str, output: Path) -> JobPlan:
    values = {
        "input": {"paths": [str(path)], "prompt_column": "prompt"},
        "output": str(output),
        "models": {"target": "any"},
        "speculation": {"policy": "none"},
    }
    return plan_job(JobConfig.model_validate(values))


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.jsonl").write_bytes(LINE)
    file = tmp_path / "in" / name
    file.write_bytes(content)
    # By name, by glob, and (what is of another kind is left out there) in a folder.
    for path in (
        file,
        tmp_path / "in" / "*",
        *([tmp_path / "in"] if file.suffix != ".csv" else []),
    ):
        with pytest.raises(UserError) as caught:
            planned(path, tmp_path / "out")
        assert message in str(caught.value)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_files_of_odd_names_are_found(tmp_path: Path) -> None:
    names = ["_hidden.jsonl", "[a].jsonl", "per%20cent.jsonl", "new\nline.jsonl", "-x.jsonl"]
    for name in names:
        (tmp_path / name).write_bytes(LINE)
        assert planned(tmp_path / name, tmp_path / "out").rows == 1
    assert planned(f"{tmp_path}/nothing/../*.jsonl", tmp_path / "out").rows == len(names) - 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root to become somebody else")
def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp())  # tmp_path is in a folder of root's
    try:
        folder.chmod(0o755)
        (folder / "a.jsonl").write_bytes(LINE)
        (folder / "a.jsonl").chmod(0o600)
        (folder / "closed").mkdir(mode=0o700)
        (folder / "closed" / "b.jsonl").write_bytes(LINE)
        os.seteuid(65534)
        for path in ("a.jsonl", "closed", "closed/b.jsonl", "closed/*.jsonl"):
            with pytest.raises(UserError) as caught:
                planned(folder / path, folder / "out")
            assert str(folder) in str(caught.value), path
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


CHANGES: dict[str, Callable[[Path], object]] = {
    "is gone": lambda file: file.unlink(),
    "has changed since the job was planned": lambda file: change(file, 5),
    "not a readable Parquet file": lambda file: damage(file),
}


def change(file: Path, rows: int) -> None:
    if file.suffix == ".parquet":
        pq.write_table(table(["y"] * rows), file)
    else:
        file.write_bytes(b"\n" * file.stat().st_size)


def damage(file: Path) -> None:
    """Bad bytes that neither size nor date betrays."""
    data, stat = file.read_bytes(), file.stat()
    file.write_bytes(data[:4] + b"\xff" * 200 + data[204:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("message", CHANGES)
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_files_that_change_after_the_plan(tmp_path: Path, suffix: str, message: str) -> None:
    file = tmp_path / f"a.{suffix}"
    prompts = [f"row {i}" for i in range(100)]
    if suffix == "parquet":
        pq.write_table(table(prompts), file)
    elif "Parquet" in message:
        pytest.skip("any bytes are lines")
    else:
        file.write_bytes(jsonl(*({"prompt": prompt} for prompt in prompts)))
    plan = planned(file, tmp_path / "out")
    CHANGES[message](file)
    with pytest.raises(UserError) as caught:
        list(read_units(plan.units, plan.files[0].schema, S3Config()))
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_whose_input_vanishes(
    local_ray: None, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "b.jsonl").write_bytes(LINE)
    monkeypatch.setattr(
        "pipeline.run.ray_session.check_resources", lambda *_: (tmp_path / "b.jsonl").unlink()
    )
    values = {
        "input": {"paths": [f"{tmp_path}/*.jsonl"], "prompt_column": "prompt"},
        "output": str(tmp_path / "out"),
        "models": {"target": tiny_models.target},
        "sampling": {"max_new_tokens": 4},
        "speculation": {"policy": "none"},
        "actors": {"num_cpus": 2},
    }
    with pytest.raises(UserError, match=r"b\.jsonl: .*is gone.*; restore it"):
        run(values)
    # The same command resumes, once the file is there again.
    (tmp_path / "b.jsonl").write_bytes(LINE)
    monkeypatch.undo()
    assert run(values).summary["rows"] == 2
