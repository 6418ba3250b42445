"""Measured speedup: rounds with speculation against control rounds without, at the same live batch.

A small share of rounds, chosen at random, runs without speculation. They give the seconds per token
that the job would have needed otherwise; nothing is modelled. Only sums are kept, so the meters of
units and actors add up to a job's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

LEAST_CONTROLS = 3
"""Control rounds of one live-batch class before it is judged by itself.

With fewer there is no variance to speak of. Raised, more classes borrow the others' ratio.
"""


@dataclass(slots=True)
class RoundSums:
    """Sums over rounds: how many, seconds t, committed tokens k, and their second moments."""

    n: float = 0.0
    t: float = 0.0
    k: float = 0.0
    tt: float = 0.0
    tk: float = 0.0
    kk: float = 0.0

    def book(self, seconds: float, tokens: int) -> None:
        """Add one round."""
        self.add(RoundSums(1, seconds, tokens, seconds**2, seconds * tokens, tokens**2))

    def add(self, other: RoundSums) -> None:
        """Add the rounds of `other`."""
        for name in RoundSums.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def seconds_per_token(self) -> float:
        """The ratio of the sums."""
        return self.t / self.k

    @property
    def variance(self) -> float:
        """Variance of a round's seconds around what its tokens predict."""
        r = self.seconds_per_token
        return max(self.tt - 2 * r * self.tk + r * r * self.kk, 0.0) / max(self.n - 1, 1)


@dataclass(slots=True)
class SpeedupMeter:
    """RoundSums by live batch, with speculation and as control.

    Attributes:
        speculative, control: by class of live batch (`batch_class`); rounds in which no prompt was
            being fed.
        mixed: rounds that fed prompts besides decoding: their seconds, the seconds they would have
            taken without candidates, and the tokens they committed beyond one per row.
    """

    speculative: dict[int, RoundSums] = field(default_factory=dict)
    control: dict[int, RoundSums] = field(default_factory=dict)
    mixed: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def book(self, live: int, seconds: float, tokens: int, *, control: bool) -> None:
        """Add a round that committed `tokens` for `live` rows."""
        arm = self.control if control else self.speculative
        arm.setdefault(batch_class(live), RoundSums()).book(seconds, tokens)

    def book_mixed(self, seconds: float, without: float, extra: int) -> None:
        """Add a round that also fed prompts; see `mixed`."""
        for i, value in enumerate((seconds, without, extra)):
            self.mixed[i] += value

    def add(self, other: SpeedupMeter) -> None:
        """Add the rounds of `other`."""
        for mine, theirs in (
            (self.speculative, other.speculative),
            (self.control, other.control),
        ):
            for key, rounds in theirs.items():
                mine.setdefault(key, RoundSums()).add(rounds)
        self.mixed = [a + b for a, b in zip(self.mixed, other.mixed, strict=True)]

    def copy(self) -> SpeedupMeter:
        """The rounds so far."""
        result = SpeedupMeter()
        result.add(self)
        return result

    def minus(self, other: SpeedupMeter) -> SpeedupMeter:
        """What was added since `other` was this meter."""
        result = SpeedupMeter()
        for target, now, then in (
            (result.speculative, self.speculative, other.speculative),
            (result.control, self.control, other.control),
        ):
            for key, rounds in now.items():
                before = then.get(key, RoundSums())
                sums = [getattr(rounds, s) - getattr(before, s) for s in RoundSums.__slots__]
                if sums[0]:
                    target[key] = RoundSums(*sums)
        result.mixed = [a - b for a, b in zip(self.mixed, other.mixed, strict=True)]
        return result

    def to_json(self) -> dict[str, Any]:
        """Plain data for records."""

        def plain(arm: Mapping[int, RoundSums]) -> dict[str, list[float]]:
            return {str(k): [getattr(r, s) for s in RoundSums.__slots__] for k, r in arm.items()}

        return {
            "speculative": plain(self.speculative),
            "control": plain(self.control),
            "mixed": self.mixed,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SpeedupMeter:
        """What `to_json` gave."""

        def arm(name: str) -> dict[int, RoundSums]:
            return {int(k): RoundSums(*sums) for k, sums in data[name].items()}

        return SpeedupMeter(arm("speculative"), arm("control"), list(data["mixed"]))

    def estimate(self, confidence: float = 0.95) -> Speedup | None:
        """Seconds without speculation over seconds with it, for the work of these rounds.

        The tokens that were committed at a live batch are charged at what its control rounds took
        per token; a class with fewer than LEAST_CONTROLS of them borrows the other classes' ratio.

        Returns:
            None while there are fewer than LEAST_CONTROLS control rounds to compare with.
        """
        known = [
            key
            for key, rounds in self.control.items()
            if rounds.n >= LEAST_CONTROLS and key in self.speculative
        ]
        if not known:
            return None
        # Not at the top: every process of a job imports this file, and few estimate. It saves each
        # of them 0.2 s.
        from scipy.special import stdtrit

        with_, without, variance_with, variance_without, controls = 0.0, 0.0, 0.0, 0.0, 0.0
        for key in known:
            fast, slow = self.speculative[key], self.control[key]
            with_ += fast.t
            without += fast.k * slow.seconds_per_token
            variance_with += fast.n * fast.variance
            variance_without += (fast.k / slow.k) ** 2 * slow.n * slow.variance
            controls += slow.n
        ratio = without / with_
        error = math.sqrt(variance_without / without**2 + variance_with / with_**2)
        spread = float(stdtrit(max(controls - len(known), 1), 0.5 + confidence / 2)) * error

        unknown = sum(r.t for key, r in self.speculative.items() if key not in known)
        committed = sum(self.speculative[key].k for key in known)
        extra = self.mixed[2] * without / committed
        total = with_ + unknown + self.mixed[0]

        def whole(decoding: float) -> float:
            """The speedup of all rounds, given that of rounds that only decode."""
            scaled = decoding / ratio
            return (decoding * (with_ + unknown) + self.mixed[1] + extra * scaled) / total

        low, high = (whole(ratio * math.exp(sign * spread)) for sign in (-1, 1))
        return Speedup(whole(ratio), low, high, int(controls))


@dataclass(frozen=True, slots=True)
class Speedup:
    """Times faster than without speculation, its confidence interval, and control rounds behind."""

    value: float
    low: float
    high: float
    controls: int


def batch_class(live: int) -> int:
    """The power of two that a live batch falls under: 1, 2, 4 (3-4), 8 (5-8), ..."""
    return 1 << (live - 1).bit_length()


class ControlSchedule:
    """Picks control rounds: one at random in every block of 1 / share rounds.

    Where 1 / share is no whole number, each block's length is drawn from the two numbers around it,
    such that its mean is 1 / share. In the long run the share of control rounds is then exact.

    Args:
        share: of rounds; 0: none.
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        self._share = share
        self._random = Random(seed)
        self._left = self._chosen = 0  # rounds left in the block, and at how many it comes

    @property
    def due(self) -> bool:
        """Whether the next round is a control round."""
        if not self._share:
            return False
        if self._left == 0:
            whole, more = divmod(1 / self._share, 1)
            longer = more > 0 and self._random.random() < more
            self._left = int(whole) + longer
            self._chosen = self._random.randint(1, self._left)
        return self._left == self._chosen

    def next(self) -> bool:
        """Whether this round is a control round, which is then over."""
        due = self.due
        self._left -= bool(self._share)
        return due
