"""What a row asks for: the token ids of its prompt, and how to sample (see `requests`).

Chat `messages` go through the target's chat template. A plain prompt, and what a `template` over
the columns renders to, are completed as they are: no chat template is put around them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.config.job import MAX_SAMPLES, InputConfig, SamplingConfig
from pipeline.config.sampling import one_length
from pipeline.config.templates import PromptTemplate
from pipeline.errors import RowError, UserError, nearest
from pipeline.inputs.messages import as_object, check_messages, spellings
from pipeline.inputs.openai_requests import REQUEST
from specdec.request import InvalidRequest, SamplingParams

SAMPLING_COLUMN = "sampling_params"
"""A column of this name overrides the job's sampling, row by row (struct or JSON text)."""

_DROPPED = 4
"""Characters of a text for each that a normalizer of a tokenizer keeps: more than any drops.
Lower, and texts that fit might be refused; higher, and longer ones are tokenized in vain."""

_INTEGERS = ("max_new_tokens", "top_k", "seed")
_SAMPLING_KEYS = SamplingParams.__dataclass_fields__.keys()


def required_columns(config: InputConfig) -> list[str]:
    """The columns that every input file must have."""
    if config.format is not None:
        return [REQUEST]
    if config.template is not None:
        return PromptTemplate(config.template).columns
    column = config.messages_column or config.prompt_column
    return [column] if column else []


class PromptRenderer:
    """Renders rows to token ids with the target's tokenizer.

    Args:
        config: which column or template is the prompt.
        tokenizer: the target's (transformers).
        context: the target's most positions; texts far beyond it are not even tokenized.

    Raises:
        UserError: messages are asked for and the tokenizer has no chat template.
    """

    def __init__(self, config: InputConfig, tokenizer: Any, context: int | None = None) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._template = PromptTemplate(config.template) if config.template is not None else None
        self._opening: list[int] | None = None  # known from the first text on
        bos: Any = getattr(tokenizer, "bos_token", None)
        self._template_has_bos = bool(bos) and bos in (config.template or "")
        self._most_characters = _longest_text(tokenizer, context) if context else math.inf
        self._knows_tools = "tool_calls" in str(tokenizer.chat_template)
        if config.messages_column is not None and not tokenizer.chat_template:
            raise UserError(
                "input.messages_column: the target's tokenizer has no chat template; "
                "use prompt_column or template, or an instruction-tuned target"
            )

    def prompt_ids(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """Token ids of the row's prompt.

        Args:
            row: the input columns; of an OpenAI request, its cells.

        Raises:
            RowError: the row has no usable prompt.
        """
        if self._config.format is not None:
            if "messages" in row:
                ids = self._chat(row["messages"])
            else:
                ids = row["prompt_ids"] if "prompt_ids" in row else self._plain(row["prompt"])
        elif self._config.messages_column is not None:
            ids = self._chat(row[self._config.messages_column])
        else:
            ids = self._plain(self._text(row))
        if not ids:
            raise RowError("EmptyPrompt", "the prompt has no tokens")
        return tuple(ids)

    def _text(self, row: Mapping[str, Any]) -> str:
        if self._template is not None:
            try:
                return self._template.render(row)
            except RowError:
                raise
            except Exception as error:  # a template may run into anything the row holds
                raise RowError("TemplateError", f"{type(error).__name__}: {error}") from None
        column = self._config.prompt_column
        prompt = row[column or ""]
        if prompt is None:
            raise RowError("NullPrompt", f"column {column!r} is null")
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise RowError("MalformedPrompt", f"column {column!r} holds a {kind}, not text")
        return prompt

    def _plain(self, text: str) -> list[int]:
        if not text:
            raise RowError("EmptyPrompt", "the prompt is empty")
        self._check_length(text)
        try:
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
            if not ids:
                return []
            if self._opening is None:
                self._opening = _opening(self._tokenizer, text, ids)
            return ids if self._begins_itself(ids) else [*self._opening, *ids]
        except (UnicodeError, TypeError, ValueError) as error:
            raise RowError("MalformedPrompt", f"the tokenizer refused it: {error}") from None

    def _begins_itself(self, ids: list[int]) -> bool:
        """Whether a text brings its own beginning-of-sequence token, as one made elsewhere may.

        In front of it may be white space, and whatever the job's template has there. The same
        letters further on in a row's data begin nothing.
        """
        bos = self._tokenizer.bos_token_id
        if bos is None or bos not in ids:
            return False
        if self._template_has_bos:
            return True
        before = ids[: ids.index(bos)]
        return not before or not str(self._tokenizer.decode(before)).strip()

    def _chat(self, value: Any) -> list[int]:
        messages = check_messages(value)
        for number, message in enumerate(messages):
            self._check_length(message["content"] or "")
            if message.get("tool_calls") and not self._knows_tools:
                raise RowError(
                    "MalformedMessages",
                    f"message {number} has tool_calls, which the target's chat template ignores",
                )
        refused: Exception | None = None
        for spelled in spellings(messages):
            try:
                # The template writes the special tokens itself, so none are added here.
                ids = self._tokenizer.apply_chat_template(
                    spelled, tokenize=True, add_generation_prompt=True, return_dict=False
                )
                return list(ids)
            except Exception as error:  # a template may run into anything the messages hold
                refused = refused or error
        raise RowError("MalformedMessages", f"the chat template refused it: {refused}")

    def _check_length(self, text: str) -> None:
        """Refuse what no tokenizer makes short enough, before it takes minutes to find out."""
        if len(text) > self._most_characters:
            raise RowError(
                "PromptTooLong",
                f"a text of {len(text):,} characters does not fit the target's context",
            )


def _opening(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """What the tokenizer puts in front of a text, such as a beginning of sequence.

    What it puts behind it, such as an end of sequence, has no place in a prompt.

    Args:
        tokenizer: the tokenizer.
        text: any text that has tokens.
        ids: these, without special tokens.
    """
    whole = list(tokenizer(text)["input_ids"])
    starts = range(len(whole) - len(ids) + 1)
    start = next((s for s in starts if whole[s : s + len(ids)] == ids), 0)
    return whole[:start]


def _longest_text(tokenizer: Any, context: int) -> int:
    """Characters above which a text cannot fit the context.

    No token stands for more characters than it has itself, but a normalizer may drop some.
    """
    return _DROPPED * context * max(map(len, tokenizer.get_vocab()))


def sample_count(job: SamplingConfig, override: Any) -> int:
    """How many samples a row asks for: the `n` of its `sampling_params` cell, or the job's.

    Raises:
        RowError: it is not a number of samples.
    """
    n = _override(override).get("n", job.n)
    n = int(n) if isinstance(n, float) and n.is_integer() else n
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_SAMPLES:
        raise RowError("InvalidSampling", f"n must be 1 to {MAX_SAMPLES}, got {n!r}")
    return n


def row_sampling(
    job: SamplingConfig, override: Any, row_id: str, sample: int = 0
) -> SamplingParams:
    """The row's sampling: the job's, with what the row's `sampling_params` cell overrides.

    Args:
        job: the job's sampling.
        override: a mapping, JSON text of one, or None.
        row_id: with the job's seed, the key of the sample's random numbers, unless it has a `seed`.
        sample: which sample of the row this is; a row's own `seed` gives each another one.

    Raises:
        RowError: unknown key or invalid value.
    """
    values: dict[str, Any] = job.model_dump(exclude={"n"})
    values["seed"] = row_seed(job.seed, row_id)
    for key, value in _override(override).items():
        if key == "n":
            continue  # of all samples: see `sample_count`
        if key not in _SAMPLING_KEYS:
            known = [*_SAMPLING_KEYS, "n"]
            raise RowError("InvalidSampling", f"{key}: unknown; {nearest(key, known)}")
        # Columns of numbers with nulls often arrive as floats.
        whole = key in _INTEGERS and isinstance(value, float) and value.is_integer()
        values[key] = int(value) if whole else value
    for key, kind in (("stop", str), ("stop_token_ids", int)):
        if isinstance(values[key], kind):
            values[key] = (values[key],)  # one is as good as a list of one
        elif isinstance(values[key], list):
            values[key] = tuple(values[key])
    try:
        params = SamplingParams(**values)
    except InvalidRequest as error:
        raise RowError("InvalidSampling", str(error)) from None
    if sample and "seed" in _override(override):
        return replace(params, seed=row_seed(params.seed, str(sample)))
    return params


def _override(cell: Any) -> dict[str, Any]:
    if isinstance(cell, str):
        if not cell.strip():
            return {}  # CSV has no null
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            raise RowError("InvalidSampling", f"{SAMPLING_COLUMN} is text, but not JSON") from None
    cell = as_object(cell)
    if cell is None:
        return {}
    if not isinstance(cell, dict):
        kind = type(cell).__name__
        raise RowError("InvalidSampling", f"{SAMPLING_COLUMN} is a {kind}, not an object")
    try:
        return one_length({key: value for key, value in cell.items() if value is not None})
    except ValueError as error:
        raise RowError("InvalidSampling", str(error)) from None


def row_seed(job_seed: int, row_id: str) -> int:
    """63 bits that depend on the job's seed and the row's name, and on nothing else."""
    digest = hashlib.sha256(f"{job_seed}:{row_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
