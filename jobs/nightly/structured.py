"""What structured completions are as data."""

from __future__ import annotations

import json
from typing import Any

from jobs.nightly.columns import as_column, fields_of
from pipeline.config.structured_outputs import StructuredOutputs
from pipeline.generate.reading import fault_of


def read_structured(
    text: str, finish_reason: str, asked: StructuredOutputs
) -> tuple[Any, dict[str, Any]] | None:
    """A completion as data, and the fields that it has as columns.

    Args:
        text: the completion.
        finish_reason: why it ended.
        asked: what it must be.

    Returns:
        JSON as data, or the text where it need not be JSON; None: it is not what it must be, such
        as a cut-off object, or no column can hold it.
    """
    schema = asked.schema_of_json
    if schema is None:
        return None if finish_reason == "length" else (text, {})
    if fault_of(text, schema) is not None:
        return None
    value = json.loads(text)
    kinds = fields_of(asked) if isinstance(value, dict) else {}
    try:
        return value, {name: as_column(value.get(name), kind) for name, kind in kinds.items()}
    except ValueError:
        return None
