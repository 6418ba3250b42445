"""A poor head is not adopted and a better one is: with real heads of a tiny pair."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from jobs.nightly.compare import Side, compare, verdict
from pipeline.config.job import JobConfig
from specdec.engine.engine import Engine
from specdec.measure.speedup import Speedup
from specdec.policies.costs import CostModel, CostTable
from specdec.policies.registry import make_policy
from specdec.policies.signals import AcceptanceHead
from specdec.request import Request, SamplingParams
from specdec.simulate.replay import Ratio
from specdec.simulate.transcripts import Text
from specdec.training.examples import Example
from specdec.training.head import HeadSettings, calibrate, train_head
from specdec.training.labelling import collect
from specdec.training.labels import Labels, LabelSettings, assign_parts
from tests.specdec.eagle_drafts import Shape, eagle_pair, random_weights, save
from tests.specdec.tiny_models import VOCAB, TinyPair, make_pair, noisy_copy, tiny_model

SAMPLING = SamplingParams(max_new_tokens=40, temperature=0.7, ignore_eos=True)
JOB = JobConfig.model_validate(
    {
        "input": {"paths": "-", "messages_column": "messages"},
        "output": "-",
        "models": {"target": "-", "draft": "-"},
        "speculation": {"policy": "head", "head": "-", "k_min": 1, "k_max": 8},
        "actors": {"slots": 4},
    }
)


@pytest.fixture(scope="module")
def pair() -> TinyPair:
    torch.set_num_threads(1)
    target = tiny_model("llama")
    return make_pair(target, noisy_copy(target, 0.06))


@pytest.fixture(scope="module")
def texts(pair: TinyPair) -> list[Text]:
    chance = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(VOCAB, (9,), generator=chance).tolist()) for _ in range(64)]
    requests = [Request(f"row-{i}", prompt, SAMPLING) for i, prompt in enumerate(prompts)]
    engine = Engine(pair, policy=make_policy("none"), slots=16)
    done = {each.id: each for each in engine.generate(requests)}
    return [Text(request, done[request.id].output_ids) for request in requests]


@pytest.fixture(scope="module")
def heads(pair: TinyPair, texts: list[Text]) -> dict[str, AcceptanceHead]:
    """A trained head, and one that expects every candidate to be rejected, and so stops at once."""
    learn = [Example(t.request.id, t.request.prompt_ids, t.output_ids) for t in texts[:40]]
    parts = assign_parts([example.prompt_ids for example in learn])
    settings = LabelSettings(SAMPLING, mixing=0.0)
    labels = Labels.cat(list(collect(pair, zip(learn, parts, strict=True), settings)))
    good, _ = calibrate(train_head(labels, HeadSettings(depth=1, epochs=8)), labels)
    poor = copy.deepcopy(good)
    for layer in (poor.before, poor.after):
        layer.weight.data.zero_()
        layer.bias.data.fill_(-20)
    return {"good": good.eval(), "poor": poor.eval()}


@pytest.fixture(scope="module")
def costs() -> tuple[CostModel, CostModel]:
    """A GPU's kind of curves: a draft step is a twentieth of a verification of any length."""

    def made() -> CostModel:
        return CostModel(CostTable([1, 64], [0.05, 0.05]), CostTable([1, 64], [1.0, 1.0]))

    return made(), made()


def test_a_poor_head_is_not_adopted_and_a_better_one_is(
    pair: TinyPair,
    texts: list[Text],
    heads: dict[str, AcceptanceHead],
    costs: tuple[CostModel, CostModel],
) -> None:
    good, poor = (Side(name, pair, heads[name]) for name in ("good", "poor"))
    options = {"control_share": 0.0, "costs": costs}
    better = compare(poor, good, texts[40:], JOB, **options)  # type: ignore[arg-type]
    assert better.adopted
    assert better.simulated.low > 1
    assert "the lower bound is above 1" in better.why
    worse = compare(good, poor, texts[40:], JOB, **options)  # type: ignore[arg-type]
    assert not worse.adopted
    assert worse.simulated.high < 1
    assert "not above 1" in worse.why
    same = compare(good, good, texts[40:], JOB, **options)  # type: ignore[arg-type]
    assert not same.adopted
    assert same.simulated == Ratio(1.0, 1.0, 1.0)


def test_control_rounds_measure_both_sides(
    pair: TinyPair, texts: list[Text], heads: dict[str, AcceptanceHead]
) -> None:
    good, poor = (Side(name, pair, heads[name]) for name in ("good", "poor"))
    found = compare(poor, good, texts[40:], JOB, control_share=0.3)
    assert all(found.speedups)
    assert found.measured is not None
    assert found.measured.low < found.measured.value < found.measured.high
    assert "By control rounds" in found.why
    assert found.to_json()["measured"]["value"] == found.measured.value


def test_drafts_of_either_kind_are_compared(
    costs: tuple[CostModel, CostModel], tmp_path: Path
) -> None:
    """An EAGLE-3 draft that knows nothing, and a language model that knows the target."""
    target, shape = tiny_model("llama", layers=3), Shape()
    folder = save(tmp_path / "eagle", shape, random_weights(shape), "speculators")
    eagle = Side("eagle", eagle_pair(target, folder), None)
    model = Side("model", make_pair(target, noisy_copy(target, 0.06)), None)
    requests = [Request(f"row-{i}", (5, 17, i), SAMPLING) for i in range(24)]
    done = Engine(eagle.pair, policy=make_policy("none")).generate(requests)
    texts = [Text(r, each.output_ids) for r, each in zip(requests, done, strict=True)]
    fixed = JOB.speculation.model_copy(update={"policy": "fixed", "k": 3, "head": None})
    job = JOB.model_copy(update={"speculation": fixed})
    options = {"control_share": 0.0, "costs": costs}
    found = compare(eagle, model, texts, job, **options)  # type: ignore[arg-type]
    assert found.adopted and found.simulated.low > 1
    before, after = found.lengths
    assert 1 <= before < 1.3 < after <= 5
    assert found.why.startswith(f"A round of 4 candidates brings {after:.2f} tokens, with the inc")
    back = compare(model, eagle, texts, job, **options)  # type: ignore[arg-type]
    assert not back.adopted and back.lengths == (after, before)


@pytest.mark.parametrize(
    ("low", "measured_high", "adopted"),
    [(1.01, 1.2, True), (1.01, 0.99, False), (0.99, 1.2, False), (1.01, None, True)],
)
def test_the_lower_bound_decides_and_control_rounds_may_object(
    low: float, measured_high: float | None, adopted: bool
) -> None:
    measured = Ratio(0.9, 0.8, measured_high) if measured_high else None
    speedups = (Speedup(1.2, 1.1, 1.3, 9), Speedup(1.1, 1.0, 1.2, 9))
    decided, why = verdict(Ratio(1.1, low, 1.2), measured, speedups, 30, 4, 0.0)
    assert decided is adopted
    assert "30 held-out rows" in why
    assert not verdict(Ratio(1.1, 1.01, 1.2), None, (None, None), 30, 4, 0.05)[0]
