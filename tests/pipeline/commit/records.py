"""Records of units that nobody generated, for tests of what is made of records."""

from __future__ import annotations

from typing import Any

from pipeline.commit.footer import from_plain
from pipeline.commit.record import UnitRecord


def plain_record(unit: str = "u", actor: str = "a", **changes: Any) -> dict[str, Any]:
    """A unit of three rows, one of which failed, as the first version's footer had it."""
    values: dict[str, Any] = {
        "unit": unit,
        "job": "j",
        "input": "a.parquet",
        "start": 0,
        "rows": 3,
        "completions": 2,
        "errors": {"NullPrompt": 1},
        "errors_file": "e",
        "errors_sha256": "0",
        "prompt_tokens": 10,
        "output_tokens": 20,
        "counts": {"rounds": 10, "drafted": 30, "verified": 25, "accepted": 10, "committed": 20},
        "actor": actor,
        "node": "n",
        "started": 0.0,
        "finished": 10.0,
        "engine": {"target_forwards": 12},
        "phase_seconds": {"verify": 4.0, "idle": 1.0},
        "peak_live": 2,
    }
    return {**values, **changes}


def record(unit: str = "u", actor: str = "a", **changes: Any) -> UnitRecord:
    """The same as a record; changes are by their names in a footer."""
    return from_plain(plain_record(unit, actor, **changes))
