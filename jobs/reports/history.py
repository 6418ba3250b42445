"""Jobs as lines of figures, to be set side by side or in a row by date."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jobs.reports.summary import read_summary
from jobs.terminal.amounts import money, number
from pipeline import layout
from pipeline.commit import manifest
from pipeline.config.job import S3Config
from pipeline.config.prices import Prices
from pipeline.errors import UserError
from pipeline.storage.folder import Folder, reach_folder

_THREADS = 16
"""Jobs read at once: on S3 each is a few small files, and mostly waiting."""

_DEPTH = 5
"""How far below a given folder jobs are looked for. Each level more lists all folders of it."""


@dataclass(frozen=True)
class ReportedJob:
    """A job, as far as it is committed.

    Attributes:
        url: its output folder.
        name: the job's.
        date: when it was finished, or else when it was begun.
        finished: whether it is done.
        summary: the job in numbers (`pipeline.commit.stats.summarise`), with its cost.
        config: its job file, with defaults filled in.
        fingerprint: all that changed its results.
    """

    url: str
    name: str
    date: datetime
    finished: bool
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    fingerprint: Mapping[str, Any]

    @property
    def currency(self) -> str | None:
        """What its cost is in; None if it is not known."""
        cost = self.summary["cost"]
        return str(cost["currency"]) if cost else None

    def to_json(self) -> dict[str, Any]:
        """Its figures as plain data; what was not measured is null."""
        return {
            "url": self.url,
            "name": self.name,
            "date": self.date.isoformat(),
            "finished": self.finished,
            "currency": self.currency,
            **{figure.key: figure.of(self) for figure in FIGURES},
            "speedup_ci": self.summary["speedup_ci"],
        }


@dataclass(frozen=True)
class JobFigure:
    """A number that every job has, or could have.

    Attributes:
        key: its name in JSON.
        label: its name for people.
        form: how it is written: a format, or "money".
        of: takes it from a job; None if it is not known.
        more_is: "better", "worse", or "" where it is neither.
    """

    key: str
    label: str
    form: str
    of: Callable[[ReportedJob], float | None]
    more_is: str = ""

    def text(self, job: ReportedJob) -> str:
        """The job's figure, as people read it."""
        value = self.of(job)
        if self.form == "money":
            return money(value, job.currency or "")
        return number(value, self.form)


def _summed(key: str) -> Callable[[ReportedJob], float | None]:
    return lambda job: job.summary.get(key)


def _costing(key: str) -> Callable[[ReportedJob], float | None]:
    return lambda job: job.summary["cost"].get(key) if job.summary["cost"] else None


FIGURES = (
    JobFigure("rows", "rows completed", ",", _summed("rows")),
    JobFigure("errors", "rows in errors", ",", _summed("errors"), "worse"),
    JobFigure("output_tokens", "output tokens", ",", _summed("output_tokens")),
    JobFigure("seconds", "seconds at work", ",.1f", _summed("seconds"), "worse"),
    JobFigure("tokens_per_second", "tokens/s", ",.1f", _summed("tokens_per_second"), "better"),
    JobFigure("acceptance_rate", "acceptance rate", ".1%", _summed("acceptance_rate"), "better"),
    JobFigure("block_efficiency", "block efficiency", ".3f", _summed("block_efficiency"), "better"),
    JobFigure("speedup", "speedup", ".2f", _summed("speedup"), "better"),
    JobFigure("cost", "cost", "money", _costing("total"), "worse"),
    JobFigure(
        "per_million_output_tokens",
        "cost per million tokens",
        "money",
        _costing("per_million_output_tokens"),
        "worse",
    ),
    JobFigure(
        "per_thousand_rows",
        "cost per thousand rows",
        "money",
        _costing("per_thousand_rows"),
        "worse",
    ),
    JobFigure("saved", "saved", "money", _costing("saved"), "better"),
)
"""What is compared between jobs."""


def read_job(url: str, s3: S3Config, prices: Prices | None = None) -> ReportedJob:
    """The job in a folder.

    Raises:
        UserError: there is none.
    """
    summary, finished = read_summary(url, s3, prices)
    output = manifest.open_output(url, s3)
    job = json.loads(output.read(layout.JOB) or b"{}")
    done = json.loads(output.read(layout.MANIFEST) or b"{}") if finished else {}
    date = datetime.fromisoformat(done.get("finished") or job["created"])
    return ReportedJob(
        url, job["name"], date, finished, summary, job.get("config", {}), job.get("fingerprint", {})
    )


def find_jobs(urls: Sequence[str], s3: S3Config, prices: Prices | None = None) -> list[ReportedJob]:
    """The jobs in folders or below them, by date.

    Raises:
        UserError: there is none in one of them.
    """
    outputs = [found for url in urls for found in _outputs(url, s3)]
    with ThreadPoolExecutor(_THREADS) as pool:
        jobs = pool.map(lambda url: read_job(url, s3, prices), dict.fromkeys(outputs))
        return sorted(jobs, key=lambda job: (job.date, job.url))


def _outputs(url: str, s3: S3Config) -> list[str]:
    """The folder itself if it holds a job, else the jobs' folders below it."""
    found = list(_below(reach_folder(url, s3), _DEPTH))
    if not found:
        raise UserError(f"{url}: no job's output in this folder or below it")
    return found


def _below(folder: Folder, depth: int) -> Iterator[str]:
    if folder.read(layout.JOB) is not None:
        yield folder.url
    elif depth:
        for name in (name for name in folder.folders() if not name.startswith(".")):
            yield from _below(folder.subfolder(name), depth - 1)
