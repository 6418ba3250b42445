"""The dataset's folder: what lies where, and which nights are published.

README.md                         the dataset card; it lists every published file
data/date=DATE/SPLIT-N.parquet    a night's partition
_nightly/nights/DATE.json         the night's manifest, written last: the night is published
_nightly/used/DATE.parquet        which seeds it used
_nightly/index/DATE.parquet       what later nights compare with to find duplicates
_nightly/work/DATE-MARK/          what it was made of: the plan, the outputs of turns and judge
_nightly/reports/DATE.md          the night's report
_nightly/improve/DATE.json        what became of the models that it taught
_nightly/status.json              how the last run went
_nightly/lock/                    who is at work
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date as Date
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.nightly.recipe import Recipe
from pipeline.commit.files import parquet_bytes
from pipeline.storage.folder import Folder, reach_folder

CARD = "README.md"
"""The dataset card, as Hugging Face's hub and `datasets` find it."""

ROOT = "_nightly"
"""Folder of what is not data, within the dataset's."""

NIGHTS = f"{ROOT}/nights"
"""Folder of the nights' manifests. A manifest there makes its night published."""

_THREADS = 16
"""Manifests that are read at a time. S3 answers each in tens of milliseconds."""


Step = int | Literal["judge"]
"""What a job of a night is for: a turn, counted from 1, or the judge."""


@dataclass(frozen=True)
class Night:
    """The manifest of a published night. Counts are stored; ratios are derived where they show.

    Attributes:
        date: YYYY-MM-DD.
        mark: of the recipe that it was made by (`Recipe.mark`).
        published: when, ISO 8601.
        seeds: seeds used.
        conversations: begun; as many rows as there would be if all were kept.
        lost: conversations without a completion, by error class.
        filters: for each filter in order: name, matched (completions), removed (conversations).
        rows: published rows by split.
        columns: Arrow types of the partition's columns by name.
        files: name, split, rows, bytes and sha256 of each file.
        summary: its jobs in numbers (`pipeline.commit.stats.summarise` over all turns).
        cost: what the jobs cost, by their ledgers; None if a price is missing.
        currency: of the cost.
        models: target, draft, head and policy that it ran with, and what pins their content.
        sampling: as in the job file.
        examples: a few published rows.
        seeds_skipped: why seeds could not be used, with how many.
        judge: what it did, if there is one: judged, output_tokens, mean_score, target.
    """

    date: str
    mark: str
    published: str
    seeds: int
    conversations: int
    lost: dict[str, int]
    filters: list[dict[str, Any]]
    rows: dict[str, int]
    columns: dict[str, str]
    files: list[dict[str, Any]]
    summary: dict[str, Any]
    cost: float | None
    currency: str
    models: dict[str, Any]
    sampling: dict[str, Any]
    examples: list[dict[str, Any]]
    seeds_skipped: dict[str, int] = field(default_factory=dict)
    judge: dict[str, Any] = field(default_factory=dict)

    @property
    def total_rows(self) -> int:
        """Published rows."""
        return sum(self.rows.values())

    @property
    def per_million(self) -> float | None:
        """Cost per million output tokens, those of rows that were filtered included."""
        tokens = self.summary["output_tokens"]
        return None if self.cost is None or not tokens else self.cost / tokens * 1e6

    def to_json(self) -> bytes:
        """What the manifest file holds."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False).encode()

    @staticmethod
    def from_json(data: bytes) -> Night:
        """What `to_json` wrote."""
        return Night(**json.loads(data))


@dataclass(frozen=True)
class Archive:
    """A dataset's folder.

    Attributes:
        folder: local or on S3.
    """

    folder: Folder

    @staticmethod
    def of(recipe: Recipe) -> Archive:
        """The recipe's dataset.

        Raises:
            UserError: S3 is out of reach.
        """
        return Archive(reach_folder(recipe.output, recipe.job.s3_of_output))

    def dates(self) -> list[str]:
        """Published nights, in the order of their dates."""
        return sorted(n.removesuffix(".json") for n in self.folder.list(NIGHTS) if n[0].isdigit())

    def night(self, date: str) -> Night | None:
        """A night's manifest, if it is published."""
        data = self.folder.read(f"{NIGHTS}/{date}.json")
        return Night.from_json(data) if data is not None else None

    def nights(self) -> list[Night]:
        """All published nights, in the order of their dates."""
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self.night, self.dates()))
        return [night for night in found if night is not None]

    def used_seeds(self) -> dict[tuple[str, str], str]:
        """Digest of what each template last saw of each seed, by template and seed id."""
        result: dict[tuple[str, str], str] = {}
        for night in sorted(self.nights(), key=lambda night: night.published):
            for row in self.table(f"{ROOT}/used/{night.date}.parquet").to_pylist():
                result[row["template"], row["seed_id"]] = row["digest"]
        return result

    def table(self, name: str) -> pa.Table:
        """A Parquet file of the folder."""
        with self.folder.open(name) as file:
            return pq.read_table(file)

    def improvement(self, date: str) -> dict[str, Any] | None:
        """What became of the models that a night taught; None if it taught none yet."""
        data = self.folder.read(f"{ROOT}/improve/{date}.json")
        return json.loads(data) if data is not None else None

    def put_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write plain data under `_nightly/`."""
        self.folder.put(f"{ROOT}/{name}", json.dumps(value, indent=1, ensure_ascii=False).encode())


@dataclass(frozen=True)
class WorkFolder:
    """Where a night is made: its plan, and for each step a job's input and output.

    A recipe that has changed since a night was begun begins anew, in another folder.

    Attributes:
        archive: the dataset.
        date: the night's.
        mark: the recipe's.
    """

    archive: Archive
    date: Date
    mark: str

    @cached_property
    def folder(self) -> Folder:
        """The folder."""
        name = f"{ROOT}/work/{self.date.isoformat()}-{self.mark}"
        return self.archive.folder.subfolder(name)

    def keep_table(self, name: str, table: pa.Table) -> pa.Table:
        """Write a table unless it is there; returns the one that is there."""
        data = parquet_bytes(table)
        if not self.folder.put_if_absent(name, data):
            data = self.folder.read(name) or data
        return pq.read_table(pa.BufferReader(data))

    def input(self, step: Step) -> str:
        """Name of the input file of a step's job."""
        return f"{_name(step)}.parquet"

    def output(self, step: Step) -> Folder:
        """Output folder of a step's job."""
        return self.folder.subfolder(_name(step))


def _name(step: Step) -> str:
    return f"turn-{step}" if isinstance(step, int) else step
