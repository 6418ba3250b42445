"""What is looked up in a replay is what an engine would look up, and so is what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from specdec.drafters.suffix import SuffixIndex
from specdec.engine.engine import Engine
from specdec.policies.base import RoundStart, StopPolicy
from specdec.policies.chains import Chain
from specdec.policies.memory import RowMemory
from specdec.policies.registry import make_policy
from specdec.request import Completion, Counts, Request, SamplingParams
from specdec.simulate.lookups import look_up
from specdec.simulate.record import Text, record
from specdec.simulate.replay import Replay, replay
from specdec.simulate.transcripts import LookedUp, Transcript, load_transcripts, save_transcripts
from tests.specdec.goodness import FALSE_ALARM
from tests.specdec.simulate.test_record import ratio_of
from tests.specdec.simulate.test_replay import COSTS, Recorder, random_transcripts, transcript_of
from tests.specdec.tiny_models import TinyPair
from tests.specdec.workloads import (
    GREEDY,
    SAMPLED,
    SOME,
    looking_goodput,
    outputs,
    requests_of,
    trimming_costs,
)


@pytest.fixture(scope="module")
def lone(pair: TinyPair) -> TinyPair:
    return replace(pair, draft=None)


def samples(sampling: SamplingParams) -> list[Request]:
    """Four samples of some prompts, all of one length."""
    sampling = replace(sampling, ignore_eos=True)
    return requests_of([prompt for prompt in SOME[:6] for _ in range(4)], sampling)


def run(pair: TinyPair, requests: Sequence[Request], policy: StopPolicy, **how: Any) -> list[Any]:
    return Engine(pair, policy=policy, verification="coupled", **how).generate(requests)


def texts_of(pair: TinyPair, requests: Sequence[Request]) -> list[Text]:
    done = outputs(run(pair, requests, StopPolicy()))
    return [Text(request, output) for request, output in zip(requests, done, strict=True)]


def recorded(pair: TinyPair, texts: Sequence[Text]) -> list[Transcript]:
    """As one row after the other writes them."""
    how: Any = {"verification": "coupled", "width": 2, "live": 1}
    return list(record(pair, texts, lookup=SuffixIndex(), **how))


# ------------------------------------------------------------------------------ what is found


class Watching(StopPolicy):
    """Submits nothing, and keeps what is looked up, by row in the order in which they come."""

    looks_up = True

    def __init__(self) -> None:
        self.rows: list[RowMemory] = []
        self.seen: list[dict[int, Chain]] = []

    def choose(self, start: RoundStart, chains: Sequence[Chain]) -> list[int]:
        for row, context, chain in zip(start.rows, start.contexts, chains, strict=True):
            if not any(row is known for known in self.rows):
                self.rows.append(row)
                self.seen.append({})
            self.seen[[row is known for known in self.rows].index(True)][context] = chain
        return [0] * len(chains)


@pytest.mark.parametrize("live", [1, 4])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_chains_are_those_of_an_engine(lone: TinyPair, sampling: SamplingParams, live: int) -> None:
    requests, policy = samples(sampling), Watching()
    texts = texts_of(lone, requests)
    run(lone, requests, policy, slots=live)
    found = look_up([(text.request, text.output_ids) for text in texts], SuffixIndex(), live)
    looked_up = 0
    for text, ours, theirs in zip(texts, found, policy.seen, strict=True):
        n = len(text.output_ids)
        for at in range(1, n):  # where an engine has no room, it looks for less
            chain = ours.chain(at, n - at - 1)
            expected = theirs[len(text.request.prompt_ids) + at]
            assert chain.tokens == [*expected.tokens]
            assert [*map(tuple, chain.evidence)] == [*expected.evidence]
            stands = [a == b for a, b in zip(chain.tokens, text.output_ids[at:], strict=False)]
            assert min(ours.stood[at], len(stands)) == [*stands, False].index(False)
            looked_up += len(stands)
    assert looked_up > 100


# ------------------------------------------------------------------------- what comes of it


def without_prompts(done: Sequence[Completion]) -> list[Counts]:
    """Counts without the round in which a prompt was fed."""
    counts = [each.counts for each in done]
    return [replace(c, rounds=c.rounds - 1, committed=c.committed - 1) for c in counts]


class Scheduled(StopPolicy):
    """Takes and drafts as the length of the context says."""

    looks_up = True

    def choose(self, start: RoundStart, chains: Sequence[Chain]) -> list[int]:
        each = zip(start.contexts, chains, strict=True)
        return [min(context % 5, len(chain.tokens)) for context, chain in each]

    def budget(self, start: RoundStart) -> list[int]:
        return [context // 2 % 4 for context in start.contexts]


@pytest.mark.parametrize("policy", ["suffix", "goodput"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_rounds_without_a_draft_are_the_engine_s(
    pair: TinyPair, lone: TinyPair, sampling: SamplingParams, policy: str
) -> None:
    def made() -> StopPolicy:
        if policy == "suffix":
            return make_policy("suffix", threshold=0.02)
        found = looking_goodput()
        found.prepare(pair.target, None, 1)
        return found

    # One token leaves nothing to be shared, so that each prompt has a round of its own.
    requests = samples(sampling)[::4] + samples(sampling)[1::4]
    requests = [r for r in requests if len(r.prompt_ids) > 1]
    engine = Engine(lone, policy=made(), verification="coupled", slots=1, least_shared=1000)
    theirs = without_prompts(engine.generate(requests))
    transcripts = recorded(pair, texts_of(lone, requests))
    ours = replay(transcripts, made(), trimming_costs(), lookup=True, draft=False)
    assert ours.rows == theirs
    assert 0 < ours.counts.accepted < ours.counts.verified
    for name in ("verified_in_prompt", "accepted_in_prompt", "verified_in_rows"):
        assert getattr(ours.stats, name) == getattr(engine.stats, name)
    assert ours.stats.verified_in_prompt > 0


def test_a_draft_behind_what_was_looked_up_is_the_engine_s(pair: TinyPair, lone: TinyPair) -> None:
    requests = [r for r in samples(GREEDY) if len(r.prompt_ids) > 1]
    how: Any = {"slots": 1, "least_shared": 1000, "lookup": True}
    engine = Engine(pair, policy=Scheduled(), verification="coupled", **how)
    theirs = without_prompts(engine.generate(requests))
    ours = replay(recorded(pair, texts_of(lone, requests)), Scheduled(), COSTS, lookup=True)
    assert ours.rows == theirs
    stats = ours.stats
    known = stats.accepted_in_prompt + stats.accepted_in_rows
    assert 0 < known < ours.counts.accepted
    assert known == engine.stats.accepted_in_prompt + engine.stats.accepted_in_rows


# ------------------------------------------------------------------------------------ by hand


def knowing(transcript: Transcript, chains: dict[int, tuple[int, int]]) -> Transcript:
    """A transcript with chains: by place how long they are and how many of each stand."""
    n = len(transcript.ranks)
    lengths = np.array([chains.get(at, (0, 0))[0] for at in range(n)])
    stood = np.array([chains.get(at, (0, 0))[1] for at in range(n)])
    evidence = np.tile([8, 3, 4, 0, 0], (lengths.sum(), 1))
    looked_up = LookedUp(lengths, stood, np.arange(lengths.sum()), evidence)
    return replace(transcript, looked_up=looked_up)


class Leading(Recorder):
    """Takes all of each chain, and drafts by its script."""

    looks_up, most = True, 6

    def choose(self, start: RoundStart, chains: Sequence[Chain]) -> list[int]:
        return [len(chain.tokens) for chain in chains]


def test_rounds_by_hand() -> None:
    """All of a chain stands and a draft goes on; one falls, with all behind it; one meets the end.

    Rounds begin at 1, 5, 7 and 8.
    """
    transcript = knowing(
        transcript_of([0, 0, 0, 1, 0, 0, 1, 0, 1, 1]), {1: (2, 2), 5: (3, 1), 8: (4, 2)}
    )
    policy = Leading([3, 2, 0, 0])
    done = replay([transcript], policy, COSTS, lookup=True)
    counts = [(o.drafted[0], o.known[0], o.accepted[0], *o.looked_up) for o in policy.outcomes]
    assert counts == [(5, 2, 3, (2, 2)), (5, 3, 1, (2, 1)), (0, 0, 0, (0, 0)), (4, 4, 2, (2, 2))]
    assert policy.outcomes[3].submitted == [2], "nothing is known of candidates behind the end"
    # The draft has read 10 tokens, the chain and its own candidates that stand; then all but one.
    assert [start.draft_pending[0] for start in policy.starts] == [10, 1, 1, 2]
    assert [o.draft_costs[0][0] for o in policy.outcomes[:2]] == [12, 4]
    assert (done.stats.verified_in_rows, done.stats.accepted_in_rows) == (9, 5)
    assert done.counts == Counts(rounds=4, drafted=14, verified=14, accepted=6, committed=9)


def test_a_draft_behind_a_wrong_candidate_sees_the_branch_of_its_place() -> None:
    plain = transcript_of([0, 0, 1, 0, 0, 0])
    policy = Leading([2, 2, 1, 1, 1])
    replay([knowing(plain, {1: (3, 2), 4: (1, 1)})], policy, COSTS, lookup=True)
    first, second, third = policy.steps[:3]
    # The chain falls at place 3; its last candidate is behind that, and the draft's are further on.
    branch = plain.branches[plain.branch_of[3]][:, 0]
    assert first.signals[0] == pytest.approx(branch[0])
    assert second.signals[0] == pytest.approx(branch[1])
    assert third.signals[0] == pytest.approx(plain.signals[5, 0])


def test_transcripts_that_know_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="looked up"):
        replay(random_transcripts(2), make_policy("suffix"), COSTS, lookup=True)


def test_who_looks_nothing_up_meets_what_it_met(pair: TinyPair) -> None:
    """Transcripts with chains are those without, bit for bit."""
    transcripts = random_transcripts(8)
    knowing_ = [knowing(each, {1: (3, 2), 9: (2, 0)}) for each in transcripts]

    def figures(given: Sequence[Transcript], name: str) -> Replay:
        costs = trimming_costs()
        return replay(given, make_policy(name, costs=trimming_costs()), costs, 3)

    for name in ("goodput", "fixed", "heuristic"):
        plain, ours = figures(transcripts, name), figures(knowing_, name)
        assert plain.rows == ours.rows
        assert np.array_equal(plain.row_seconds, ours.row_seconds)


def test_what_was_looked_up_survives_a_file(tmp_path: Path) -> None:
    before = [knowing(each, {2: (3, 1), 5: (1, 1)}) for each in random_transcripts(3)]
    save_transcripts(tmp_path / "t", before, {})
    for ours, theirs in zip(load_transcripts(tmp_path / "t")[0], before, strict=True):
        assert ours.looked_up is not None and theirs.looked_up is not None
        for name in ("lengths", "stood", "tokens", "evidence"):
            assert np.array_equal(getattr(ours.looked_up, name), getattr(theirs.looked_up, name))
        assert ours.looked_up.chain(5, 9) == theirs.looked_up.chain(5, 9)


def test_a_draft_that_knows_one_choice_cannot_go_on_behind_a_wrong_candidate(
    pair: TinyPair,
) -> None:
    with pytest.raises(ValueError, match="width"):
        next(record(pair, texts_of(pair, samples(GREEDY)[:1]), lookup=SuffixIndex()))


@pytest.mark.statistical
def test_the_text_judges_as_rejection_does(pair: TinyPair) -> None:
    """Of other samples of the same prompts as much is verified, and as much of it stands.

    Two z-tests over rows, as in test_record.py. Rows of an engine that speculates are not as far as
    those of `look_up`, which does not tell.
    """
    prompts = [prompt for prompt in SOME[:6] if len(prompt) > 1 for _ in range(30)]
    recorded_, others = (
        requests_of(prompts, replace(SAMPLED, temperature=0.7, seed=seed)) for seed in (0, 1000)
    )
    done = outputs(Engine(pair, policy=StopPolicy()).generate(recorded_))
    texts = [Text(request, output) for request, output in zip(recorded_, done, strict=True)]
    transcripts = list(record(pair, texts, most=2, width=2, lookup=SuffixIndex(), live=8))
    how: Any = {"lookup": True, "draft": False}
    ours = replay(transcripts, make_policy("suffix", threshold=0.1), COSTS, 8, **how).rows
    engine = Engine(replace(pair, draft=None), policy=make_policy("suffix", threshold=0.1), slots=8)
    theirs = without_prompts(engine.generate(others))
    assert sum(row.verified for row in ours) > 500
    bound = stats.norm.isf(FALSE_ALARM / 4)
    for above, below in (("accepted", "verified"), ("verified", "rounds")):
        (a, da), (b, db) = (ratio_of(side, above, below) for side in (ours, theirs))
        assert abs(a - b) < bound * sqrt(da + db), f"{above} / {below}, {a} and {b}"
