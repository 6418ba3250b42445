from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from jobs.reports.grafana import dashboard, exported
from pipeline.observe.metrics import COUNTERS, GAUGES
from tests.jobs.command_line import call, one_error


def test_each_metric_of_the_dashboard_exists_and_each_that_exists_is_there() -> None:
    text = json.dumps(dashboard())
    shown = set(re.findall(r"ray_specbatch_\w+", text))
    assert shown == {exported(name) for name in (*COUNTERS, *GAUGES)}


def test_panels_can_be_told_apart() -> None:
    panels = dashboard()["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels) == len({panel["id"] for panel in panels})
    for panel in panels:
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")


def test_command(tmp_path: Path) -> None:
    assert json.loads(call("grafana").stdout) == dashboard()
    file = tmp_path / "dashboard.json"
    assert call("grafana", file).exit_code == 0
    assert json.loads(file.read_text()) == dashboard()
    assert "No such file" in one_error(call("grafana", tmp_path / "no" / "x.json"))


def test_no_other_metric_has_a_name() -> None:
    with pytest.raises(KeyError):
        exported("specbatch_gone")
