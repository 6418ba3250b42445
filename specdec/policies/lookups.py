"""Which candidates to take that were looked up, and which rows to leave to a draft.

A draft may draw for rows that have known candidates, behind these, or for none of them: an EAGLE
draft knows nothing of tokens that the target has not read. There, what is looked up here and there
must not take from the draft the rows that it needs, since a step for a few rows takes hardly less
than one for all. So two plans are compared. Either the draft draws for all rows but those that have
better candidates, or what was looked up is taken as if there were no draft.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.policies.base import RoundStart
from specdec.policies.chains import Chain
from specdec.policies.kinds import Kind
from specdec.policies.known import KnownChains, Lookups, in_front, survivals
from specdec.policies.objective import best_prefixes, by_row
from specdec.policies.offers import OfferingPolicy
from specdec.policies.switch import Switch

Set = Sequence[tuple[float, int]]
"""Survival and row of some candidates."""


class LookingUpPolicy(OfferingPolicy):
    """A policy that weighs known candidates against a draft's.

    Attributes:
        switch: whether a draft pays.
        found: judges known candidates; `found_switch`: whether to submit them.
        lookups: whether to look for them.
    """

    switch: Switch

    def __post_init__(self) -> None:
        super().__post_init__()
        self.found, self.found_switch, self.lookups = KnownChains(), Switch(), Lookups()
        self._saved = 0.0  # seconds, by the candidates of this round that were looked up
        self._known: list[list[float]] = []  # survival of the known candidates taken, by row
        # Whether there is no draft, and what one brings a row where it draws behind known tokens.
        self._looking_up, self._worth = False, 0.0
        self._all_pay = False  # whether a draft would pay if it drew for all rows of this round

    def wants_lookups(self) -> bool:
        return self.lookups.due()

    def lookups_took(self, seconds: float) -> None:
        self.lookups.ended(seconds, self._saved)

    def choose(self, start: RoundStart, chains: Sequence[Chain]) -> Sequence[int]:
        counts = [chain.forced for chain in chains]
        self._steps, self._known, self._odds, self._saved = [], [], [], 0.0
        self._all_pay = False
        if not any(chain.tokens for chain in chains):
            return counts
        self._begin(start)
        self._odds = self.found.predict(start, chains)
        known = [*map(survivals, self._odds)]
        rows = sum(room > 0 for room in start.room)
        best, gain = self._leaving(known, self._worth if start.draws_behind else 0.0, start)
        saved = gain
        if not start.draws_behind:
            free = [row for row, room in enumerate(start.room) if room and not counts[row]]
            if free and not self._looking_up and not self.switch.rests(start):
                best, gain, saved = self._or_drafting(start, free, known, best, gain)
        bare = self._looking_up and self.found_switch.look_again and start.decodes
        if best and not bare and self.found_switch.pays(gain / rows):
            start.notes["found"], self._saved = gain / rows, saved / self.price
            counts = [*map(max, counts, by_row(best, len(chains)))]
        self._known = [each[:n] for each, n in zip(known, counts, strict=True)]
        self.survival = [each[-1] if each else 1.0 for each in self._known]
        start.notes.update(taken=self._known, reached=[*self.survival])
        self._kept, self._tokens_fed = [*counts], self._tokens_fed + sum(counts)
        return counts

    def _leaving(
        self, known: Sequence[Sequence[float]], worth: float, start: RoundStart, place: float = 0.0
    ) -> tuple[Set, float]:
        """`_best_set` of known candidates, leaving rows to a draft that is worth more to them.

        Args:
            known: survival of each row's.
            worth: tokens that the draft brings a row.
            place: tokens that a place of the verification costs, if `worth` is net of that.
        """
        behind = start.draws_behind
        net = ([p - place for p in each] for each in known) if place else known
        taken = [in_front(each, worth, draws_behind=behind) for each in net]
        self._known = [[*each[:n]] for each, n in zip(known, taken, strict=True)]
        return self._best_set()

    def _or_drafting(
        self,
        start: RoundStart,
        rows: Sequence[int],
        known: Sequence[Sequence[float]],
        best: Set,
        gain: float,
    ) -> tuple[Set, float, float]:
        """`_best_set` where a draft draws for rows without known candidates, and for no others.

        Args:
            start: the round.
            rows: that a draft may draw for, if what was looked up is not taken.
            known: survival of each row's.
            best, gain: `_best_set` without a draft.

        Returns:
            The best set and the tokens that it gains; and how many these are beyond what the draft
            alone would gain.
        """
        assert self.costs is not None
        offer = self._offer(start, rows, [0] * len(start.rows), Kind())
        self._all_pay = offer.promised / len(rows) > self.switch.missing
        if not self._all_pay or not offer.rows:
            return best, gain, gain
        bare, n = self._tokens_bare, len(offer.rows) * offer.length
        verify = self.costs.verify
        place = self.price * float(verify(bare + n) - verify(bare)) / n
        rate = sum(self.typical[row] for row in offer.rows) / len(offer.rows)
        worth = sum(rate**depth - place for depth in range(1, offer.length + 1))
        others, more = self._leaving(known, worth, start, place)
        taken = {row for _, row in others}
        beyond = more - worth * sum(row in taken for row in offer.rows)
        if beyond + offer.promised > gain:
            return others, more, beyond
        return best, gain, gain - offer.promised

    def _best_set(self) -> tuple[Set, float]:
        """Survival and row of the candidates worth verifying, and the tokens that they gain."""
        assert self.costs is not None
        every = [(survival, row) for row, known in enumerate(self._known) for survival in known]
        every += [
            (survival, row)
            for step in self._steps
            for survival, row in zip(step.survival, step.rows, strict=True)
        ]
        bare = self._tokens_bare
        seconds = self.costs.verify.curve(bare, bare + len(every)).tolist()
        best = best_prefixes(every, seconds, self.price)
        gain = sum(p for p, _ in best) - self.price * (seconds[len(best)] - seconds[0])
        return best, gain
