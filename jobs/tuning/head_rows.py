"""The rows that a head learns from: prompts completed on the way, or the outputs of jobs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.terminal.console import err
from jobs.terminal.display import Show
from jobs.tuning.common import complete, told
from jobs.tuning.head_report import early_lines
from pipeline.config.job import JobConfig, S3Config
from pipeline.errors import UserError
from pipeline.inputs.requests import RowRequests
from pipeline.inputs.row_sampling import row_sampling
from pipeline.inputs.sample import Sample
from pipeline.outputs.training_data import open_job, read_examples
from specdec.loading.pair import ModelPair
from specdec.request import Request, SamplingParams
from specdec.training.examples import Example
from specdec.training.head import early_look
from specdec.training.labelling import collect
from specdec.training.labels import Labels, LabelSettings, Part, assign_parts

EARLY_SHARE = 0.2
"""Share of the rows after which the first look is printed. A smaller one says less, but sooner."""


@dataclass
class HeadRows:
    """Examples to label, generated as they are asked for.

    Attributes:
        pair: target and draft.
        config: the job that the head is for.
        s3: how to reach outputs on S3.
        mine: prompts to complete and learn from; None: `outputs` are used.
        outputs: output folders of jobs.
        others: prompts of another kind, or None.
        rows: rows of `outputs`, at most.
        max_positions: output positions to label, at most.
        left_out: why rows were left out, with how many.
    """

    pair: ModelPair
    config: JobConfig
    s3: S3Config
    mine: Sample | None
    outputs: Sequence[str]
    others: Sample | None
    rows: int
    max_positions: int
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def sampling(self) -> SamplingParams:
        """The sampling of rows that have none of their own."""
        return row_sampling(self.config.sampling, None, "")

    def examples(self) -> tuple[Iterator[tuple[Example, Part]], int]:
        """Examples to train, tune and measure on, and how many there will be, about."""
        if self.mine is not None:
            requests = self._requests(self.mine)
            assigned = self._parts([request.prompt_ids for request in requests])
            parts = {r.id: part for r, part in zip(requests, assigned, strict=True)}
            return ((e, parts[e.id]) for e in self._completed(requests)), len(requests)

        found: list[Example] = []
        for output in self.outputs:
            if left := self.rows - len(found):
                # With the sampling that the head is for, which options may have changed.
                job = replace(open_job(output, self.s3), sampling=self.config.sampling)
                found += read_examples(job, self.pair.tokenizer, limit=left)
        parts_of = self._parts([example.prompt_ids for example in found])
        return zip(found, parts_of, strict=True), len(found)

    def other_examples(self) -> tuple[Iterator[tuple[Example, Part]], int]:
        """Examples of another kind, and how many there will be, about."""
        if self.others is None:
            return iter(()), 0
        requests = self._requests(self.others)
        return ((example, Part.OTHER) for example in self._completed(requests)), len(requests)

    def _parts(self, prompts: Sequence[tuple[int, ...]]) -> list[Part]:
        try:
            return assign_parts(prompts)
        except ValueError as error:
            raise UserError(f"{error}{self.explain_left_out()}") from None

    def _requests(self, sample: Sample) -> list[Request]:
        make = RowRequests(
            sample.input, self.config.sampling, self.pair.tokenizer, self.pair.context_length
        )
        return make.first_samples(sample.rows, self.left_out)

    def _completed(self, requests: Sequence[Request]) -> Iterator[Example]:
        for text in complete(self.config, self.pair, requests, self.left_out):
            asked = text.request
            yield Example(asked.id, asked.prompt_ids, text.output_ids, text.group, asked.sampling)

    def explain_left_out(self) -> str:
        """What was left out, as the end of a sentence."""
        return f" ({told(self.left_out)})" if self.left_out else ""


def label_all(source: HeadRows, settings: LabelSettings, show: Show) -> Labels:
    """Label everything, with a first look on the way."""
    examples, expected = source.examples()
    parts: list[Labels] = []
    rows = positions = 0
    looked = False

    def counted(items: Iterator[tuple[Example, Part]], total: int) -> Iterator[Any]:
        for number, item in enumerate(items, start=1):
            show("completing and labelling", number / max(total, number), f"{number:,} rows")
            yield item

    batch = max(4, min(32, expected // 10))
    show("completing and labelling", 0.0)
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
        raise UserError(f"there is nothing to learn from{source.explain_left_out()}")
    return Labels.cat(parts)
