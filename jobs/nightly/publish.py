"""From conversations to a published partition: all of a night, or nothing of it.

The files of a night are complete before anything names them. On a disk the whole partition gets its
place in one rename. Then comes the manifest, in one atomic step: from here on the night is
published. The card, which lists the files for `datasets.load_dataset`, is written from all
manifests; what it lists is always whole, on S3 too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from jobs.nightly.archive import NIGHTS, ROOT, Archive, Night
from jobs.nightly.columns import CHOSEN_COLUMNS, OWN_COLUMNS, column_type
from jobs.nightly.conversations import Conversation
from jobs.nightly.duplicates import DuplicateIndex, index_name
from jobs.nightly.recipe import Recipe, SplitConfig
from jobs.nightly.seeds import Prompt
from pipeline.commit.files import parquet_bytes
from pipeline.errors import UserError

SPLITS = ("train", "validation")

_FILE_ROWS = 50_000
"""Most rows of a file of a partition. Fewer make more files; all are made in memory."""


def split_of(seed_id: str, config: SplitConfig) -> str:
    """The split that a seed's conversations are in, in every night.

    >>> split_of("any", SplitConfig(validation=0))
    'train'
    """
    digest = hashlib.sha256(f"{config.salt}:{seed_id}".encode()).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") / 2**64 < config.validation]


def partition_schema(recipe: Recipe, seed: pa.Schema) -> pa.Schema:
    """The columns of the dataset.

    Args:
        recipe: says what its turns bring, and which of the seeds' columns are kept.
        seed: their types.

    Raises:
        UserError: a kept column has the name of one of the dataset's own.
    """
    fields = dict(OWN_COLUMNS)
    fields |= {name: column_type(kind) for name, kind in recipe.fields().items()}
    fields |= {name: CHOSEN_COLUMNS[name] for name in recipe.chosen}
    for column in recipe.seeds.keep_columns:
        if column in fields:
            raise UserError(
                f"seeds.keep_columns: {column!r} is the name of a column that the dataset has; "
                "rename it in the seeds"
            )
        fields[column] = seed.field(column).type
    return pa.schema(fields)


_BRINGS = "seeds.keep_columns, a turn's schema or judge and select"
"""What makes columns."""


def check_columns(schema: pa.Schema, nights: Sequence[Night]) -> None:
    """Make sure that a night's rows fit to those that are published.

    Raises:
        UserError: names the column that differs.
    """
    if not nights:
        return
    there, here = nights[-1].columns, described(schema)
    for name in [*there, *here]:
        if there.get(name) != here.get(name):
            raise UserError(
                f"{_BRINGS}: column {name!r} is {there.get(name, 'not there')} in the "
                f"night of {nights[-1].date} and {here.get(name, 'not there')} now; readers need "
                "the same columns in all nights: restore it, or choose another output"
            )


def described(schema: pa.Schema) -> dict[str, str]:
    """Types by column."""
    return {field.name: str(field.type) for field in schema}


@dataclass(frozen=True)
class Partition:
    """A night's rows, as files.

    Attributes:
        date: the night's.
        files: name in the partition, split, rows and content of each.
        rows: by split.
        examples: a few rows, as plain data.
    """

    date: str
    files: list[tuple[str, str, int, bytes]]
    rows: dict[str, int]
    examples: list[dict[str, Any]]

    @property
    def folder(self) -> str:
        """Where the files belong, in the dataset's folder."""
        return f"data/date={self.date}"

    def described(self) -> list[dict[str, Any]]:
        """The files, as the manifest lists them."""
        return [
            {
                "name": f"{self.folder}/{name}",
                "split": split,
                "rows": rows,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
            for name, split, rows, data in self.files
        ]


def make_partition(
    recipe: Recipe, date: str, schema: pa.Schema, kept: Sequence[Conversation], model: str
) -> Partition:
    """Rows and files of what is kept."""
    by_split: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    chosen, brought = recipe.chosen, dict.fromkeys(recipe.fields())
    for each in kept:
        by_split[split_of(each.prompt.seed_id, recipe.split)].append(
            {
                **_row(each, date, model, recipe),
                **brought,
                **each.fields,
                **{name: getattr(each, name) for name in chosen},
            }
        )
    files = []
    for split, rows in by_split.items():
        for number, start in enumerate(range(0, len(rows), _FILE_ROWS)):
            part = rows[start : start + _FILE_ROWS]
            data = parquet_bytes(pa.Table.from_pylist(part, schema=schema))
            files.append((f"{split}-{number:05d}.parquet", split, len(part), data))
    counts = {split: len(rows) for split, rows in by_split.items()}
    return Partition(date, files, counts, by_split["train"][:2])


def _row(each: Conversation, date: str, model: str, recipe: Recipe) -> dict[str, Any]:
    return {
        "id": f"{date}:{each.id}",
        "night": date,
        "seed_id": each.prompt.seed_id,
        "template": each.prompt.template,
        "sample": each.sample,
        "messages": each.messages,
        "model": model,
        "output_tokens": each.output_tokens,
        **{column: each.prompt.seed[column] for column in recipe.seeds.keep_columns},
    }


def used_table(prompts: Iterable[Prompt]) -> pa.Table:
    """What the night used, for `only_new`."""
    rows = [{"seed_id": p.seed_id, "template": p.template, "digest": p.digest} for p in prompts]
    schema = pa.schema({name: pa.string() for name in ("seed_id", "template", "digest")})
    return pa.Table.from_pylist(rows, schema=schema)


def commit(
    archive: Archive,
    partition: Partition,
    night: Night,
    prompts: Iterable[Prompt],
    duplicates: DuplicateIndex | None,
) -> bool:
    """Publish a night.

    Args:
        archive: the dataset.
        partition: its rows.
        night: its manifest.
        prompts: what it used.
        duplicates: what it adds for later nights to compare with.

    Returns:
        False if the night was published already; then nothing of it has changed.
    """
    if archive.night(night.date) is not None:
        return False
    folder = archive.folder
    folder.put(f"{ROOT}/used/{night.date}.parquet", parquet_bytes(used_table(prompts)))
    if duplicates is not None:
        folder.put(index_name(night.date), parquet_bytes(duplicates.table()))
    _place(archive, partition)
    return folder.put_if_absent(f"{NIGHTS}/{night.date}.json", night.to_json())


def _place(archive: Archive, partition: Partition) -> None:
    """Put the files where they belong; what an earlier attempt left there is none of any night."""
    folder = archive.folder
    folder.put_folder(partition.folder, {name: data for name, _, _, data in partition.files})
    folder.clear_staging()


def published_files(nights: Iterable[Night], split: str) -> Iterator[str]:
    """Names of all published files of a split."""
    for night in nights:
        yield from (file["name"] for file in night.files if file["split"] == split)
