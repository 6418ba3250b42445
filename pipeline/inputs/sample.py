"""A few rows of the input, spread over its files: for training and estimates, not for jobs."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa

from pipeline.config.job import InputConfig, S3Config
from pipeline.errors import RowError, UserError
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.prompts import required_columns
from pipeline.inputs.requests import Row
from pipeline.inputs.row_values import each_row
from pipeline.inputs.source import read_units
from pipeline.inputs.units import Unit, check_columns, plan_files, table_of
from pipeline.storage.folder import resolved

UNIT_ROWS = 64
"""Rows that are read together. More of them reads more than the sample needs."""

_LEAST_UNITS = 8
"""Ranges that a sample is spread over, if there are as many. More of them reads more places."""

_USUAL = ("messages", "prompt")
"""Columns that prompts are looked for in, in this order, if nothing says which."""


@dataclass(frozen=True)
class Sample:
    """Rows of some files.

    Attributes:
        input: the files, and what the prompt is made of.
        rows: by row id.
    """

    input: InputConfig
    rows: Mapping[str, Row]


def sample_rows(
    paths: Sequence[str],
    how: Mapping[str, str | None],
    s3: S3Config,
    count: int,
    seed: int = 0,
) -> Sample:
    """At most `count` rows, a function of the files and the seed.

    Args:
        paths: files, folders and globs, local or s3://.
        how: `format`, `prefix`, `messages_column`, `prompt_column` or `template` as in a job file;
            without a prompt: a column called messages, or else one called prompt.
        s3: how to reach files on S3.
        count: most rows.
        seed: of the choice and the order.

    Raises:
        UserError: no files, no such column, or unreadable files.
    """
    s3 = resolved(s3, *paths)
    files = list_inputs(paths, s3, how.get("prefix"))
    plans = plan_files(files, s3, UNIT_ROWS, format=how.get("format"))
    if not any(value for key, value in how.items() if key != "prefix"):
        how = _usual_columns(plans[0].schema.names, plans[0].file.url)
    config = InputConfig.model_validate({"paths": tuple(paths), **how})
    check_columns(plans, required_columns(config))
    units = [Unit.of(piece) for plan in plans for piece in plan.pieces]
    return Sample(config, choose_rows(units, table_of(plans), s3, count, seed))


def choose_rows(
    units: Sequence[Unit], table: pa.Schema, s3: S3Config, count: int, seed: int = 0
) -> dict[str, Row]:
    """At most `count` rows of some units by row id, spread over the units.

    Args:
        units: the units.
        table: the job's columns.
        s3: how to reach files on S3.
        count: most rows.
        seed: of the choice and the order.

    Raises:
        UserError: unreadable files.
    """
    chance = random.Random(seed)
    units = chance.sample(units, len(units))
    share = max(1, -(-count // _LEAST_UNITS))
    chosen: list[tuple[str, Row]] = []
    spare: list[tuple[str, Row]] = []
    for unit in units:
        if len(chosen) >= count or len(chosen) + len(spare) >= count + _LEAST_UNITS * UNIT_ROWS:
            break
        (read,) = read_units([unit], table, s3)
        # What is malformed becomes an error, or is a column that the prompt does not need.
        every = enumerate(each_row(read.table))
        rows = [(read.row_id(i), row) for i, row in every if not isinstance(row, RowError)]
        chance.shuffle(rows)
        chosen += rows[:share]
        spare += rows[share:]
    return dict(list(chain(chosen, spare))[:count])


def _usual_columns(names: Sequence[str], url: str) -> dict[str, str | None]:
    for name in _USUAL:
        if name in names:
            return {f"{name}_column": name}
    have = ", ".join(names) or "none"
    raise UserError(
        f"{url}: neither a column 'messages' nor 'prompt'; its columns: {have}; "
        "say which one is the prompt"
    )
