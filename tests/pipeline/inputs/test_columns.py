from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.commit.files import parquet_bytes
from pipeline.commit.schema import Failed, Finished, completions_table, errors_table
from pipeline.config.job import S3Config
from pipeline.conventions import Message, ToolCall
from pipeline.errors import RowError, UserError
from pipeline.inputs.columns import NoCommonType, common, conformed, stored, taken
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.source import read_units
from pipeline.inputs.units import FilePlan, Unit, check_added, plan_files
from pipeline.layout import (
    CONTENT,
    LOGPROBS,
    MESSAGE,
    OPTIONAL_COLUMNS,
    OUTPUT_TOKEN_IDS,
    PARSED,
    PROMPT_LOGPROBS,
    REASONING,
    TOOL_CALLS,
)
from specdec.request import Completion, TokenLogprob
from tests.pipeline.inputs.every_type import EVERY_TYPE

S3 = S3Config()


def planned(folder: Path, **files: pa.Table | bytes) -> list[FilePlan]:
    """Files, by their names without the extension."""
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / f"{name}.jsonl").write_bytes(content)
        else:
            pq.write_table(content, folder / f"{name}.parquet")
    return plan_files(list_inputs([str(folder)], S3), S3, 100)


def read_back(content: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(content))


@pytest.mark.parametrize("name", EVERY_TYPE)
def test_every_type_that_parquet_holds_comes_through(name: str, tmp_path: Path) -> None:
    """From the input to completions and errors, whether it was taken apart or not."""
    (plan,) = planned(tmp_path, a=pa.table({"p": ["x", "y"], name: EVERY_TYPE[name]}))
    (rows,) = read_units([Unit.of(*plan.pieces)], plan.table, S3)
    kind = plan.table.field(name).type
    original = EVERY_TYPE[name]
    storage = original.storage if isinstance(original, pa.ExtensionArray) else original
    # As Python has them; what the table has another type for, by Arrow's cast.
    other = pa.types.is_map(storage.type) or pa.types.is_decimal256(storage.type)
    wanted = (storage.cast(kind) if other else storage).to_pylist()
    assert wanted[0] is not None or pa.types.is_null(storage.type)
    failed = Failed(RowError("Unlucky", "why"), 1)
    done = Finished("x", Completion("a", 1, (1,), "stop"))
    for outcome, write in ((done, completions_table), (failed, errors_table)):
        table = read_back(parquet_bytes(write(rows, [[outcome], [outcome] * 2])))
        assert table.schema.field(name).type == kind
        assert table[name].to_pylist() == [*wanted, wanted[1]]
        assert stored(table.schema.field(name).type) == kind


def test_optional_columns_stand_last_and_only_where_they_are_asked_for(tmp_path: Path) -> None:
    (plan,) = planned(tmp_path, a=pa.table({"p": ["x", "y"]}))
    (rows,) = read_units([Unit.of(*plan.pieces)], plan.table, S3)
    told = (TokenLogprob(7, -0.5, ((7, -0.5), (3, -1.0))),)
    done = [
        [
            Finished(
                "x", Completion("a", 1, (7,), "stop", logprobs=told, prompt_logprobs=(None, *told))
            )
        ],
        [Finished("y", Completion("b", 1, (3, 4), "stop"))],
    ]
    assert not set(OPTIONAL_COLUMNS) & set(completions_table(rows, done).column_names)
    names = (LOGPROBS, PROMPT_LOGPROBS, OUTPUT_TOKEN_IDS)
    table = read_back(
        parquet_bytes(completions_table(rows, done, names, lambda token: f"t{token}"))
    )
    assert tuple(table.column_names[-3:]) == names
    assert table[OUTPUT_TOKEN_IDS].to_pylist() == [[7], [3, 4]]
    top = [
        {"token": "t7", "token_id": 7, "logprob": -0.5},
        {"token": "t3", "token_id": 3, "logprob": -1.0},
    ]
    assert table[LOGPROBS].to_pylist() == [[{**top[0], "top": top}], None]
    assert table[PROMPT_LOGPROBS].to_pylist() == [[None, {**top[0], "top": top}], None]


def test_what_a_completion_says_in_columns(tmp_path: Path) -> None:
    (plan,) = planned(tmp_path, a=pa.table({"p": ["x", "y", "z"]}))
    (rows,) = read_units([Unit.of(*plan.pieces)], plan.table, S3)
    call = ToolCall("f", '{"a": 1}')
    messages = [Message("x", "why", (call, call)), Message("y"), None]
    completion = Completion("a", 1, (7,), "stop")
    done = [[Finished("", completion, m, parsed="{}" if m else None)] for m in messages]
    table = read_back(parquet_bytes(completions_table(rows, done, (*MESSAGE, PARSED))))
    assert tuple(table.column_names[-5:]) == (*MESSAGE, PARSED)
    assert table[CONTENT].to_pylist() == ["x", "y", None]
    assert table[REASONING].to_pylist() == ["why", None, None]
    assert table[PARSED].to_pylist() == ["{}", "{}", None]
    calls, *none = table[TOOL_CALLS].to_pylist()
    assert none == [None, None]
    assert [each["function"] for each in calls] == [{"name": "f", "arguments": '{"a": 1}'}] * 2
    assert {each["type"] for each in calls} == {"function"}
    assert len({each["id"] for each in calls}) == 2
    again = completions_table(rows, done, (TOOL_CALLS, CONTENT, REASONING))
    assert again[TOOL_CALLS].to_pylist()[0] == calls


def test_columns_are_the_same_in_every_unit(tmp_path: Path) -> None:
    plans = planned(
        tmp_path,
        a=pa.table({"p": ["x"], "n": pa.array([1], pa.int32()), "s": pa.nulls(1)}),
        b=pa.table({"n": pa.array([2**40], pa.int64()), "p": pa.array(["y"], pa.string_view())}),
        c=pa.table({"p": pa.array(["z"]).dictionary_encode(), "s": [{"a": 1}]}),
        d=b'{"p": "w", "s": {"a": 2, "b": "t"}, "late": true}\n',
        e=pa.table({"other": pa.array([], pa.int8())}),  # without rows
    )
    units = [read_units([Unit.of(*plan.pieces)], plan.table, S3) for plan in plans if plan.pieces]
    table = pa.concat_tables([rows.table for unit in units for rows in unit])
    assert table.schema == pa.schema(
        {
            "p": pa.large_string(),
            "n": pa.int64(),
            "s": pa.struct({"a": pa.int64(), "b": pa.string()}),
            "late": pa.bool_(),
        }
    )
    assert table["n"].to_pylist() == [1, 2**40, None, None]
    assert table["s"].to_pylist() == [None, None, {"a": 1, "b": None}, {"a": 2, "b": "t"}]


@pytest.mark.parametrize(
    ("first", "second", "both"),
    [
        (pa.int8(), pa.uint16(), pa.int32()),
        (pa.int32(), pa.float32(), pa.float64()),
        (pa.string(), pa.large_string(), pa.large_string()),
        (pa.list_(pa.int8()), pa.large_list(pa.int16()), pa.large_list(pa.int16())),
        (pa.list_(pa.int8(), 2), pa.list_(pa.int8(), 3), pa.list_(pa.int8())),
        (pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us")),
        (pa.decimal128(9, 2), pa.decimal128(12, 4), pa.decimal128(12, 4)),
        (pa.null(), pa.struct({"a": pa.null()}), pa.struct({"a": pa.null()})),
        (pa.int64(), pa.uint64(), None),
        (pa.string(), pa.binary(), None),
        (pa.string(), pa.int64(), None),
        (pa.bool_(), pa.int8(), None),
        (pa.float64(), pa.decimal128(9, 2), None),
        (pa.timestamp("s"), pa.timestamp("s", "UTC"), None),
        (pa.list_(pa.string()), pa.struct({"a": pa.string()}), None),
        (pa.decimal128(38, 0), pa.decimal128(38, 30), None),
    ],
)
def test_what_two_types_have_in_common(
    first: pa.DataType, second: pa.DataType, both: pa.DataType | None
) -> None:
    for a, b in ((first, second), (second, first)):
        if both is None:
            with pytest.raises(NoCommonType):
                common(a, b)
        else:
            assert common(a, b) == both


def test_files_that_no_table_holds_are_both_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        planned(tmp_path, a=pa.table({"n": [1]}), b=pa.table({"n": ["x"]}))
    message = f"{tmp_path}/b.parquet: column 'n' is string, but int64 in {tmp_path}/a.parquet, and"
    assert str(caught.value).startswith(message)
    assert "cast the column in one of them, or make two jobs of them" in str(caught.value)


def test_integers_meet_fractions_only_if_none_is_lost(tmp_path: Path) -> None:
    fractions = pa.table({"n": [0.5]})
    plans = planned(tmp_path, a=pa.table({"n": [None, 2**53]}), b=fractions)
    assert plans[0].table.field("n").type == pa.float64()
    with pytest.raises(UserError, match=r"a\.parquet: column 'n' .* some beyond 2\*\*53"):
        planned(tmp_path, a=pa.table({"n": [2**53 + 1]}), b=fractions)


def test_a_line_that_does_not_fit_what_parquet_has_is_its_own_error(tmp_path: Path) -> None:
    lines = b'{"m": [{"role": "a"}]}\n{"m": [{"role": 7}]}\n{"m": "x"}\n'
    _, plan = planned(tmp_path, a=pa.table({"m": [[{"role": "b"}]]}), b=lines)
    (rows,) = read_units([Unit.of(*plan.pieces)], plan.table, S3)
    assert rows.table["m"].to_pylist() == [[{"role": "a"}], None, None]
    assert {i: line.error_class for i, line in rows.bad_lines.items()} == {
        1: "MalformedValue",
        2: "MalformedValue",
    }


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (pa.table({"p": ["x"], "n": pa.array([1], pa.int8())}), None),
        (pa.table({"p": ["x"], "f": [1]}), None),
        (pa.table({"p": pa.array(["x"], pa.string_view())}), None),
        (b'{"p": "x", "n": 3, "f": 7}\n{"p": 1}\n{"p": "y"}\n', None),
        (pa.table({"p": ["x"], "n": pa.array([1], pa.int64())}), "'n' is int64, but int32 in what"),
        (pa.table({"p": [1]}), "'p' is int64, but string in what this job has written; cast it"),
        (pa.table({"p": ["x"], "q": [1]}), "'q' is new, and what this job has written lacks it"),
        (pa.table({"f": [2**60]}), "'f' has integers beyond 2\\*\\*53, but is double"),
        (b'{"p": 1}\n', "'p' is int64, but string"),
        (b'{"p": [1]}\n{"p": "x"}\n', "'p' is of several kinds, but string"),
    ],
)
def test_files_that_are_added_fit_the_table(
    new: pa.Table | bytes, message: str | None, tmp_path: Path
) -> None:
    table = pa.schema({"p": pa.string(), "n": pa.int32(), "f": pa.float64()})
    added = planned(tmp_path, b=new)
    if message is None:
        check_added(added, table, S3)
        return
    with pytest.raises(UserError, match=rf"/b\.\w+: column {message}"):
        check_added(added, table, S3)


def test_rows_are_picked_in_pieces_that_arrow_can_make() -> None:
    """Arrow cannot pick more than 2 GiB of text at once."""
    table = pa.table({"t": [f"{i:100}" for i in range(50)], "v": [[str(i)] for i in range(50)]})
    rows = [3, *[7] * 40, 8, 49, 0]
    for most in (1, 500, 1 << 30):
        found = taken(table, rows, most)
        assert found.equals(table.take(rows))
        longest = max(chunk.nbytes for chunk in found["t"].chunks)
        assert longest <= max(most, 200)
        again = Counter(map(len, found["t"].chunks))
        assert (most < 1 << 30) == (again.total() > 1)
    assert taken(table, []).num_rows == 0


def test_a_unit_lacks_no_column_even_without_rows() -> None:
    empty: Any = conformed(pa.table({"x": pa.nulls(3)}), pa.schema({"y": pa.list_(pa.int8())}))
    assert empty.to_pylist() == [{"y": None}] * 3
