"""What a check of an output finds: problems, each with its kind, its file and its words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

_MOST_PROBLEMS = 10_000
"""Problems that are kept. A spoiled output may have one for each row, and memory is finite."""

_NAMES_SHOWN = 3
"""Names in one message; the rest are counted."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong.

    Attributes:
        kind: unreadable, checksum, count, missing, duplicate, foreign, stray, half-written,
            manifest or unfinished.
        file: where, as a name in the output folder; or the input file whose rows are missing.
        message: what.
    """

    kind: str
    file: str
    message: str


@dataclass
class Verification:
    """What was checked, and what is wrong with it.

    Attributes:
        output: the folder.
        finished: whether it has `_SUCCESS`.
        rows_in: rows of the input files that the job was planned on.
        rows_out: rows in completions.
        rows_in_errors: rows in errors.
        units, files, bytes: how many were read.
        problems: the first ten thousand.
        problems_found: how many there are.
    """

    output: str
    finished: bool = False
    rows_in: int = 0
    rows_out: int = 0
    rows_in_errors: int = 0
    units: int = 0
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    problems_found: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems_found

    def add(self, problems: Iterable[Problem]) -> None:
        """Note problems."""
        for problem in problems:
            self.problems_found += 1
            if len(self.problems) < _MOST_PROBLEMS:
                self.problems.append(problem)


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
