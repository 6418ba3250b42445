"""Fields of structured turns as columns."""

from __future__ import annotations

from typing import Any

import jsonschema
import pyarrow as pa
import pytest

from jobs.nightly.columns import as_column, column_type, example_of, fields_of
from jobs.nightly.structured import read_structured
from pipeline.config.structured_outputs import StructuredOutputs

POINT = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}
LIST = {"type": "array", "items": {"type": "integer"}}
FIELDS: dict[str, tuple[Any, pa.DataType | None]] = {
    "text": ({"type": "string", "format": "date"}, pa.string()),
    "whole": ({"type": "integer", "minimum": 3}, pa.int64()),
    "number": ({"type": ["number", "null"]}, pa.float64()),
    "flag": ({"type": "boolean"}, pa.bool_()),
    "kind": ({"enum": ["a", "b", None]}, pa.string()),
    "fixed": ({"const": 7}, pa.int64()),
    "maybe": ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, pa.int64()),
    "tags": ({"type": "array", "items": {"$ref": "#/$defs/tag"}}, pa.list_(pa.string())),
    "grid": ({"type": "array", "items": LIST}, pa.list_(pa.list_(pa.int64()))),
    "either": ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, None),
    "mixed": ({"enum": ["a", 1]}, None),
    "point": ({"$ref": "#/$defs/point"}, None),
    "tuple": ({"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 1}, None),
    "any": (True, None),
}
SCHEMA = {
    "type": "object",
    "properties": {name: schema for name, (schema, _) in FIELDS.items()},
    "$defs": {"tag": {"type": "string"}, "point": POINT},
}


def asked(**kind: Any) -> StructuredOutputs:
    return StructuredOutputs.model_validate(kind)


def test_types_are_what_the_schema_says_of_all_values() -> None:
    assert fields_of(asked(json_schema=SCHEMA)) == {n: kind for n, (_, kind) in FIELDS.items()}
    whole = {"$ref": "#/$defs/point", "$defs": {"point": POINT}}
    assert fields_of(asked(json_schema=whole)) == {"x": pa.float64()}
    for other in ({"json_schema": LIST}, {"json_object": True}, {"choice": ["a"]}):
        assert fields_of(asked(**other)) == {}
    assert fields_of(None) == {}


def test_examples_validate() -> None:
    wanted = asked(json_schema=SCHEMA)
    jsonschema.validate(example_of(wanted), SCHEMA)
    assert example_of(wanted)["tags"] == ["(a text)"] * 8
    assert example_of(asked(choice=["yes", "no"])) == "yes"


@pytest.mark.parametrize(
    ("name", "value", "cell"),
    [
        ("text", "é", "é"),
        ("whole", 3.0, 3),
        ("number", 2**70, float(2**70)),
        ("number", None, None),
        ("tags", ["a", "b"], ["a", "b"]),
        ("either", "é", '"é"'),
        ("point", {"x": 1}, '{"x": 1}'),
        ("any", None, None),
    ],
)
def test_values(name: str, value: Any, cell: Any) -> None:
    kind = FIELDS[name][1]
    assert as_column(value, kind) == cell
    assert pa.array([cell], column_type(kind)).to_pylist() == [cell]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("whole", 2**63),
        ("number", 10**400),
        ("text", "\ud83d"),
        ("any", ["\ud83d"]),
        ("grid", [[2**70]]),
    ],
)
def test_what_no_column_can_hold(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        as_column(value, FIELDS[name][1])


@pytest.mark.parametrize(
    ("kind", "text", "reason", "expected"),
    [
        ({"json_schema": POINT}, ' {"x": 1}', "stop", ({"x": 1}, {"x": 1.0})),
        ({"json_schema": POINT}, '{"x": 1', "length", None),
        ({"json_schema": POINT}, '{"y": 1}', "stop", None),
        ({"json_schema": LIST}, "[1, 2]", "length", ([1, 2], {})),
        ({"json_object": True}, '{"y": [1]}', "stop", ({"y": [1]}, {})),
        ({"choice": ["yes", "no"]}, "yes", "stop", ("yes", {})),
        ({"regex": "[a-z]+"}, "abc", "length", None),
    ],
)
def test_completions_as_data(kind: dict[str, Any], text: str, reason: str, expected: Any) -> None:
    assert read_structured(text, reason, asked(**kind)) == expected
