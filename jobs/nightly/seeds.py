"""Which seeds a night uses, and what templates make of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from functools import partial
from itertools import islice
from typing import Any

import jinja2
import pyarrow as pa

from jobs.nightly.columns import example_of
from jobs.nightly.expressions import TurnError, environment
from jobs.nightly.judge_settings import RUBRIC_VARIABLES
from jobs.nightly.recipe import Recipe
from jobs.nightly.template_settings import TEMPLATE_VARIABLES
from pipeline.errors import RowError, UserError, nearest
from pipeline.inputs.jsonl import BadLine
from pipeline.inputs.listing import list_inputs
from pipeline.inputs.row_values import each_row
from pipeline.inputs.source import read_units
from pipeline.inputs.units import FilePlan, Unit, plan_files, table_of
from pipeline.storage.folder import resolved

_READ_ROWS = 4096
"""Rows of a seed file that are read at a time."""

_TRIED = 20
"""Seeds of each template on which it is tried before any model is loaded."""


@dataclass(frozen=True)
class Prompt:
    """A seed under a template: what conversations begin with.

    Attributes:
        seed_id, template: names.
        digest: of the columns that the template uses.
        seed: the seed's columns that templates use or the dataset keeps.
    """

    seed_id: str
    template: str
    digest: str
    seed: dict[str, Any]


@dataclass
class Picked:
    """What a night begins with.

    Attributes:
        prompts: in order.
        seeds: how many seeds they are of.
        schema: Arrow types of a seed's columns.
        skipped: why seeds were left out, with how many.
    """

    prompts: list[Prompt]
    seeds: int
    schema: pa.Schema
    skipped: Counter[str] = field(default_factory=Counter)

    def without(self, used: Mapping[tuple[str, str], str]) -> Picked:
        """This, without prompts that are used."""
        left = [p for p in self.prompts if used.get((p.template, p.seed_id)) != p.digest]
        gone = len(self.prompts) - len(left)
        skipped = self.skipped + Counter({"used by another night meanwhile": gone})
        return Picked(left, len({prompt.seed_id for prompt in left}), self.schema, skipped)


def pick(recipe: Recipe, date: Date, used: Mapping[tuple[str, str], str]) -> Picked:
    """Choose the seeds of a night.

    With `only_new` they come in the order of the files, so that a long list is worked off night by
    night. Otherwise, if there are more than `per_night`, the date draws them.

    Args:
        recipe: the recipe.
        date: the night's.
        used: what published nights used (`Archive.used_seeds`).

    Raises:
        UserError: no such files or columns, or a template that fails on the first seed.
    """
    settings = recipe.seeds
    s3 = resolved(recipe.job.s3_of_input, *settings.paths)
    try:
        plans = plan_files(list_inputs(settings.paths, s3), s3, _READ_ROWS)
    except UserError as error:
        raise UserError(str(error).replace("input.paths:", "seeds.paths:")) from None
    schema = _schema(recipe, plans)
    picked = Picked([], 0, schema)
    groups = _groups(recipe, schema, plans, s3, picked.skipped)
    if settings.only_new:
        groups = _new_only(groups, used, picked.skipped)
    if settings.per_night is not None and not settings.only_new:
        drawn = sorted(groups, key=lambda group: _draw(date, group[0].seed_id))
        groups = iter(drawn[: settings.per_night])
    for group in groups:
        if picked.seeds == settings.per_night:
            break
        picked.seeds += 1
        picked.prompts += group
    if picked.prompts:
        _try_templates(recipe, picked.prompts, date)
    return picked


def _schema(recipe: Recipe, plans: list[FilePlan]) -> pa.Schema:
    """The columns of seeds that are needed, with the types that fit all files."""
    settings = recipe.seeds
    needed = {c: f"templates.{t.name}" for t in recipe.templates for c in t.columns}
    if not needed:
        raise UserError(
            "templates: none uses a column of the seeds, so that all conversations would begin "
            "alike; use one, such as {{ question }}"
        )
    if recipe.judge is not None:
        needed = dict.fromkeys(recipe.judge.columns, "judge.rubric") | needed
    needed |= dict.fromkeys(settings.keep_columns, "seeds.keep_columns")
    if settings.id_column is not None:
        needed[settings.id_column] = "seeds.id_column"
    for plan in plans:
        if not plan.rows:
            continue
        for column, where in needed.items():
            if column not in plan.schema.names:
                known = RUBRIC_VARIABLES if where == "judge.rubric" else TEMPLATE_VARIABLES
                hint = nearest(column, [*plan.schema.names, *known])
                raise UserError(f"{where}: {plan.file.url} has no column {column!r}; {hint}")
    if not any(plan.rows for plan in plans):
        raise UserError("seeds.paths: the files have no rows")
    return pa.schema([plans[0].table.field(column).remove_metadata() for column in needed])


def _groups(
    recipe: Recipe, schema: pa.Schema, plans: list[FilePlan], s3: Any, skipped: Counter[str]
) -> Iterator[list[Prompt]]:
    """Every seed once, as the prompts of all templates."""
    named = recipe.seeds.id_column
    uses = {template.name: template.columns for template in recipe.templates}
    every = sorted({column for columns in uses.values() for column in columns})
    seen: set[str] = set()
    units = [Unit.of(piece) for plan in plans for piece in plan.pieces]
    for read in read_units(units, table_of(plans), s3):
        wanted = [name for name in schema.names if name in read.table.column_names]
        for number, row in enumerate(each_row(read.table.select(wanted))):
            if number in read.bad_lines:
                skipped[_why_skipped(read.bad_lines[number])] += 1
                continue
            if isinstance(row, RowError):
                skipped["a value that is no valid text, or nothing that Python has"] += 1
                continue
            seed = {column: row.get(column) for column in schema.names}
            if named is not None and seed[named] is None:
                skipped[f"no {named}"] += 1
                continue
            seed_id = str(seed[named]) if named is not None else _digest(seed, every)
            if seed_id in seen:
                skipped["the same id or content as an earlier seed"] += 1
                continue
            seen.add(seed_id)
            yield [
                Prompt(seed_id, name, _digest(seed, columns), seed)
                for name, columns in uses.items()
            ]


def _why_skipped(line: BadLine) -> str:
    if line.error_class == "MalformedLine":
        return "not a JSON object"
    return "a value of another kind than most rows have"


def _new_only(
    groups: Iterator[list[Prompt]], used: Mapping[tuple[str, str], str], skipped: Counter[str]
) -> Iterator[list[Prompt]]:
    for group in groups:
        new = [p for p in group if used.get((p.template, p.seed_id)) != p.digest]
        if new:
            yield new
        else:
            skipped["used before"] += 1


def _digest(seed: Mapping[str, Any], columns: list[str]) -> str:
    text = json.dumps([[column, seed[column]] for column in columns], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _draw(date: Date, seed_id: str) -> bytes:
    return hashlib.sha256(f"{date.isoformat()}:{seed_id}".encode()).digest()


# --------------------------------------------------------------------- templates


class Templates:
    """Renders the user's turns, and what a judge is asked, in jinja2's sandbox.

    Args:
        recipe: with the templates.
        date: the night's.
    """

    def __init__(self, recipe: Recipe, date: Date) -> None:
        make = environment().from_string
        self._date = date.isoformat()
        self._turns = {t.name: [make(turn.text) for turn in t.turns] for t in recipe.templates}
        self._systems = {t.name: make(t.system) for t in recipe.templates if t.system is not None}
        self._judge: dict[str, jinja2.Template] = {}
        if (judge := recipe.judge) is not None:
            texts = {"system": judge.system, "user": judge.rubric}
            self._judge = {role: make(text) for role, text in texts.items() if text is not None}

    def turns(self, template: str) -> int:
        """How many turns of the user a template has."""
        return len(self._turns[template])

    def messages(
        self,
        template: str,
        seed: Mapping[str, Any],
        completions: Sequence[str],
        parsed: Sequence[Any] = (),
    ) -> list[dict[str, str]]:
        """The conversation up to the user's next turn.

        Args:
            template: its name.
            seed: the seed's columns.
            completions: of the turns so far.
            parsed: the same of structured turns, as data; None of free ones.

        Raises:
            TurnError: jinja2 refuses, or the turn is empty.
        """
        messages = []
        if (system := self._systems.get(template)) is not None:
            messages.append(_message("system", self._render(system, seed)))
        for number in range(len(completions) + 1):
            said = {"completions": [*completions[:number]], "parsed": [*parsed[:number]]}
            text = self._render(self._turns[template][number], seed, **said)
            messages.append(_message("user", text))
            if number < len(completions):
                messages.append(_message("assistant", completions[number]))
        return messages

    def to_judge(self, seed: Mapping[str, Any], **said: Any) -> list[dict[str, str]]:
        """What the judge is asked of a conversation.

        Args:
            seed: the seed's columns.
            said: the conversation, by the names of RUBRIC_VARIABLES, without `date`.

        Raises:
            TurnError: jinja2 refuses, or the rubric is empty.
        """
        rendered = ((role, self._render(text, seed, **said)) for role, text in self._judge.items())
        return [_message(role, text) for role, text in rendered]

    def _render(self, template: jinja2.Template, seed: Mapping[str, Any], **said: Any) -> str:
        said = {"completions": [], "parsed": [], **said, "date": self._date}
        try:
            text = template.render({**seed, **said})
        except Exception as error:  # a template may run into anything a seed holds
            raise TurnError(f"{type(error).__name__}: {error}") from None
        if not text.strip():
            raise TurnError("it renders to nothing")
        return text


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _try_templates(recipe: Recipe, prompts: list[Prompt], date: Date) -> None:
    """Render all that is asked, for a few seeds: what is wrong in it should show at once.

    Raises:
        UserError: a turn, or the judge's rubric, fails for all of them.
    """
    templates = Templates(recipe, date)
    for template in recipe.templates:
        name, count = template.name, len(template.turns)
        tried = list(islice((p.seed for p in prompts if p.template == name), _TRIED))
        parsed = [example_of(recipe.asked(name, turn)) for turn in range(1, count + 1)]
        for turn in range(count):
            said = ["(a completion)"] * turn
            made = partial(templates.messages, name, completions=said, parsed=parsed)
            _try(f"templates.{name}: turn {turn + 1}", made, tried)
        if recipe.judge is not None:
            said = ["(a completion)"] * count
            messages = [_message(role, "(a text)") for _ in said for role in ("user", "assistant")]
            if template.system is not None:
                messages.insert(0, _message("system", "(a text)"))
            made = partial(templates.to_judge, completions=said, parsed=parsed, messages=messages)
            _try(f"judge.rubric: of template {name}", made, tried)


def _try(where: str, made: Callable[..., object], seeds: Sequence[Mapping[str, Any]]) -> None:
    reasons = []
    for seed in seeds:
        try:
            made(seed=seed)
        except TurnError as error:
            reasons.append(str(error))
    if seeds and len(reasons) == len(seeds):
        raise UserError(f"{where}: {reasons[0]}")
