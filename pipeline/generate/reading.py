"""From what the engine returned to what a row's columns say of it."""

from __future__ import annotations

from typing import Any

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
        text, message = self._texts.completion(request, done), None
        if self._conventions is not None and (chat := self._requests.chat(row)) is not None:
            message = self._conventions.message(request, done, chat.tools)
        return Finished(text, done, message)
