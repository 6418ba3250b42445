from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair
from specdec.loading.sources import PairError
from specdec.model.decoder import PackedDecoder
from specdec.policies.base import Fixed
from specdec.request import Request, SamplingParams
from specdec.training.distill import distill
from specdec.training.evaluate import ALL, Agreements, batches, evaluate
from specdec.training.examples import Example, cut, from_lines, packs, split, to_lines
from specdec.training.scores import output_positions, score
from specdec.training.settings import Moment, Settings, Watch
from specdec.training.student import DistillError, Student
from specdec.training.trainer import distill_loss, rate
from specdec.training.workspace import Workspace
from tests.specdec.loading.saved_models import EOS, saved, set_config
from tests.specdec.tiny_models import VOCAB, noisy_copy, tiny_model

QUICK = Settings(epochs=2, lr=3e-3, held_out=0.2, batch_tokens=200, evaluations=4, top_k=8)
LAYERS = (0, 3)
PADDED = 112
"""Rows for those families whose tokenizers bring a token of their own."""


def target_model(family: str = "llama", **extra: Any) -> Any:
    return tiny_model(family, layers=4, **extra)


def tie(folder: Path) -> None:
    """Make the LM head of a saved model its embedding."""
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    weights["model.embed_tokens.weight"] *= 30  # otherwise its logits are flat
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    set_config(folder, tie_word_embeddings=True)


def load(folder: Path) -> ModelPair:
    return ModelPair.load(str(folder), device="cpu", trainable=True)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("target"), target_model())


@pytest.fixture(scope="module")
def pair(target: Path) -> ModelPair:
    return load(target)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """What the target made of 120 prompts, sampled; prompts and outputs have various lengths."""
    model = target_model()
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(4)
        for length in range(2, 12):
            prompts = torch.randint(VOCAB, (12, length))
            whole = model.generate(prompts, do_sample=True, top_k=0, max_new_tokens=8 + length)
            for i, (prompt, tokens) in enumerate(zip(prompts, whole, strict=True)):
                output = tuple(tokens[length:].tolist())
                name = f"{length}:{i}"
                found.append(Example(name, tuple(prompt.tolist()), output, f"part-{i % 2}"))
    return found


def greedy(pair: ModelPair, k: int = 3) -> tuple[int, ...]:
    """What the pair makes of one prompt; the draft decides nothing."""
    sampling = SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    (done,) = Engine(pair, policy=Fixed(k)).generate([Request("a", (5, 17, 3, 3), sampling)])
    assert done.error is None
    return done.output_ids


def run(
    pair: ModelPair,
    student: Student,
    examples: list[Example],
    folder: Path,
    settings: Settings = QUICK,
    watch: Watch | None = None,
    **options: Any,
) -> dict[str, Any]:
    space = Workspace(folder)
    arguments = {"student": student.name, "epochs": settings.epochs}
    space.check(arguments)
    record = {"arguments": arguments}
    return distill(
        pair, student, examples, settings, space, record=record, watch=watch or Watch(), **options
    )


# ------------------------------------------------------------------------------------- examples


def test_a_prompt_is_on_one_side_whatever_else_there_is(examples: list[Example]) -> None:
    train, held_out = split(examples, 0.3)
    assert sorted(e.id for e in train + held_out) == sorted(e.id for e in examples)
    assert 12 <= len(held_out) <= 60
    again = [replace(e, id="other", output_ids=(1,)) for e in held_out]
    assert split(again, 0.3) == ([], again)
    assert split(reversed(train[:5]), 0.3)[1] == []


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_packs_hold_every_example_once_within_the_budget(
    examples: list[Example], seed: int | None
) -> None:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found = packs(examples, 40, generator)
    assert sorted(i for pack in found for i in pack) == list(range(len(examples)))
    for pack in found:
        assert max(len(examples[i].input_ids) for i in pack) * len(pack) <= 40
    assert len(found) == len(packs(examples, 40))
    assert packs(examples[:3], 1) == [[i] for pack in packs(examples[:3], 1) for i in pack]


def test_output_positions() -> None:
    assert output_positions([(3, 2), (1, 1)]) == [2, 3, 4]
    assert output_positions([(3, 2), (1, 1)], stride=6) == [2, 3, 6]


def test_examples_are_cut_to_what_a_model_can_read() -> None:
    whole = [Example("a", (1, 2, 3), (4, 5, 6)), Example("b", (1,) * 5, (2,))]
    assert cut(whole, 4) == [Example("a", (1, 2, 3), (4, 5))]
    assert cut(whole, 5) == whole


def test_examples_as_lines(examples: list[Example]) -> None:
    assert from_lines(to_lines(examples)) == examples


def test_an_example_has_tokens() -> None:
    with pytest.raises(ValueError, match="example x"):
        Example("x", (1,), ())


# --------------------------------------------------------------------------------------- scores


def plain_probs(example: Example) -> Tensor:
    """What the target's plain forward says at the example's output positions: [n, V]."""
    logits = target_model()(torch.tensor([example.input_ids])).logits[0]
    return torch.softmax(logits[len(example.prompt_ids) - 1 :], -1)


def scored(pair: ModelPair, examples: list[Example], folder: Path, **options: Any) -> Any:
    settings = {"vocab_size": VOCAB, "top_k": 8, "identity": "t", **options}
    return score(pair.target, examples, folder, **settings)


def test_scores_are_the_targets_top_k(
    pair: ModelPair, examples: list[Example], tmp_path: Path
) -> None:
    scores = scored(pair, examples, tmp_path)
    for index in (0, 17, len(examples) - 1):
        ids, probs = scores.of([index])
        expected = plain_probs(examples[index])
        assert torch.allclose(probs, expected.topk(8).values, atol=1e-5)
        assert torch.allclose(expected.gather(1, ids), probs, atol=1e-5)
    ids, probs = scores.of([5, 2])
    assert torch.equal(probs, torch.cat([scores.of([5])[1], scores.of([2])[1]]))


def test_scores_are_computed_once(
    pair: ModelPair,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specdec.training.scores._SHARD_EXAMPLES", 8)
    first = scored(pair, examples, tmp_path).of(range(len(examples)))
    shards = set(tmp_path.iterdir())
    assert len(shards) > 3
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    # One example less changes the shard that it was in, and no other.
    scored(pair, examples[1:], tmp_path, progress=tell)
    assert len(set(tmp_path.iterdir()) - shards) == 1
    assert told == [(told[0][1], told[0][1])]
    (new,) = set(tmp_path.iterdir()) - shards
    new.unlink()

    def refuse(*arguments: object) -> None:
        raise AssertionError("the target was asked again")

    monkeypatch.setattr(PackedDecoder, "forward", refuse)
    again = scored(pair, examples, tmp_path).of(range(len(examples)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ({"top_k": 4}, {"vocab_size": 90}, {"identity": "u"}):
        with pytest.raises(AssertionError, match="asked again"):
            scored(pair, examples, tmp_path, **other)


# ----------------------------------------------------------------------------------------- loss


def test_loss_of_the_documented_example() -> None:
    q = torch.tensor([[0.5, 0.25, 0.2, 0.05]])
    loss = distill_loss(
        q.log(), torch.tensor([1]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]), 0.0
    )
    assert loss.item() == pytest.approx(0.0101, abs=1e-4)
    with_ce = distill_loss(
        q.log(), torch.tensor([1]), torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3]]), 2.0
    )
    assert with_ce.item() - loss.item() == pytest.approx(-2 * torch.tensor(0.25).log().item())


def test_loss_over_a_whole_vocabulary_is_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    p_logits = torch.randn(5, 11, generator=generator)
    q_logits = torch.randn(5, 11, generator=generator, requires_grad=True)
    p = torch.softmax(p_logits, -1)
    top = p.topk(11)
    loss = distill_loss(q_logits, torch.zeros(5).long(), top.indices, top.values, 0.0)
    log_q = torch.log_softmax(q_logits, -1)
    expected = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
    assert torch.allclose(loss, expected, atol=2e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), q_logits)
    assert torch.allclose(gradient, log_q.exp() - p, atol=1e-4)


def test_loss_of_certainty_is_finite() -> None:
    """A target and a draft without a doubt, in agreement and not."""
    logits = torch.tensor([[80.0, 0.0, 0.0], [0.0, 80.0, 0.0]], requires_grad=True)
    ids, probs = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = distill_loss(logits, torch.tensor([0, 0]), ids, probs, 0.1)
    assert loss[0].item() == pytest.approx(0, abs=1e-5)
    assert loss[1].item() == pytest.approx(88, rel=0.01)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()


def test_the_rate_rises_and_falls() -> None:
    rates = [rate(i / 200) for i in range(1, 201)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == 1
    assert rates[-1] == pytest.approx(0.02)


# -------------------------------------------------------------------------------------- student


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_all_layers_of_the_target_are_the_target(
    family: str, examples: list[Example], tmp_path: Path
) -> None:
    pair = load(saved(tmp_path / "target", target_model(family, vocab=PADDED)))
    student = Student.from_layers(pair, [0, 1, 2, -1])
    found = evaluate(pair.target, {"all": student}, batches(pair.target, examples))["all"]
    assert found[ALL].greedy_agreement == 1
    assert found[ALL].mean_overlap == pytest.approx(1, abs=1e-4)
    assert set(found) == {ALL, "part-0", "part-1"}
    assert found["part-0"].tokens + found["part-1"].tokens == found[ALL].tokens


def test_overlap_is_exact(pair: ModelPair, examples: list[Example], tmp_path: Path) -> None:
    model = noisy_copy(target_model(), 0.2)
    student = Student.from_draft(pair, str(saved(tmp_path, model)))
    found = evaluate(pair.target, {"d": student}, batches(pair.target, examples[:9]))["d"][ALL]
    overlaps, agreed = [], []
    for example in examples[:9]:
        p = plain_probs(example)
        logits = model(torch.tensor([example.input_ids])).logits[0]
        q = torch.softmax(logits[len(example.prompt_ids) - 1 :], -1)
        overlaps.append(torch.minimum(p, q).sum(-1))
        agreed.append((p.argmax(-1) == q.argmax(-1)).float())
    assert found.mean_overlap == pytest.approx(torch.cat(overlaps).mean().item(), abs=1e-4)
    assert found.greedy_agreement == pytest.approx(torch.cat(agreed).mean().item())


def test_embedding_and_head_stay_as_they_are(pair: ModelPair) -> None:
    student = Student.from_layers(pair, LAYERS)
    names = set(student.trainable())
    assert names
    assert not [name for name in names if "embed" in name or "lm_head" in name]
    assert student.model.get_input_embeddings() is pair.target.model.get_input_embeddings()


def test_a_model_that_trains_is_not_repacked(pair: ModelPair) -> None:
    assert type(pair.target.model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("layers", [[4], [-5], []])
def test_layers_that_are_not_there(pair: ModelPair, layers: list[int]) -> None:
    with pytest.raises(DistillError, match="the target has 4, 0 to 3"):
        Student.from_layers(pair, layers)


def test_drafts_that_do_not_fit(pair: ModelPair, tmp_path: Path) -> None:
    with pytest.raises(PairError, match="no such folder"):
        Student.from_draft(pair, "/no/such/draft")
    small = saved(tmp_path / "small", tiny_model(vocab=90))
    with pytest.raises(DistillError, match="has 90 tokens, the target's tokenizer 97"):
        Student.from_draft(pair, str(small))


# ------------------------------------------------------------------------------------- training


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
        Watch(moment, tell),
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
            watch=Watch(kill),
            checkpoint_seconds=0,
        )
    stages: list[str] = []
    resumed = run(
        pair,
        Student.from_layers(pair, LAYERS),
        examples,
        tmp_path / "killed",
        watch=Watch(lambda moment: stages.append(moment.stage)),
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


# ------------------------------------------------------------------------------------- refusals


def test_too_few_examples(pair: ModelPair, tmp_path: Path) -> None:
    only = [Example("a", (1, 2), (3, EOS))]
    with pytest.raises(DistillError, match="1 examples"):
        run(pair, Student.from_layers(pair, [0]), only, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else(
    pair: ModelPair, examples: list[Example], target: Path, tmp_path: Path
) -> None:
    with pytest.raises(DistillError, match="holds another model"):
        Workspace(target).check({"epochs": 1})
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DistillError, match="is a file"):
        Workspace(file).check({})


def test_other_arguments_are_refused_with_the_difference(
    examples: list[Example], tmp_path: Path
) -> None:
    space = Workspace(tmp_path)
    space.check({"epochs": 2, "layers": (0, 1)})
    space.begin({"epochs": 2, "layers": (0, 1)}, examples)
    space.check({"epochs": 2, "layers": (0, 1)})
    assert space.examples() == examples
    with pytest.raises(DistillError, match=r"(?s)other arguments.*epochs: 2 there, 3 here$"):
        space.check({"epochs": 3, "layers": (0, 1)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1"),
        ({"lr": float("nan")}, "lr must be more than 0"),
        ({"minutes": 0.0}, "minutes must be more than 0"),
    ],
)
def test_settings_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DistillError, match=message):
        Settings(**values)
