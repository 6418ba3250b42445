"""The dataset's columns: its own, and those that structured turns bring.

A property of a turn's JSON Schema is a column. Its Arrow type is what the schema says that all its
values are; where they may be of several kinds, the column has them as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import pyarrow as pa

from pipeline.config.structured_outputs import StructuredOutputs

MESSAGE = pa.struct({"role": pa.string(), "content": pa.string()})

OWN_COLUMNS = {
    "id": pa.string(),
    "night": pa.string(),
    "seed_id": pa.string(),
    "template": pa.string(),
    "sample": pa.int64(),
    "messages": pa.list_(MESSAGE),
    "model": pa.string(),
    "output_tokens": pa.int64(),
}
"""Columns of every dataset."""

LOGPROB, SCORE, JUDGEMENT = "logprob", "score", "judgement"
CHOSEN_COLUMNS = {LOGPROB: pa.float64(), SCORE: pa.float64(), JUDGEMENT: pa.string()}
"""Columns of datasets whose recipe selects by log-probability, or has a judge."""

Kind: TypeAlias = pa.DataType | None
"""The Arrow type of a field; None: its values are of several kinds, and stand as JSON text."""

_SCALARS = {
    "string": pa.string(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}

_MOST_STEPS = 16
"""References that are followed in a schema, one after the other, and levels of an example."""

_EXAMPLES = {"string": "(a text)", "boolean": True, "null": None}
_EXAMPLE_ITEMS = 8
"""Items of a list in an example, if its schema allows so many: templates may use any of them."""


def column_type(kind: Kind) -> pa.DataType:
    """The type of the column of a field."""
    return pa.string() if kind is None else kind


def fields_of(asked: StructuredOutputs | None) -> dict[str, Kind]:
    """The fields that a completion has: the properties of its schema, if that is an object's.

    Args:
        asked: what the completion must be; None: anything.
    """
    schema = asked.schema_of_json if asked is not None else None
    if schema is None:
        return {}
    properties = _resolved(schema, schema).get("properties", {})
    return {name: _kind(each, schema) for name, each in properties.items()}


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """A part of a schema, behind its references; an empty one allows anything."""
    for _ in range(_MOST_STEPS):
        if not isinstance(schema, Mapping):
            return {}
        if (reference := schema.get("$ref")) is None:
            return schema
        schema = root
        for step in str(reference).removeprefix("#").strip("/").split("/"):
            name = step.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, Mapping) else None
    return {}


def _choices(schema: Mapping[str, Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a value may be, but null; one thing if the schema has no alternatives."""
    among = schema.get("anyOf") or schema.get("oneOf") or [schema]
    found = [_resolved(each, root) for each in among]
    return [each for each in found if each.get("type") != "null"]


def _kind(schema: Any, root: Mapping[str, Any], level: int = 0) -> Kind:
    if level > _MOST_STEPS:
        return None
    choices = _choices(_resolved(schema, root), root)
    kinds = [_kind_of_one(each, root, level) for each in choices]
    return kinds[0] if kinds and all(kind == kinds[0] for kind in kinds) else None


def _kind_of_one(schema: Mapping[str, Any], root: Mapping[str, Any], level: int) -> Kind:
    if "enum" in schema or "const" in schema:
        values = [v for v in schema.get("enum", [schema.get("const")]) if v is not None]
        names = {_name_of(value) for value in values}
        return _SCALARS.get(names.pop()) if len(names) == 1 else None
    types = schema.get("type", ())
    names = {types} if isinstance(types, str) else {*types}
    names -= {"null"}
    if names != {"array"}:
        return _SCALARS.get(names.pop()) if len(names) == 1 else None
    inner = None if "prefixItems" in schema else _kind(schema.get("items"), root, level + 1)
    return None if inner is None else pa.list_(inner)


def _name_of(value: Any) -> str:
    """What JSON Schema calls a value."""
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    return kinds.get(type(value), "other")


class Fields:
    """The columns that a recipe's turns bring.

    Args:
        taken: names that the dataset has already.

    Attributes:
        kinds: by name, in order.
    """

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = {*taken}
        self.kinds: dict[str, Kind] = {}
        self._by: dict[str, tuple[str, int]] = {}  # template and turn that brought each last

    def add(
        self, template: str, turn: int, asked: StructuredOutputs | None, column: str | None
    ) -> None:
        """Add those of a turn.

        Args:
            template, turn: its name, and number from 1.
            asked: what its completions must be.
            column: that has them whole.

        Raises:
            ValueError: another turn brings one, or its name is taken.
        """
        kinds = fields_of(asked) | ({column: pa.string()} if column is not None else {})
        for name, kind in kinds.items():
            where = f"templates.{template}: turn {turn}: {name!r}"
            if name.lower() in self._taken:
                raise ValueError(f"{where} is a column that the dataset has; give it another name")
            other, number = self._by.get(name, (template, turn))
            if other == template and number != turn:
                raise ValueError(f"{where} is in turn {number}, too; give one another name")
            there = self.kinds.setdefault(name, kind)
            if there != kind:
                raise ValueError(
                    f"{where} is {_said(kind)}, and {_said(there)} in template {other}; "
                    "give one another name"
                )
            self._by[name] = template, turn


def _said(kind: Kind) -> str:
    return "of several kinds" if kind is None else str(kind)


def as_column(value: Any, kind: Kind) -> Any:
    """A field's value as its column has it.

    Args:
        value: JSON that validates by its schema; None: the object has no such field.
        kind: the field's.

    Raises:
        ValueError: no such column can hold it: an integer of more than 64 bits, half a character.
    """
    if value is None:
        return None
    if kind is None:
        value = json.dumps(value, ensure_ascii=False)
    elif pa.types.is_list(kind):
        return [as_column(each, kind.value_type) for each in value]
    elif pa.types.is_integer(kind):
        value = int(value)
    elif pa.types.is_floating(kind):
        value = _finite(value)
    if isinstance(value, str):
        value.encode()  # half of a surrogate pair cannot be
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{value} has more than 64 bits")
    return value


def _finite(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{value} is no double") from None


def example_of(asked: StructuredOutputs | None) -> Any:
    """A value that a turn may give, to try templates and expressions with; None of free turns."""
    if asked is None:
        return None
    if (schema := asked.schema_of_json) is not None:
        return _example(schema, schema, 0)
    return asked.choice[0] if asked.choice else "(a completion)"


def _example(schema: Any, root: Mapping[str, Any], level: int) -> Any:
    resolved = _resolved(schema, root)
    one = next(iter(_choices(resolved, root)), resolved)
    if "const" in one or "enum" in one:
        return one["const"] if "const" in one else one["enum"][0]
    types = one.get("type", "object" if "properties" in one else "other")
    kind = types if isinstance(types, str) else next((t for t in types if t != "null"), "null")
    if kind in ("integer", "number"):
        return one.get("minimum", 1)
    if level > _MOST_STEPS or kind not in ("object", "array"):
        return _EXAMPLES.get(kind, "(a value)")
    if kind == "object":
        properties = one.get("properties", {})
        return {name: _example(each, root, level + 1) for name, each in properties.items()}
    first = [_example(each, root, level + 1) for each in one.get("prefixItems", ())]
    most = one.get("maxItems", max(_EXAMPLE_ITEMS, one.get("minItems", 0)))
    if one.get("items") is False or len(first) >= most:
        return first[:most]
    count = min(most, max(_EXAMPLE_ITEMS, one.get("minItems", 0))) - len(first)
    return first + [_example(one.get("items"), root, level + 1)] * count
