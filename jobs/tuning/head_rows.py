"""The rows that a head learns from: prompts completed on the way, or the outputs of jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.terminal.console import err
from jobs.tuning.head_report import early_lines
from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import RowError, UserError
from pipeline.inputs.prompts import PromptRenderer, row_sampling
from pipeline.inputs.sample import Sample
from pipeline.outputs.training_data import open_job, read_examples
from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair
from specdec.policies.registry import make_policy
from specdec.request import Request
from specdec.training.examples import Example
from specdec.training.head import early_look
from specdec.training.labels import (
    Labels,
    LabelSettings,
    Part,
    assign_parts,
    collect,
    continuations,
)

EARLY_SHARE = 0.2
"""Share of the rows after which the first look is printed."""

Show = Callable[[str, float], None]
"""Called with what is being done and how much of it is done, 0 to 1."""


@dataclass
class HeadRows:
    """Examples to label, generated as they are asked for.

    Attributes:
        mine: prompts to complete and learn from; None: `outputs` are used.
        others: prompts of another kind.
        dropped: why rows were left out, with how many.
    """

    pair: ModelPair
    config: JobConfig
    s3: S3Config
    mine: Sample | None
    outputs: Sequence[str]
    others: Sample | None
    rows: int
    max_positions: int

    def __post_init__(self) -> None:

        self.dropped: dict[str, int] = {}
        self.sampling = row_sampling(self.config.sampling, None, "")

    def examples(self) -> tuple[Iterator[tuple[Example, Part]], int]:
        """Examples to train, tune and measure on, and how many there will be, about."""
        if self.mine is not None:
            prompts = self._rendered(self.mine)
            parts = dict(zip(prompts, self._parts(list(prompts.values())), strict=True))
            return ((e, parts[e.id]) for e in self._completed(prompts)), len(prompts)

        found: list[Example] = []
        for output in self.outputs:
            left = self.rows - len(found)
            if left:
                found += read_examples(open_job(output, self.s3), self.pair.tokenizer, limit=left)
        assigned = zip(found, self._parts([e.prompt_ids for e in found]), strict=True)
        return assigned, len(found)

    def other_examples(self) -> tuple[Iterator[tuple[Example, Part]], int]:
        """Examples of another kind, and how many there will be, about."""
        if self.others is None:
            return iter(()), 0
        prompts = self._rendered(self.others)
        return ((example, Part.OTHER) for example in self._completed(prompts)), len(prompts)

    def _parts(self, prompts: Sequence[tuple[int, ...]]) -> list[Part]:

        try:
            return assign_parts(prompts)
        except ValueError as error:
            raise UserError(f"{error}{self.explain_dropped()}") from None

    def _rendered(self, sample: Sample) -> dict[str, tuple[int, ...]]:

        renderer = PromptRenderer(sample.input, self.pair.tokenizer)
        prompts = {}
        for name, row in sample.rows.items():
            try:
                prompts[name] = renderer.prompt_ids(row)
            except RowError as error:
                self._drop(str(error))
        return prompts

    def _completed(self, prompts: Mapping[str, tuple[int, ...]]) -> Iterator[Example]:

        engine = Engine(
            self.pair,
            policy=make_policy("none"),
            verification=self.config.speculation.verification,
            slots=self.config.actors.slots,
            decode=self.pair.tokenizer.decode,
        )
        requests = [
            Request(name, prompt, row_sampling(self.config.sampling, None, name))
            for name, prompt in prompts.items()
        ]
        for done in continuations(engine, requests):
            if done.error is not None:
                self._drop(done.error)
            elif done.output_ids:
                yield Example(done.id, prompts[done.id], done.output_ids)

    def _drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def explain_dropped(self) -> str:
        """What was left out, as the end of a sentence."""
        if not self.dropped:
            return ""
        reason, _ = max(self.dropped.items(), key=lambda item: item[1])
        return f" ({sum(self.dropped.values()):,} rows were left out, most often: {reason})"


def label_all(source: HeadRows, settings: LabelSettings, show: Show) -> Labels:
    """Label everything, with a first look on the way."""
    examples, expected = source.examples()
    parts: list[Labels] = []
    rows = positions = 0
    looked = False

    def counted(items: Iterator[tuple[Example, Part]], total: int) -> Iterator[Any]:
        for number, item in enumerate(items, start=1):
            show("completing and labelling", number / max(total, number))
            yield item

    batch = max(4, min(32, expected // 10))
    for part in collect(source.pair, counted(examples, expected), settings, batch=batch):
        parts.append(part)
        rows, positions = rows + part.rows, positions + len(part)
        if not looked and rows >= EARLY_SHARE * expected:
            looked = True
            for line in early_lines(early_look(Labels.cat(parts)), rows / expected):
                err.print(line, highlight=False, soft_wrap=True)
        if positions >= source.max_positions:
            err.print(f"{positions:,} positions of {rows:,} rows: that is --max-positions")
            break
    others, expected = source.other_examples()
    parts += collect(source.pair, counted(others, expected), settings, batch=batch, first_row=rows)
    if not parts:
        raise UserError(f"there is nothing to learn from{source.explain_dropped()}")
    return Labels.cat(parts)
