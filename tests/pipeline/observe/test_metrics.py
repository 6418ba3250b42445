from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.reports.grafana import exported
from pipeline.observe.metrics import COUNTERS, GAUGES, LiveMetrics, Reading, recent, totals
from pipeline.observe.progress import Tally
from specdec.request import Counts
from tests.conftest import TinyModels, free_port

ROOT = Path(__file__).parents[3]


def reading(times: int, **changes: Any) -> Reading:
    counts = Counts(10 * times, 30 * times, 20 * times, 5 * times, 15 * times)
    values = {"rounds": 4 * times, "live_rows": 12 * times, "seconds": {"verify": 2.0 * times}}
    return Reading(Tally(3 * times, times, counts), **{**values, **changes})


def test_gauges_are_of_the_time_since_the_last_reading() -> None:
    found = recent(reading(3), reading(1), seconds=10.0)
    assert found == {
        "specbatch_goodput": 3.0,
        "specbatch_acceptance_rate": 0.25,
        "specbatch_candidates_per_round": 2.0,
        "specbatch_live_batch": 3.0,
    }
    assert set(found) == set(GAUGES)
    assert recent(reading(2), reading(2), 1.0) == {"specbatch_goodput": 0.0}
    # An engine that was replaced counts from the beginning.
    assert recent(reading(1), reading(5), 10.0)["specbatch_goodput"] == 1.5


def test_every_counter_has_a_value() -> None:
    names = {name for name, _ in totals(reading(1))}
    assert names == set(COUNTERS) - {"specbatch_cost"}


class Recorded:
    """What a metric of Ray was told, in its place."""

    def __init__(self, metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total: dict[str, float] = {}
        monkeypatch.setattr(metric, "inc", self._inc)

    def _inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        assert value > 0
        key = (tags or {}).get("phase", "")
        self.total[key] = self.total.get(key, 0.0) + value


def test_what_is_exported_adds_up_though_the_engine_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.observe.metrics.EXPORT_SECONDS", 3600.0)
    readings = [reading(2), reading(5), reading(1), reading(1)]
    metrics = LiveMetrics("job", "actor", lambda: readings.pop(0), price_per_hour=1800.0)
    recorded = {n: Recorded(m, monkeypatch) for n, m in metrics._counters.items()}
    while readings:
        metrics.export()
    assert recorded["specbatch_rows"].total == {"": 18}
    assert recorded["specbatch_output_tokens"].total == {"": 90}
    assert recorded["specbatch_phase_seconds"].total == {"verify": 12.0}
    assert recorded["specbatch_cost"].total == {"": 6.0}


SCRAPED_JOB = """
import sys, threading, time, urllib.request
import ray
from jobs.job_file import load_job
from pipeline.run.run import run_job

job, port = load_job(sys.argv[1], []), int(sys.argv[2])
ray.init(
    address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
    _metrics_export_port=port, _system_config={"metrics_report_interval_ms": 500},
)
wanted, pages = set(sys.argv[3:]), []

def scrape():
    while True:
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            continue
        pages.append([line for line in lines if line.startswith("ray_specbatch")])

threading.Thread(target=scrape, daemon=True).start()
run_job(job)
print("\\n".join(max(pages, key=len)))
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(find_spec("prometheus_client") is None, reason="needs ray[default]")
def test_prometheus_gets_every_metric(tmp_path: Path, tiny_models: TinyModels) -> None:
    """A job on a Ray of its own, whose metrics are read as Prometheus reads them."""
    rows = [{"prompt": f"say {i}"} for i in range(1500)] + [{"prompt": None}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "name": "scraped",
        "input": {"paths": "in.jsonl", "prompt_column": "prompt"},
        "output": "out",
        "models": {"target": tiny_models.target, "draft": tiny_models.draft},
        "sampling": {"max_new_tokens": 128, "temperature": 1, "ignore_eos": True},
        "speculation": {"policy": "fixed", "k": 2, "control_share": 0.1},
        "actors": {"num_cpus": 2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    result = subprocess.run(
        [sys.executable, "-c", SCRAPED_JOB, tmp_path / "job.yaml", str(free_port())],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    names = set(re.findall(r"^(ray_specbatch_\w+)\{", result.stdout, flags=re.MULTILINE))
    assert names >= {exported(name) for name in (*COUNTERS, *GAUGES)}
    assert 'job_name="scraped"' in result.stdout
    assert 'phase="verify"' in result.stdout
