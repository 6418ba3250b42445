from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specdec.loading.pair import ModelPair
from specdec.training.evaluate import ALL, Agreements, batches, evaluate
from specdec.training.examples import Example, split
from specdec.training.settings import DistillError, DistillWatch, Moment
from specdec.training.student import Student
from tests.specdec.loading.saved_models import EOS, saved
from tests.specdec.tiny_models import noisy_copy, tiny_model
from tests.specdec.training.drafts import (
    LAYERS,
    PADDED,
    QUICK,
    greedy,
    load,
    run,
    target_model,
    tie,
)


@pytest.fixture(scope="module")
def pair(target: Path) -> ModelPair:
    return load(target)


def test_training_makes_a_better_draft_that_loads_and_is_lossless(
    target: Path, pair: ModelPair, examples: list[Example], tmp_path: Path
) -> None:
    losses: list[float] = []
    evaluated: list[str] = []

    def moment(found: Moment) -> None:
        if found.loss is not None:
            losses.append(found.loss)

    def tell(name: str, agreements: Agreements) -> None:
        evaluated.append(name)

    before = {name: p.clone() for name, p in pair.target.model.named_parameters()}
    settings = replace(QUICK, epochs=12)
    card = run(
        pair,
        Student.from_layers(pair, LAYERS),
        examples,
        tmp_path,
        settings,
        DistillWatch(moment, tell),
        incumbent=Student.from_layers(pair, [0]),
    )
    assert losses[-1] < 0.7 * losses[0]
    start, result = card["held_out"]["start"][ALL], card["held_out"]["result"][ALL]
    assert result["mean_overlap"] > start["mean_overlap"] + 0.1
    assert result["tokens"] == start["tokens"]
    assert card["held_out"]["incumbent"][ALL]["tokens"] == start["tokens"]
    assert card["incumbent"] == "layers 0 of the target"
    assert [round(point["done"] * 4) for point in card["curve"]] == [0, 1, 2, 3, 4]
    assert evaluated == [
        "start",
        "incumbent",
        *(f"sample at {n}%" for n in (0, 25, 50, 75, 100)),
        "result",
    ]
    for name, p in pair.target.model.named_parameters():
        assert torch.equal(p, before[name]), name

    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.json",
    ]
    assert json.loads((tmp_path / "training.json").read_text()) == card
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert not [key for key in keys if "embed" in key or "lm_head" in key]
    drafted = ModelPair.load(str(target), str(tmp_path), device="cpu")
    assert greedy(drafted) == greedy(ModelPair.load(str(target), device="cpu"), k=0)
    again = Student.from_draft(pair, str(tmp_path))
    held_out = split(examples, settings.held_out)[1]
    found = evaluate(pair.target, {"d": again}, batches(pair.target, held_out))["d"][ALL]
    assert found.as_dict() == result


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_after", [1, 7])
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    pair: ModelPair, examples: list[Example], tmp_path: Path, kill_after: int
) -> None:
    whole = run(pair, Student.from_layers(pair, LAYERS), examples, tmp_path / "whole")
    assert whole["steps"] > 10
    steps = 0

    def kill(moment: Moment) -> None:
        nonlocal steps
        steps += moment.stage == "training"
        if steps == kill_after:
            raise Killed

    with pytest.raises(Killed):
        # Each step is checkpointed, so the one that was killed is taken again.
        run(
            pair,
            Student.from_layers(pair, LAYERS),
            examples,
            tmp_path / "killed",
            watch=DistillWatch(kill),
            checkpoint_seconds=0,
        )
    stages: list[str] = []
    resumed = run(
        pair,
        Student.from_layers(pair, LAYERS),
        examples,
        tmp_path / "killed",
        watch=DistillWatch(lambda moment: stages.append(moment.stage)),
    )
    assert set(stages) == {"training"}
    assert len(stages) == whole["steps"] - kill_after + 1
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert resumed["held_out"] == whole["held_out"]
    assert [p["mean_overlap"] for p in resumed["curve"]] == [
        p["mean_overlap"] for p in whole["curve"]
    ]


def test_the_clock_ends_training(pair: ModelPair, examples: list[Example], tmp_path: Path) -> None:
    settings = replace(QUICK, epochs=100_000, minutes=0.005)
    card = run(pair, Student.from_layers(pair, [0]), examples, tmp_path, settings)
    assert 0.3 <= card["training_seconds"] < 3
    assert card["curve"][-1]["done"] == 1


def test_the_result_is_the_best_and_not_the_last(
    pair: ModelPair, examples: list[Example], tmp_path: Path
) -> None:
    """A learning rate that ruins a draft leaves it as it was."""
    good = str(saved(tmp_path / "good", noisy_copy(target_model(), 0.02)))
    student = Student.from_draft(pair, good)
    card = run(pair, student, examples, tmp_path / "out", replace(QUICK, lr=1.0))
    assert card["curve"][-1]["mean_overlap"] < card["curve"][0]["mean_overlap"]
    assert card["held_out"]["result"] == card["held_out"]["start"]


def test_bf16(pair: ModelPair, examples: list[Example], tmp_path: Path) -> None:
    settings = replace(QUICK, bf16=True, epochs=6)
    card = run(pair, Student.from_layers(pair, LAYERS), examples, tmp_path, settings)
    start, result = card["held_out"]["start"][ALL], card["held_out"]["result"][ALL]
    assert result["mean_overlap"] > start["mean_overlap"]
    assert load_file(tmp_path / "model.safetensors").popitem()[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("target_rows", "draft_rows", "tied"), [(128, PADDED, False), (PADDED, 128, True)]
)
def test_a_draft_with_its_own_padded_embedding(
    examples: list[Example], tmp_path: Path, target_rows: int, draft_rows: int, tied: bool
) -> None:
    """As Qwen2.5 has it: vocabularies that differ in padding rows only."""
    target = saved(tmp_path / "t", target_model("qwen2", vocab=target_rows))
    narrow = tiny_model("qwen2", vocab=draft_rows, hidden=32, heads=4, seed=1)
    draft = saved(tmp_path / "d", narrow)
    if tied:
        tie(draft)
    pair = load(target)
    student = Student.from_draft(pair, str(draft))
    card = run(pair, student, examples, tmp_path / "out", replace(QUICK, epochs=8))
    start, result = card["held_out"]["start"][ALL], card["held_out"]["result"][ALL]
    assert result["mean_overlap"] > start["mean_overlap"]
    there, here = (load_file(f / "model.safetensors") for f in (draft, tmp_path / "out"))
    assert there.keys() == here.keys()
    for key in there:
        frozen = "embed_tokens" in key or "lm_head" in key
        assert torch.equal(there[key], here[key]) == frozen, key
    drafted = ModelPair.load(str(target), str(tmp_path / "out"), device="cpu")
    assert drafted.vocab_size == PADDED
    # The target by itself could choose tokens of its padding.
    assert greedy(drafted) == greedy(drafted, k=0)


def test_layers_of_a_tied_target_and_on_from_there(examples: list[Example], tmp_path: Path) -> None:
    target = saved(tmp_path / "t", target_model("qwen3", vocab=PADDED))
    tie(target)
    pair = load(target)
    run(pair, Student.from_layers(pair, LAYERS), examples, tmp_path / "a")
    improved = Student.from_draft(pair, str(tmp_path / "a"))
    assert improved.model.get_output_embeddings() is pair.target.model.get_output_embeddings()
    run(pair, improved, examples, tmp_path / "b")
    kept = load_file(tmp_path / "b" / "model.safetensors")
    assert {key.split(".")[1] for key in kept} == {"layers", "norm"}
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (2, 2)
    drafted = ModelPair.load(str(target), str(tmp_path / "b"), device="cpu")
    assert greedy(drafted) == greedy(ModelPair.load(str(target), device="cpu"), k=0)


def test_too_few_examples(pair: ModelPair, tmp_path: Path) -> None:
    only = [Example("a", (1, 2), (3, EOS))]
    with pytest.raises(DistillError, match="1 examples"):
        run(pair, Student.from_layers(pair, [0]), only, tmp_path)
    assert not list(tmp_path.iterdir())
