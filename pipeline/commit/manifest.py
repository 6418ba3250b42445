"""Whose an output folder is, and which units in it are done."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit import planned_inputs
from pipeline.config.input import CHAT_ONLY, InputConfig
from pipeline.config.job import JobConfig, S3Config, SamplingConfig
from pipeline.config.model_identity import digest, head_identity, model_identity
from pipeline.config.sampling import LATER_SAMPLING
from pipeline.errors import UserError
from pipeline.inputs.units import FilePlan, Unit, check_added, table_of
from pipeline.storage.folder import Folder, check_conditions, reach_folder

_THREADS = 16
_SHOWN_CHARACTERS = 80
"""Of a setting that differs, such as a template: a line of a terminal."""

_PACKAGES = ("specbatch", "torch", "transformers", "ray", "pyarrow")
"""What results depend on."""


def fingerprint(job: JobConfig, plans: Sequence[FilePlan]) -> dict[str, Any]:
    """All that changes results, as plain data. The pool, its slots and the output are not in it.

    With `coupled` verification neither draft nor policy changes a token, so they are left out.

    Raises:
        UserError: a model is not there.
    """
    models, speculation = job.models, job.speculation
    result: dict[str, Any] = {
        "input": _input_mark(job, plans),
        "unit_rows": job.unit_rows,
        "models": {
            "target": model_identity(models.target),
            **models.model_dump(mode="json", include={"dtype", "quantization", "deterministic"}),
        },
        "sampling": mark_of(job.sampling),
        "speculation": {"verification": speculation.verification},
    }
    if models.kv_dtype != "auto":
        result["models"]["kv_dtype"] = models.kv_dtype
    if speculation.verification == "rejection":
        result["speculation"]["policy"] = speculation.policy
        result["speculation"] |= speculation.settings
        if speculation.lookup is not None:
            result["speculation"]["lookup"] = speculation.lookup
        if speculation.corpus:
            result["speculation"]["corpus"] = [*speculation.corpus]
        if speculation.head is not None:
            result["speculation"]["head"] = head_identity(speculation.head)
        if models.draft is not None and job.drafts:
            result["models"]["draft"] = model_identity(models.draft)
            result["models"]["draft_quantization"] = models.draft_quantization
    return result


SAMPLING_FROM = "sampling_from"
"""What the job record says of the sources of its sampling's values."""

OPTIONAL = "optional_columns"
"""What the job record says of the columns that not every job has."""

_LATER = {
    SamplingConfig: LATER_SAMPLING,
    InputConfig: (
        *("format", "prefix", "truncate_prompt_tokens", "escape_special_tokens"),
        *("completion_column", *CHAT_ONLY),
    ),
}
"""Keys that later versions brought. Outputs of versions without them are still the same jobs'."""


def mark_of(section: SamplingConfig | InputConfig) -> dict[str, Any]:
    """A section's keys that change results, without such as are new and say nothing."""
    fields, later = type(section).model_fields, _LATER[type(section)]
    return {
        key: value
        for key, value in section.model_dump(mode="json", exclude={"paths", "s3"}).items()
        if key not in later
        or getattr(section, key) != fields[key].get_default(call_default_factory=True)
    }


def _input_mark(job: JobConfig, plans: Sequence[FilePlan]) -> dict[str, Any]:
    return {**mark_of(job.input), **_files_mark(plans)}


def _files_mark(plans: Sequence[FilePlan]) -> dict[str, Any]:
    return {
        "files": len(plans),
        "rows": sum(p.rows for p in plans),
        "digest": digest([[p.file.name, p.file.size, p.rows] for p in plans]),
    }


class Begun(NamedTuple):
    """What there is of an output, compared with a job.

    Attributes:
        record: its record; empty if there is none.
        added: input files that become part of it.
        another: whether it is no job's yet: nothing is committed, or nothing is there.
        planned: whether it says which files it was planned on.
    """

    record: dict[str, Any]
    added: list[FilePlan]
    another: bool
    planned: bool


def compare(
    output: Folder,
    plans: Sequence[FilePlan],
    mark: dict[str, Any],
    *,
    extend: bool = False,
    same_content: bool = False,
) -> Begun:
    """Make sure that an output folder is a job's, or may become it; arguments as of `claim`.

    Raises:
        UserError: as of `claim`.
    """
    found = output.read(layout.JOB)
    if found is None and output.list(layout.COMPLETIONS):
        raise UserError(
            f"output: {output.url} has completions but no {layout.JOB}; "
            "choose another output folder, or empty this one"
        )
    record = json.loads(found) if found is not None else {}
    planned = planned_inputs.read_planned(output)
    there, digests = record.get("fingerprint", {}), accepted_digests(record)
    added = [p for p in plans if p.file.name not in planned] if extend and planned else []
    kept = [p for p in plans if p.file.name in planned] if added else plans
    before = {**mark, "input": {**mark["input"], **_files_mark(kept)}} if added else mark
    changed = planned_inputs.changes(planned, kept, times=not same_content) if planned else []
    known = digest(before) in digests if added else not difference(there, before)
    another = found is None or not known or bool(changed)
    if another and found is not None and output.list(layout.COMPLETIONS):
        if digest(mark) in digests and not changed:
            raise UserError(
                f"output: {output.url} was being extended with new input files when that was "
                "stopped; run again with --extend"
            )
        raise _refusal(output, difference(there, before), changed)
    if planned_inputs.other_steps(plans, planned):
        raise UserError(
            f"output: {output.url} was begun or extended by another run at this moment; run the "
            "same command again"
        )
    return Begun(record, added, another, bool(planned))


def claim(
    output: Folder,
    job: JobConfig,
    plans: Sequence[FilePlan],
    mark: dict[str, Any],
    *,
    sampling_from: Mapping[str, str] | None = None,
    extend: bool = False,
    same_content: bool = False,
    forked_from: Folder | None = None,
) -> pa.Schema:
    """Make the output folder this job's, or make sure that it already is.

    Args:
        output: the folder.
        job: the job.
        plans: its input.
        mark: its fingerprint.
        sampling_from: where the values of its sampling are from, for the record.
        extend: input files that the job was not planned on become part of it.
        same_content: input files of which only the time of change differs have not changed.
        forked_from: the output of the job that this one was made from, for the record.

    Returns:
        The columns of the job's table: of what it has written, if that is known.

    Raises:
        UserError: the folder holds another job's output, or the input has changed, or added files
            do not fit the table; the message shows the difference. Or the storage cannot say which
            of two writers was first.
    """
    record, added, another, planned = compare(
        output, plans, mark, extend=extend, same_content=same_content
    )
    if another:
        # A job that never committed anything, perhaps for a mistake that is corrected now.
        table = table_of(plans)
        more = {"created": _now(), **_fork(forked_from, mark), SAMPLING_FROM: sampling_from}
        _record(output, job, plans, mark, table, more)
        return table
    table = recorded_table(record) or table_of(plans)
    if added:
        check_added(added, table, job.s3_of_input)
        optional = optional_columns(output, record, job.optional_columns)
        more = {**_extended(record, added), OPTIONAL: optional}
        _record(output, job, plans, mark, table, more)
    elif same_content or not planned:
        output.put(layout.INPUTS, planned_inputs.to_bytes(plans))
    return table


def optional_columns(
    output: Folder, record: Mapping[str, Any], usual: tuple[str, ...]
) -> tuple[str, ...]:
    """The optional columns that a job's files have: what it was begun with, it ends with.

    Args:
        output: the job's folder.
        record: what it says of the job.
        usual: those that this version gives such a job.
    """
    if OPTIONAL in record:
        return tuple(record[OPTIONAL])
    # A version that did not note them had fewer, perhaps; its files tell.
    begun = min(committed_ids(output), default=None)
    if begun is None:
        return usual
    try:
        with output.open(layout.completions(begun)) as file:
            names = {*pq.read_schema(file).names}
    except (pa.ArrowException, OSError):
        return usual
    table = recorded_table(record)
    given = () if table is None else table.names
    return tuple(name for name in layout.OPTIONAL_COLUMNS if name in names and name not in given)


def recorded_table(record: Mapping[str, Any]) -> pa.Schema | None:
    """The columns that a job writes; None: it was begun by a version that did not note them."""
    if (found := record.get("table")) is None:
        return None
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(found["arrow"])))


def _table_record(table: pa.Schema) -> dict[str, Any]:
    """The columns for people, and exactly."""
    arrow = base64.b64encode(table.serialize()).decode()
    return {"columns": {field.name: str(field.type) for field in table}, "arrow": arrow}


def _record(
    output: Folder,
    job: JobConfig,
    plans: Sequence[FilePlan],
    mark: dict[str, Any],
    table: pa.Schema,
    more: Mapping[str, Any],
) -> None:
    record = {
        "name": job.name,
        "versions": versions(),
        OPTIONAL: job.optional_columns,
        **more,
        "fingerprint": mark,
        "table": _table_record(table),
        "config": job.model_dump(mode="json"),
    }
    check_conditions(output)
    # In this order: a job whose input list is behind is told to extend it again.
    output.put(layout.JOB, json.dumps(record, indent=2).encode())
    output.put(layout.INPUTS, planned_inputs.to_bytes(plans))


def _extended(record: Mapping[str, Any], added: Sequence[FilePlan]) -> dict[str, Any]:
    """What the record keeps when files are added: units of the job before stay valid."""
    step = {
        "at": _now(),
        "files": len(added),
        "rows": sum(p.rows for p in added),
        "fingerprint": digest(record["fingerprint"]),
    }
    known = ("created", "forked_from", SAMPLING_FROM)
    kept = {name: record[name] for name in known if name in record}
    return {**kept, "extended": [*record.get("extended", []), step]}


def _fork(source: Folder | None, mark: dict[str, Any]) -> dict[str, Any]:
    if source is None:
        return {}
    there = json.loads(source.read(layout.JOB) or b"{}").get("fingerprint", {})
    return {"forked_from": {"output": source.url, "differences": difference(there, mark)}}


def accepted_digests(record: Mapping[str, Any]) -> set[str]:
    """Digests of the fingerprints whose units belong to a job: its own, and before extensions."""
    earlier = {step["fingerprint"] for step in record.get("extended", [])}
    return {digest(record.get("fingerprint", {})), *earlier}


def _refusal(output: Folder, differences: list[str], changed: list[str]) -> UserError:
    if changed:
        # These say the same as sums over all files, in plain words.
        sums = tuple(f"input.{name}:" for name in ("files", "rows", "digest"))
        differences = [line for line in differences if not line.startswith(sums)]
    what = "another job" if differences or not changed else "a job on other input"
    fix = "restore this" if what == "another job" else "restore these files"
    if changed and all(": modified " in line for line in changed):
        fix = "if only their times differ, say --same-content"
    lines = "".join(f"\n  {line}" for line in [*differences, *changed])
    return UserError(
        f"output: {output.url} holds {what}; choose another output (--fork OUT), or {fix}:{lines}"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def difference(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines that say which settings of two fingerprints differ."""
    lines = []
    for key in [*there, *(key for key in here if key not in there)]:
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += difference(old, new, f"{prefix}{key}.")
        elif old != new:
            first, second = _pair(old, new)
            lines.append(f"{prefix}{key}: {first} there, {second} here")
    return lines


def _pair(old: object, new: object) -> tuple[str, str]:
    """Both values in a line; of long texts, the place where they begin to differ."""
    texts = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    same = next((i for i, (a, b) in enumerate(zip_longest(*texts)) if a != b), 0)
    start = max(0, same - 20) if max(map(len, texts)) > _SHOWN_CHARACTERS else 0
    short = [f"...{text[start:]}" if start else text for text in texts]
    most = _SHOWN_CHARACTERS
    first, second = (text if len(text) <= most else f"{text[: most - 3]}..." for text in short)
    return first, second


def open_output(url: str, s3: S3Config) -> Folder:
    """The output folder of a job, finished or not.

    Args:
        url: the folder, local or s3://.
        s3: how to reach it, if it is on S3.

    Raises:
        UserError: there is no job in this folder, or it is out of reach.
    """
    output = reach_folder(url, s3)
    if output.read(layout.JOB) is None:
        raise UserError(f"{url}: no job's output here: there is no {layout.JOB}")
    return output


def committed_ids(output: Folder) -> set[str]:
    """Ids of the units that have a completions file, of whatever job."""
    units = map(layout.unit_of, output.list(layout.COMPLETIONS))
    return {unit for unit in units if unit is not None}


def committed(output: Folder, units: Iterable[Unit]) -> set[str]:
    """Ids of the units that are done: those whose completions file exists.

    Raises:
        UserError: a file in `completions/` that is none of theirs.
    """
    known = {unit.id for unit in units}
    found = committed_ids(output)
    foreign = sorted(found - known)
    if foreign:
        raise UserError(
            f"output: {output.join(layout.completions(foreign[0]))} is not of this job; "
            "move it away"
        )
    return found


def versions() -> dict[str, str]:
    """Versions of this package and of what its results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
