"""Where actors go: nodes that are too small or cannot import us, groups, nodes that join."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pydantic import ValidationError

from pipeline.config.job import ActorsConfig
from pipeline.errors import UserError
from pipeline.generate import pool
from pipeline.generate.pool import check_resources, check_workers, group_of, next_group
from pipeline.run.dataflow import data_context
from tests.chaos import add_node, small_cluster
from tests.conftest import TinyModels
from tests.pipeline.small_jobs import rows_of, started

GROUPS = ActorsConfig.model_validate(
    {
        "slots": 8,
        "groups": {
            "A100": {"min": 1, "max": 2, "num_gpus": 1, "accelerator_type": "A100", "slots": 64},
            "L4": {"max": 4, "num_gpus": 1, "accelerator_type": "L4"},
            "cpu": {"num_cpus": 4},
        },
    }
)


def test_resources_are_counted_by_node() -> None:
    nodes = [{"CPU": 8.0, "GPU": 1.0, "accelerator_type:A100": 1.0}, {"CPU": 8.0}]
    check_resources(ActorsConfig(num_gpus=1, accelerator_type="A100"), nodes)
    check_resources(ActorsConfig(num_gpus=0.5, min=2), nodes)
    check_resources(ActorsConfig(min=4, num_cpus=4), nodes)
    with pytest.raises(UserError, match="accelerator_type:H100"):
        check_resources(ActorsConfig(num_gpus=1, accelerator_type="H100"), nodes)
    with pytest.raises(UserError, match="2 actors of 1 CPU, 1 GPU do not fit"):
        check_resources(ActorsConfig(num_gpus=1, min=2), nodes)
    check_resources(ActorsConfig(num_gpus=1, min=2, autoscaling_cluster=True), nodes)


def test_groups_must_fit_beside_each_other() -> None:
    a100 = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0}
    l4 = {"CPU": 4.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
    check_resources(GROUPS, [a100, l4])
    with pytest.raises(UserError, match=r"actors\.groups\.L4: .*accelerator_type:L4"):
        check_resources(GROUPS, [a100])
    with pytest.raises(UserError, match=r"groups\.cpu\.min: 1 actors of 4 CPU.*beside the other"):
        check_resources(GROUPS, [{**a100, "CPU": 4.0}, l4])


def test_a_group_has_what_it_says_and_else_what_the_pool_says() -> None:
    assert {name: group.slots for name, group in GROUPS.groups.items()} == {
        "A100": 64,
        "L4": 8,
        "cpu": 8,
    }
    assert (GROUPS.min_actors, GROUPS.max_actors) == (3, 7)
    assert ActorsConfig.model_validate(GROUPS.model_dump()) == GROUPS
    alone = ActorsConfig(min=2, max=5)
    assert (alone.min_actors, alone.max_actors, alone.pools) == (2, 5, {"": alone})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": {"groups": {"b": {}}}}, "a group cannot have groups of its own"),
        ({"a/b": {}}, "should match pattern"),
        ({"a": {"min": 3, "max": 2}}, "max .2. is less than min .3."),
        ({"a": {"slot": 2}}, "Extra inputs"),
    ],
)
def test_groups_that_make_no_sense(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ActorsConfig.model_validate({"groups": groups})


def test_the_next_actor_goes_where_one_is_missing_then_where_there_is_room() -> None:
    alive: dict[str, int] = {}
    gpus = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0, "accelerator_type:L4": 1.0}
    for expected in ("A100", "L4", "cpu", "A100", "L4"):
        assert next_group(GROUPS, alive, gpus) == expected
        alive[expected] = alive.get(expected, 0) + 1
    assert next_group(GROUPS, {"A100": 1, "L4": 1, "cpu": 1}, {**gpus, "GPU": 0.0}) == "A100"
    no_a100 = {name: free for name, free in gpus.items() if "A100" not in name}
    assert next_group(GROUPS, {"A100": 1, "L4": 1, "cpu": 1}, no_a100) == "L4"
    assert next_group(GROUPS, {"A100": 2, "L4": 4, "cpu": 1}, gpus) is None


def test_an_actors_name_says_its_group() -> None:
    assert group_of("A100/12ab") == "A100"
    assert group_of(None) == group_of("") == ""


@pytest.mark.ray
def test_a_node_without_the_packages_is_named(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [node["NodeID"] for node in ray.nodes()]
    check_workers(nodes)
    check_workers([*nodes, "e" * 56])  # one has gone meanwhile
    monkeypatch.setattr(pool, "_NEEDED", ("pipeline.generate.actor", "not_there"))
    with pytest.raises(UserError, match=f"node {nodes[0][:8]} .*cannot import not_there; install"):
        check_workers(nodes)


FOREIGN = """
import sys
# An editable install finds our modules even inside of another package. This node has none.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
from ray import cloudpickle
missing = cloudpickle.load(sys.stdin.buffer)
import pipeline
print(pipeline.WHOSE, missing(("pipeline.generate.actor", "pipeline", "json")))
"""


@pytest.mark.parametrize("shape", ["package", "module", "has a generate of its own", "raises"])
def test_another_projects_pipeline_is_not_ours(tmp_path: Path, shape: str) -> None:
    """A worker that finds a package of this name finds no actor in it."""
    if shape == "module":
        (tmp_path / "pipeline.py").write_text("WHOSE = 'theirs'")
    else:
        (tmp_path / "pipeline").mkdir()
        (tmp_path / "pipeline/__init__.py").write_text("WHOSE = 'theirs'")
    if shape in ("has a generate of its own", "raises"):
        (tmp_path / "pipeline/generate").mkdir()
        text = "raise RuntimeError('not today')" if shape == "raises" else ""
        (tmp_path / "pipeline/generate/__init__.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", FOREIGN],
        input=ray.cloudpickle.dumps(pool._probe()),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
    )
    assert done.stdout.decode() == "theirs ['pipeline.generate.actor']\n", done.stderr.decode()


@pytest.mark.slow
@pytest.mark.ray
def test_groups_share_a_job_and_a_node_that_joins_is_used(
    tiny_models: TinyModels, tmp_path: Path
) -> None:
    rows = 240
    prompts = {"prompt": [f"count to {i}" for i in range(rows)]}
    pq.write_table(pa.table(prompts), tmp_path / "p.parquet")
    output = tmp_path / "out"
    values = {
        "input": {"paths": [str(tmp_path / "p.parquet")], "prompt_column": "prompt"},
        "output": str(output),
        "models": {"target": tiny_models.target},
        "sampling": {"max_new_tokens": 100, "ignore_eos": True},
        "speculation": {"policy": "none"},
        "actors": {
            "groups": {
                "large": {"num_cpus": 2, "slots": 6, "autoscaling_cluster": True},
                "small": {"num_cpus": 1, "slots": 3},
            }
        },
        "unit_rows": 2,
    }
    with small_cluster(nodes=1) as cluster:
        process = started(values, tmp_path / "job.yaml", "--quiet", address=cluster.address)
        assert process.poll() is None
        add_node(cluster, num_cpus=2)
        assert process.wait(timeout=300) == 0
    assert len(rows_of(output)) == rows
    actors = {
        row["group"]: row for row in pq.read_table(output / "stats/actors.parquet").to_pylist()
    }
    assert {name: row["peak_live"] for name, row in actors.items()} == {"large": 6, "small": 3}
    assert actors["large"]["node"] != actors["small"]["node"]
    assert actors["large"]["units"] + actors["small"]["units"] == rows // 2


def test_what_the_user_must_mend_is_not_tried_again_and_the_rest_is() -> None:
    from ray._common.retry import format_exception, matches_error
    from ray.data import DataContext

    with data_context():
        patterns = DataContext.get_current().retried_map_errors
    assert isinstance(patterns, list)

    def retried(error: Exception) -> bool:
        wrapped = RuntimeError("in a map function")
        wrapped.__cause__ = error
        text = format_exception(wrapped, include_cause=True)
        return any(matches_error(pattern, text) for pattern in patterns)

    assert retried(ValueError("some\nlines"))
    assert not retried(UserError("s3://b: S3 answered SlowDown;\ngave up after 120 s"))


@pytest.mark.parametrize(
    ("given", "nodes", "cores"),
    [
        ({}, [8.0], 8),
        ({"min": 3}, [8.0], 2),
        ({"max": 16}, [8.0], 1),
        ({"max": 6}, [16.0, 16.0, 16.0], 8),
        ({"max": 2}, [16.0, 16.0, 16.0], 16),  # no more than a node has
        ({}, [0.0, 4.0], 4),  # a head node without cores
        ({"num_gpus": 1}, [64.0], 1),
        ({"num_cpus": 3}, [8.0], 3),
    ],
)
def test_cores_that_nobody_chose(given: dict[str, Any], nodes: list[float], cores: int) -> None:
    assert ActorsConfig(**given).on(nodes).num_cpus == cores


def test_groups_have_cores_of_their_own() -> None:
    groups = {"slow": {"max": 4}, "fast": {"num_gpus": 1}, "own": {"num_cpus": 5}}
    placed = ActorsConfig.model_validate({"groups": groups}).on([16.0])
    assert {name: group.num_cpus for name, group in placed.groups.items()} == {
        "slow": 4,
        "fast": 1,
        "own": 5,
    }


@pytest.mark.parametrize(
    ("settings", "share"),
    [({}, 1 / 8), ({"num_cpus": 2}, 1 / 4), ({"num_cpus": 16}, 1), ({"num_gpus": 0.5}, 1 / 2),
     ({"num_gpus": 2}, 1)],
)  # fmt: skip
def test_an_actor_counts_on_its_share_of_a_nodes_memory(
    settings: dict[str, float], share: float
) -> None:
    assert ActorsConfig.model_validate(settings).memory_share(8) == share
