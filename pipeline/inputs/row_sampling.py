"""How a row is sampled: the job's sampling, and what the row says otherwise (see `requests`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from pipeline.config.job import MAX_SAMPLES, SamplingConfig
from pipeline.config.sampling import one_length
from pipeline.config.structured_outputs import StructuredOutputs
from pipeline.errors import RowError, nearest
from pipeline.inputs.messages import as_object, without_nulls
from specdec.request import INTEGERS, InvalidRequest, SamplingParams

SAMPLING_COLUMN = "sampling_params"
"""A column of this name overrides the job's sampling, row by row (struct or JSON text)."""

STRUCTURED = "structured_outputs"
"""What a completion must be; `SamplingParams` has it as a grammar."""

_SAMPLING_KEYS = SamplingParams.__dataclass_fields__.keys() - {"grammar"}

_NOT_OF_ROWS = {"n", "defaults", "return_token_ids", "parse_response", "return_parsed", STRUCTURED}
"""Keys of the section `sampling` that `SamplingParams` has otherwise, or not at all."""

_LISTS = {"stop": str, "stop_token_ids": int, "bad_words": str, "allowed_token_ids": int}
"""What is a list, and of what."""


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
    values: dict[str, Any] = job.model_dump(exclude=_NOT_OF_ROWS)
    values["seed"] = row_seed(job.seed, row_id)
    if (structured := row_structured(job, override)) is not None:
        values["grammar"] = structured.text()
    for key, value in _override(override).items():
        if key in ("n", STRUCTURED):
            continue  # of all samples: see `sample_count`; and as a grammar, above
        if key not in _SAMPLING_KEYS:
            known = [*_SAMPLING_KEYS, "n", STRUCTURED]
            raise RowError("InvalidSampling", f"{key}: unknown; {nearest(key, known)}")
        # Columns of numbers with nulls often arrive as floats.
        whole = key in INTEGERS and isinstance(value, float) and value.is_integer()
        values[key] = int(value) if whole else value
    for key, kind in _LISTS.items():
        if isinstance(values[key], kind):
            values[key] = (values[key],)  # one is as good as a list of one
        elif isinstance(values[key], list):
            values[key] = tuple(values[key])
    values["logit_bias"] = _by_token(values["logit_bias"])
    try:
        params = SamplingParams(**values)
    except InvalidRequest as error:
        raise RowError("InvalidSampling", str(error)) from None
    if sample and "seed" in _override(override):
        return replace(params, seed=row_seed(params.seed, str(sample)))
    return params


def row_structured(job: SamplingConfig, override: Any) -> StructuredOutputs | None:
    """What a row's completions must be: its own, an object or JSON text of one, or the job's.

    Raises:
        RowError: its own is wrong; the message says what.
    """
    own = _override(override)
    if STRUCTURED not in own:
        return job.structured_outputs
    try:
        asked = own[STRUCTURED]
        asked = json.loads(asked) if isinstance(asked, str) else without_nulls(as_object(asked))
        return StructuredOutputs.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (STRUCTURED, *first["loc"])))
        said = f"{where}: {first['msg'].removeprefix('Value error, ')}"
        raise RowError("InvalidSampling", said) from None
    except (ValueError, RecursionError):
        raise RowError("InvalidSampling", f"{STRUCTURED} is text, but not JSON") from None


def _by_token(biases: Any) -> Any:
    """Biases by token, whose ids are texts in JSON and in columns."""
    biases = as_object(biases)
    if not isinstance(biases, dict):
        return biases
    try:
        return {int(token): bias for token, bias in biases.items() if bias is not None}
    except (TypeError, ValueError):
        raise RowError("InvalidSampling", "logit_bias must be numbers by token id") from None


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
