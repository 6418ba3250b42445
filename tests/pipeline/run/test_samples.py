"""Several samples of each prompt, through whole jobs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import layout
from pipeline.commit.record import parts
from pipeline.config.job import S3Config, SamplingConfig
from pipeline.errors import RowError
from pipeline.inputs.row_sampling import row_sampling, sample_count
from pipeline.outputs.rounds import read_rounds
from pipeline.storage.folder import open_folder
from tests.conftest import TinyModels
from tests.pipeline.commit.records import plain_record, record
from tests.pipeline.small_jobs import rows_of, run

ROWS = 6
N = 3
SYSTEM = "You answer in one word and never say why, whatever you are asked, in any language. "


def settings(models: TinyModels, inputs: str, output: Path, n: int, **more: Any) -> dict[str, Any]:
    return {
        "input": {"paths": [inputs], "prompt_column": "prompt"},
        "output": str(output),
        "models": {"target": models.target, "draft": models.draft},
        "sampling": {"max_new_tokens": 12, "temperature": 1.0, "seed": 7, "n": n},
        "speculation": {"policy": "heuristic", "verification": "coupled"},
        "actors": {"num_cpus": 2, "slots": 8},
        "unit_rows": 3,
        **more,
    }


@pytest.fixture
def inputs(write_rows: Callable[..., str]) -> str:
    return write_rows("in.jsonl", [{"prompt": f"{SYSTEM}Question {i}?"} for i in range(ROWS)])


@pytest.mark.slow
@pytest.mark.ray
def test_samples_differ_and_do_not_depend_on_what_else_is_in_the_batch(
    local_ray: None, tiny_models: TinyModels, inputs: str, tmp_path: Path
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    run(settings(tiny_models, inputs, one, 1))
    result = run(settings(tiny_models, inputs, several, N))
    rows = rows_of(several)
    assert list(rows) == [f"in.jsonl:{i}:{s}" for i in range(ROWS) for s in range(N)]
    assert result.summary["rows"] == ROWS * N
    assert result.summary["prompts"] == ROWS
    assert result.summary["shared_tokens"] > (ROWS * N - 2) * len(SYSTEM)
    for name, row in rows_of(one).items():
        assert rows[name]["completion"] == row["completion"], "sample 0 is what n=1 draws"
    for i in range(ROWS):
        assert len({rows[f"in.jsonl:{i}:{s}"]["completion"] for s in range(N)}) == N

    # Another policy, one row at a time, other units: under `coupled` the same samples.
    alone = tmp_path / "alone"
    more = {
        "speculation": {"policy": "none", "verification": "coupled"},
        "actors": {"num_cpus": 2, "slots": 1},
        "unit_rows": 2,
    }
    run(settings(tiny_models, inputs, alone, N, **more))
    texts = {name: row["completion"] for name, row in rows.items()}
    assert {name: row["completion"] for name, row in rows_of(alone).items()} == texts

    assert run(settings(tiny_models, inputs, several, N)).units_run == 0
    recorded = json.loads((several / layout.MANIFEST).read_text())
    assert (recorded["rows_in"], recorded["samples"], recorded["rows_out"]) == (ROWS, 18, 18)


@pytest.mark.ray
def test_rows_with_an_n_of_their_own_add_up(
    local_ray: None, tiny_models: TinyModels, write_rows: Callable[..., str], tmp_path: Path
) -> None:
    cells: list[Any] = [None, {"n": 4}, {"n": 1, "seed": 5}, {"n": 0}, {"n": 2, "top_k": -1}]
    rows = [{"prompt": f"Question {i}?", "sampling_params": c} for i, c in enumerate(cells)]
    rows.append({"prompt": "", "sampling_params": {"n": 3}})
    inputs = write_rows("in.jsonl", rows)
    output = tmp_path / "out"
    more = {"speculation": {"policy": "fixed", "verification": "rejection", "k": 3, "trace": True}}
    result = run(settings(tiny_models, inputs, output, 2, **more))
    done = Counter(name.rsplit(":", 1)[0] for name in rows_of(output))
    failed = Counter(name.rsplit(":", 1)[0] for name in rows_of(output, "errors"))
    assert done == {"in.jsonl:0": 2, "in.jsonl:1": 4, "in.jsonl:2": 1}
    # Where the row does not say how many, or wrongly, it counts as the job's number of samples.
    assert failed == {"in.jsonl:3": 2, "in.jsonl:4": 2, "in.jsonl:5": 3}
    assert (result.summary["rows"], result.summary["errors"]) == (7, 7)
    recorded = json.loads((output / layout.MANIFEST).read_text())
    assert (recorded["rows_in"], recorded["samples"]) == (6, 14)
    units = pq.read_table(output / "stats" / "units.parquet").to_pylist()
    assert [(u["rows"], u["samples"], u["own_n"]) for u in units] == [(3, 7, True), (3, 7, True)]
    folder = open_folder(str(output), S3Config())
    (first, *_) = read_rounds(folder, "in.jsonl:1:3")
    assert first["row_id"] == "in.jsonl:1:3"


def test_each_sample_has_a_seed_of_its_own() -> None:
    job = SamplingConfig(seed=3)
    seeds = [row_sampling(job, None, f"f:0:{s}", s).seed for s in range(4)]
    seeds += [row_sampling(job, None, f"f:1:{s}", s).seed for s in range(4)]
    # A row's own seed is that of its first sample, as it always was.
    own = [row_sampling(job, {"seed": 9}, f"f:0:{s}", s).seed for s in range(4)]
    assert own[0] == 9
    assert own == [row_sampling(job, {"seed": 9}, f"f:1:{s}", s).seed for s in range(4)]
    assert len(set(seeds + own)) == 12


@pytest.mark.parametrize(("cell", "n"), [(None, 5), ({"n": 2}, 2), ('{"n": 3.0}', 3), ({}, 5)])
def test_a_row_says_how_many_samples(cell: Any, n: int) -> None:
    assert sample_count(SamplingConfig(n=5), cell) == n


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "4", 10_001, [2]])
def test_what_is_no_number_of_samples(n: Any) -> None:
    with pytest.raises(RowError, match="n must be 1 to 10000"):
        sample_count(SamplingConfig(), {"n": n})


def test_samples_that_were_tried_again_count_once() -> None:
    first = plain_record(samples=6, completions=4, errors={"EngineDied": 2})
    again = record(
        samples=6,
        completions=5,
        errors={"EngineDied": 1},
        retried=1,
        generation=1,
        earlier=[first],
    )
    assert [part.results.samples for part in parts(again)] == [4, 2]
