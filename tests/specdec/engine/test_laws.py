"""What holds of every round: what is accepted, committed and counted."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec.engine.engine import Engine
from specdec.request import Counts, Request, SamplingParams
from tests.specdec.tiny_models import VOCAB, TinyPair
from tests.specdec.workloads import (
    Scripted,
    prompts,
)

SCRIPTS = st.lists(st.integers(0, 6), min_size=1, max_size=4)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    budgets=SCRIPTS,
    submissions=SCRIPTS,
    unlikely_stop=st.booleans(),
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=7),
    slots=st.integers(1, 5),
    chunk=st.sampled_from([1, 5, 64]),
    mode=st.sampled_from(["rejection", "coupled"]),
    temperature=st.sampled_from([0.0, 1.0]),
    eos=st.frozensets(st.integers(0, VOCAB - 1), max_size=12),
)
def test_counts_obey_their_laws(
    pair: TinyPair,
    budgets: list[int],
    submissions: list[int],
    unlikely_stop: bool,
    lengths: list[tuple[int, int]],
    slots: int,
    chunk: int,
    mode: str,
    temperature: float,
    eos: frozenset[int],
) -> None:
    engine = Engine(
        replace(pair, eos_token_ids=eos),
        policy=Scripted(budgets, submissions, unlikely_stop),
        verification=mode,  # type: ignore[arg-type]
        slots=slots,
        prefill_chunk=chunk,
    )
    many = prompts([n for n, _ in lengths])
    requests = [
        Request(str(i), prompt, SamplingParams(max_new_tokens=n, temperature=temperature, seed=i))
        for i, (prompt, (_, n)) in enumerate(zip(many, lengths, strict=True))
    ]
    done = engine.generate(requests)
    total = Counts()
    for request, completion in zip(requests, done, strict=True):
        counts, output = completion.counts, completion.output_ids
        total.add(counts)
        assert counts.committed == len(output) <= request.sampling.max_new_tokens
        assert 0 <= counts.accepted <= counts.verified <= counts.drafted
        # Every round adds one bonus token, but for a last one that ends among its candidates.
        assert counts.committed - counts.accepted in (counts.rounds, counts.rounds - 1)
        if completion.finish_reason == "length":
            assert counts.committed - counts.accepted == counts.rounds
            assert len(output) == request.sampling.max_new_tokens
            assert not eos & set(output)
        else:
            assert completion.stop_reason == output[-1]
            assert output[-1] in eos and not eos & set(output[:-1])
    stats = engine.stats
    assert stats.counts == total
    assert stats.outcomes.total() == total.rounds
    assert sum(verified * n for (verified, _), n in stats.outcomes.items()) == total.verified
    # What verification accepted behind a row's end does not stand.
    taken = sum(accepted * n for (_, accepted), n in stats.outcomes.items())
    assert total.accepted <= taken <= total.verified
    assert all(completion.seconds > 0 for completion in done)
    assert stats.rounds == stats.target_forwards <= stats.live_rows
    fed = sum(len(prompt) for prompt in many)
    assert stats.target_tokens == fed + total.verified + total.rounds - len(requests)
    phases = {"profile", "prefill", "draft", "decide", "verify", "sample", "host"}
    assert set(stats.seconds) <= phases
    assert all(seconds >= 0 for seconds in stats.seconds.values())
    assert not engine.has_work and engine.live == engine.waiting == 0
