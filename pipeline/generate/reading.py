"""From what the engine returned to what a row's columns say of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import validator_for
from referencing import Registry

from pipeline.commit.schema import Failed, Finished, Outcome
from pipeline.config.job import JobConfig
from pipeline.conventions import Conventions
from pipeline.errors import RowError, UserError
from pipeline.inputs.requests import Row, RowRequests
from pipeline.layout import CONTENT
from pipeline.texts import Texts
from specdec.request import Completion, Request


class Reader:
    """Reads completions as a job asks for.

    Args:
        job: the job.
        tokenizer: its target's (transformers).
        requests: made of its rows.

    Raises:
        UserError: the job asks for messages that nothing marks.
    """

    def __init__(self, job: JobConfig, tokenizer: Any, requests: RowRequests) -> None:
        self._texts, self._requests = Texts(tokenizer), requests
        conventions = Conventions(tokenizer, self._texts)
        if job.sampling.parse_response and not conventions.known:
            raise UserError(
                "sampling.parse_response: the target's chat template does not tell how it marks "
                "reasoning or tool calls; remove the key"
            )
        self._conventions = conventions if CONTENT in job.optional_columns else None
        self._given = job.input.completion_column or ""
        self._parses = job.sampling.return_parsed

    def token_text(self, token: int) -> str:
        """The text of a token, by itself."""
        return self._texts.decode([token])

    def outcome(self, row: Row, request: Request, done: Completion) -> Outcome:
        """What became of a sample.

        Args:
            row: its row.
            request: what it asked for.
            done: what the engine returned.
        """
        if done.finish_reason == "error":
            kind = done.error_class or "InvalidRequest"
            return Failed(RowError(kind, done.error or "refused"), attempts=1)
        if request.given_ids:
            return Finished(str(row[self._given]), done)
        text, message = self._texts.completion(request, done), None
        if self._conventions is not None and (chat := self._requests.chat(row)) is not None:
            message = self._conventions.message(request, done, chat.tools, chat.choice)
        schema = self._requests.schema(row) if self._parses else None
        if schema is None:
            return Finished(text, done, message)
        if fault := fault_of(text, schema):
            cut = f"cut off after {len(done.output_ids)} tokens, " * (
                done.finish_reason == "length"
            )
            said = f"the completion is not JSON of its schema: {cut}{fault}; it ends with "
            return Failed(RowError("InvalidOutput", said + repr(text[-_SHOWN:])), attempts=1)
        return Finished(text, done, message, text.strip())


_SHOWN = 80
"""Characters of a completion in an error's message: a line of a terminal."""


def fault_of(text: str, schema: Mapping[str, Any]) -> str | None:
    """Why a text is not JSON of a schema; None if it is."""
    try:
        value = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        return str(error)
    try:
        _validator(json.dumps(schema)).validate(value)
    except ValidationError as error:
        return f"{error.json_path}: {error.message[:_SHOWN]}"
    except Exception as error:  # a schema may ask for what the library lacks
        return f"its schema cannot be checked ({type(error).__name__}: {error})"
    return None


def _no_json(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


@functools.lru_cache(1024)
def _validator(schema: str) -> Any:
    """A validator that fetches nothing: what a schema refers to is in it."""
    parsed = json.loads(schema)
    return validator_for(parsed, default=Draft202012Validator)(parsed, registry=Registry())
