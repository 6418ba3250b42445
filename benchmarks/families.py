"""Which causal architectures of transformers run, and whether their output is what it should be.

Each class of MODEL_FOR_CAUSAL_LM_MAPPING is built tiny and random, in a process of its own. What
`PackedDecoder` accepts is compared with the plain model: rows of different lengths, longer than
window and block, rolled back, in float32 and bfloat16. Windows, soft caps, scales and shared keys
are tried where a config has them. Prints what became of each, and why.

    python benchmarks/families.py                     all, some 20 minutes
    python benchmarks/families.py --only llama,gemma4_text
    python benchmarks/families.py --save pipeline/config/families.yaml --out families.jsonl
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import resource
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from common import console, prepare, run
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specdec.model.decoder import PackedDecoder
from specdec.model.fused import FusedLayer
from specdec.model.stock import UnsupportedModel

MEMORY = 2 << 30
"""Bytes that a process may allocate for a model; one that needs more is reported as too large."""

SECONDS = 240
"""Most processor time for one architecture."""

VOCAB, WINDOW = 128, 20

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 64),
    "rotary_dim": 16,
    **dict.fromkeys(("ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("expert_ffn_hidden_size", "shared_experts_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "swa_head_dim"), 16),
    **dict.fromkeys(("swa_v_head_dim", "attention_head_dim", "d_kv"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("qk_head_dim",), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "zero_expert_num"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), 512),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size"), WINDOW),
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    **dict.fromkeys(("linear_num_value_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("linear_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head"), 8),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "mamba_ngroups", "n_groups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_state"), 16),
    **dict.fromkeys(("ssm_state_size", "state_size"), 16),
    **dict.fromkeys(("expand", "mamba_expand", "attn_layer_offset"), 1),
    "mamba_d_ssm": 64,
    "attn_layer_period": 2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
}
"""What a config's numbers become where it has them and they are larger."""

UNSET = ("head_dim", "num_key_value_heads", "pad_token_id", "num_experts_per_tok")
"""What gets its size of SIZES though the config leaves it open."""

_EXPERTS = {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"] * 2}
_STATE = {"layer_types": ["linear_attention", "full_attention"] * 2}

OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _EXPERTS | _STATE | {"n_group": 1, "topk_group": 1},
    "blenderbot": {"max_position_embeddings": 512},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"head_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _STATE,
    "kimi_linear": _EXPERTS | _STATE | {"num_local_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}
"""What some architectures need besides: their defaults lack it, or do not fit the sizes above."""

VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "windowed": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "capped": {"final_logit_softcapping": 5.0},
    "shared": {"num_kv_shared_layers": 2},
    "scaled": {"logit_scale": 0.3, "logits_scaling": 3.0},
    "attending": {"attn_layer_indices": [1, 3]},
    "biased": {"alibi": True},
    "grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
}
"""Settings that are tried where a config has one of them, since its default leaves it unused."""


def tiny_config(kind: str, variant: dict[str, Any]) -> Any:
    """The default config of an architecture, made small; changed by `variant`."""
    build = CONFIG_MAPPING[kind]
    return build(**_shrunk(build().to_dict(), variant))


def _shrunk(values: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in variant:
            small[name] = variant[name]
        elif name == "per_layer_config":
            small[name] = {}
        elif isinstance(value, dict) and "model_type" in value:
            small[name] = _shrunk(value, variant)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, SIZES[name])
        elif name in ("layer_types", "layers_block_type") and value:
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[i % len(kinds)] for i in range(4)]
        elif name == "layer_types" and "conv_L_cache" in values:
            small[name] = ["conv", "full_attention"] * 2
        elif name == "is_decoder":
            small[name] = True
        elif value is None and name in UNSET:
            small[name] = SIZES[name]
    if "kv_lora_rank" in small:  # latent attention: each head has keys of its own
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small | OWN.get(values.get("model_type", ""), {})


def tiny_model(config: Any) -> Any:
    """A random model whose logits are as far apart as a trained one's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and weight.dtype.is_floating_point:
            torch.nn.init.normal_(weight, std=0.5 / weight.shape[-1] ** 0.5)
        elif "sink" in name:
            torch.nn.init.normal_(weight)
    _peaked(model)
    return model.eval().requires_grad_(False)


def _peaked(model: Any) -> None:
    """Scale the LM head so that logits have a standard deviation of 3."""
    head = model.get_output_embeddings()
    ids = torch.arange(2, 66)[None]
    with torch.no_grad():
        # A copy, since some models (BigBird) change with the first text that they get.
        spread = copy.deepcopy(model)(input_ids=ids, use_cache=False).logits.float().std()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.clone())
    head.weight.data *= 3 / spread.clamp(min=1e-3)


STEPS: list[list[tuple[int, int, int]]] = [
    [(0, 0, 17), (1, 0, 150), (2, 0, 5), (3, 0, 40)],
    [(0, 17, 1), (1, 146, 5), (2, 5, 4), (3, 30, 24)],
    [(3, 54, 1), (0, 15, 30), (2, 7, 3), (1, 151, 1)],
    [(1, 148, 60), (0, 45, 2), (2, 6, 9)],
    [(0, 46, 3), (2, 13, 12), (3, 55, 4)],
    [(0, 47, 1), (2, 14, 2), (3, 58, 24)],
]
"""Packed forwards, each of rows (slot, length that it is rolled back to, tokens appended)."""


@torch.inference_mode()
def packed_logits(decoder: Any, texts: Tensor) -> dict[tuple[int, int], Tensor]:
    """Logits by (slot, position) of every token that STEPS computes; the last ones of each."""
    cache, found = decoder.new_cache(4, 256), {}
    for step in STEPS:
        for slot, keep, _ in step:
            cache.rollback(slot, keep)
        # A state that has run on beyond what is kept is forgotten as a whole.
        spans = [(slot, cache.lengths[slot], keep + n) for slot, keep, n in step]
        tokens = torch.cat([texts[slot, begin:end] for slot, begin, end in spans])
        hidden = decoder.forward(cache, [(s, end - begin) for s, begin, end in spans], tokens)
        places = [(slot, place) for slot, begin, end in spans for place in range(begin, end)]
        found |= dict(zip(places, decoder.logits(hidden).float(), strict=True))
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Mean total variation between the distributions of two sets of logits [n, V]."""
    return ((a.softmax(-1) - b.softmax(-1)).abs().sum(-1) / 2).mean().item()


def check_one(exact_model: Any) -> dict[str, Any]:
    """What becomes of one config: right, refused or wrong in each dtype, with distances."""
    texts = torch.randint(2, VOCAB, (4, 256), generator=torch.Generator().manual_seed(1))
    result: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        plain = copy.deepcopy(exact_model).to(dtype)
        try:
            decoder = PackedDecoder(copy.deepcopy(plain), fuse=True)
        except UnsupportedModel as error:
            result[name] = {"verdict": "refused", "why": str(error)}
            continue
        found = packed_logits(decoder, texts)
        with torch.inference_mode():
            exact = exact_model(input_ids=texts, use_cache=False).logits
            expected = plain(input_ids=texts, use_cache=False).logits.float()
        rows, columns = zip(*found, strict=True)
        packed, at = torch.stack(list(found.values())), (list(rows), list(columns))
        tv, noise = distance(packed, expected[at]), distance(expected[at], exact[at])
        right = tv < 1e-3 + 3 * noise
        fused = any(isinstance(module, FusedLayer) for module in decoder.model.modules())
        kernels = decoder.use_kernels if decoder.layout else None  # nothing attends
        verdict = "right" if right else "wrong"
        result[name] = {
            "verdict": verdict, "tv": tv, "noise": noise, "fused": fused, "kernels": kernels,
            "recurrent": decoder.recurrent,
        }  # fmt: skip
    return result


VERDICTS = ("wrong", "crashed", "right", "refused", "not built")
"""What may become of a family; the first that one of its variants has counts."""


def check_family(kind: str) -> dict[str, Any]:
    """What becomes of each variant of an architecture, in this process."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY * 2, MEMORY * 2))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    found: dict[str, Any] = {}
    for name, variant in VARIANTS.items():
        try:
            config = tiny_config(kind, variant)
            if variant and not variant.keys() & config.get_text_config().to_dict().keys():
                continue
            model = tiny_model(config)
        except Exception as error:
            found[name] = {"float32": {"verdict": "not built", "why": _reason(error)}}
            continue
        try:
            found[name] = check_one(model)
        except Exception as error:
            found[name] = {"float32": {"verdict": "crashed", "why": _reason(error)}}
    return found


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def in_a_fork(kind: str) -> dict[str, Any]:
    """`check_family` in a process of its own, which has the libraries loaded already."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=lambda: theirs.send(check_family(kind))
    )
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        found = {"as it comes": {"float32": {"verdict": "crashed", "why": "its process ended"}}}
    process.join()
    return found


NOTE = """\
# What `python benchmarks/families.py --save pipeline/config/families.yaml` found, with tiny random
# models, in each family of transformers that could be built. docs/models.md is written from it.
"""


def summary(found: dict[str, Any], verdict: str) -> dict[str, Any]:
    """What the table of families says of one: a `Family` of pipeline/config/model_family.py."""
    results = {
        f"{name} in {dtype}": each
        for name, variant in found.items()
        for dtype, each in variant.items()
    }
    right = [each for each in results.values() if each["verdict"] == "right"]
    layers = None
    if right:
        attending = [each["kernels"] for each in right if each["kernels"] is not None]
        kernels = "kernels" if attending and all(attending) else "torch"
        layers = "fused" if all(each["fused"] for each in right) else kernels
    whys = [
        (f"{where}: " if right else "") + each["why"].partition(": ")[2]
        for where, each in results.items()
        if each["verdict"] == "refused"
    ]
    why = min(whys, default="").replace("|", "/")[:160]
    line: dict[str, Any] = {"runs": verdict == "right", "layers": layers, "why": why}
    # Said where it is so alone: most families have none.
    return line | ({"recurrent": True} if any(each["recurrent"] for each in right) else {})


def save(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write what was found over what the table said of these families before."""
    table: dict[str, Any] = yaml.safe_load(path.read_text()) if path.exists() else {}
    for line in lines:
        table.pop(line["kind"], None)
        if line["verdict"] in ("right", "refused"):
            table[line["kind"]] = summary(line["found"], line["verdict"])
    text = yaml.safe_dump(dict(sorted(table.items())), width=1000, default_flow_style=None)
    path.write_text(NOTE + text)


def all_families(
    only: Annotated[str, typer.Option(help="model types, separated by commas")] = "",
    out: Annotated[Path | None, typer.Option(help="where results go, as JSON lines")] = None,
    table: Annotated[
        Path | None, typer.Option("--save", help="the table to bring up to date")
    ] = None,
) -> None:
    prepare(1)
    kinds = only.split(",") if only else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    lines: list[dict[str, Any]] = []
    for kind in kinds:
        found = in_a_fork(kind)
        verdicts = {each["verdict"] for variant in found.values() for each in variant.values()}
        verdict = next(each for each in VERDICTS if each in verdicts)
        lines.append({"kind": kind, "verdict": verdict, "found": found})
        whys = {e.get("why", "") for v in found.values() for e in v.values()} - {""}
        console.print(f"{kind:28} {verdict:9} {' | '.join(sorted(whys))[:200]}", markup=False)
        if out:
            out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    console.print(dict(Counter(line["verdict"] for line in lines)))
    if table:
        save(table, lines)


if __name__ == "__main__":
    run(__doc__, all_families)
