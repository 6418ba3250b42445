"""Job files: YAML to a checked `JobConfig`, and mistakes to one clear line each."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.job import JobConfig, S3Config
from pipeline.config.locations import is_url
from pipeline.config.prices import Prices
from pipeline.errors import UserError, nearest

_MOST_LINES = 20
"""Mistakes of one file that are shown; more would hide the first ones."""

_OWN_WORDS = {
    "model_type": "must be a section of keys and values (leave it out for the defaults)",
    "tuple_type": "must be a list",
    "string_unicode": "must be text without half characters",
    "too_short": "must hold at least one",
}
"""What to say instead of pydantic's words, by its type of error."""

_OCTAL = re.compile(r"[-+]?0[0-9_]+")

Model = TypeVar("Model", bound=BaseModel)


class JobFileError(UserError):
    """A job file that cannot be used; one line for each thing that is wrong with it."""


def load_job(file: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file.

    Relative paths in it are relative to its folder: input paths, the output, and models that start
    with `./` or `../` or are folders or files there.

    Args:
        file: the job file (YAML).
        overrides: `a.b=value`, the value in YAML; relative paths in them count from the working
            directory, as on any command line.

    Raises:
        JobFileError: it cannot be read, is not YAML, or says what it may not.
    """
    return load_settings(file, overrides, JobConfig, resolve_job_paths)


Resolve = Callable[[Mapping[str, Any], Path], dict[str, Any]]
"""Makes paths that are relative to a folder absolute; what it is given may be wrong in any way."""


def load_settings(
    file: str | Path, overrides: Sequence[str], model: type[Model], resolve: Resolve
) -> Model:
    """Read a YAML file of any settings.

    Args:
        file: the file.
        overrides: as of `load_job`.
        model: what the file describes.
        resolve: how paths in it are found.

    Raises:
        JobFileError: as of `load_job`.
    """
    file = Path(file)
    values = _read(file)
    if not isinstance(values, dict):
        raise JobFileError(f"{file}: not a job file: its top level must be keys and values")
    return _build(values, file.resolve().parent, overrides, str(file), model, resolve)


def build_job(
    job: Mapping[str, Any], folder: Path, overrides: Sequence[str], source: str
) -> JobConfig:
    """Check what a job file, or a command in place of one, says.

    Args:
        job: its keys and values.
        folder: that relative paths count from.
        overrides: as of `load_job`.
        source: what mistakes are said to be in.

    Raises:
        JobFileError: it says what it may not.
    """
    return _build(job, folder, overrides, source, JobConfig, resolve_job_paths)


def _build(
    values: Mapping[str, Any],
    folder: Path,
    overrides: Sequence[str],
    source: str,
    model: type[Model],
    resolve: Resolve,
) -> Model:
    values = resolve(values, folder)
    for override in overrides:
        values = _merged(values, resolve(_parse_override(override), Path.cwd()))
    values = _with_prices(values)
    if isinstance(job := values.get("job"), dict):  # of a recipe
        values["job"] = _with_prices(job)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {line}" for line in explain(error, model)]
        if (more := len(lines) - _MOST_LINES) > 0:
            lines = [*lines[:_MOST_LINES], f"{source}: and {more} more"]
        raise JobFileError("\n".join(lines)) from None


def _with_prices(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job with its price table read, if it names a file."""
    if isinstance(prices := job.get("prices"), str):
        return {**job, "prices": load_prices(prices).model_dump()}
    return dict(job)


def _read(file: Path, what: str = "job file") -> Any:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise JobFileError(f"{file}: no such {what}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobFileError(f"{file}: cannot be read: {error}") from None
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise JobFileError(f"{file}: not a job file: it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise JobFileError(f"{file}: line {line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # a date such as 2026-13-45 is a ValueError
        reason = " ".join(str(error).split())
        raise JobFileError(f"{file}: not valid YAML: {reason}") from None


class _Loader(yaml.SafeLoader):
    """Plain data only, in which no key is given twice and each number is what it looks like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> Any:
    """A number, but not 1:30 and 010, which YAML reads in base 60 and 8."""
    if ":" in node.value or _OCTAL.fullmatch(node.value):
        problem = f"{node.value} is not a decimal number; write one, or quote it if it is text"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return yaml.SafeLoader.yaml_constructors[node.tag](loader, node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _decimal)


def load_prices(file: str | Path) -> Prices:
    """Read a price table.

    Raises:
        JobFileError: it cannot be read, is not YAML, or says what it may not.
    """
    values = _read(Path(file), "price table")
    try:
        return Prices.model_validate(values)
    except ValidationError as error:
        lines = [f"{file}: {line}" for line in explain(error, Prices)]
        raise JobFileError("\n".join(lines)) from None


def s3_options(endpoint: str | None, profile: str | None) -> S3Config:
    """How to reach S3, as the options --endpoint and --profile say.

    Raises:
        UserError: an endpoint that is no URL.
    """
    try:
        return S3Config(endpoint=endpoint, profile=profile)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--endpoint: {message}") from None


# --------------------------------------------------------------------- overrides


def _parse_override(override: str) -> dict[str, Any]:
    """`a.b=value` as a job file that says only this."""
    dotted, separator, text = override.partition("=")
    path = dotted.strip().split(".")
    if not separator or not all(path):
        raise JobFileError(f"--set {override}: write it as key=value, such as sampling.seed=1")
    try:
        value = yaml.load(text, _Loader)
        if text.lstrip().startswith("#"):
            raise ValueError("it would be a comment")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise JobFileError(
            f"--set {override}: the value is not valid YAML: {why}; text that holds signs of YAML "
            """goes in two kinds of quotes: --set 'input.template="Q: {{ q }}"'"""
        ) from None
    for key in reversed(path):
        value = {key: value}
    return dict(value)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with what `over` says; sections are merged, everything else is replaced."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = _merged(below or {}, value) if both else value
    return result


# ------------------------------------------------------------------------- paths


def resolve_job_paths(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`job` with paths that are relative to `folder` made absolute; it may be wrong in any way."""
    result = dict(job)
    for key in ("output", "prices"):
        if isinstance(path := result.get(key), str):
            result[key] = _absolute(path, folder)
    if isinstance(given := result.get("input"), dict) and "paths" in given:
        result["input"] = {**given, "paths": _each_absolute(given["paths"], folder)}
    if isinstance(models := result.get("models"), dict):
        names = {k: _model(models[k], folder) for k in ("target", "draft") if models.get(k)}
        result["models"] = {**models, **names}
    if isinstance(speculation := result.get("speculation"), dict):
        named = {k: speculation[k] for k in ("head", "corpus") if speculation.get(k)}
        absolute = {key: _each_absolute(paths, folder) for key, paths in named.items()}
        result["speculation"] = {**speculation, **absolute}
    return result


def _each_absolute(paths: Any, folder: Path) -> Any:
    """A path, or each of a list, made absolute; anything else as it is."""
    if isinstance(paths, list):
        return [_each_absolute(path, folder) for path in paths]
    return _absolute(paths, folder) if isinstance(paths, str) else paths


def _absolute(path: str, folder: Path) -> str:
    if is_url(path):
        return path
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise JobFileError(
            f"{path}: no user of this name; for a folder of this name write ./{path}"
        )
    return os.path.normpath(folder / path) if path else path


def _model(name: Any, folder: Path) -> Any:
    if not isinstance(name, str):
        return name
    if name.startswith(("./", "../", "~")) or name in {".", ".."} or (folder / name).exists():
        return _absolute(name, folder)
    return name


# ------------------------------------------------------------------------ errors


def explain(error: ValidationError, model: type[BaseModel] = JobConfig) -> Iterator[str]:
    """One line for each mistake: the dotted key, what is wrong, and the fix."""
    for detail in error.errors():
        location = [str(part) for part in detail["loc"] if not _is_branch(part)]
        dotted = ".".join(location)
        match detail["type"]:
            case "extra_forbidden":
                yield _unknown_key(location, model)
            case "missing":
                yield f"{dotted}: required, but not given"
            case "value_error":
                # Pydantic puts "Value error, " before what our own validators say.
                message = detail["msg"].removeprefix("Value error, ")
                yield f"{dotted}: {message}" if dotted else message
            case _:
                message = _OWN_WORDS.get(
                    detail["type"], detail["msg"][0].lower() + detail["msg"][1:]
                )
                # Somebody may have put a credential there.
                secret = {"s3", "output_s3"} & set(location)
                got = "" if secret else f", got {_short(detail['input'])}"
                yield f"{dotted}: {message}{got}"


def _is_branch(part: int | str) -> bool:
    # Pydantic adds the tried member of a union, such as `dict[str,…]`, to the location.
    return isinstance(part, str) and ("[" in part or part in {"str", "int"})


def _unknown_key(location: Sequence[str], model: type[BaseModel]) -> str:
    dotted = ".".join(location)
    *section, key = location
    return f"{dotted}: unknown key; {nearest(key, _keys(section, model))}"


def _keys(section: Iterable[str], model: type[BaseModel]) -> list[str]:
    """The keys that a section of a file may have."""
    for name in section:
        if name.isdigit():  # a place in a list, whose items were looked into already
            continue
        field = model.model_fields.get(name)
        if field is None:  # the name of an actor group
            continue
        candidates = (field.annotation, *get_args(field.annotation))
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _short(value: object) -> str:
    text = reprlib.repr(value)  # which looks at the first items only
    return text if len(text) <= 60 else f"{text[:57]}..."
