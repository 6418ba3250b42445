"""What a target recommends for its own sampling, where the job says nothing of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import ValidationError

from pipeline.config.job import JobConfig, SamplingConfig
from pipeline.config.model_files import HubError, read_model_file
from pipeline.errors import UserError

RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Keys of `generation_config.json` that are taken, as vLLM takes them."""

_FILE = "generation_config.json"

Source = Literal["job", "model", "default"]
"""Where a value is from: the job file, the target's recommendation, or neither."""

_SHOWN = ("max_new_tokens", *RECOMMENDED)
"""Keys of `sampling` that are said to users: what every row has, and what models recommend."""

_NAMES = {"job": "the job", "model": f"the target's {_FILE}", "default": "defaults"}


def sources(sampling: SamplingConfig, recommended: Collection[str]) -> dict[str, Source]:
    """Where the values of a job's sampling are from, by key.

    Args:
        sampling: with what the target recommends.
        recommended: the keys that are from there.
    """

    def source(key: str) -> Source:
        if key in recommended:
            return "model"
        return "job" if key in sampling.model_fields_set else "default"

    return {key: source(key) for key in _SHOWN}


def in_force(values: Mapping[str, Any], found: Mapping[str, str]) -> str:
    """The values of a sampling in a line, by where they are from.

    Args:
        values: by key.
        found: their sources.
    """
    parts = []
    for source, name in _NAMES.items():
        said = [f"{key} {values[key]:g}" for key in found if found[key] == source]
        parts += [f"{', '.join(said)} ({name})"] if said else []
    return "; ".join(parts)


def with_model_defaults(job: JobConfig, *, ask_hub: bool = True) -> tuple[JobConfig, list[str]]:
    """The job with what its target recommends, and the keys of `sampling` that are from there.

    A job that names a temperature means its own sampling, unless it asks for the model's.

    Args:
        job: the job.
        ask_hub: whether the hub is asked for a target that is not here.

    Raises:
        UserError: there is no such target, what it recommends cannot be used, or the hub does not
            answer.
    """
    given = job.sampling.model_fields_set
    wanted = job.sampling.defaults or ("none" if "temperature" in given else "model")
    if wanted == "none":
        return job, []
    try:
        recommended = read_model_file(job.models.target, _FILE, ask_hub=ask_hub)
    except HubError as error:
        raise UserError(f"{error}; sampling.defaults: none does without it") from None
    taken = {key: recommended[key] for key in RECOMMENDED if recommended.get(key) is not None}
    taken = {key: value for key, value in taken.items() if key not in given}
    if not taken:
        return job, []
    try:
        own = job.sampling.model_dump(exclude_unset=True)
        sampling = SamplingConfig.model_validate({**own, **taken})
    except ValidationError as error:
        (first, *_) = error.errors()
        raise UserError(
            f"models.target: its {_FILE} has {'.'.join(map(str, first['loc']))} that cannot be "
            f"used ({first['msg']}); set sampling.defaults to none"
        ) from None
    return job.model_copy(update={"sampling": sampling}), list(taken)
