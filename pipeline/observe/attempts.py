"""Which units were begun and did not end: how a row that kills its engine is found.

An actor that dies takes its account of what it was doing with it, so the account is kept elsewhere
(`pipeline.observe.monitor.Monitor`). A unit that was begun twice without an end is *in quarantine*:
it gets an engine to itself and runs in groups, each announced before it starts. The group that was
announced when the engine died runs row by row next time. A row that was alone in the engine when it
died, `POISON_DEATHS` times, is not tried again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

QUARANTINE_DEATHS = 2
"""Deaths after which a unit is quarantined. One may well have been the machine's doing."""

POISON_DEATHS = 2
"""Deaths of an engine that held this row alone, after which the row is given up."""

HOPELESS_ROWS = 8
"""Rows of a unit given up, without one that passed alone, after which it is not the rows."""

Group = tuple[int, ...]
"""Rows of a unit, by their index in it."""


@dataclass(frozen=True)
class History:
    """What became of earlier attempts at a unit.

    Attributes:
        deaths: how many ended with their engine.
        killed: how often, by the group that ran alone in the engine.
        passed: how many groups ran alone and lived.
    """

    deaths: int = 0
    killed: Mapping[Group, int] = field(default_factory=dict)
    passed: int = 0

    @property
    def quarantined(self) -> bool:
        """Whether the unit gets an engine to itself."""
        return self.deaths >= QUARANTINE_DEATHS

    @property
    def hopeless(self) -> bool:
        """Whether the engine dies whatever row it works on."""
        return not self.passed and sum(map(self.poisonous, self.killed)) >= HOPELESS_ROWS

    def poisonous(self, group: Group) -> bool:
        """Whether this is a row not to be tried again."""
        return len(group) == 1 and self.killed.get(group, 0) >= POISON_DEATHS

    def groups(self, rows: Sequence[int], size: int) -> list[Group]:
        """How these rows of a quarantined unit are split: suspects first and row by row.

        What dies early in an attempt wastes little of it.
        """
        whole = [tuple(rows[i : i + size]) for i in range(0, len(rows), size)]
        suspects = [(i,) for group in whole if group in self.killed for i in group]
        return [*suspects, *(group for group in whole if group not in self.killed)]


class Attempts:
    """The account of units that were begun. One for a job; plain and synchronous."""

    def __init__(self) -> None:
        self._deaths: dict[str, int] = {}
        self._killed: dict[str, dict[Group, int]] = {}
        self._trial: dict[str, Group] = {}
        self._passed: Counter[str] = Counter()
        self._uncommitted: set[str] = set()

    def begin(self, unit: str) -> History:
        """Note the begin of an attempt. One that was begun and not ended has died."""
        if unit in self._deaths:
            self._deaths[unit] += 1
            if group := self._trial.pop(unit, None):
                killed = self._killed.setdefault(unit, {})
                killed[group] = killed.get(group, 0) + 1
        else:
            self._deaths[unit] = 0
        return History(self._deaths[unit], dict(self._killed.get(unit, {})), self._passed[unit])

    def trial(self, unit: str, group: Group) -> None:
        """Note that these rows of the unit, and no others, are in an engine now."""
        self._trial[unit] = group

    def passed(self, unit: str) -> None:
        """Note that the group on trial has lived."""
        self._trial.pop(unit, None)
        self._passed[unit] += 1

    def end(self, unit: str) -> None:
        """Note that an attempt has completed the unit; its files are not written yet."""
        for account in (self._deaths, self._killed, self._trial, self._passed):
            account.pop(unit, None)
        self._uncommitted.add(unit)

    def committed(self, unit: str) -> None:
        """Note that the unit's files are written."""
        self._uncommitted.discard(unit)

    @property
    def in_flight(self) -> int:
        """Units begun and not yet committed."""
        return len(self._deaths.keys() | self._uncommitted)
