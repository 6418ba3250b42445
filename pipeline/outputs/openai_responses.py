"""A finished job over OpenAI batch lines as the API's output files, in the order of the input.

Units are read one after the other and never held together. What is written is a function of the
committed files, so writing it again writes the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TextIO

import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit.footer import read_record
from pipeline.inputs.jsonl import RAW_LINE
from pipeline.inputs.openai_parameters import TOP
from pipeline.inputs.openai_requests import CHAT, REQUEST, RESPONSES, endpoint_of, parsed
from pipeline.inputs.row_ids import ROW_ID, parse_row_id
from pipeline.inputs.units import Unit
from pipeline.outputs.openai_items import response_object
from pipeline.outputs.openai_messages import finite, message, token
from pipeline.storage.folder import Folder

_COMPLETED = (
    *(ROW_ID, REQUEST, "completion", "finish_reason", "prompt_tokens", "output_tokens"),
    *layout.OPTIONAL_COLUMNS,
)
_FAILED = (ROW_ID, REQUEST, RAW_LINE, "error_class", "error_message")


@dataclass
class _Answer:
    """What became of one line."""

    line: str | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    error: tuple[str, str] | None = None


@dataclass(frozen=True)
class Written:
    """How many lines went where."""

    responses: int
    errors: int


def write_responses(
    job: Folder, units: Sequence[Unit], model: str, responses: TextIO, errors: TextIO
) -> Written:
    """Write a line for each request: its response, or its error.

    Args:
        job: the output folder of a finished job.
        units: the job's, in input order.
        model: the name that responses give.
        responses, errors: where to write.
    """
    seen: dict[str, int] = {}  # custom ids, and which request had them first
    number = good = 0
    for unit in units:
        created = int(read_record(job, unit.id).work.finished)
        for answer in _answers(job, unit):
            number += 1
            request = parsed(answer.line)
            custom_id = request.get("custom_id")
            if not isinstance(custom_id, str):
                custom_id = None
            first = number if custom_id is None else seen.setdefault(custom_id, number)
            error = answer.error
            if first != number:
                error = ("DuplicateCustomId", f"request {first} has the same custom_id")
            name = hashlib.sha256(f"{unit.id}:{number}".encode()).hexdigest()[:24]
            line = {"id": f"batch_req_{name}", "custom_id": custom_id}
            if error is not None:
                detail = {"code": error[0], "message": error[1], "line": number, "param": None}
                _write(errors, {**line, "response": None, "error": detail})
                continue
            good += 1
            body = _body(request, answer.samples, name, created, model)
            response = {"status_code": 200, "request_id": f"req_{name}", "body": body}
            _write(responses, {**line, "response": response, "error": None})
    return Written(good, number - good)


def _write(file: TextIO, value: dict[str, Any]) -> None:
    # Escaped, since a JSON text may hold what UTF-8 cannot: half of a surrogate pair.
    file.write(json.dumps(value) + "\n")


def _answers(job: Folder, unit: Unit) -> Iterator[_Answer]:
    """What became of each of a unit's lines, in order."""
    answers = {unit.place(index): _Answer() for index in range(unit.rows)}
    for row in _rows(job, layout.completions(unit.id), _COMPLETED):
        answer = answers[_place(row)]
        answer.line = row[REQUEST]
        answer.samples.append(row)
    errors = read_record(job, unit.id).files.errors
    if errors is not None:
        for row in _rows(job, errors.name, _FAILED):
            answer = answers[_place(row)]
            answer.line = row[REQUEST] or row.get(RAW_LINE)
            answer.error = (row["error_class"], row["error_message"])
    yield from answers.values()


def _rows(job: Folder, name: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with job.open(name) as file, pq.ParquetFile(file) as parquet:
        there = parquet.schema_arrow.names
        yield from parquet.read([c for c in columns if c in there]).to_pylist()


def _place(row: Mapping[str, Any]) -> tuple[str, int]:
    return parse_row_id(row[ROW_ID])[:2]


def _body(
    request: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    name: str,
    created: int,
    model: str,
) -> dict[str, Any]:
    """A response's body: the samples of one request as its choices."""
    endpoint, asked = endpoint_of(request), request["body"]
    if endpoint == RESPONSES:
        return response_object(asked, samples[0], name, created, model)
    chat = endpoint == CHAT
    choices: list[dict[str, Any]] = []
    for index, sample in enumerate(samples):
        text: dict[str, Any] = {"text": sample["completion"]}
        reason = sample["finish_reason"]
        if chat:
            text = {"message": message(sample, asked)}
            # A call that was cut off is none, so the last one ended as it should.
            called = "tool_calls" in text["message"] and reason == "stop"
            reason = "tool_calls" if called else reason
        told = sample.get(layout.LOGPROBS)
        choice = {"index": index, **text, "finish_reason": reason}
        choice["logprobs"] = _logprobs(told, chat) if told is not None else None
        if asked.get("return_token_ids"):
            choice["token_ids"] = sample.get(layout.OUTPUT_TOKEN_IDS)
        choices.append(choice)
    prompt, told = samples[0]["prompt_tokens"], samples[0].get(layout.PROMPT_LOGPROBS)
    whole = {layout.PROMPT_LOGPROBS: [each and _by_token(each) for each in told]} if told else {}
    output = sum(sample["output_tokens"] for sample in samples)
    thought = sum(sample.get(layout.REASONING_TOKENS) or 0 for sample in samples)
    details = {"completion_tokens_details": {"reasoning_tokens": thought}} if chat else {}
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        **whole,
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            **details,
        },
    }


def _logprobs(told: Sequence[Mapping[str, Any]], chat: bool) -> dict[str, Any]:
    """What a response tells of its tokens, in the form of its endpoint.

    Args:
        told: the tokens, as the column `logprobs` has them.
        chat: whether it is a chat's.
    """
    if chat:
        content = [{**token(t), TOP: [token(other) for other in t["top"]]} for t in told]
        return {"content": content, "refusal": None}
    tokens = [t["token"] for t in told]
    offsets = accumulate((len(text) for text in tokens[:-1]), initial=0) if tokens else ()
    return {
        "tokens": tokens,
        "token_logprobs": [finite(t["logprob"]) for t in told],
        TOP: [{other["token"]: finite(other["logprob"]) for other in t["top"]} for t in told],
        "text_offset": list(offsets),
    }


def _by_token(told: Mapping[str, Any]) -> dict[int, Any]:
    """A token of the prompt and the likeliest ones by their ids, as vLLM has them."""
    return {
        each["token_id"]: {"logprob": finite(each["logprob"]), "decoded_token": each["token"]}
        for each in (told, *told["top"])
    }
