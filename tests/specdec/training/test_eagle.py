"""EAGLE-3 drafts in training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specdec.loading.pair import ModelPair
from specdec.training.eagle_lessons import EagleLessons
from specdec.training.eagle_rollout import positions_of, rolled_out
from specdec.training.eagle_student import EagleStudent, vocabulary_of
from specdec.training.evaluate import ALL, Chains, batches, evaluate
from specdec.training.examples import Example
from specdec.training.settings import DistillError, DistillWatch, Moment
from specdec.training.student import Student
from tests.specdec.eagle_drafts import LAYERS, Shape, fused, plain_draft, random_weights, save
from tests.specdec.eagle_drafts import target_states as states_by_hand
from tests.specdec.loading.saved_models import EOS, saved
from tests.specdec.training.drafts import PADDED, QUICK, greedy, load, run, target_model

ROWS = [
    Example("a", (5, 17, 3, 9, 1), (40, 2, 8, 61)),
    Example("b", (7,), (30, 4, 4, 12, 90, 3)),
    Example("c", (1, 2, 3, 4, 5, 6, 7, 8, 9), (10, 11)),
    Example("d", (6,), (6,)),
]
"""One is too short to have anything to predict."""


@pytest.fixture(scope="module")
def pair(target: Path) -> ModelPair:
    return load(target)


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        (Shape(), "speculators"),
        (Shape(draft_vocab=None, own_embedding=False, bias=True), "sglang"),
        (Shape(kind="qwen3", norm_before_residual=True, norm_before_fc=True), "speculators"),
        (Shape(hidden=32), "speculators"),
        (Shape(fc_norm=True, norm_output=True), "speculators"),
    ],
    ids=["plain", "sglang", "qwen3", "narrow", "EAGLE-3.1"],
)
def test_each_step_computes_what_a_chain_would(
    pair: ModelPair, tmp_path: Path, shape: Shape, form: Any
) -> None:
    """Token t at step s: features up to token t - s - 2, the draft's own states from there on."""
    weights = random_weights(shape)
    student = EagleStudent.from_draft(pair, str(save(tmp_path / "d", shape, weights, form)))
    (batch,) = batches(pair.target, ROWS, student.layers)
    rows, steps = batch.examples, 4
    places = positions_of(rows, steps)
    states = torch.cat([batch.inputs[layer] for layer in student.layers], -1)
    found = rolled_out(student.rollout, places, states, steps)
    everywhere = student.predicted(batch)
    model, compared = target_model(), 0
    tokens = [(e, len(e.prompt_ids) + t) for e in rows for t in range(len(e.output_ids))]
    for step in range(steps):
        for place, n in enumerate(places.kept[step].tolist()):
            example, token = tokens[n]
            text = [*example.prompt_ids, *example.output_ids][:token]
            at = token - 2 - step  # the last position with a feature
            x = fused(weights, states_by_hand(model, text)[: at + 1])
            for _ in range(step + 1):
                reads = text[1 : len(x) + 1]
                logits, made = plain_draft(weights, shape, model, reads, x)
                x = torch.cat([x, made[-1:]])
            state = found[step][place]
            assert torch.allclose(state, made[-1], atol=2e-4, rtol=1e-3), (step, n)
            ours, known = student.logits(everywhere[step][n][None])
            theirs = logits[-1] if known is None else logits[-1, known]
            assert torch.allclose(ours[0], theirs, atol=2e-3, rtol=1e-3), (step, n)
            compared += 1
    assert compared > 30


def test_training_makes_a_better_draft_that_loads_and_is_lossless(
    target: Path, pair: ModelPair, examples: list[Example], tmp_path: Path
) -> None:
    settings = replace(QUICK, epochs=12)
    other = Student.from_layers(pair, [0])
    student = EagleStudent.begin(pair, examples, 80)
    card = run(pair, student, examples, tmp_path / "a", settings, incumbent=other)
    start, result = card["held_out"]["start"][ALL], card["held_out"]["result"][ALL]
    for figure in ("greedy_length", "sampled_length"):
        assert result[figure][3] > start[figure][3] + 0.1
        assert result[figure] == sorted(result[figure])
    incumbent = card["held_out"]["incumbent"][ALL]
    assert incumbent["tokens"] == result["tokens"]
    assert result["mean_overlap"] > start["mean_overlap"] + 0.1

    kept = load_file(tmp_path / "a" / "model.safetensors")
    assert len(kept["d2t"]) == 80 and not [name for name in kept if "embed" in name]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3"
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]
    drafted = ModelPair.load(str(target), str(tmp_path / "a"), device="cpu")
    assert greedy(drafted) == greedy(ModelPair.load(str(target), device="cpu"), k=0)

    again = EagleStudent.from_draft(pair, str(tmp_path / "a"))
    (found,) = evaluate(
        pair.target, {"": again}, batches(pair.target, examples, again.layers)
    ).values()
    assert found[ALL].merit > start["sampled_length"][3]
    improved = run(pair, again, examples, tmp_path / "b", replace(QUICK, epochs=1))
    begun = improved["held_out"]["start"][ALL]
    assert begun["mean_overlap"] == pytest.approx(result["mean_overlap"], abs=1e-5)
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_new_draft_begins_as_the_targets_last_layer(
    family: str, examples: list[Example], tmp_path: Path
) -> None:
    """Where that has no biases; its LM head is the target's in any case."""
    model = target_model(family, vocab=PADDED)
    pair = ModelPair.load(str(saved(tmp_path / "t", model)), device="cpu")
    student = EagleStudent.begin(pair, examples, 30)
    own, last = student.trainable(), model.model.layers[-1]
    head = student.rollout.head.weight
    assert torch.allclose(head, model.lm_head.weight[student.known], atol=1e-6)
    same = [
        torch.allclose(own[f"layers.0.{name}.weight"][:, -weight.shape[1] :], weight, atol=1e-6)
        for name, weight in (
            ("self_attn.q_proj", last.self_attn.q_proj.weight),
            ("self_attn.v_proj", last.self_attn.v_proj.weight),
            ("self_attn.o_proj", last.self_attn.o_proj.weight),
            ("mlp.up_proj", last.mlp.up_proj.weight),
            ("mlp.down_proj", last.mlp.down_proj.weight),
        )
    ]
    assert same == [family == "llama"] * 5
    assert torch.equal(own["norm.weight"], model.model.norm.weight) or family == "qwen2"


def test_a_draft_of_all_tokens_has_no_map(
    target: Path, pair: ModelPair, examples: list[Example], tmp_path: Path
) -> None:
    """vLLM refuses a map that it does not need. Catches one that is written all the same."""
    student = EagleStudent.begin(pair, examples, 10_000)
    student.save(tmp_path)
    kept = load_file(tmp_path / "model.safetensors")
    assert len(kept["lm_head.weight"]) == len(student.known) == pair.target.vocab_size
    assert not {"d2t", "t2d"} & kept.keys()
    drafted = ModelPair.load(str(target), str(tmp_path), device="cpu")
    assert greedy(drafted) == greedy(ModelPair.load(str(target), device="cpu"), k=0)


class Killed(Exception):
    pass


def test_a_run_that_was_killed_ends_as_one_that_was_not(
    pair: ModelPair, examples: list[Example], tmp_path: Path
) -> None:
    steps = 0

    def kill(moment: Moment) -> None:
        nonlocal steps
        steps += moment.stage == "training"
        if steps == 5:
            raise Killed

    def go(name: str, watch: DistillWatch | None = None, **options: Any) -> dict[str, Any]:
        student = EagleStudent.begin(pair, examples, 80)
        return run(pair, student, examples, tmp_path / name, watch=watch, **options)

    whole = go("whole")
    with pytest.raises(Killed):
        go("killed", DistillWatch(kill), checkpoint_seconds=0)
    assert go("killed")["held_out"] == whole["held_out"]
    kept = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_lessons_are_the_same_read_alone_together_or_again(pair: ModelPair) -> None:
    known = torch.arange(0, 97, 2)
    lessons, forgetful = (
        EagleLessons(pair.target, ROWS, LAYERS, known, 4, kept_bytes=room) for room in (1 << 20, 0)
    )
    alone = [lessons.of([i]) for i in range(len(ROWS))]
    whole = [each.of([2, 0, 3]) for each in (lessons, forgetful)]
    for name in ("states", "ids", "probs"):
        expected = torch.cat([getattr(alone[i], name) for i in (2, 0, 3)])
        assert torch.equal(getattr(whole[0], name), expected)
        assert torch.allclose(getattr(whole[1], name), expected, atol=1e-4)
    model = target_model()
    text = [*ROWS[0].prompt_ids, *ROWS[0].output_ids]
    assert torch.allclose(alone[0].states, states_by_hand(model, text[:-1]), atol=1e-4)
    p = torch.softmax(model(torch.tensor([text[:-1]])).logits[0, 4:, ::2], -1).topk(4)
    assert torch.equal(alone[0].ids, p.indices)
    assert torch.allclose(alone[0].probs, p.values, atol=1e-4)


def test_what_is_proposed_are_the_most_frequent_tokens() -> None:
    rows = [Example("a", (9,), (5, 5, 3)), Example("b", (9,), (3, 5, 7))]
    assert vocabulary_of(rows, 2, 12) == [3, 5]
    assert vocabulary_of(rows, 5, 12) == [0, 1, 3, 5, 7]
    assert vocabulary_of(rows, 50, 12) == list(range(12))


def test_lengths_of_chains_by_hand() -> None:
    """Right at every first place, at half of the second ones, never at a third one."""
    matches = torch.zeros(8, 4)
    matches[0], matches[1] = 1, torch.tensor([0, 1, 0, 1])
    chains = Chains()
    chains.add(matches)
    # Three of four chains have a second place; two of those hold there, on tokens 1 and 3.
    assert (chains.tried[:3], chains.kept[:3]) == ([4, 3, 1], [4, 2, 0])
    assert chains.acceptance[:3] == [1, pytest.approx(2 / 3), 0]
    assert chains.lengths[:3] == [2, pytest.approx(2 + 2 / 3), pytest.approx(2 + 2 / 3)]


def test_drafts_that_cannot_be_trained(pair: ModelPair, tmp_path: Path) -> None:
    for shape, reason in (
        (Shape(layers=2), "2 layers"),
        (Shape(own_head=False, draft_vocab=None), "no LM head"),
    ):
        folder = save(tmp_path / reason, shape, random_weights(shape), "speculators")
        with pytest.raises(DistillError, match=reason):
            EagleStudent.from_draft(pair, str(folder))
    only = [Example("a", (1, 2), (3, EOS))]
    with pytest.raises(DistillError, match="1 examples"):
        run(pair, EagleStudent.begin(pair, only, 9), only, tmp_path / "out")
