"""What a page about a job shows, gathered from the job's committed files and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.reports.summary import has_failed, read_summary
from jobs.reports.timeline import Timeline, timeline
from pipeline import layout
from pipeline.commit import manifest
from pipeline.commit.footer import read_records
from pipeline.commit.record import UnitRecord, parts
from pipeline.commit.stats import reliability, summarise
from pipeline.config.job import InputConfig, S3Config
from pipeline.config.prices import Prices
from pipeline.errors import RowError
from pipeline.inputs.jsonl import RAW_LINE
from pipeline.inputs.prompts import required_columns
from pipeline.inputs.row_ids import ROW_ID
from pipeline.inputs.row_values import each_row
from pipeline.storage.folder import Folder
from specdec.measure.speedup import RoundSums, SpeedupMeter

_EXCERPT = 240
"""Characters of a prompt or a completion on a page."""

_EXAMPLES = 3
"""Failed rows of each error class on a page."""

_SLOWEST = 10
"""Slow rows on a page. More than a footer keeps of its unit (`record`) would leave some out."""

_CLASSES = 12
"""Error classes that have examples; the others have a count alone."""


@dataclass(frozen=True)
class FailedRow:
    """A failed row: its id, what was wrong with it, and the beginning of its prompt."""

    row_id: str
    message: str
    prompt: str


@dataclass(frozen=True)
class SlowRow:
    """A row that took long: seconds from its slot to its end, counts, and how it reads."""

    row_id: str
    seconds: float
    prompt_tokens: int
    output_tokens: int
    rounds: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class Findings:
    """A job, as far as it is committed.

    Attributes:
        url: its output folder.
        finished: whether it is done.
        failed: whether it has come to its end with too many rows in errors.
        job: `_specbatch/job.json`: name, created, versions, config.
        ended: when it was finished, ISO 8601; None if it is not.
        versions: of the run that finished it, or else of the one that began it.
        summary: `pipeline.commit.stats.summarise`, with its cost.
        actors: a summary for each actor, with `actor` and `node`, most tokens first.
        timeline: speed over the time in which the job worked.
        reliability: bins of predicted against observed acceptance by (by, name); see
            `pipeline.commit.stats.reliability`.
        rounds: rounds of rows by candidates verified.
        speeds: class of live batch, tokens per second with speculation and in control rounds.
        errors: for each error class a few failed rows.
        slowest: the slowest rows.
    """

    url: str
    finished: bool
    failed: bool
    job: Mapping[str, Any]
    ended: str | None
    versions: Mapping[str, str]
    summary: Mapping[str, Any]
    actors: Sequence[Mapping[str, Any]]
    timeline: Timeline
    reliability: Mapping[tuple[str, str], list[list[float]]]
    rounds: Mapping[int, int]
    speeds: Sequence[tuple[int, float | None, float | None]]
    errors: Mapping[str, list[FailedRow]]
    slowest: Sequence[SlowRow]


def gather(url: str, s3: S3Config, prices: Prices | None = None) -> Findings:
    """Read all that a page shows.

    Args:
        url: a job's output folder.
        s3: how to reach it, if it is on S3.
        prices: a price table; None: that of the job's last run.

    Raises:
        UserError: there is no job in this folder.
    """
    summary, finished = read_summary(url, s3, prices)
    output = manifest.open_output(url, s3)
    job = json.loads(output.read(layout.JOB) or b"{}")
    done = json.loads(output.read(layout.MANIFEST) or b"{}") if finished else {}
    units = read_records(output, manifest.committed_ids(output))
    records = [part for unit in units for part in parts(unit)]
    prompt = InputConfig.model_validate(job["config"]["input"])
    return Findings(
        url=output.url,
        finished=finished,
        failed=not finished and has_failed(output, summary),
        job=job,
        ended=done.get("finished"),
        versions=done.get("versions", job.get("versions", {})),
        summary=summary,
        actors=_actors(records),
        timeline=timeline(records),
        reliability={key: found.bins.tolist() for key, found in reliability(records).items()},
        rounds=_rounds(records),
        speeds=_speeds(records),
        errors=_examples(output, units, prompt),
        slowest=_slowest(output, records, prompt),
    )


def _actors(records: Sequence[UnitRecord]) -> list[dict[str, Any]]:
    by_actor: dict[str, list[UnitRecord]] = {}
    for record in records:
        by_actor.setdefault(record.actor.id, []).append(record)
    actors = [
        {"actor": actor, "node": mine[0].actor.node, **summarise(mine)}
        for actor, mine in by_actor.items()
    ]
    return sorted(actors, key=lambda actor: -actor["output_tokens"])


def _rounds(records: Iterable[UnitRecord]) -> dict[int, int]:
    rounds = Counter[int]()
    for record in records:
        for verified, _, n in record.work.rounds:
            rounds[verified] += n
    return dict(rounds)


def _speeds(records: Iterable[UnitRecord]) -> list[tuple[int, float | None, float | None]]:
    meter = SpeedupMeter()
    for record in records:
        if record.work.speedup is not None:
            meter.add(SpeedupMeter.from_json(record.work.speedup))

    def speed(rounds: RoundSums | None) -> float | None:
        return rounds.k / rounds.t if rounds is not None and rounds.t > 0 else None

    return [
        (batch, speed(meter.speculative.get(batch)), speed(meter.control.get(batch)))
        for batch in sorted(meter.speculative.keys() | meter.control.keys())
    ]


# ------------------------------------------------------------------ single rows


def _examples(
    output: Folder, records: Iterable[UnitRecord], prompt: InputConfig
) -> dict[str, list[FailedRow]]:
    """A few failed rows of each class, from as few files as have them."""
    found: dict[str, list[FailedRow]] = {}
    for record in records:
        lacking = [
            name
            for name in record.results.errors
            if len(found.get(name, ())) < _EXAMPLES and (name in found or len(found) < _CLASSES)
        ]
        if not lacking or record.files.errors is None:
            continue
        table = _read(output, record.files.errors.name, prompt, "error_class", RAW_LINE)
        said = table.select([ROW_ID, "error_class", "error_message"]).to_pylist()
        for why, row in zip(said, each_row(table), strict=True):
            mine = found.setdefault(why["error_class"], [])
            if len(mine) < _EXAMPLES:
                text = ""  # of a row that is malformed itself
                if not isinstance(row, RowError):
                    text = row.get(RAW_LINE) or prompt_text(prompt, row)
                message = _excerpt(why["error_message"] or "")
                mine.append(FailedRow(why[ROW_ID], message, _excerpt(text)))
    return found


def _slowest(output: Folder, records: Iterable[UnitRecord], prompt: InputConfig) -> list[SlowRow]:
    all_rows = [
        (seconds, row, record.unit) for record in records for row, seconds in record.results.slowest
    ]
    found = []
    for seconds, name, unit in sorted(all_rows, reverse=True)[:_SLOWEST]:
        table = _read(output, layout.completions(unit), prompt, "completion")
        for row in table.filter(pc.equal(table[ROW_ID], name)).to_pylist():
            found.append(
                SlowRow(
                    name,
                    seconds,
                    row["prompt_tokens"],
                    row["output_tokens"],
                    row["rounds"],
                    _excerpt(prompt_text(prompt, row)),
                    _excerpt(row["completion"]),
                )
            )
    return found


def _read(output: Folder, name: str, prompt: InputConfig, *more: str) -> pa.Table:
    """The columns of a file that tell what a row is and how it went, as far as it has them."""
    wanted = {ROW_ID, "error_message", "prompt_tokens", "output_tokens", "rounds", *more}
    wanted |= set(required_columns(prompt))
    with output.open(name) as file, pq.ParquetFile(file) as parquet:
        columns = [name for name in parquet.schema_arrow.names if name in wanted]
        return parquet.read(columns)


def prompt_text(prompt: InputConfig, row: Mapping[str, Any]) -> str:
    """What a row asks, for people: the last message, the prompt, or the template's columns."""
    if prompt.messages_column is not None:
        value = row.get(prompt.messages_column)
        if isinstance(value, list) and value and isinstance(value[-1], dict):
            value = value[-1].get("content")
        return _text(value)
    columns = required_columns(prompt)
    if len(columns) == 1:
        return _text(row.get(columns[0]))
    return " · ".join(f"{column}: {_text(row.get(column))}" for column in columns)


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _excerpt(text: str) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text[: 4 * _EXCERPT].split())
    return line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]}…"
