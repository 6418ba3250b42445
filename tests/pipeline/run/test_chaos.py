"""A job of which actors, nodes, workers and the driver are killed, on S3 that fails now and then.

pytest tests/pipeline/run/test_chaos.py -m slow     # the long one, at least 100 kills
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos import KINDS, Chaos, actors, small_cluster
from tests.conftest import S3Server, TinyModels
from tests.faulty_s3 import faulty_s3
from tests.pipeline.small_jobs import alone

pytestmark = [pytest.mark.ray, pytest.mark.s3]

UNIT_ROWS, TOKENS = 2, 24
SMALL_FILES = 10
"""Of one row each."""


def settings(
    models: TinyModels, inputs: str, output: str, nodes: int, **more: Any
) -> dict[str, Any]:
    return {
        "input": {"paths": [inputs], "prompt_column": "prompt"},
        "output": output,
        "models": {"target": models.target, "draft": models.draft, "deterministic": True},
        "sampling": {"max_new_tokens": TOKENS, "temperature": 1.0, "seed": 7, "ignore_eos": True},
        "speculation": {"policy": "fixed", "k": 2, "verification": "coupled"},
        "actors": {"min": 1, "max": nodes, "num_cpus": 1, "slots": 4},
        "unit_rows": UNIT_ROWS,
        **more,
    }


def write_inputs(folder: Path, rows: int) -> None:
    folder.mkdir()
    half = (rows - SMALL_FILES) // 2
    table = pa.table({"i": range(rows), "prompt": [f"count to {i}" for i in range(rows)]})
    pq.write_table(table.slice(0, half), folder / "a.parquet", row_group_size=20)
    lines = [json.dumps(row) for row in table.slice(half).to_pylist()]
    (folder / "b.jsonl").write_text("\n".join(lines[:half]))
    for number, line in enumerate(lines[half:]):
        (folder / f"c-{number:02}.jsonl").write_text(line)


class Store:
    """A bucket, read past the proxy."""

    def __init__(self, server: S3Server, name: str) -> None:
        self._client, self.name = server.client(), name
        self._client.create_bucket(Bucket=name)

    def upload(self, folder: Path) -> None:
        for file in folder.iterdir():
            self._client.upload_file(str(file), self.name, f"in/{file.name}")

    def keys(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self.name, Prefix=prefix)
        return [e["Key"] for page in found for e in page.get("Contents", [])]

    def read(self, key: str) -> bytes:
        return bytes(self._client.get_object(Bucket=self.name, Key=key)["Body"].read())


def check(store: Store, output: str, calm: dict[str, str]) -> None:
    """Nothing lost, nothing twice, every row as without disturbance; the manifest agrees."""
    rows = [
        row
        for key in store.keys(f"{output}/completions/")
        for row in pq.read_table(pa.BufferReader(store.read(key))).to_pylist()
    ]
    assert {*Counter(row["row_id"] for row in rows).values()} == {1}
    assert {row["row_id"]: row["completion"] for row in rows} == calm
    assert sorted(row["i"] for row in rows) == list(range(len(calm)))
    for row in rows:
        assert row["prompt"] == f"count to {row['i']}"
        assert (row["output_tokens"], row["finish_reason"]) == (TOKENS, "length")
    assert not store.keys(f"{output}/errors/")
    manifest = json.loads(store.read(f"{output}/_specbatch/manifest.json"))
    assert manifest["rows_in"] == manifest["rows_out"] == len(calm)
    assert store.keys(f"{output}/_SUCCESS")


@pytest.mark.parametrize(
    ("jobs", "rows", "nodes", "kinds"),
    [
        pytest.param(1, 50, 1, [*KINDS], id="short", marks=pytest.mark.timeout(1200)),
        pytest.param(
            5,
            200,
            2,
            [*KINDS] * 5 + ["actor"],
            id="long",
            marks=[pytest.mark.slow, pytest.mark.timeout(7200)],
        ),
    ],
)
def test_whatever_dies_nothing_is_lost_or_done_twice(
    tiny_models: TinyModels,
    s3_env: S3Server,
    tmp_path: Path,
    jobs: int,
    rows: int,
    nodes: int,
    kinds: list[str],
) -> None:
    """CHAOS_SEED chooses other victims and moments."""
    write_inputs(tmp_path / "in", rows)
    calm = alone(settings(tiny_models, str(tmp_path / "in"), str(tmp_path / "calm"), nodes))
    assert len(calm) == rows
    store = Store(s3_env, f"chaos-{jobs}")
    store.upload(tmp_path / "in")
    first = int(os.environ.get("CHAOS_SEED", "0"))
    killed: Counter[str] = Counter()
    began = time.monotonic()
    with (
        faulty_s3(s3_env.endpoint, probability=0.02, seed=first) as server,
        small_cluster(nodes) as cluster,
    ):
        for seed in range(first, first + jobs):
            output = f"out-{seed}"
            values = settings(
                tiny_models,
                f"s3://{store.name}/in",
                f"s3://{store.name}/{output}",
                nodes,
                s3={"endpoint": server.endpoint},
            )
            folder = tmp_path / output
            folder.mkdir()
            chaos = Chaos(
                cluster,
                values,
                folder,
                units=rows // UNIT_ROWS,
                committed=lambda prefix=f"{output}/completions/": len(store.keys(prefix)),
                seed=seed,
            )
            chaos.run(kinds, seconds=200 * len(kinds))
            killed += chaos.killed
            print(f"{time.monotonic() - began:.0f} s: {chaos.describe()}")
            check(store, output, calm)
            assert chaos.killed == Counter(kinds)
            assert not chaos.ended  # but for the driver's own death, the job went on
            deadline = time.monotonic() + 60
            while actors(cluster) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not actors(cluster)
        print(f"{killed.total()} kills {dict(killed)}, S3 faults {dict(server.injected)}")
