from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from pipeline.errors import UserError
from pipeline.inputs.partitions import filled, partition_of, partition_types

PLACES = [
    "s3://b/date=2026-11-28/lang=en/n=1/m=01/a.parquet",
    "s3://b/date=__HIVE_DEFAULT_PARTITION__/lang=a%20b%2Fc/n=-7/m=2/b=c.parquet",
    "s3://b/lang=de/n=__HIVE_DEFAULT_PARTITION__/x=2147483648/=/y/a.parquet",
]


def test_columns_are_in_the_names_of_folders() -> None:
    assert [dict(partition_of(url)) for url in PLACES] == [
        {"date": "2026-11-28", "lang": "en", "n": "1", "m": "01"},
        {"date": None, "lang": "a b/c", "n": "-7", "m": "2"},
        {"lang": "de", "n": None, "x": "2147483648"},
    ]
    assert partition_types(PLACES) == {
        "date": pa.string(),
        "lang": pa.string(),
        "n": pa.int32(),
        "m": pa.int32(),
        "x": pa.string(),
    }
    assert partition_types(["a=__HIVE_DEFAULT_PARTITION__/x"]) == {"a": pa.null()}


@pytest.mark.parametrize("values", [[1, 2], ["01", "2"], ["a", "1"], ["a b", None], [1, None]])
def test_columns_are_those_that_pyarrow_finds(tmp_path: Path, values: list[object]) -> None:
    table = pa.table({"q": ["x"] * len(values), "p": values})
    ds.write_dataset(
        table, tmp_path, format="parquet", partitioning=["p"], partitioning_flavor="hive"
    )
    expected = ds.dataset(tmp_path, partitioning="hive").to_table(["q", "p"])
    files = sorted(map(str, tmp_path.rglob("*.parquet")))
    kind = partition_types(files)["p"]
    assert kind == expected.schema.field("p").type
    read = []
    for file in files:
        rows = pq.ParquetFile(file).read()
        rows = rows.append_column("p", pa.nulls(len(rows), kind))
        read.append(filled(rows, partition_of(file), file))
    key = [("p", "ascending")]
    assert pa.concat_tables(read).sort_by(key).equals(expected.sort_by(key))


@pytest.mark.parametrize(
    ("column", "folder", "agrees"),
    [
        (pa.array([None, 3], pa.int64()), "3", True),
        (pa.array([None, "03"]), "03", True),
        (pa.array(["2026-11-28"]).cast(pa.date32()), "2026-11-28", True),
        (pa.array([3, 4]), "3", False),
        (pa.array(["03"]), "3", False),
        (pa.array([1.5]), "a", False),
        (pa.array([None, None], pa.float64()), "a", True),
        (pa.array([["x"]]), "x", False),
    ],
)
def test_a_column_that_the_file_has_too_must_agree(
    column: pa.Array, folder: str, agrees: bool
) -> None:
    table = pa.table({"q": pa.nulls(len(column)), "p": column})
    if agrees:
        read = filled(table, {"p": folder}, "p=3/x")
        assert read.schema == table.schema
        return
    with pytest.raises(UserError, match=rf"x: column 'p' holds .*, but the folder says p={folder}"):
        filled(table, {"p": folder}, "x")
