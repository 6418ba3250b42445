"""What is known of a committed unit, by subject.

A record travels in the footer of the unit's completions file (`pipeline.commit.footer`). Statistics
are so committed with the rows they describe, and any set of committed files adds up, whatever runs
they come from.
An engine's seconds of a round count for the units of the rows that took part, in proportion. Its
forwards, and seconds spent on no unit, count for the unit that finished next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline import layout
from pipeline.commit.schema import Failed, Finished, Outcomes, by_sample
from pipeline.inputs.units import RowRange, Unit
from specdec.measure.calibration import Calibration
from specdec.request import Completion, Counts

_SLOWEST_ROWS = 10
"""Rows of a unit whose seconds are kept: as many as a report shows. More would swell footers."""


@dataclass(frozen=True)
class UnitFile:
    """A file of a unit.

    Attributes:
        name: in the output folder.
        rows: how many it has.
        sha256: its checksum; None where no footer says it.
    """

    name: str
    rows: int
    sha256: str | None


@dataclass(frozen=True)
class AttachedFiles:
    """The files that the footer of a unit's completions file names.

    Attributes:
        errors: its failed rows; None if no row failed, or their file was lost.
        trace: the rounds of its rows; None if they were not kept.
    """

    errors: UnitFile | None = None
    trace: UnitFile | None = None

    @property
    def there(self) -> list[UnitFile]:
        """Those that the unit has."""
        return [file for file in (self.errors, self.trace) if file is not None]


@dataclass(frozen=True)
class Results:
    """What became of a unit's rows.

    Attributes:
        samples: how many samples the rows asked for: `completions` + `failed`.
        own_n: whether each row may say how many.
        completions: samples completed.
        errors: failed samples by error class.
        prompt_tokens, output_tokens: of completed samples.
        counts: what speculation did for them.
        calibration: predicted against observed acceptance, by class of context length
            (`Calibration.bins`); of the last generation alone.
        slowest: the rows that took longest from slot to end, and their seconds, slowest first; of
            the last generation alone.
    """

    samples: int
    own_n: bool
    completions: int
    errors: Mapping[str, int]
    prompt_tokens: int
    output_tokens: int
    counts: Counts
    calibration: Mapping[str, list[list[float]]] = field(default_factory=dict)
    slowest: Sequence[tuple[str, float]] = ()

    @property
    def failed(self) -> int:
        """Samples in errors."""
        return sum(self.errors.values())

    @staticmethod
    def of(outcomes: Outcomes, own_n: bool) -> Results:
        """The results of rows that were just tried."""
        samples = [outcome for _, _, outcome in by_sample(outcomes)]
        finished = [each.completion for each in samples if isinstance(each, Finished)]
        counts = Counts()
        for completion in finished:
            counts.add(completion.counts)
        return Results(
            samples=len(samples),
            own_n=own_n,
            completions=len(finished),
            errors=Counter(e.error.error_class for e in samples if isinstance(e, Failed)),
            prompt_tokens=sum(completion.prompt_tokens for completion in finished),
            output_tokens=sum(len(completion.output_ids) for completion in finished),
            counts=counts,
            calibration=_calibration(finished),
            slowest=_slowest(finished),
        )


def _calibration(completions: Iterable[Completion]) -> dict[str, list[list[float]]]:
    """The sum of the rows' calibration bins by class of context length, as plain data."""
    total: dict[int, Calibration] = {}
    for completion in completions:
        for context, calibration in completion.calibration.items():
            total.setdefault(context, Calibration()).bins += calibration.bins
    return {str(context): each.bins.tolist() for context, each in sorted(total.items())}


def _slowest(completions: Iterable[Completion]) -> list[tuple[str, float]]:
    slowest = sorted(completions, key=lambda completion: -completion.seconds)[:_SLOWEST_ROWS]
    return [(completion.id, completion.seconds) for completion in slowest]


@dataclass(frozen=True)
class Actor:
    """Which actor generated a unit.

    Attributes:
        id, node: Ray's ids of the actor and of where it ran.
        group: its group, if the pool has groups.
        worker: Ray's id of its process; an actor that is restarted goes on as another.
    """

    id: str
    node: str
    group: str | None = None
    worker: str = ""


@dataclass(frozen=True)
class Work:
    """What a unit took of its actor.

    Attributes:
        started, finished: seconds since the epoch.
        engine: forwards and tokens through each model.
        phase_seconds: seconds by phase: the unit's share of the rounds that its rows took part in,
            and load, profile and idle since the last unit.
        peak_live: most rows in the engine's slots at once.
        speedup: rounds with speculation and control rounds (`SpeedupMeter.to_json`).
        rounds: candidates verified, how many of them were accepted, and how many rounds of a row
            ended so.
        nodes: of candidates that branch, depth and rank among siblings, and how many there were
            drafted, verified, judged and accepted.
        forward_seconds: the policy's cost tables when the unit ended: (tokens, seconds) by model.
        fell_back: whether the policy had given up its acceptance head by then.
    """

    started: float
    finished: float
    engine: Mapping[str, int]
    phase_seconds: Mapping[str, float]
    peak_live: int
    speedup: Mapping[str, Any] | None = None
    rounds: Sequence[tuple[int, int, int]] = ()
    nodes: Sequence[tuple[int, ...]] = ()
    forward_seconds: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    fell_back: bool = False


@dataclass(frozen=True)
class Retries:
    """How often a unit's failed rows were tried again (`pipeline.commit.retry`).

    Attributes:
        generation: 0 for the first, which tried all rows.
        retried: how many rows the last generation tried; 0 for the first.
        earlier: the records that this one superseded, oldest first.
    """

    generation: int = 0
    retried: int = 0
    earlier: tuple[UnitRecord, ...] = ()


@dataclass(frozen=True)
class UnitRecord:
    """One committed unit.

    After a retry, `rows`, `results` and `files` are about all rows of the unit; `actor` and `work`
    are about the last generation, which tried the failed ones.

    Attributes:
        unit: its id.
        job: digest of the fingerprint of the job that it was generated for.
        ranges: which rows it is of, in this order.
        rows: how many were tried.
        results: what became of its rows.
        actor: who generated it.
        work: what that took.
        files: its errors and trace.
        retries: how often its failed rows were tried again.
    """

    unit: str
    job: str
    ranges: tuple[RowRange, ...]
    rows: int
    results: Results
    actor: Actor
    work: Work
    files: AttachedFiles = AttachedFiles()
    retries: Retries = Retries()

    @staticmethod
    def of_attempt(
        unit: Unit,
        outcomes: Outcomes,
        *,
        job: str,
        own_n: bool,
        actor: Actor,
        work: Work,
        files: AttachedFiles,
    ) -> UnitRecord:
        """The record of an attempt at a unit that has just ended.

        Args:
            unit: what was tried.
            outcomes: of the rows that were (`unit.wanted`).
            job: digest of the job's fingerprint.
            own_n: whether each row may say how many samples it has.
            actor: who tried.
            work: what it took.
            files: where failed rows and rounds are.
        """
        return UnitRecord(
            unit=unit.id,
            job=job,
            ranges=tuple(RowRange(each.name, each.start, each.rows) for each in unit.pieces),
            rows=len(unit.wanted),
            results=Results.of(outcomes, own_n),
            actor=actor,
            work=work,
            files=files,
            retries=Retries(unit.generation),
        )

    @property
    def inputs(self) -> list[str]:
        """Names of the input files that its rows are of, in this order."""
        return list(dict.fromkeys(each.name for each in self.ranges))

    @property
    def completions_file(self) -> UnitFile:
        """The file that commits the unit."""
        return UnitFile(layout.completions(self.unit), self.results.completions, None)

    @property
    def superseded_files(self) -> list[UnitFile]:
        """Failed rows that were tried again, by generation."""
        errors = (record.files.errors for record in self.retries.earlier)
        return [replace(f, name=layout.superseded(f.name)) for f in errors if f is not None]


def parts(record: UnitRecord) -> list[UnitRecord]:
    """A record by generation: what each of them took, and the rows that it settled.

    Rows that failed and were tried again belong to the generation that tried them last, so the
    parts sum to the whole.
    """
    last = replace(record, retries=replace(record.retries, earlier=()))
    wholes = [*record.retries.earlier, last]
    found: list[UnitRecord] = []
    for before, whole, after in zip([None, *wholes], wholes, [*wholes[1:], None], strict=False):
        tried = whole.rows if before is None else whole.retries.retried
        results = whole.results
        if after is not None:
            results = replace(results, errors={})
        if before is not None:
            results = _since(before.results, results)
        results = replace(results, samples=results.completions + results.failed)
        rows = tried - (after.retries.retried if after else 0)
        found.append(replace(whole, rows=rows, results=results))
    return found


def _since(before: Results, after: Results) -> Results:
    """`after` without the completed samples of `before`."""
    earlier = asdict(before.counts)
    counts = {name: n - earlier[name] for name, n in asdict(after.counts).items()}
    return replace(
        after,
        completions=after.completions - before.completions,
        prompt_tokens=after.prompt_tokens - before.prompt_tokens,
        output_tokens=after.output_tokens - before.output_tokens,
        counts=Counts(**counts),
    )
