"""What is not a bug: mistakes of the user's or a row's, too many of these, and a wish to stop."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST_MESSAGE = 1000  # characters


class UserError(Exception):
    """Something the user can fix. The message says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with 2.
    """


class RowError(Exception):
    """One row cannot be completed. It goes to `errors/` and the job goes on.

    Attributes:
        error_class: a short stable name that rows can be grouped by, such as `NullPrompt`.
        message: what is wrong with this row; cut where it is very long.
    """

    def __init__(self, error_class: str, message: str) -> None:
        # It may quote the row: half characters and megabytes are kept out of the error column.
        message = message[:_LONGEST_MESSAGE].encode(errors="backslashreplace").decode()
        super().__init__(f"{error_class}: {message}")
        self.error_class = error_class
        self.message = message

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return type(self), (self.error_class, self.message)  # from one process to another


class JobStopped(Exception):
    """The job was asked to stop, and has: what was in flight is committed. It can be resumed."""


class BudgetReached(JobStopped):
    """The job stopped at its budget. The message says what was spent of it."""


class TooManyErrors(Exception):
    """More rows failed than the job allows. What is committed stays, and can be tried again.

    Attributes:
        missing: units that are not generated, because the job was stopped for its errors.
    """

    def __init__(self, message: str, missing: int = 0) -> None:
        super().__init__(message)
        self.missing = missing


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the known name nearest to `name`, or lists them all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
