"""How people read the files of an output: each of the usual readers, on a whole folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def with_arrow(folder: Path) -> tuple[int, list[str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(folder)
    return table.num_rows, table.column_names


def with_pandas(folder: Path) -> tuple[int, list[str]]:
    import pandas

    frame = pandas.read_parquet(folder)
    return len(frame), list(frame.columns)


def with_polars(folder: Path) -> tuple[int, list[str]]:
    import polars

    frame = polars.read_parquet(folder / "*.parquet")
    return frame.height, frame.columns


def with_duckdb(folder: Path) -> tuple[int, list[str]]:
    import duckdb

    table = duckdb.sql(f"select * from '{folder}/*.parquet'").to_arrow_table()
    return table.num_rows, table.column_names


def with_datasets(folder: Path) -> tuple[int, list[str]]:
    import datasets

    files = sorted(map(str, folder.glob("*.parquet")))
    cache = str(folder.parent.parent / "cache")
    rows: Any = datasets.Dataset.from_parquet(files, cache_dir=cache)
    return len(rows), rows.column_names


def with_ray(folder: Path) -> tuple[int, list[str]]:
    import pyarrow as pa
    import ray

    table = pa.concat_tables(ray.get(ray.data.read_parquet(str(folder)).to_arrow_refs()))
    return table.num_rows, table.column_names


READERS: dict[str, Callable[[Path], tuple[int, list[str]]]] = {
    "Arrow": with_arrow,
    "pandas": with_pandas,
    "polars": with_polars,
    "DuckDB": with_duckdb,
    "datasets": with_datasets,
    "Ray Data": with_ray,
}
"""Reads all columns of all files; returns rows and names of columns."""
