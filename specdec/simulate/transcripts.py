"""A row's text, what speculation would meet along it, and the file that holds that."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from specdec.atomic import atomic_file
from specdec.measure.calibration import Flags
from specdec.policies.chains import Chain
from specdec.request import Request

Signals = NDArray[np.float32]
Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Text:
    """A request and the target's own completion of it.

    Attributes:
        request: with the sampling that the completion was drawn by.
        output_ids: the completion, to its end.
        group: results are reported by it.
    """

    request: Request
    output_ids: tuple[int, ...]
    group: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class LookedUp:
    """What would be looked up after each prefix of a row's output of n tokens.

    A candidate stands if the text goes on with it. The text was drawn from the target's
    distribution, so that this has the law of any mode of verification.

    Attributes:
        lengths: int64 [n], candidates after the first t output tokens.
        stood: int64 [n], how many of them the text goes on with.
        tokens: int64 [m], the candidates, place after place.
        evidence: int64 [m, len(Evidence)], what speaks for each.
    """

    lengths: Whole
    stood: Whole
    tokens: Whole
    evidence: Whole
    _begins: Whole = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_begins", np.cumsum(self.lengths) - self.lengths)

    def chain(self, at: int, most: int) -> Chain:
        """The candidates after `at` output tokens, at most so many."""
        begin = int(self._begins[at])
        these = slice(begin, begin + min(int(self.lengths[at]), most))
        return Chain(self.tokens[these].tolist(), self.evidence[these].tolist())


@dataclass(frozen=True, slots=True, eq=False)
class Transcript:
    """What speculation would meet along one row's output of n tokens.

    After each prefix of the text the draft has `width` choices, best first; the first is the
    candidate of a chain, the others are its siblings in a tree.

    Attributes:
        id, group: of the row; results are reported by group.
        prompt_tokens: length of the prompt.
        limit: no candidate has an output position of `limit` or more.
        free_trimming: as in `RoundStart`.
        ranks: int64 [n], which choice after the first t output tokens is accepted; `width` where
            none is.
        signals: float32 [n, width, len(Signal)], what a policy may see of the choices.
        branch_of: int64 [n], where drafting goes on behind choices that are not accepted, as an
            index into branches; -1 where nobody recorded it.
        branches: float32 [m, depth, width, len(Signal)], signals of up to `depth` further draft
            steps. Each follows the first choice of the one before.
        lengths: int64 [n], of a draft whose candidates depend on where the round began: how many
            stand of a round that begins at t, as far as it was recorded. Then `branches[t]` are
            what follows its first candidate, right or wrong, and the width is 1.
        looked_up: what would be looked up, if that was recorded.
        accepted: bool [n], whether the first choice is.
        runs: int64 [n + 1], how many candidates of a round that begins at t are accepted.
    """

    id: str
    group: str
    prompt_tokens: int
    limit: int
    free_trimming: bool
    ranks: Whole
    signals: Signals
    branch_of: Whole
    branches: Signals
    lengths: Whole | None = None
    looked_up: LookedUp | None = None
    accepted: Flags = field(init=False)
    runs: Whole = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "accepted", self.ranks == 0)
        object.__setattr__(self, "runs", self.runs_within(1))

    @property
    def width(self) -> int:
        """How many choices are known at each place."""
        return int(self.signals.shape[1])

    @property
    def most(self) -> int:
        """The most candidates, one behind another, that a round may draft."""
        return 1 + int(self.branches.shape[1])

    @property
    def first(self) -> int:
        """Output tokens that there are before the first round that may draft."""
        return 1 if self.prompt_tokens > 1 or self.reads_again else 0

    @property
    def reads_again(self) -> bool:
        """Whether each round reads what the last one accepted, as it comes from the target."""
        return self.lengths is not None

    def runs_within(self, width: int) -> Whole:
        """int64 [n + 1]: how many places from t on have their next token among `width` choices."""
        runs: Whole
        if self.lengths is not None:
            runs = np.append(self.lengths, 0)
        else:
            stops = np.append(np.flatnonzero(self.ranks >= width), len(self.ranks))
            places = np.arange(len(self.ranks) + 1)
            runs = stops[np.searchsorted(stops, places)] - places
        return runs

    def choices(self, at: int, last: int) -> Signals:
        """Signals of the choices after `at` tokens, of which those from `last` on are wrong.

        Args:
            at: output tokens before the choices, drafted ones included.
            last: the place of the first that is not the text's; at least `at` if all are.

        Returns:
            float32 [width, len(Signal)].
        """
        row: Signals = (
            self.signals[at] if at <= last else self.branches[self.branch_of[last], at - last - 1]
        )
        return row

    def seen(self, at: int, index: int) -> Signals:
        """Signals float32 [len(Signal)] of a candidate.

        Args:
            at: output tokens before the round.
            index: of the candidate in the round, from 0.
        """
        if self.lengths is not None and index:
            choices = self.branches[at, index - 1]
        else:
            choices = self.choices(at + index, min(at + int(self.runs[at]), len(self.ranks) - 1))
        first: Signals = choices[0]
        return first


_SCALARS = ("id", "group", "prompt_tokens", "limit", "free_trimming")
_LOOKED_UP = ("lengths", "stood", "tokens", "evidence")


def save_transcripts(
    path: Path, transcripts: Sequence[Transcript], about: Mapping[str, Any]
) -> None:
    """Write transcripts as safetensors, in one step.

    Args:
        transcripts: at least one, all of one draft, of equal depth and width; all with what was
            looked up, or none.
        about: how they were made, JSON-able.
    """
    rows = [
        {name: getattr(transcript, name) for name in _SCALARS}
        | {"n": len(transcript.ranks), "m": len(transcript.branches)}
        for transcript in transcripts
    ]
    names = ["ranks", "signals", "branch_of", "branches"]
    if transcripts[0].lengths is not None:
        names.append("lengths")
    arrays = {
        name: np.concatenate([getattr(transcript, name) for transcript in transcripts])
        for name in names
    }
    if any(transcript.looked_up for transcript in transcripts):
        for name in _LOOKED_UP:
            parts = [getattr(transcript.looked_up, name) for transcript in transcripts]
            arrays[f"looked_up_{name}"] = np.concatenate(parts)
    with atomic_file(path) as fresh:
        save_file(arrays, fresh, {"rows": json.dumps(rows), "about": json.dumps(dict(about))})


def load_transcripts(path: Path) -> tuple[list[Transcript], dict[str, Any]]:
    """The transcripts that `save_transcripts` wrote, and how they were made.

    Files of chains, written before there were trees, hold one choice at each place. Older ones do
    not say what was looked up.
    """
    opened: Any = safe_open(path, framework="np")
    metadata = opened.metadata()
    arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if "accepted" in arrays:
        arrays["ranks"] = 1 - arrays.pop("accepted").astype(np.int64)
        arrays |= {name: arrays[name][..., None, :] for name in ("signals", "branches")}
    transcripts: list[Transcript] = []
    known: dict[str, Any] = {name: arrays.pop(f"looked_up_{name}", None) for name in _LOOKED_UP}
    places_of = [name for name in arrays if name != "branches"]
    n = m = k = 0
    for row in json.loads(metadata["rows"]):
        ends = n + row.pop("n"), m + row.pop("m")
        parts = {name: arrays[name][n : ends[0]] for name in places_of}
        looked_up = None
        if known["lengths"] is not None:
            places = slice(n, ends[0])
            found = slice(k, k := k + int(known["lengths"][places].sum()))
            cuts = (places, places, found, found)
            looked_up = LookedUp(
                *(each[cut] for each, cut in zip(known.values(), cuts, strict=True))
            )
        branches = arrays["branches"][m : ends[1]]
        transcripts.append(Transcript(**row, **parts, branches=branches, looked_up=looked_up))
        n, m = ends
    return transcripts, json.loads(metadata["about"])
