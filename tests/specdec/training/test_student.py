from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdec.loading.pair import ModelPair
from specdec.loading.sources import PairError
from specdec.training.eagle_student import EagleStudent
from specdec.training.evaluate import ALL, batches, evaluate
from specdec.training.examples import Example
from specdec.training.settings import DistillError
from specdec.training.student import Student
from tests.specdec.loading import quantised_models as stored
from tests.specdec.loading.saved_models import saved
from tests.specdec.loading.test_quantised import Store, store_or_skip
from tests.specdec.tiny_models import noisy_copy, tiny_model
from tests.specdec.training.drafts import (
    LAYERS,
    PADDED,
    load,
    plain_probs,
    target_model,
)


@pytest.fixture(scope="module")
def pair(target: Path) -> ModelPair:
    return load(target)


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


@pytest.mark.parametrize(
    "store",
    [
        stored.bitsandbytes_8bit,
        stored.bitsandbytes_nf4,
        stored.torchao_int8,
        stored.compressed_int8,
    ],
    ids=lambda store: store.__name__,
)
def test_layers_that_stay_quantised_teach_but_are_not_trained(
    store: Store, pair: ModelPair, examples: list[Example], tmp_path: Path
) -> None:
    folder = store_or_skip(store, tmp_path / "target")
    quantised = load(folder)
    wrong = rf"target {folder}: its layers stay quantised by .*; give --kind eagle3, or --draft"
    with pytest.raises(DistillError, match=wrong):
        Student.from_layers(quantised, [0, 1])
    with pytest.raises(DistillError, match=rf"draft {folder}: its layers stay .*; give one that"):
        Student.from_draft(pair, str(folder))
    small = Student.from_draft(quantised, str(saved(tmp_path / "small", tiny_model())))
    eagle = EagleStudent.begin(quantised, examples, 40)
    reads = batches(quantised.target, examples[:5], eagle.layers)
    found = evaluate(quantised.target, {"model": small, "eagle": eagle}, reads)
    assert all(each[ALL].merit >= 1 for each in found.values())
