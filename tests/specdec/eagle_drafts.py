"""Tiny EAGLE-3 drafts on disk, in both formats, and a plain implementation to compare with."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from specdec.loading.eagle import eagle_config, load_eagle
from specdec.loading.sources import find_model
from specdec.model.eagle import EagleDecoder
from tests.specdec.tiny_models import VOCAB, TinyPair, make_pair, tiny_model

LAYERS = (0, 1, 2)
"""The layers of a tiny target of three whose inputs drafts read."""

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What a draft is; by default as large as a tiny target."""

    hidden: int = 64
    target_hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    kind: str = "llama"
    layers: int = 1
    vocab: int = VOCAB
    draft_vocab: int | None = 40
    own_embedding: bool = True
    own_head: bool = True
    tied: bool = False
    bias: bool = False
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


FITTED = Shape(hidden=128, target_hidden=64, bias=True, draft_vocab=60)
"""A draft whose LM head may be fitted to a target: some of its candidates then stand."""


def foreseeable_target(family: str = "llama", **options: Any) -> PreTrainedModel:
    """A tiny target whose next token depends on the last one most of all; `tiny_model`'s options.

    So a draft can be fitted to it.
    """
    model = tiny_model(family, layers=3, **options)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.3)
    return model


def random_weights(shape: Shape, seed: int = 0) -> Weights:
    """By the names of the `speculators` format."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(width: int) -> Tensor:
        return 1 + 0.1 * torch.randn(width, generator=generator)

    h, fused = shape.hidden, len(LAYERS) * shape.target_hidden
    weights = {"fc.weight": matrix(h, fused), "norm.weight": norm(h)}
    if shape.norm_before_fc:
        weights["input_norm.weight"] = norm(fused)
    if shape.fc_norm:
        weights |= {f"fc_norm.{i}.weight": norm(shape.target_hidden) for i in range(len(LAYERS))}
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for i in range(shape.layers):
        own, read = f"layers.{i}.", h if i else 2 * h
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            weights[f"{own}self_attn.{name}_proj.weight"] = matrix(rows, read)
            if shape.bias:
                weights[f"{own}self_attn.{name}_proj.bias"] = matrix(1, rows)[0]
        weights[f"{own}self_attn.o_proj.weight"] = matrix(h, queries)
        if shape.bias:
            weights[f"{own}self_attn.o_proj.bias"] = torch.zeros(h)
        if shape.kind == "qwen3":
            weights[f"{own}self_attn.q_norm.weight"] = norm(shape.head_dim)
            weights[f"{own}self_attn.k_norm.weight"] = norm(shape.head_dim)
        weights[f"{own}mlp.gate_proj.weight"] = matrix(2 * h, h)
        weights[f"{own}mlp.up_proj.weight"] = matrix(2 * h, h)
        weights[f"{own}mlp.down_proj.weight"] = matrix(h, 2 * h)
        weights[f"{own}input_layernorm.weight"] = norm(h)
        weights[f"{own}post_attention_layernorm.weight"] = norm(h)
    weights["layers.0.hidden_norm.weight"] = norm(h)
    if shape.own_embedding:
        weights["embed_tokens.weight"] = torch.randn(shape.vocab, h, generator=generator)
    if shape.own_head:
        weights["lm_head.weight"] = 4 * matrix(shape.draft_vocab or shape.vocab, h)
    if shape.draft_vocab is not None:
        chosen = torch.randperm(shape.vocab, generator=generator)[: shape.draft_vocab]
        known = chosen.sort().values
        weights["d2t"] = known - torch.arange(shape.draft_vocab)
        weights["t2d"] = torch.zeros(shape.vocab, dtype=torch.bool)
        weights["t2d"][known] = True
    return weights


def layer_config(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": shape.kind,
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 64,  # of training; rows may be longer
        "attention_bias": shape.bias,
        "vocab_size": shape.vocab,
    }


def save(
    folder: Path, shape: Shape, weights: Weights, form: Literal["speculators", "sglang"]
) -> Path:
    """A checkpoint as `speculators` writes one, or as EAGLE-3's own and SGLang's are."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {"tie_word_embeddings": shape.tied}
    config["draft_vocab_size"] = shape.draft_vocab or shape.vocab
    if shape.target_hidden != shape.hidden:
        config["target_hidden_size"] = shape.target_hidden
    if form == "speculators":
        config |= {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "transformer_layer_config": layer_config(shape),
            "norm_before_residual": shape.norm_before_residual,
            "norm_before_fc": shape.norm_before_fc,
            "fc_norm": shape.fc_norm,
            "norm_output": shape.norm_output,
            "eagle_aux_hidden_state_layer_ids": [*LAYERS],
        }
    else:
        assert not (shape.norm_before_residual or shape.fc_norm or shape.norm_output)
        config |= layer_config(shape) | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in LAYERS],
                "norm_before_fc": shape.norm_before_fc,
            },
        }
        names = {name: name.replace("layers.0.", "midlayer.", 1) for name in weights}
        weights = {names[name]: weight for name, weight in weights.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: weight.contiguous() for name, weight in weights.items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


def load(folder: Path, pair: TinyPair, **options: Any) -> EagleDecoder:
    """The draft of a folder for a pair's target."""
    source = find_model(str(folder))
    config = eagle_config(source)
    assert config is not None
    options = {"pack": False, "quantization": None} | options
    return load_eagle("float32", source, config, pair.target, pair.vocab_size, **options)


def eagle_pair(target: PreTrainedModel, folder: Path, **options: Any) -> TinyPair:
    """A target with the EAGLE-3 draft of a folder; options as of `make_pair`."""
    pair = make_pair(target, None, **options)
    return replace(pair, draft=load(folder, pair))


# ------------------------------------------------------------------------- by hand


@torch.inference_mode()
def target_states(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """[n, 3 * hidden]: what goes into the target's layers, by transformers' own forward."""
    out = model(torch.tensor([tokens]), output_hidden_states=True)
    return torch.cat([out.hidden_states[layer][0] for layer in LAYERS], -1)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def _turned(x: Tensor, head_dim: int) -> Tensor:
    """Rotary embedding of [T, H, D], the first token at position 0, in complex numbers."""
    rates = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    turns = torch.polar(torch.ones(1), torch.arange(len(x))[:, None] * rates)[:, None]
    low, high = x.chunk(2, -1)
    turned = torch.complex(low, high) * turns
    return torch.cat([turned.real, turned.imag], -1)


def _attention(w: Weights, own: str, x: Tensor, shape: Shape) -> Tensor:
    heads = {}
    for name in "qkv":
        y = x @ w[f"{own}{name}_proj.weight"].T + w.get(f"{own}{name}_proj.bias", torch.zeros(1))
        heads[name] = y.view(len(x), -1, shape.head_dim)
    if shape.kind == "qwen3":
        heads["q"] = _norm(heads["q"], w[own + "q_norm.weight"])
        heads["k"] = _norm(heads["k"], w[own + "k_norm.weight"])
    q, k = (_turned(heads[name], shape.head_dim) for name in "qk")
    outs = []
    for t in range(len(x)):  # one token and one head after the other
        for h in range(shape.heads):
            group = h * shape.kv_heads // shape.heads
            weights = torch.softmax(k[: t + 1, group] @ q[t, h] * shape.head_dim**-0.5, 0)
            outs.append(weights @ heads["v"][: t + 1, group])
    mixed = torch.stack(outs).view(len(x), -1)
    return mixed @ w[own + "o_proj.weight"].T + w.get(own + "o_proj.bias", torch.zeros(1))


def fused(w: Weights, states: Tensor) -> Tensor:
    """Features of the target's states [n, 3 * hidden]."""
    if "input_norm.weight" in w:
        states = _norm(states, w["input_norm.weight"])
    if "fc_norm.0.weight" in w:
        each = states.chunk(len(LAYERS), -1)
        states = torch.cat([_norm(x, w[f"fc_norm.{i}.weight"]) for i, x in enumerate(each)], -1)
    return states @ w["fc.weight"].T


@torch.inference_mode()
def plain_draft(
    w: Weights, shape: Shape, model: PreTrainedModel, tokens: list[int], features: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [n, V] and next states [n, hidden] of a whole row.

    Args:
        model: the target, whose embedding and LM head serve where the draft has none.
        tokens: those behind the features.
        features: [n, hidden]; a draft's own states where the target has not been.
    """
    embedding = w.get("embed_tokens.weight", model.get_input_embeddings().weight)
    embedded, x = embedding[torch.tensor(tokens)], features
    for i in range(shape.layers):
        own = f"layers.{i}."
        read = _norm(embedded if i == 0 else x, w[own + "input_layernorm.weight"])
        if i == 0:
            normed = _norm(x, w["layers.0.hidden_norm.weight"])
            read = torch.cat([read, normed], -1)
            x = normed if shape.norm_before_residual else x
        x = x + _attention(w, own + "self_attn.", read, shape)
        read = _norm(x, w[own + "post_attention_layernorm.weight"])
        gate, up = (read @ w[f"{own}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[own + "mlp.down_proj.weight"].T
    head = embedding if shape.tied else w.get("lm_head.weight")
    head = model.get_output_embeddings().weight if head is None else head
    normed = _norm(x, w["norm.weight"])
    own_logits, x = normed @ head.T, normed if shape.norm_output else x
    if shape.draft_vocab is None:
        return own_logits, x
    logits = torch.full((len(x), shape.vocab), float("-inf"))
    logits[:, w["t2d"].nonzero()[:, 0]] = own_logits
    return logits, x


# ------------------------------------------------------------------------- a draft that is good


@torch.inference_mode()
def fitted_weights(shape: Shape, model: PreTrainedModel, texts: int = 24) -> Weights:
    """Weights of which the LM head alone was fitted, to what the target says of random texts.

    Attention looks at the last token, by biases of queries and keys that rotary angles tell apart.
    So it does well where the target's next token depends on the last one most of all.
    """
    assert shape.bias and shape.kind == "llama" and shape.layers == 1
    w = random_weights(shape)
    for name in "qk":
        w[f"layers.0.self_attn.{name}_proj.weight"].zero_()
        w[f"layers.0.self_attn.{name}_proj.bias"].fill_(6.0)
    # What it knows of the token counts more than what it knows of the text before it.
    w["fc.weight"].mul_(0.2)
    w["layers.0.self_attn.v_proj.weight"][:, shape.hidden :].mul_(0.2)
    generator = torch.Generator().manual_seed(0)
    states, wanted = [], []
    for _ in range(texts):
        text = torch.randint(shape.vocab, (24,), generator=generator).tolist()
        features = fused(w, target_states(model, text)[:-1])
        _, x = plain_draft(w, shape, model, text[1:], features)
        states.append(_norm(x, w["norm.weight"]))
        wanted.append(model(torch.tensor([text])).logits[0, 1:])
    x, y = torch.cat(states).double(), torch.cat(wanted).double()
    square = x.T @ x + 1e-3 * len(x) * torch.eye(shape.hidden, dtype=torch.float64)
    head = torch.linalg.solve(square, x.T @ (y - y.mean(-1, keepdim=True))).T.float()
    w["lm_head.weight"] = head if shape.draft_vocab is None else head[w["t2d"].nonzero()[:, 0]]
    return w
