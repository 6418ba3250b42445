"""EAGLE-3 checkpoints on disk: both formats load, and what does not fit is refused in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.loading.eagle_config import EagleConfig
from specdec.loading.pair import load_draft
from specdec.loading.sources import PairError, model_digest
from specdec.loading.vocabulary import check_tokenizers
from specdec.model.eagle import EagleDecoder
from specdec.model.linear import layer_for
from tests.specdec.eagle_drafts import Shape, random_weights, save
from tests.specdec.loading.saved_models import complete, load, saved, set_config
from tests.specdec.tiny_models import tiny_model

SHAPE = Shape()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return saved(tmp_path / "target", tiny_model(layers=3))


def draft_of(folder: Path, shape: Shape = SHAPE, form: Any = "speculators") -> Path:
    return save(folder, shape, random_weights(shape), form)


def set_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("form", ["speculators", "sglang"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_pair_with_one_completes_as_its_target(
    target: Path, tmp_path: Path, form: str, quantization: Any
) -> None:
    draft = draft_of(tmp_path / "d", form=form)
    pair = load(target, draft, quantization=quantization)
    assert isinstance(pair.draft, EagleDecoder) and pair.draft.reads_features
    assert (pair.vocab_size, pair.draft_context_length) == (97, 1024)
    assert complete(pair) == complete(load(target, quantization=quantization))
    described = pair.describe()["draft"]
    assert described == {"name": str(draft), "digest": model_digest(draft)}
    assert json.loads(json.dumps(pair.describe())) == pair.describe()


@pytest.mark.parametrize(
    ("asked", "layer"),
    [(None, layer_for("int8", torch.float32)), ("none", layer_for(None, torch.float32))],
)
def test_its_linear_layers_are_packed_as_asked(
    target: Path, tmp_path: Path, asked: Any, layer: type
) -> None:
    pair = load(target, draft_of(tmp_path / "d"), draft_quantization=asked)
    assert pair.draft is not None
    for name in ("fc", "lm_head"):
        assert type(getattr(pair.draft.model, name)) is layer
    assert type(pair.draft.model.first.qkv) is layer
    assert type(pair.target.model.get_output_embeddings()) is layer_for(None, torch.float32)


def test_it_uses_what_it_lacks_of_the_targets(target: Path, tmp_path: Path) -> None:
    shape = Shape(own_embedding=False, own_head=False, draft_vocab=None)
    pair = load(target, draft_of(tmp_path / "d", shape))
    assert pair.draft is not None
    ours, theirs = pair.target.model, pair.draft.model
    assert theirs.embed_tokens is ours.get_input_embeddings()
    assert theirs.lm_head is ours.get_output_embeddings()
    assert theirs.known is None
    assert complete(pair) == complete(load(target))


@pytest.mark.parametrize("left", ["d2t", "t2d"])
def test_either_map_of_the_vocabulary_is_enough(target: Path, tmp_path: Path, left: str) -> None:
    draft = draft_of(tmp_path / "d")
    known = random_weights(SHAPE)["t2d"].nonzero()[:, 0]
    set_weights(draft, lambda w: w.pop({"d2t": "t2d", "t2d": "d2t"}[left]))
    pair = load(target, draft)
    assert pair.draft is not None and torch.equal(pair.draft.model.known, known)


def test_of_a_vocabulary_that_is_padded_less_than_the_targets_nothing_is_missing(
    tmp_path: Path,
) -> None:
    """As with any draft, tokens that it does not know are not sampled."""
    wide = saved(tmp_path / "wide", tiny_model(layers=3, vocab=97 + 7))
    pair = load(wide, draft_of(tmp_path / "d", Shape(draft_vocab=None)))
    assert pair.vocab_size == 97 and max(complete(pair)) < 97


def test_without_a_list_it_reads_the_layers_of_the_rule() -> None:
    config = {"speculators_model_type": "eagle3", "transformer_layer_config": {
        "vocab_size": 9, "hidden_size": 8}}  # fmt: skip
    found = EagleConfig.of("d", config)
    assert found is not None
    assert found.layers_of(32) == (2, 16, 29) and found.layers_of(7) == (2, 3, 4)
    with pytest.raises(PairError, match="does not say which of the target's 6 layers it reads"):
        found.layers_of(6)


def test_the_two_formats_count_layers_differently() -> None:
    layer = {"vocab_size": 9, "hidden_size": 8, "draft_vocab_size": 5}
    ids = {"eagle_aux_hidden_state_layer_ids": [29, 2, 16]}
    inputs, outputs = (EagleConfig.of("d", layer | each) for each in (ids, {"eagle_config": ids}))
    assert inputs is not None and inputs.layer_ids == (2, 16, 29)
    assert outputs is not None and outputs.layer_ids == (3, 17, 30)
    assert EagleConfig.of("d", {"architectures": ["LlamaForCausalLM"], **layer}) is not None
    assert EagleConfig.of("d", {"vocab_size": 9, "hidden_size": 8}) is None


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda d: set_weights(d, lambda w: w.update({new: w.pop(old)}))


def without(*names: str) -> Callable[[Path], None]:
    return lambda d: set_weights(d, lambda w: [w.pop(name) for name in names] and None)


def inside(**values: object) -> Callable[[Path], None]:
    """Other values in the layer's config."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        set_config(folder, transformer_layer_config=config["transformer_layer_config"] | values)

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_tokens(folder: Path) -> None:
    set_weights(folder, lambda w: w.update(d2t=w["d2t"] + 60))


def cut_embedding(weights: dict[str, torch.Tensor]) -> None:
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][:50].clone()


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another kind": (
        lambda d: set_config(d, speculators_model_type="dflash"),
        "is a speculator of the kind dflash; of these, eagle3 runs",
    ),
    "another layer": (
        inside(model_type="deepseek_v3"),
        "its layers are of deepseek_v3; EAGLE-3 drafts run with layers of llama or qwen3",
    ),
    "no layer": (
        lambda d: set_config(d, transformer_layer_config=None),
        "its config.json has no layer's config of EAGLE-3",
    ),
    "no size": (inside(vocab_size=None), "its config.json is none of EAGLE-3: TypeError"),
    "layers beyond the target's": (
        lambda d: set_config(d, eagle_aux_hidden_state_layer_ids=[0, 1, 3]),
        "reads the target's layers 0, 1, 3, but the target has 3: it was made for another target",
    ),
    "other states": (
        lambda d: set_config(d, target_hidden_size=128),
        "reads hidden states of 128 numbers, but the target's have 64: it was made for another",
    ),
    "fewer tokens": (
        inside(vocab_size=90),
        "knows 90 tokens, but the target has 97: it was made for another target",
    ),
    "tokens beyond the target's": (other_tokens, "its d2t does not name 40 different tokens"),
    "no map": (without("d2t", "t2d"), "proposes some tokens only, and its weights lack d2t"),
    "no head": (without("lm_head.weight"), "its weights lack lm_head"),
    "a weight that is missing": (without("norm.weight"), 'Missing key(s) in state_dict: "norm'),
    "a weight that is left over": (
        rename("norm.weight", "norms.weight"),
        "its weights are not EAGLE-3's: ",
    ),
    "a short embedding": (
        lambda d: set_weights(d, cut_embedding),
        "has embeddings of 50 tokens, but the target has 97: it was made for another target",
    ),
    "another shape": (inside(intermediate_size=96), "size mismatch for layers.0.mlp"),
    "one state": (
        lambda d: set_config(d, eagle_config={"use_aux_hidden_state": False}),
        "reads the target's last hidden state alone, which is EAGLE-1 or 2",
    ),
    "a pickle": (pickled, "pytorch_model.bin, a pickle file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(target: Path, tmp_path: Path, case: str) -> None:
    draft = draft_of(tmp_path / "d")
    change, said = REFUSED[case]
    change(draft)
    with pytest.raises(PairError) as refused:
        load(target, draft)
    text = str(refused.value)
    assert said in text and "\n" not in text and str(draft) in text


def test_a_narrow_draft_cannot_use_the_targets_embedding(target: Path, tmp_path: Path) -> None:
    shape = Shape(hidden=32, own_embedding=False)
    with pytest.raises(PairError, match="has no embed_tokens and cannot use the target's"):
        load(target, draft_of(tmp_path / "d", shape))


def test_sizes_are_compared_before_anything_is_loaded(target: Path, tmp_path: Path) -> None:
    fits = draft_of(tmp_path / "fits", form="sglang")
    check_tokenizers(str(target), str(fits))
    wide = draft_of(tmp_path / "wide", replace(SHAPE, target_hidden=32))
    with pytest.raises(PairError, match="hidden states of 32 numbers, but the target's have 64"):
        check_tokenizers(str(target), str(wide))
    few = draft_of(tmp_path / "few", Shape(vocab=80))
    with pytest.raises(PairError, match="knows 80 tokens, but the target has 97"):
        check_tokenizers(str(target), str(few))


def test_where_a_language_model_is_needed_it_is_refused(target: Path, tmp_path: Path) -> None:
    pair = load(target, trainable=True)
    with pytest.raises(PairError, match="is EAGLE-3; give a draft that is a language model"):
        load_draft(pair, str(draft_of(tmp_path / "d")))


def test_it_says_what_it_is() -> None:
    folder_config = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096}
    found = EagleConfig.of("d", folder_config | {"draft_vocab_size": 32000})
    assert found is not None
    assert found.described() == (
        "EAGLE-3 (EAGLE/SGLang format): llama layer over the target's hidden states, proposes "
        "32,000 of 128,256 tokens"
    )
