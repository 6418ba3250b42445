"""What the pipeline itself costs and how far it goes, with an engine that returns at once.

    python benchmarks/scale.py plan --files 100000 --rows 1000  # footers: seconds, driver memory
    python benchmarks/scale.py flow --rows 1000000              # driver memory from first to last
    python benchmarks/scale.py units                            # seconds per unit and per row
    python benchmarks/scale.py actors                           # rows/s of 1, 2, 4 and 8 actors
    python benchmarks/scale.py resume                           # by units, and by rows per unit
    python benchmarks/scale.py files --files 10000              # of one row each, and one file

But for `files`, which has a tiny model, the engine is a double, the one thing here that is not
real: it completes every request with one token without a forward, so that everything else is what
is measured: planning, Ray, reading, rendering and tokenizing, Parquet, commits and the manifest.
The cluster is several raylets on this machine.
`actors` lets the double take a while for each row, as an engine on an accelerator of its own would;
otherwise all actors would share this machine's cores, and show those.

Each prints tables; each command's `--help` says of what, and how long it takes on two cores.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from common import console, run
from engine_double import cluster
from rich.table import Table

from pipeline.commit import manifest
from pipeline.config.job import ActorsConfig, JobConfig, S3Config, SamplingConfig
from pipeline.inputs.joining import bundled
from pipeline.inputs.source import UnitDatasource
from pipeline.observe.progress import JobProgress
from pipeline.run.plan import plan_job
from pipeline.run.run import run_job
from tests.conftest import save_llama, save_tokenizer

Actors = Annotated[int, typer.Option(help="actors of the double")]
UnitRows = Annotated[int, typer.Option(help="rows of a unit")]
_FOLDER_FILES = 10_000
"""Hard links of one file. Filesystems allow some ten thousand, so more would fail."""


# ----------------------------------------------------------------------- helpers


@contextmanager
def workspace() -> Iterator[Path]:
    """A folder for this measurement with a tiny model in it."""
    root = Path(tempfile.mkdtemp(prefix="scale-"))
    try:
        save_llama(root / "model", save_tokenizer(root / "model"), seed=0)
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def write_files(root: Path, files: int, rows: int) -> int:
    """Input files of `rows` prompts each. Returns the bytes of one of them."""
    words = np.random.default_rng(0).integers(0, 1000, (rows, 30))
    prompts = [" ".join(map(str, row)) for row in words]
    size = 0
    for first in range(0, files, _FOLDER_FILES):
        folder = root / "in" / f"{first // _FOLDER_FILES:03}"
        folder.mkdir(parents=True)
        original = folder / f"part-{first:06}.parquet"
        pq.write_table(pa.table({"id": range(rows), "prompt": prompts}), original)
        size = original.stat().st_size
        for i in range(first + 1, min(first + _FOLDER_FILES, files)):
            os.link(original, folder / f"part-{i:06}.parquet")
    return size


def job_of(root: Path, name: str, unit_rows: int, actors: int = 1) -> JobConfig:
    """The job over the workspace's input."""
    return JobConfig.model_validate(
        {
            "input": {"paths": [str(root / "in")], "prompt_column": "prompt"},
            "output": str(root / name),
            "models": {"target": str(root / "model")},
            "speculation": {"policy": "none"},
            "actors": {"min": actors, "num_cpus": 1, "slots": 16},
            "unit_rows": unit_rows,
        }
    )


def rss_mb() -> float:
    """This process's resident memory now."""
    return psutil.Process().memory_info().rss / 1e6


@dataclass
class Watch:
    """Takes note of rows and of the driver's memory while a job runs."""

    samples: list[tuple[float, int, float]]
    """Seconds since the start, rows done, resident MB."""

    def __init__(self) -> None:
        self.samples = []
        self._began = time.monotonic()
        self._rows = 0
        self._over = threading.Event()

    def told(self, progress: JobProgress) -> None:
        self._rows = max(self._rows, progress.tally.rows)

    @contextmanager
    def running(self) -> Iterator[None]:
        def sample() -> None:
            while not self._over.wait(0.25):
                self.samples.append((time.monotonic() - self._began, self._rows, rss_mb()))

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def between(self, low: float, high: float) -> float:
        """Mean memory while the rows done were between two shares of all."""
        total = self.samples[-1][1]
        found = [mb for _, rows, mb in self.samples if low * total < rows <= high * total]
        return float(np.mean(found)) if found else float("nan")

    @property
    def rows_per_second(self) -> float:
        """Between the first and the last tenth of the rows: without start and end.

        Not a number where all rows were done between two looks.
        """
        total = self.samples[-1][1]
        middle = [(t, rows) for t, rows, _ in self.samples if 0.1 * total < rows < 0.9 * total]
        if len(middle) < 2:
            return float("nan")
        (t0, r0), (t1, r1) = middle[0], middle[-1]
        return (r1 - r0) / (t1 - t0)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table of measurements."""
    shown = Table(title=title)
    for column in columns:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            *(
                f"{v:,.3g}" if isinstance(v, float) else v if isinstance(v, str) else f"{v:,}"
                for v in row
            )
        )
    console.print(shown)


# ------------------------------------------------------------------ measurements


def plan(
    files: Annotated[int, typer.Option(help="input files")] = 2000,
    rows: Annotated[int, typer.Option(help="rows of each")] = 1000,
    unit_rows: UnitRows = 256,
) -> None:
    """Plan a job over many files: footers only, no data page.

    Prints the seconds of planning and claiming, the driver's memory, and the bytes read of a file.
    100,000 files take half a minute, and a minute to be made.
    """
    with workspace() as root:
        size = write_files(root, files, rows)
        job = job_of(root, "out", unit_rows)
        before, read = rss_mb(), psutil.Process().io_counters().read_chars
        began = time.monotonic()
        planned = plan_job(job)
        seconds = time.monotonic() - began
        read = psutil.Process().io_counters().read_chars - read
        after = rss_mb()
        began = time.monotonic()
        mark = manifest.fingerprint(job, planned.files)
        manifest.claim(planned.output, job, planned.files, mark)
        units = planned.units
        source = UnitDatasource(bundled(units, unit_rows), planned.table, S3Config())
        source.get_read_tasks(source.read_tasks)
        claim = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    table(
        "plan",
        ["files", "rows", "units", "seconds", "files/s", "claim s", "read tasks"],
        [(files, planned.rows, len(units), seconds, files / seconds, claim, source.read_tasks)],
    )
    table(
        "driver memory, MB, and bytes read",
        ["before", "after planning", "peak", "bytes/unit", "bytes read/file", "bytes of a file"],
        [(before, after, peak, (after - before) * 1e6 / len(units), read // files, size)],
    )


def flow(
    rows: Annotated[int, typer.Option(help="rows of the job")] = 50_000,
    unit_rows: UnitRows = 256,
    actors: Actors = 2,
) -> None:
    """Run a job from end to end and watch the driver's memory.

    Prints rows per second and the driver's memory by tenth of the rows. A million rows take five
    minutes, the default one.
    """
    with workspace() as root:
        per_file = 10_000
        write_files(root, -(-rows // per_file), min(rows, per_file))
        watch = Watch()
        with cluster(nodes=actors, cpus=1):
            began = time.monotonic()
            with watch.running():
                result = run_job(job_of(root, "out", unit_rows, actors), progress=watch.told)
            seconds = time.monotonic() - began
        size = sum(f.stat().st_size for f in (root / "out").rglob("*") if f.is_file())
    first, last = watch.between(0.0, 0.1), watch.between(0.9, 1.0)
    done = result.summary["rows"]
    table(
        f"flow, {actors} actors",
        ["rows", "units", "seconds", "rows/s", "output MB"],
        [(done, result.units_run, seconds, watch.rows_per_second, size / 1e6)],
    )
    peak = max(mb for _, _, mb in watch.samples)
    tenths = [watch.between(i / 10, (i + 1) / 10) for i in range(10)]
    table("driver memory by tenth of the rows, MB", list(map(str, range(1, 11))), [tenths])
    table("driver memory, MB", ["first tenth", "last tenth", "ratio", "peak (with the manifest)"],
          [(first, last, last / first, peak)])  # fmt: skip


def units(
    rows: Annotated[int, typer.Option(help="rows of each job")] = 20_000,
    sizes: Annotated[str, typer.Option(help="rows of a unit, two sizes")] = "16,256",
) -> None:
    """Split the time of a job into seconds per unit and seconds per row.

    Runs two jobs whose units differ in size, and prints both costs in milliseconds. Two minutes.
    """
    found = []
    with workspace() as root:
        write_files(root, 2, rows // 2)
        with cluster(nodes=1, cpus=1):
            for size in map(int, sizes.split(",")):
                watch = Watch()
                with watch.running():
                    result = run_job(job_of(root, f"out-{size}", size), progress=watch.told)
                found.append((size, result.units_run, 1 / watch.rows_per_second))
    # seconds per row = row + unit / unit_rows
    (small, _, slow), (large, _, fast) = found
    unit = (slow - fast) / (1 / small - 1 / large)
    row = fast - unit / large
    table("one actor, with the double", ["unit_rows", "units", "ms per row"],
          [(size, n, seconds * 1e3) for size, n, seconds in found])  # fmt: skip
    table("hence", ["ms per unit", "ms per row"], [(unit * 1e3, row * 1e3)])


def actors(
    rows: Annotated[int, typer.Option(help="rows for each actor")] = 5000,
    counts: Annotated[str, typer.Option(help="numbers of actors")] = "1,2,4,8",
    row_ms: Annotated[float, typer.Option(help="the double sleeps so long for each row")] = 5.0,
    unit_rows: UnitRows = 64,
) -> None:
    """Rows per second by number of actors, each on a raylet of its own.

    Prints by number of actors the rate, how many times that of one it is, and its share of what
    the doubles could do. Some 4 minutes.
    """
    found: list[tuple[int, float, float]] = []
    with workspace() as root:
        for count in map(int, counts.split(",")):
            shutil.rmtree(root / "in", ignore_errors=True)
            write_files(root, 4, rows * count // 4)
            with cluster(nodes=count, cpus=1, seconds_per_row=row_ms / 1e3):
                watch = Watch()
                with watch.running():
                    run_job(job_of(root, f"out-{count}", unit_rows, count), progress=watch.told)
            found.append((count, watch.rows_per_second, watch.rows_per_second * row_ms / 1e3))
            console.print(f"{count} actors: {watch.rows_per_second:,.0f} rows/s")
    most = 1e3 / row_ms if row_ms else float("nan")
    table(
        f"{row_ms:g} ms per row and actor: at most {most:,.0f} rows/s each",
        ["actors", "rows/s", "times one actor", "share of the most"],
        [(n, rate, rate / found[0][1], rate / (n * most)) for n, rate, _ in found],
    )


def resume(
    shapes: Annotated[
        str, typer.Option(help="units x rows of a unit, separated by commas")
    ] = "250x8,1000x8,250x256,1000x256",
) -> None:
    """Seconds until a job whose units are all committed is known to be whole.

    Prints by shape of job the seconds to list what is missing, and to check and write the manifest.
    Some 5 minutes, in which the jobs are run.
    """
    found = []
    with workspace() as root, cluster(nodes=2, cpus=1):
        for shape in shapes.split(","):
            units, unit_rows = map(int, shape.split("x"))
            shutil.rmtree(root / "in", ignore_errors=True)
            write_files(root, 10, units * unit_rows // 10)
            job = job_of(root, f"out-{shape}", unit_rows, actors=2)
            run_job(job)
            (root / f"out-{shape}" / "_SUCCESS").unlink()
            began = time.monotonic()
            planned = plan_job(job)
            manifest.committed(planned.output, planned.units)
            listed = time.monotonic() - began
            result = run_job(job)
            assert not result.units_run
            seconds = time.monotonic() - began - listed
            row = (units, unit_rows, units * unit_rows, listed, seconds, seconds * 1e3 / units)
            found.append(row)
            console.print(f"{shape}: {listed:.2f} s, {seconds:.2f} s")
    columns = ["units", "unit_rows", "rows", "what is missing, s", "check and manifest, s"]
    table("resume", [*columns, "ms per unit"], found)


def files(
    files: Annotated[int, typer.Option(help="input files of one row each")] = 1000,
    unit_rows: UnitRows = 256,
    slots: Annotated[int, typer.Option(help="of the engine")] = 64,
    tokens: Annotated[int, typer.Option(help="new tokens per row")] = 24,
) -> None:
    """Rows of many small files, and the same rows in one file, through a tiny model.

    Prints for both the seconds in which units were in work, tokens per second, forwards of the
    target and how many rows they had in them, units, and the seconds of the whole run. 10,000 files
    take four minutes.
    """
    found = []
    with workspace() as root:
        for name, shape in (("one row each", (files, 1)), ("one file", (1, files))):
            shutil.rmtree(root / "in", ignore_errors=True)
            write_files(root, *shape)
            job = job_of(root, f"out-{shape[0]}", unit_rows).model_copy(
                update={
                    "actors": ActorsConfig(num_cpus=os.cpu_count(), slots=slots),
                    "sampling": SamplingConfig(
                        max_new_tokens=tokens, temperature=0, ignore_eos=True
                    ),
                }
            )
            began = time.monotonic()
            result = run_job(job)
            seconds, summary = time.monotonic() - began, result.summary
            live = summary["rounds"] / summary["target_forwards"]
            found.append(
                (
                    name,
                    summary["seconds"],
                    summary["tokens_per_second"],
                    summary["target_forwards"],
                    live,
                    result.units_run,
                    seconds,
                )
            )
    columns = ["input", "seconds", "tokens/s", "forwards", "rows in each", "units", "whole run, s"]
    table(f"{files:,} rows", columns, found)


if __name__ == "__main__":
    run(__doc__, plan, flow, units, actors, resume, files)
