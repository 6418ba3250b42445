from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair, check_kv_dtype, chosen_dtype
from specdec.loading.sources import PairError, model_digest
from specdec.model.linear import Int8WeightOnlyLinear, layer_for, packable
from specdec.policies.simple import Fixed
from specdec.request import Request, SamplingParams
from tests.specdec.loading.saved_models import (
    EOS,
    SMOLLM2,
    complete,
    load,
    saved,
    set_config,
    without,
)
from tests.specdec.tiny_models import VOCAB, noisy_copy, tiny_model

ROOT = Path(__file__).parents[3]


def test_a_pair_loads_from_folders_and_completes_as_its_target(target: Path, draft: Path) -> None:
    pair = load(target, draft)
    assert (pair.vocab_size, pair.context_length, pair.draft_context_length) == (VOCAB, 1024, 1024)
    assert pair.eos_token_ids == {EOS}
    model = tiny_model()
    prompt = torch.tensor([[5, 17, 3, 3]])
    expected = model.generate(prompt, do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert complete(pair) == tuple(expected[0, 4:].tolist())


def test_a_target_loads_alone(target: Path, draft: Path) -> None:
    alone = load(target)
    assert alone.draft is None
    assert complete(alone) == complete(load(target, draft))


def test_end_of_sequence_comes_from_the_generation_config_and_the_tokenizer(target: Path) -> None:
    set_config(target, eos_token_id=5)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert load(target).eos_token_ids == {3, 4, EOS}


@pytest.mark.parametrize("ends", [("lm_head.weight",), ("embed_tokens.weight", "lm_head.weight")])
@pytest.mark.parametrize("quantization", [None, "int8", "int8wo"])
def test_a_draft_without_embedding_or_head_uses_the_targets(
    target: Path, draft: Path, ends: tuple[str, ...], quantization: str | None
) -> None:
    expected = complete(load(target, quantization=quantization))
    alike = {"quantization": quantization, "draft_quantization": quantization or "none"}
    pair = load(target, without(draft, *ends), **alike)
    assert pair.draft is not None
    ours, theirs = pair.target.model, pair.draft.model
    assert theirs.get_output_embeddings() is ours.get_output_embeddings()
    assert ("embed_tokens.weight" in ends) == (
        theirs.get_input_embeddings() is ours.get_input_embeddings()
    )
    assert complete(pair) == expected


def test_a_tied_draft_without_embedding_uses_the_targets_head_too(
    target: Path, tmp_path: Path
) -> None:
    """As examples/demo/draft is stored; one copy of the head where both have one precision."""
    model = noisy_copy(tiny_model(), 0.05)
    draft = without(saved(tmp_path / "tied", model), "embed_tokens.weight", "lm_head.weight")
    set_config(draft, tie_word_embeddings=True)
    for quantization in (None, "int8"):
        pair = load(target, draft, quantization=quantization)
        assert pair.draft is not None
        ours, theirs = pair.target.model, pair.draft.model
        assert theirs.get_input_embeddings() is ours.get_input_embeddings()
        same = theirs.get_output_embeddings() is ours.get_output_embeddings()
        assert same == (quantization == "int8")
        assert complete(pair) == complete(load(target, quantization=quantization))


@pytest.mark.parametrize(
    ("asked", "layer"),
    [
        (None, layer_for("int8", torch.float32)),
        ("int8wo", Int8WeightOnlyLinear),
        ("none", layer_for(None, torch.float32)),
    ],
)
def test_a_draft_on_a_cpu_is_int8_unless_asked_otherwise(
    target: Path, draft: Path, asked: str | None, layer: type
) -> None:
    pair = load(target, draft, draft_quantization=asked)
    assert pair.draft is not None
    assert type(pair.draft.model.get_output_embeddings()) is layer
    assert type(pair.target.model.get_output_embeddings()) is layer_for(None, torch.float32)
    assert pair.describe()["draft_quantization"] == (asked or "int8")
    assert complete(pair) == complete(load(target))


@pytest.mark.parametrize(
    ("quantization", "layer"),
    [("int8", layer_for("int8", torch.float32)), ("int8wo", Int8WeightOnlyLinear)],
)
def test_quantization_reaches_both_models(
    target: Path, draft: Path, quantization: str, layer: type
) -> None:
    pair = load(
        target,
        draft,
        quantization=quantization,
        draft_quantization=quantization,
        deterministic=True,
    )
    assert pair.draft is not None
    for decoder in (pair.target, pair.draft):
        assert type(decoder.model.get_output_embeddings()) is layer
    assert pair.target.invariant and not pair.draft.invariant
    assert complete(pair) == complete(load(target, quantization=quantization, deterministic=True))


def test_dtype_is_the_checkpoints_where_that_is_fast(tmp_path: Path) -> None:
    target = saved(tmp_path / "t", tiny_model(seed=3).to(torch.bfloat16))
    fast = packable(torch.bfloat16)
    assert load(target).target.dtype == (torch.bfloat16 if fast else torch.float32)
    assert load(target).describe()["dtype"] == ("bfloat16" if fast else "float32")
    for full in ({"quantization": "int8"}, {"deterministic": True}, {"dtype": "float32"}):
        assert load(target, **full).target.dtype == torch.float32
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    half, full_size = torch.float16, torch.float32
    assert [chosen_dtype(stored, cpu) for stored in (None, full_size, half)] == ["float32"] * 3
    assert chosen_dtype(half, gpu) == "float16"
    assert chosen_dtype(torch.bfloat16, gpu) == "bfloat16"


def test_half_precision_is_passed_on(target: Path, draft: Path) -> None:
    pair = load(target, draft, dtype="bfloat16")
    assert pair.target.dtype == torch.bfloat16
    assert pair.target.new_cache(1, 1).dtype == torch.bfloat16
    assert len(complete(pair)) == 20
    head = pair.target.model.get_output_embeddings()
    assert (type(head) is layer_for(None, torch.bfloat16)) == packable(torch.bfloat16)


def test_keys_and_values_of_both_models_are_as_asked(target: Path, draft: Path) -> None:
    pair = load(target, draft, kv_dtype="int8")
    assert pair.draft is not None and pair.describe()["kv_dtype"] == "int8"
    for decoder in (pair.target, pair.draft):
        cache = decoder.new_cache(1, 1)
        assert (cache.stored, cache.dtype) == (torch.int8, decoder.dtype)
    assert len(complete(pair)) == 20


def test_fp8_is_refused_on_gpus_that_lack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_kv_dtype("int8", gpu)
    with pytest.raises(PairError, match=r"8\.9 .* this one has 8\.0: set models.kv_dtype to int8"):
        check_kv_dtype("fp8", gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_kv_dtype("fp8", gpu)


def test_the_description_pins_what_was_loaded(target: Path, draft: Path) -> None:
    described = load(target, draft, quantization="int8").describe()
    assert json.loads(json.dumps(described)) == described
    assert described["target"] == {"name": str(target), "digest": model_digest(target)}
    assert described["draft"]["digest"] != described["target"]["digest"]
    assert (described["quantization"], described["dtype"]) == ("int8", "float32")


def test_the_demo_pair_loads_and_answers() -> None:
    pair = ModelPair.load(
        SMOLLM2,
        str(ROOT / "examples/demo/eagle"),
        quantization="int8",
        deterministic=True,
        device="cpu",
    )
    chat = [{"role": "user", "content": "Write a python function that adds two numbers."}]
    text = pair.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tuple(pair.tokenizer(text, add_special_tokens=False).input_ids)
    sampling = SamplingParams(temperature=0, max_new_tokens=24)
    (done,) = Engine(pair, policy=Fixed(2)).generate([Request("a", prompt, sampling)])
    (plain,) = Engine(pair, policy=Fixed(0)).generate([Request("a", prompt, sampling)])
    assert "def add" in pair.tokenizer.decode(done.output_ids)
    assert done.output_ids == plain.output_ids
    assert done.counts.rounds < plain.counts.rounds
