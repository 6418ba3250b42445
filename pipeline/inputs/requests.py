"""From a row to the engine's requests: the one way, which every command takes.

A job, its plan, a profile and the training of drafts and heads must ask the same of a row. So what
a row's prompt is, how many samples it has, and how each is drawn are decided here and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config.job import InputConfig, SamplingConfig
from pipeline.errors import RowError
from pipeline.inputs.chats import ChatSettings
from pipeline.inputs.openai_requests import KWARGS_COLUMN, REQUEST, request_cells
from pipeline.inputs.prompts import PromptRenderer, required_columns
from pipeline.inputs.row_ids import parse_row_id, sibling
from pipeline.inputs.row_sampling import (
    SAMPLING_COLUMN,
    row_sampling,
    row_structured,
    sample_count,
)
from pipeline.texts import Texts
from specdec.request import LOGPROBS, Request, SamplingParams

Row = Mapping[str, Any]
"""A row's input columns by name. Of an OpenAI request: its line, in the column `request`."""


class RowRequests:
    """Makes requests of rows.

    Args:
        input: which columns, template or format the prompt is made of.
        sampling: the job's; a row's `sampling_params` override it.
        tokenizer: the target's (transformers).
        context: the target's most positions; None: prompts of any length are taken.

    Attributes:
        required: the columns that every row must have.
        columns: these, and those that a row may have besides.

    Raises:
        UserError: messages are asked for and the tokenizer has no chat template.
    """

    def __init__(
        self,
        input: InputConfig,
        sampling: SamplingConfig,
        tokenizer: Any,
        context: int | None = None,
    ) -> None:
        self.required = required_columns(input)
        self.columns = [*self.required]
        # What is given is not sampled, whatever a row says.
        self.columns += [SAMPLING_COLUMN] if input.completion_column is None else []
        self.columns += [KWARGS_COLUMN] if input.messages_column is not None else []
        self._of_lines = input.format is not None
        self._input, self._sampling = input, sampling
        has = {name for name in LOGPROBS if getattr(sampling, name) is not None}
        self._told = set(LOGPROBS) if self._of_lines else has
        self._context = context
        self._renderer = PromptRenderer(input, tokenizer, context)
        self._texts = Texts(tokenizer)

    def of(self, row: Row, row_id: str) -> list[Request]:
        """The requests of all samples of a row, in order.

        Args:
            row: the row; columns that are not needed do no harm.
            row_id: of any of its samples.

        Raises:
            RowError: it has no usable prompt, or asks for a sampling that there is not.
        """
        cells = self._cells(row)
        if self._input.completion_column is not None:
            return [self._scored(cells, row_id)]
        count = sample_count(self._sampling, cells.get(SAMPLING_COLUMN))
        return self._made(cells, [sibling(row_id, sample) for sample in range(count)])

    def sample(self, row: Row, row_id: str) -> Request:
        """The request of the one sample that a row id names.

        Raises:
            RowError: as of `of`.
        """
        if self._input.completion_column is not None:
            raise RowError("InvalidSampling", "input.completion_column: nothing is generated")
        cells = self._cells(row)
        sample_count(self._sampling, cells.get(SAMPLING_COLUMN))  # raises for what is none
        (request,) = self._made(cells, [row_id])
        return request

    def first_samples(self, rows: Mapping[str, Row], left_out: Counter[str]) -> list[Request]:
        """The request of each row's first sample, for commands that try a few rows.

        Args:
            rows: by row id.
            left_out: why rows have no request; counted here.
        """
        requests = []
        for row_id, row in rows.items():
            try:
                requests.append(self.sample(row, sibling(row_id, 0)))
            except RowError as error:
                left_out[str(error)] += 1
        return requests

    def count(self, row: Row) -> int:
        """How many samples a row has: the job's `n` if it does not say so itself, or wrongly."""
        if self._input.completion_column is not None:
            return 1
        try:
            return sample_count(self._sampling, self._cells(row).get(SAMPLING_COLUMN))
        except RowError:
            return self._sampling.n

    def chat(self, row: Row) -> ChatSettings | None:
        """What the chat template was told for a row that has requests; None: it is no chat."""
        cells = self._cells(row)
        is_chat = "messages" in cells if self._of_lines else self._input.messages_column is not None
        return ChatSettings.of(self._input, cells) if is_chat else None

    def schema(self, row: Row) -> dict[str, Any] | None:
        """The JSON Schema of the completions of a row; None: they need not be JSON."""
        asked = row_structured(self._sampling, self._cells(row).get(SAMPLING_COLUMN))
        return None if asked is None else asked.schema_of_json

    def _cells(self, row: Row) -> Row:
        """What prompt and sampling are made of."""
        return request_cells(row.get(REQUEST)) if self._of_lines else row

    def _in_tokens(self, sampling: SamplingParams) -> SamplingParams:
        """The sampling with the tokens that its stop strings and bad words are."""
        most = self._texts.vocab_size
        for token in sampling.stop_token_ids:
            if not 0 <= token < most:
                raise RowError(
                    "InvalidSampling",
                    f"stop_token_ids: the target has no token {token}; it has {most:,}, from 0 on",
                )
        for name in LOGPROBS:
            if getattr(sampling, name) is not None and name not in self._told:
                said = f"{name}: the job has no column for them; set sampling.{name}"
                raise RowError("InvalidSampling", said)
        return self._texts.with_bad_words(self._texts.with_special_stops(sampling))

    def _scored(self, cells: Row, row_id: str) -> Request:
        """The request of a row whose completion is given."""
        prompt, column = self._renderer.prompt_ids(cells), self._input.completion_column or ""
        text = cells[column]
        if not isinstance(text, str):
            what = "is null" if text is None else f"holds a {type(text).__name__}, not text"
            raise RowError("MalformedCompletion", f"column {column!r} {what}")
        try:
            given = tuple(self._texts.output_ids(prompt, text))
        except (UnicodeError, TypeError, ValueError) as error:
            raise RowError("MalformedCompletion", f"the tokenizer refused it: {error}") from None
        if not given:
            raise RowError("MalformedCompletion", f"column {column!r} has no tokens")
        if self._context is not None and len(prompt) + len(given) > self._context:
            raise RowError(
                "PromptTooLong",
                f"prompt and completion have {len(prompt)} and {len(given)} tokens; the target's "
                f"context is of {self._context}",
            )
        sampling = SamplingParams(logprobs=self._sampling.logprobs)
        return Request(row_id, prompt, sampling, given)

    def _made(self, cells: Row, row_ids: Iterable[str]) -> list[Request]:
        override = cells.get(SAMPLING_COLUMN)
        sampling: dict[str, SamplingParams] = {}
        for name in row_ids:
            params = row_sampling(self._sampling, override, name, parse_row_id(name).sample)
            sampling[name] = self._in_tokens(params)
        prompt = self._renderer.prompt_ids(cells)
        if self._context is not None and len(prompt) >= self._context:
            raise RowError(
                "PromptTooLong",
                f"the prompt has {len(prompt)} tokens; the target's context of "
                f"{self._context} must also hold at least one new token",
            )
        return [Request(name, prompt, params) for name, params in sampling.items()]
