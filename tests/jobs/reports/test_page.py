from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jobs.reports.command import page_at_the_end
from jobs.reports.findings import FailedRow, Findings, SlowRow, gather
from jobs.reports.page import headline, job_page, write_page
from jobs.reports.timeline import timeline
from pipeline.commit import manifest
from pipeline.commit.stats import summarise
from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import JobStopped
from pipeline.layout import JOB, REPORT
from pipeline.storage.folder import open_folder
from tests.conftest import S3Server, TinyModels
from tests.jobs.browser import chromium, columns_at_the_right_edge, screenshot
from tests.jobs.command_line import call, one_error
from tests.jobs.pages import PLANTED, make_job

HOSTILE = "</svg></title><script>alert('$x_$')</script>"


@pytest.fixture(scope="module")
def output(
    local_ray: None, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of a job whose prompts, file names and errors hold markup."""
    return make_job(tmp_path_factory.mktemp("page"), tiny_models)


@pytest.fixture(scope="module")
def findings(output: Path) -> Findings:
    return gather(str(output), S3Config())


class Elements(HTMLParser):
    """Names and attributes of a page's elements, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def check_harmless(self) -> None:
        """Nothing runs and nothing is loaded from anywhere."""
        for tag, attributes in self.found:
            assert tag not in {"script", "img", "iframe", "object", "embed", "link", "b"}
            for name, value in attributes.items():
                assert not name.startswith("on")
                if name in {"src", "href", "xlink:href", "action", "data"}:
                    assert (value or "").startswith("#")
        (policy,) = (a["content"] for t, a in self.found if t == "meta" and "http-equiv" in a)
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def drawings(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


@pytest.mark.ray
def test_the_page_that_a_job_leaves(output: Path) -> None:
    page = (output / REPORT).read_text()
    elements = Elements(page)
    elements.check_harmless()
    assert "url(http" not in page
    assert "@import" not in page
    # What was planted is text, in the slowest rows and in the errors.
    assert page.count("&lt;script&gt;document.title") >= 2
    assert PLANTED in " ".join(elements.text.split())
    for part in ("rows completed", "Time by state", "Acceptance by position", "NullPrompt"):
        assert part in elements.text
    svgs = drawings(page)
    assert len(svgs) >= 6
    for svg in svgs:
        ElementTree.fromstring(svg)


@pytest.mark.ray
def test_what_was_gathered_adds_up(findings: Findings) -> None:
    summary = findings.summary
    assert findings.finished
    assert sum(actor["rows"] for actor in findings.actors) == summary["rows"] == 10
    assert findings.timeline.total.committed.sum() == pytest.approx(summary["committed"])
    assert sum(findings.rounds.values()) == summary["rounds"]
    assert sum(k * n for k, n in findings.rounds.items()) == summary["verified"]
    assert sum(row["judged"] for row in summary["positions"]) >= summary["accepted"] > 0
    assert len(findings.slowest) == 10
    seconds = [row.seconds for row in findings.slowest]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] > 0
    assert any(PLANTED in row.prompt for row in findings.slowest)
    assert {name: len(rows) for name, rows in findings.errors.items()} == {"NullPrompt": 1}
    assert findings.errors["NullPrompt"][0].row_id.endswith("$x_$.jsonl:4:0")


@pytest.mark.ray
def test_names_that_hold_markup_are_text_in_charts_too(findings: Findings) -> None:
    bins = [[10.0, 5.0, 4.0]]
    hostile = replace(
        findings,
        url=HOSTILE,
        job={**findings.job, "name": HOSTILE},
        actors=[
            {**actor, "actor": HOSTILE, "node": HOSTILE, "phase_seconds": {HOSTILE: 2.0}}
            for actor in findings.actors
        ],
        reliability={("all", ""): bins, ("input", HOSTILE): bins, ("input", "b"): bins},
        errors={HOSTILE: [FailedRow(HOSTILE, HOSTILE, HOSTILE)]},
        slowest=[SlowRow(HOSTILE, 1.0, 1, 1, 1, HOSTILE, HOSTILE)],
        summary={
            **findings.summary,
            "cost": None,
            "errors": 1,
            "errors_by_class": {HOSTILE: 1},
            "phase_seconds": {HOSTILE: 2.0},
            "calibration": [
                {"by": by, "name": HOSTILE, "judged": 1, "predicted": 0.5, "accepted": 1, "ece": 0}
                for by in ("all", "input", "context")
            ],
        },
    )
    page = job_page(hostile)
    Elements(page).check_harmless()
    assert "<script" not in page
    svgs = drawings(page)
    # By state, by actor, and the end of the input's name by input.
    assert sum("&lt;/script&gt;" in svg for svg in svgs) == 3
    for svg in svgs:
        ElementTree.fromstring(svg)


def cost(**changes: Any) -> dict[str, Any]:
    holder = {
        "run": "r1",
        "actor": "a" * 32,
        "node": "n" * 32,
        "hardware": "CPU",
        "market": "on_demand",
        "resources": {"CPU": 2.0},
        "began": 0.0,
        "ended": 100.0,
        "end": "killed",
        "seconds_held": 100.0,
        "seconds_by_state": {"verify": 80.0, "lost": 20.0},
        "price_per_hour": 0.09,
        "cost": 0.0025,
    }
    run = {"run": "r1", "began": 0.0, "ended": 100.0, "end": "done", "holders": 1}
    return {
        "total": 12.5,
        "currency": "USD",
        "per_million_output_tokens": 3.25,
        "per_thousand_rows": 0.0421,
        "saved": -1.5,
        "saved_ci": [-2.0, -1.0],
        "seconds_held": 100.0,
        "seconds_by_state": {"verify": 80.0, "lost": 20.0},
        "cost_by_state": {"verify": 10.0, "lost": 2.5},
        "by_actor": [holder, {**holder, "run": "r2", "end": "done"}],
        "by_run": [
            {**run, "seconds_held": 50.0, "cost": 6.0},
            {**run, "run": "r2", "seconds_held": 50.0, "cost": None},
        ],
        "price_source": "a price list <2026>",
        "unpriced": [],
        "reconciled": {
            "booked": 100.1,
            "held": 100.0,
            "difference": 0.001,
            "ok": True,
            "holders": 2,
            "unsettled": 0,
        },
        "budget": {"dollars": 20.0, "hours": None},
        "hours": 0.1,
        **changes,
    }


@pytest.mark.ray
def test_money(findings: Findings) -> None:
    page = job_page(replace(findings, summary={**findings.summary, "cost": cost()}))
    elements = Elements(page)
    elements.check_harmless()
    text = " ".join(elements.text.split())
    for part in (
        "cost of the job$12.50",
        "per million output tokens$3.25",
        "per thousand rows$0.0421",
        "saved−$1.50",
        "95% interval −$2.00 to −$1.00",
        "Money by state",
        "lost20.020.0%$2.50",
        "a price list <2026>",
        "0.1% off those that Ray saw",
        "Budget: $20.00.",
    ):
        assert part in text, part


@pytest.mark.ray
def test_money_that_is_not_known(findings: Findings) -> None:
    unknown = cost(
        total=None,
        per_million_output_tokens=None,
        per_thousand_rows=None,
        saved=None,
        saved_ci=None,
        cost_by_state=None,
        unpriced=["GPU <b>"],
        reconciled=None,
        budget=None,
    )
    page = job_page(replace(findings, summary={**findings.summary, "cost": unknown}))
    Elements(page).check_harmless()
    assert "no price for GPU &lt;b&gt;" in page
    assert "Money by state" not in page


def test_a_job_that_has_committed_nothing_has_a_page(
    write_job_output: Callable[..., str], tmp_path: Path
) -> None:
    output = write_job_output({})
    page = Path(write_page(output, S3Config())).read_text()
    Elements(page).check_harmless()
    assert "not finished" in page
    assert "Nothing is committed yet" in page


def test_a_job_that_was_stopped_has_a_page(
    write_job_output: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = write_job_output({})
    job = JobConfig.model_validate(json.loads(Path(output, JOB).read_text())["config"])
    with pytest.raises(JobStopped), page_at_the_end(job):
        raise JobStopped
    assert Path(output, REPORT).exists()
    # A page that cannot be written is said to be missing, and that is all.
    Path(output, REPORT).unlink()
    Path(output, REPORT).mkdir()
    with page_at_the_end(job):
        pass
    assert "no report page" in capsys.readouterr().err


def test_headline_says_what_is_bad() -> None:
    loses = {"speedup": 0.8, "speedup_ci": [0.7, 0.9], "speedup_controls": 40, "drafted": 9}
    bad = {
        figure.label for figure in headline({**summarise([]), **loses, "errors": 1}) if figure.bad
    }
    assert bad == {"measured speedup", "rows in errors"}


def test_a_timeline_of_nothing() -> None:
    line = timeline([])
    assert line.total.goodput.tolist() == [0.0]
    assert not line.actors


@pytest.mark.s3
def test_pages_on_s3(
    s3_env: S3Server, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    s3_env.client().create_bucket(Bucket="pages")
    for name in ("a", "b"):
        values = {
            "name": name,
            "input": {"paths": "in.parquet", "prompt_column": "prompt"},
            "output": f"s3://pages/nights/{name}",
            "s3": {"endpoint": s3_env.endpoint},
            "models": {"target": tiny_models.target},
            "speculation": {"policy": "none"},
        }
        job = JobConfig.model_validate(values)
        folder = open_folder(job.output, job.s3)
        manifest.claim(folder, job, [], manifest.fingerprint(job, []))
    at = ("--endpoint", s3_env.endpoint)
    page = f"s3://pages/nights/a/{REPORT}"
    assert f"Wrote {page}" in call("report", "s3://pages/nights/a", "--html", *at).stdout
    stored = s3_env.client().get_object(Bucket="pages", Key=f"nights/a/{REPORT}")["Body"].read()
    assert b"Nothing is committed yet" in stored
    result = call("report", "--trend", "s3://pages", "--json", *at)
    assert [job["name"] for job in json.loads(result.stdout)["jobs"]] == ["a", "b"]
    assert call("report", "--trend", "s3://pages", "--html", *at).stdout == "Wrote trend.html\n"


# ------------------------------------------------------------------- the command


@pytest.mark.ray
def test_report_as_a_page(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (output / REPORT).unlink()
    assert f"Wrote {output}/{REPORT}" in call("report", output, "--html").stdout
    assert call("report", "--html", output).exit_code == 0
    assert call("report", output, "--html", "here.html").stdout == "Wrote here.html\n"
    assert Path("here.html").read_text().startswith("<!DOCTYPE html>")
    assert "--html no/x.html: No such file" in one_error(
        call("report", output, "--html", "no/x.html")
    )


@pytest.mark.ray
def test_compare(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("report", "--compare", output, output)
    assert result.exit_code == 0, result.output
    assert re.search(r"rows completed +10 +10 +1\.00×", result.stdout)
    found = json.loads(call("report", "--compare", output, output, "--json").stdout)
    assert found["ratios"]["rows"] == found["ratios"]["tokens_per_second"] == 1
    assert found["ratios"]["errors"] == 1
    assert found["caution"] is None
    assert found["settings"] == {}
    assert call("report", "--compare", output, output, "--html").stdout == "Wrote compare.html\n"
    Elements(Path("compare.html").read_text()).check_harmless()


@pytest.mark.ray
def test_trend(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("report", "--trend", output.parent)
    assert result.exit_code == 0, result.output
    assert "markup" in result.stdout
    # A job is there once, however it was found.
    (job,) = json.loads(call("report", "--trend", output.parent, output, "--json").stdout)["jobs"]
    assert job["rows"] == 10
    assert job["errors"] == 1
    assert job["finished"]
    assert call("report", "--trend", output, "--html").stdout == "Wrote trend.html\n"
    Elements(Path("trend.html").read_text()).check_harmless()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "a"], "--compare: give two outputs, got 1"),
        (["--compare", "--trend", "a"], "give one of them"),
        (["a", "--json", "--html"], "give one of them"),
        (["a", "b"], "one output at a time"),
        (["--trend", "."], "no job's output in this folder or below it"),
        (["--compare", "a", "b"], "a: no job's output here"),
    ],
)
def test_mistakes(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in one_error(call("report", *options))


# -------------------------------------------------------------------- a browser


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.skipif(chromium() is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(output: Path, findings: Findings, width: int, tmp_path: Path) -> None:
    pages = {"plain": (output / REPORT).read_text()}
    pages["money"] = job_page(replace(findings, summary={**findings.summary, "cost": cost()}))
    for name, page in pages.items():
        file, picture = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        file.write_text(page)
        dom = screenshot(file, picture, width)
        # Chromium has parsed and, had there been any, run what was planted.
        assert "<title>markup · specbatch</title>" in dom
        assert "<script" not in dom
        # Nothing sticks out at the right.
        assert columns_at_the_right_edge(picture, width) == 1
