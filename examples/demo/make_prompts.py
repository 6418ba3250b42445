"""Turn prompts.yaml, the source of the demo's prompts, into the four Parquet files of prompts/.

Run it after changing prompts.yaml: ``.venv/bin/python examples/demo/make_prompts.py``.
The same prompts.yaml gives the same files.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

HERE = Path(__file__).resolve().parent
FILES = 4
ROWS_PER_FILE = 52
ID_PREFIX = {
    "question": "qa",
    "arithmetic": "math",
    "rewriting": "rewrite",
    "code": "code",
    "list": "list",
    "story": "story",
}
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    ]
)


def to_messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """A plain string is one user turn; a list holds one ``{role: content}`` mapping per turn."""
    turns = [{"user": prompt}] if isinstance(prompt, str) else prompt
    return [{"role": role, "content": content} for turn in turns for role, content in turn.items()]


def share_of(part: int, prompts: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every FILES-th prompt of each kind, spread so that each stretch of rows has every kind."""
    placed = [
        (number / len(of_kind), kind, number, prompt)
        for kind, of_kind in prompts.items()
        for number, prompt in enumerate(of_kind, start=1)
        if number % FILES == (part + 1) % FILES
    ]
    return [
        {"id": f"{ID_PREFIX[kind]}-{number:03d}", "kind": kind, "messages": to_messages(prompt)}
        for _, kind, number, prompt in sorted(placed, key=lambda item: item[:3])
    ]


def main() -> None:
    """Write prompts/part-0.parquet to part-3.parquet, two row groups each."""
    prompts = yaml.safe_load((HERE / "prompts.yaml").read_text(encoding="utf-8"))
    (HERE / "prompts").mkdir(exist_ok=True)
    for part in range(FILES):
        rows = share_of(part, prompts)
        if len(rows) != ROWS_PER_FILE:
            raise SystemExit(f"part {part} would have {len(rows)} prompts, not {ROWS_PER_FILE}")
        path = HERE / "prompts" / f"part-{part}.parquet"
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, path, row_group_size=ROWS_PER_FILE // 2)


if __name__ == "__main__":
    main()
