from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.engine.engine import Engine
from specdec.lossless.sampling import SamplingBatch, probabilities
from specdec.policies.base import Signal, StopPolicy
from specdec.policies.signals import AcceptanceHead
from specdec.request import Request, SamplingParams
from specdec.training.examples import Example
from specdec.training.head import (
    HeadSettings,
    calibrate,
    early_look,
    evaluate_head,
    raw_logits,
    train_head,
    weighted_loss,
)
from specdec.training.labelling import collect
from specdec.training.labels import (
    Labels,
    LabelSettings,
    Part,
    assign_parts,
    continuations,
)
from specdec.training.reliability import fit_platt, reliability, sigmoid, weighted_auc
from tests.specdec.tiny_models import VOCAB, TinyPair, make_pair, noisy_copy, tiny_model

SAMPLED = SamplingParams(max_new_tokens=12, temperature=0.8, top_k=20, top_p=0.95, ignore_eos=True)
GREEDY = SamplingParams(max_new_tokens=12, temperature=0, ignore_eos=True)


def examples(pair: TinyPair, count: int = 6, sampling: SamplingParams = SAMPLED) -> list[Example]:
    """Prompts of different lengths with the target's outputs."""
    generator = torch.Generator().manual_seed(3)
    prompts = {
        f"row-{i}": tuple(torch.randint(VOCAB, (3 + 5 * i,), generator=generator).tolist())
        for i in range(count)
    }
    requests = [Request(name, prompt, sampling) for name, prompt in prompts.items()]
    engine = Engine(pair, policy=StopPolicy(), slots=4)
    found = [Example(c.id, prompts[c.id], c.output_ids) for c in continuations(engine, requests)]
    assert [example.id for example in found] == list(prompts)
    return found


def plain_logits(model: torch.nn.Module, example: Example) -> Tensor:
    """float32 [outputs, V]: what each output position is drawn from."""
    tokens = torch.tensor([example.prompt_ids + example.output_ids])
    with torch.no_grad():
        logits: Tensor = model(tokens).logits[0]
    return logits[len(example.prompt_ids) - 1 : -1]


def labelled(pair: TinyPair, rows: list[Example], settings: LabelSettings, part: Part) -> Labels:
    return Labels.cat(list(collect(pair, [(row, part) for row in rows], settings, batch=4)))


# ------------------------------------------------------------------------------------- labels


def test_an_examples_own_sampling_goes_first(pair: TinyPair) -> None:
    rows = examples(pair, sampling=GREEDY)
    own = [replace(row, sampling=GREEDY) for row in rows[::2]]
    mixed = [own[i // 2] if i % 2 == 0 else row for i, row in enumerate(rows)]
    labels = labelled(pair, mixed, LabelSettings(SAMPLED), Part.HELD_OUT)
    greedy = labelled(pair, rows, LabelSettings(GREEDY), Part.HELD_OUT)
    sampled = labelled(pair, rows, LabelSettings(SAMPLED), Part.HELD_OUT)
    even = labels.row % 2 == 0
    assert torch.equal(labels.accepted[even], greedy.accepted[even])
    assert torch.equal(labels.accepted[~even], sampled.accepted[~even])
    assert not torch.equal(greedy.accepted[even], sampled.accepted[even])


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY])
def test_labels_equal_the_closed_form_along_the_targets_text(
    pair: TinyPair, draft_model: torch.nn.Module, sampling: SamplingParams
) -> None:
    rows = examples(pair, sampling=sampling)
    labels = labelled(pair, rows, LabelSettings(sampling), Part.HELD_OUT)
    assert len(labels) == sum(len(row.output_ids) for row in rows)
    assert labels.rows == len(rows)
    for number, row in enumerate(rows):
        mine = labels.where(labels.row == number)
        assert mine.position.tolist() == list(range(len(row.output_ids)))
        params = SamplingBatch.of([sampling] * len(mine), torch.device("cpu"))
        target, draft = plain_logits(pair.plain, row), plain_logits(draft_model, row)
        p, q = probabilities(target, params), probabilities(draft, params)
        if sampling is GREEDY:
            agree = target.argmax(-1) == draft.argmax(-1)
            assert mine.accepted.tolist() == agree.float().tolist()
            continue
        raw = torch.log_softmax(draft, -1)
        # The candidate is the token whose own probability was read off.
        gap = (raw - mine.signals[:, :1]).abs()
        tokens = gap.argmin(-1)
        assert gap.amin(-1).max() < 1e-3
        expected = (p / q).gather(1, tokens[:, None])[:, 0].clamp(max=1)
        assert torch.allclose(mine.accepted, expected, atol=1e-3)
        assert torch.allclose(mine.signals[:, 1], raw.amax(-1), atol=1e-3)


def test_the_hidden_state_is_the_one_that_the_candidate_is_drawn_from(
    pair: TinyPair, draft_model: torch.nn.Module
) -> None:
    (row,) = examples(pair, 1)
    labels = labelled(pair, [row], LabelSettings(SAMPLED), Part.TUNE)
    with torch.no_grad():
        logits = draft_model.lm_head(labels.hidden.float())  # type: ignore[operator]
    assert (logits - plain_logits(draft_model, row)).abs().max() < 0.1


def test_a_draft_that_is_the_target_has_labels_of_one(self_pair: TinyPair) -> None:
    rows = examples(self_pair, 3)
    labels = labelled(self_pair, rows, LabelSettings(SAMPLED), Part.TRAIN)
    assert torch.allclose(labels.accepted, torch.ones(len(labels)), atol=1e-3)


def test_coupled_labels_say_whether_the_models_choose_alike(
    pair: TinyPair, self_pair: TinyPair
) -> None:
    settings = LabelSettings(SAMPLED, "coupled")
    labels = labelled(pair, examples(pair), settings, Part.TRAIN)
    assert set(labels.accepted.unique().tolist()) == {0.0, 1.0}
    alike = labelled(self_pair, examples(self_pair), settings, Part.TRAIN)
    assert alike.accepted.mean() > 0.98


def test_mixing_puts_draft_tokens_into_training_text_only(
    pair: TinyPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[list[tuple[int, ...]]] = []
    from specdec.training import labelling as module

    real = module.target_states

    def watched(decoder: object, rows: list[Example]) -> Iterator[tuple[list[int], Tensor]]:
        if decoder is pair.target:
            read.append([row.output_ids for row in rows])
        return real(decoder, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "target_states", watched)
    rows = examples(pair, 12)
    settings = LabelSettings(SAMPLED, mixing=0.5)
    for part in (Part.TRAIN, Part.HELD_OUT):
        labelled(pair, rows, settings, part)
    mixed = [output for outputs in read[:3] for output in outputs]
    unmixed = [output for outputs in read[3:] for output in outputs]
    assert unmixed == [row.output_ids for row in rows]
    pairs = zip((row.output_ids for row in rows), mixed, strict=True)
    changed = [a != b for y, z in pairs for a, b in zip(y, z, strict=True)]
    # Half of 144 are replaced, many of these by the same token.
    assert 0.1 < np.mean(changed) < 0.6


def test_labels_repeat_with_the_seed(pair: TinyPair) -> None:
    rows = examples(pair, 3)

    def signals(seed: int) -> Tensor:
        sampling = SamplingParams(temperature=0.8, seed=seed)
        return labelled(pair, rows, LabelSettings(sampling), Part.TRAIN).signals

    assert torch.equal(signals(1), signals(1))
    assert not torch.equal(signals(1), signals(2))


def test_text_is_cut_to_the_shorter_context_and_vocabularies_may_be_padded() -> None:
    target = tiny_model(context=64)
    padded = tiny_model(vocab=VOCAB + 31, seed=4, layers=1)
    pair = make_pair(target, padded, draft_context=16)
    rows = [Example("fits", (1, 2, 3), tuple(range(20))), Example("long", (5,) * 30, (1, 2))]
    labels = labelled(pair, rows, LabelSettings(SAMPLED), Part.TRAIN)
    assert labels.position.tolist() == list(range(14))


# ---------------------------------------------------------------------------------- the split


def test_parts_are_split_by_prompt_whatever_the_order() -> None:
    prompts = [(i % 50, 7) for i in range(150)]
    parts = assign_parts(prompts)
    assert len({(prompt, part) for prompt, part in zip(prompts, parts, strict=True)}) == 50
    order = np.random.default_rng(0).permutation(150)
    again = assign_parts([prompts[i] for i in order])
    assert again == [parts[i] for i in order]
    counts = [sum(part is each for part in parts) / 3 for each in (Part.HELD_OUT, Part.TUNE)]
    assert counts == [8, 8]


def test_three_prompts_are_the_least() -> None:
    assert set(assign_parts([(1,), (2,), (3,)])) == {Part.TRAIN, Part.TUNE, Part.HELD_OUT}
    with pytest.raises(ValueError, match="2 different prompts"):
        assign_parts([(1,), (2,), (1,)])


def test_no_row_has_positions_in_two_parts(pair: TinyPair) -> None:
    rows = examples(pair)
    parts = assign_parts([row.prompt_ids for row in rows])
    labels = Labels.cat(
        list(collect(pair, zip(rows, parts, strict=True), LabelSettings(SAMPLED), batch=2))
    )
    for number, part in enumerate(parts):
        assert labels.part[labels.row == number].unique().tolist() == [int(part)]


# ----------------------------------------------------------------------------------- training


def synthetic(
    n: int = 12000, width: int = 8, seed: int = 0, parts: tuple[Part, ...] = tuple(Part)[:3]
) -> Labels:
    """States whose acceptance is known: sigmoid(a - e) with a = 2 x_0 and an exponential e.

    Before the draw that is 1 - ln(1 + exp a) / exp a, the integral over u = exp -e in (0, 1).
    """
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width))
    log_q = -rng.exponential(size=n)
    truth = sigmoid(2 * x[:, 0] + log_q)
    before = 1 - np.log1p(np.exp(2 * x[:, 0])) / np.exp(2 * x[:, 0])
    signals = np.stack([log_q, rng.normal(size=n), rng.normal(size=n)], -1)
    row = np.arange(n) // 40
    return Labels(
        hidden=torch.tensor(x).half(),
        signals=torch.tensor(signals).float(),
        accepted=torch.tensor(truth).float(),
        knowable=torch.tensor(np.stack([before, truth], -1)).float(),
        position=torch.arange(n).int() % 40,
        row=torch.tensor(row).int(),
        part=torch.tensor([int(parts[r % len(parts)]) for r in row], dtype=torch.int8),
    )


@pytest.fixture(scope="module")
def task() -> tuple[Labels, AcceptanceHead]:
    labels = synthetic()
    return labels, train_head(labels, HeadSettings(depth=1, epochs=10, learning_rate=5e-3))


def test_debiasing_is_what_makes_a_weighted_head_calibrated(
    task: tuple[Labels, AcceptanceHead],
) -> None:
    labels, head = task
    metrics = evaluate_head(head, head, labels)["held_out"]
    for output in ("before", "after"):
        measured = {name: each[output] for name, each in metrics["estimators"].items()}
        assert measured["de-biased"]["ece"] <= 0.05
        assert measured["as trained"]["ece"] > 0.15
        assert measured["de-biased"]["auc"] == pytest.approx(measured["as trained"]["auc"])
    after = metrics["estimators"]["de-biased"]["after"]
    before = metrics["estimators"]["de-biased"]["before"]
    assert after["log_loss"] < before["log_loss"]
    # Hidden states say what the free estimators cannot know.
    assert after["auc"] > metrics["estimators"]["confidence"]["after"]["auc"] + 0.1
    for output in ("before", "after"):  # nobody knows more than both models' distributions
        most = metrics["ceiling"][output]
        for measured in metrics["estimators"].values():
            assert measured[output]["auc"] <= most["auc"]
            assert measured[output]["log_loss"] >= most["log_loss"]
    assert metrics["ceiling"]["after"]["ece"] == pytest.approx(0)
    assert metrics["ceiling"]["after"]["auc"] > metrics["ceiling"]["before"]["auc"]
    assert metrics["rows"] == 100
    assert metrics["by_first_position"]["32"]["positions"] == 8 * 100


def test_the_best_weighted_answer_is_the_biased_one() -> None:
    """P / (P + w (1 - P)) minimises the loss: for P = 0.6, w = 6 that is 0.2, logit ln 0.25."""
    logits = torch.linspace(-3, 1, 4001)[:, None]
    losses = torch.stack([weighted_loss(x[None], torch.tensor([0.6]), 6.0) for x in logits])
    best = float(logits[losses.argmin()])
    assert best == pytest.approx(np.log(0.25), abs=2e-3)
    assert best + np.log(6) == pytest.approx(np.log(0.6 / 0.4), abs=2e-3)


def test_calibration_is_fitted_on_tuning_rows_and_folded_into_the_head(
    task: tuple[Labels, AcceptanceHead],
) -> None:
    labels, head = task
    distorted = AcceptanceHead(head.width, head.depth, head.reject_weight)
    distorted.load_state_dict(head.state_dict())
    for layer in (distorted.before, distorted.after):
        layer.weight.data *= 3
        layer.bias.data += 1
    distorted.requires_grad_(False)
    kept = {name: tensor.clone() for name, tensor in distorted.state_dict().items()}
    saved, found = calibrate(distorted, labels)
    assert all(torch.equal(kept[name], tensor) for name, tensor in distorted.state_dict().items())
    metrics = evaluate_head(distorted, saved, labels)["held_out"]["estimators"]
    bias = np.log(head.reject_weight)
    for i, output in enumerate(("before", "after")):
        assert metrics["de-biased"][output]["ece"] > 0.05
        assert metrics["head"][output]["ece"] <= 0.05
        assert found[output]["applied"]
        plain, folded = (raw_logits(each, labels)[:, i].double() for each in (distorted, saved))
        expected = found[output]["scale"] * (plain + bias) + found[output]["shift"]
        assert torch.allclose(folded + bias, expected, atol=1e-4)


def test_what_fits_a_few_rows_by_chance_is_not_applied(
    task: tuple[Labels, AcceptanceHead],
) -> None:
    """Two tuning rows that disagree: what mends one makes the other worse."""
    labels, head = task
    tune = labels.of(Part.TUNE)
    two = tune.where(tune.row < tune.row.unique()[2])
    two.accepted[:40], two.accepted[40:] = 0.95, 0.05
    saved, found = calibrate(head, two)
    assert not found["after"]["applied"]
    assert torch.equal(saved.after.weight, head.after.weight)


def test_another_kind_of_text_is_measured_and_not_trained_on() -> None:
    known = synthetic(4000)
    settings = HeadSettings(depth=1, epochs=2)
    head = train_head(known, settings)
    other = synthetic(400, seed=9, parts=(Part.OTHER,))
    both = Labels.cat([known, other])
    again = train_head(both, settings)
    pairs = zip(head.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    report = evaluate_head(head, head, both)
    assert report["other"]["positions"] == 400
    assert report["other"]["estimators"]["head"]["after"]["auc"] > 0.5


def test_a_first_look_needs_few_rows(pair: TinyPair) -> None:
    labels = labelled(pair, examples(pair), LabelSettings(SAMPLED), Part.TRAIN)
    look = early_look(labels)
    assert look["positions"] == len(labels)
    assert list(look["by_first_position"]) == ["0", "8"]
    assert set(look["auc"]) == {"confidence", "entropy"}
    assert all(auc <= look["ceiling"] <= 1 for auc in look["auc"].values())
    assert early_look(labels.where(labels.row == 0))["auc"] == {"confidence": None, "entropy": None}


# ------------------------------------------------------------------------------------ figures


def test_platt_finds_the_scale_and_shift_that_made_the_labels() -> None:
    x = np.random.default_rng(0).normal(size=5000) * 2
    scale, shift = fit_platt(x, sigmoid(0.5 * x - 0.7))
    assert scale == pytest.approx(0.5, abs=0.01)
    assert shift == pytest.approx(-0.7, abs=0.01)


def test_auc_by_hand() -> None:
    """0.9 and 0.4 accepted, 0.4 and 0.1 rejected: of four pairs three are won and one is tied."""
    predicted, accepted = np.array([0.9, 0.4, 0.4, 0.1]), np.array([1.0, 1, 0, 0])
    assert weighted_auc(predicted, accepted) == 3.5 / 4
    # Half accepted, half rejected: each of the two is both.
    assert weighted_auc(np.array([0.7, 0.2]), np.array([0.5, 0.5])) == 0.5
    assert weighted_auc(predicted, np.ones(4)) is None


def test_score_of_perfect_probabilities() -> None:
    truth = np.random.default_rng(0).random(1000)
    found = reliability(truth, truth)
    assert found["ece"] == pytest.approx(0)
    entropy = -(truth * np.log(truth) + (1 - truth) * np.log(1 - truth)).mean()
    assert found["log_loss"] == pytest.approx(entropy)
    assert np.array(found["bins"]).shape == (10, 3)


def test_signals_are_in_the_order_that_the_head_reads() -> None:
    from specdec.policies.base import TOKEN_SIGNALS

    assert TOKEN_SIGNALS == (Signal.LOG_Q, Signal.LOG_TOP, Signal.ENTROPY)


def test_a_noisier_draft_has_lower_labels(pair: TinyPair) -> None:
    worse = make_pair(pair.plain, noisy_copy(pair.plain, 0.5))
    rows = examples(pair)
    settings = LabelSettings(SAMPLED)
    good, bad = (labelled(each, rows, settings, Part.TUNE) for each in (pair, worse))
    assert good.accepted.mean() > bad.accepted.mean() + 0.2
