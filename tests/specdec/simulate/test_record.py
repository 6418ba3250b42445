from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt
from typing import Literal

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from specdec.engine.engine import Engine
from specdec.lossless.sampling import SamplingBatch, coupled_choice, probabilities
from specdec.policies.base import TOKEN_SIGNALS, Signal, StopPolicy
from specdec.policies.costs import CostModel
from specdec.policies.registry import make_policy
from specdec.policies.signals import read_signals
from specdec.request import Completion, Counts, Request, SamplingParams
from specdec.simulate.record import measure_costs, record
from specdec.simulate.replay import replay
from specdec.simulate.transcripts import Text, Transcript
from tests.specdec.goodness import FALSE_ALARM
from tests.specdec.tiny_models import TinyPair, make_pair
from tests.specdec.workloads import linear, prompts, random_head

Verification = Literal["rejection", "coupled"]

COSTS = CostModel(linear(1.0, 0.1), linear(3.0, 0.2))
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=30)
SAMPLED = SamplingParams(temperature=1.0, max_new_tokens=24)


def requests_of(n: int, sampling: SamplingParams) -> list[Request]:
    return [
        Request(f"r{i}", prompt, replace(sampling, seed=i))
        for i, prompt in enumerate(prompts([4 + 7 * i % 40 for i in range(n)], seed=9))
    ]


def run(
    pair: TinyPair,
    requests: Sequence[Request],
    policy: StopPolicy,
    verification: Verification,
    slots: int = 64,
) -> list[Completion]:
    return Engine(pair, policy=policy, verification=verification, slots=slots).generate(requests)


def texts_of(
    pair: TinyPair, requests: Sequence[Request], verification: Verification = "rejection"
) -> list[Text]:
    done = run(pair, requests, make_policy("none"), verification)
    return [Text(r, c.output_ids, "g") for r, c in zip(requests, done, strict=True)]


# ------------------------------------------------------------------------- against the models


def signals_after(
    pair: TinyPair, draft: PreTrainedModel, tokens: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw logits [1, V] and hidden state [1, H] of the plain draft behind `tokens`."""
    with torch.no_grad():
        out = draft(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    return out.logits[0, -1:], out.hidden_states[-1][0, -1:]


def test_transcripts_are_what_the_plain_models_say(
    pair: TinyPair, draft_model: PreTrainedModel
) -> None:
    """Greedy: candidates, verdicts, signals and branches, one plain forward at a time."""
    head = random_head(64)
    (text,) = texts_of(pair, [Request("a", prompts([11])[0], replace(GREEDY, max_new_tokens=16))])
    (transcript,) = record(pair, [text], head=head, most=5)
    assert transcript.free_trimming and transcript.limit == 15 and transcript.group == "g"
    prompt = list(text.request.prompt_ids)
    wanted = frozenset(Signal)
    assert not transcript.accepted.all(), "the test needs branches"
    for t, x in enumerate(text.output_ids):
        context = [*prompt, *text.output_ids[:t]]
        logits, hidden = signals_after(pair, draft_model, context)
        y = logits.argmax(-1)
        assert transcript.accepted[t] == (int(y) == x)
        expected = read_signals(logits, y, hidden, wanted, head)[0]
        assert torch.tensor(transcript.signals[t, 0]) == pytest.approx(expected, abs=2e-3)
        if transcript.accepted[t] and t < len(text.output_ids) - 1:
            assert transcript.branch_of[t] == -1
            continue
        branch = transcript.branches[transcript.branch_of[t]]
        for step in range(4):
            context.append(int(y))
            if t + 1 + step >= transcript.limit:
                assert not branch[step].any()
                continue
            logits, hidden = signals_after(pair, draft_model, context)
            y = logits.argmax(-1)
            expected = read_signals(logits, y, hidden, wanted, head)[0]
            assert torch.tensor(branch[step, 0]) == pytest.approx(expected, abs=2e-3)


def test_coupled_candidates_share_the_noise_of_the_row(
    pair: TinyPair, draft_model: PreTrainedModel
) -> None:
    request = Request("a", prompts([8])[0], replace(SAMPLED, temperature=0.7, top_k=20, seed=5))
    (text,) = texts_of(pair, [request], "coupled")
    (transcript,) = record(pair, [text], verification="coupled", most=3)
    assert transcript.free_trimming
    assert not transcript.signals[..., [Signal.HEAD_BEFORE, Signal.HEAD_AFTER]].any()
    params = SamplingBatch.of([request.sampling], torch.device("cpu"))
    for t, x in enumerate(text.output_ids):
        context = [*request.prompt_ids, *text.output_ids[:t]]
        logits, _ = signals_after(pair, draft_model, context)
        y = coupled_choice(probabilities(logits, params), params.seed, torch.tensor([t]))
        assert transcript.accepted[t] == (int(y) == x)


def test_siblings_are_the_draft_s_next_best(pair: TinyPair, draft_model: PreTrainedModel) -> None:
    """Greedy: its likeliest tokens in order, and branches behind its best wrong one."""
    (text,) = texts_of(pair, [Request("a", prompts([11])[0], replace(GREEDY, max_new_tokens=12))])
    (transcript,) = record(pair, [text], most=4, width=3)
    (chain,) = record(pair, [text], most=4)
    assert np.array_equal(transcript.signals[:, :1], chain.signals)
    assert (transcript.branch_of == np.arange(12)).all()
    for t, x in enumerate(text.output_ids):
        context = [*text.request.prompt_ids, *text.output_ids[:t]]
        logits, hidden = signals_after(pair, draft_model, context)
        best = logits[0].topk(3).indices
        assert transcript.ranks[t] == [*best.tolist()[:3], x].index(x)
        for rank, y in enumerate(best):
            expected = read_signals(logits, y[None], hidden, frozenset(TOKEN_SIGNALS))[0]
            assert torch.tensor(transcript.signals[t, rank]) == pytest.approx(expected, abs=2e-3)
        wrong = best[0 if transcript.ranks[t] or t == 11 else 1]
        if t + 1 < transcript.limit:
            logits, hidden = signals_after(pair, draft_model, [*context, int(wrong)])
            expected = read_signals(logits, logits.argmax(-1), hidden, frozenset(TOKEN_SIGNALS))
            behind = transcript.branches[t, 0, 0]
            assert torch.tensor(behind) == pytest.approx(expected[0], abs=2e-3)


def test_a_text_is_cut_where_the_draft_ends(
    target_model: PreTrainedModel, draft_model: PreTrainedModel
) -> None:
    short = make_pair(target_model, draft_model, draft_context=20)
    texts = texts_of(short, [Request("a", prompts([12])[0], GREEDY)])
    texts += texts_of(short, [Request("b", prompts([25])[0], GREEDY)])
    (transcript,) = record(short, texts)
    assert len(transcript.accepted) == 9
    assert transcript.limit == 8


def test_a_pair_without_a_draft_has_no_transcripts(target_model: PreTrainedModel) -> None:
    alone = make_pair(target_model, None)
    with pytest.raises(ValueError, match="draft"):
        next(record(alone, [Text(requests_of(1, GREEDY)[0], (1,))]))


# -------------------------------------------------------------------------------------- costs


def test_the_clock_knows_what_a_prompt_takes(pair: TinyPair) -> None:
    costs = measure_costs(pair, slots=2, prompt=400, seconds=0.4)
    tokens = [n for n, _ in costs.draft.points()]
    assert tokens[0] == 1 and tokens[-1] == 400
    # In proportion, 400 tokens would take 100 times as long as 4.
    assert costs.draft(400) < 50 * costs.draft(4)
    assert costs.verify.points()[-1][0] <= 18


# ------------------------------------------------------------------------- against the engine

Make = Callable[[], StopPolicy]


def totals(rows: Sequence[Counts]) -> Counts:
    total = Counts()
    for row in rows:
        total.add(row)
    return total


@pytest.mark.parametrize("name", ["fixed 1", "fixed 3", "fixed 8", "heuristic", "confidence"])
def test_greedy_rounds_are_the_engine_s(
    target_model: PreTrainedModel, draft_model: PreTrainedModel, name: str
) -> None:
    """Rows end by an end-of-sequence token, by length, and after a one-token prompt."""
    plain = make_pair(target_model, draft_model)
    requests = [*requests_of(10, GREEDY), Request("one", (5,), GREEDY)]
    eos = frozenset({texts_of(plain, requests[:1])[0].output_ids[12]})
    pair = make_pair(target_model, draft_model, eos=eos)
    kind, _, k = name.partition(" ")

    def policy() -> StopPolicy:
        return make_policy(kind, k=int(k or 2), k_max=6)

    texts = texts_of(pair, requests)
    assert len({len(text.output_ids) for text in texts}) > 1
    replayed = replay(list(record(pair, texts)), policy(), COSTS, live=4)
    for request, ours, theirs in zip(
        requests, replayed.rows, run(pair, requests, policy(), "rejection", slots=8), strict=True
    ):
        expected = theirs.counts
        if len(request.prompt_ids) > 1:
            # The first token comes with the prompt, in a round of its own.
            expected = replace(
                expected, rounds=expected.rounds - 1, committed=expected.committed - 1
            )
        assert ours == expected


STATISTICAL: dict[str, Make] = {
    "fixed": lambda: make_policy("fixed", k=3),
    "entropy": lambda: make_policy("entropy", threshold=0.5, k_max=6),
    "confidence": lambda: make_policy("confidence", threshold=0.3, k_max=6),
    "head": lambda: make_policy("head", estimator="confidence", threshold=0.6, k_max=6),
}


@pytest.mark.statistical
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_sampled_rounds_are_the_engine_s_in_law(pair: TinyPair, verification: Verification) -> None:
    """Acceptance rate, candidates a round and block efficiency agree with other texts' real ones.

    Each of 3 figures for 4 policies is compared by a z-test over rows (two samples, delta method);
    FALSE_ALARM bounds the chance that a correct simulator fails, over all 12, in each mode.
    """
    rows = 90
    recorded = requests_of(rows, SAMPLED)
    others = [
        replace(r, sampling=replace(r.sampling, seed=r.sampling.seed + 1000)) for r in recorded
    ]
    transcripts = list(
        record(pair, texts_of(pair, recorded, verification), verification=verification)
    )
    bound = stats.norm.isf(FALSE_ALARM / (2 * 3 * len(STATISTICAL)))
    for name, make in STATISTICAL.items():
        ours = replay(transcripts, make(), COSTS, live=8).rows
        theirs = [
            replace(c.counts, rounds=c.counts.rounds - 1, committed=c.counts.committed - 1)
            for c in run(pair, others, make(), verification)
        ]
        assert totals(ours).drafted > rows
        for above, below in (
            ("accepted", "verified"),
            ("verified", "rounds"),
            ("committed", "rounds"),
        ):
            (a, da), (b, db) = (ratio_of(side, above, below) for side in (ours, theirs))
            assert abs(a - b) < bound * sqrt(da + db), f"{name}: {above} / {below}, {a} and {b}"


def ratio_of(rows: Sequence[Counts], above: str, below: str) -> tuple[float, float]:
    """A ratio of sums over rows, and its variance."""
    x, y = (np.array([getattr(row, name) for row in rows], float) for name in (above, below))
    ratio = x.sum() / y.sum()
    residual = x - ratio * y
    return float(ratio), float((residual**2).sum() / y.sum() ** 2)


@pytest.mark.statistical
def test_rejection_accepts_as_often_as_the_distributions_overlap(
    pair: TinyPair, draft_model: PreTrainedModel
) -> None:
    """At each position P(accepted) = sum min(p, q), with top-k and a temperature."""
    sampling = replace(SAMPLED, temperature=1.3, top_k=30)
    texts = texts_of(pair, requests_of(40, sampling))
    transcripts: list[Transcript] = list(record(pair, texts, most=2))
    params = SamplingBatch.of([sampling], torch.device("cpu"))
    overlap, variance, accepted = 0.0, 0.0, 0
    for text, transcript in zip(texts, transcripts, strict=True):
        prompt = text.request.prompt_ids
        ids = torch.tensor([[*prompt, *text.output_ids[:-1]]])
        with torch.no_grad():
            p, q = (
                probabilities(
                    model(ids, use_cache=False).logits[0, len(prompt) - 1 :],
                    params.rows(torch.zeros(len(text.output_ids), dtype=torch.int64)),
                )
                for model in (pair.plain, draft_model)
            )
        # Averaged over x_t ~ p, a candidate stands with probability sum min(p, q).
        chances = torch.minimum(p, q).sum(-1)
        overlap += float(chances.sum())
        variance += float((chances * (1 - chances)).sum())
        accepted += int(transcript.accepted.sum())
    assert abs(accepted - overlap) < stats.norm.isf(FALSE_ALARM / 2) * sqrt(variance)
