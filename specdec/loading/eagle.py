"""Loading an EAGLE-3 draft for a target that is loaded already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from specdec.loading.eagle_config import EagleConfig
from specdec.loading.loader import LONGEST_REASON, DType, reason
from specdec.loading.sources import ModelSource, PairError
from specdec.model.decoder import PackedDecoder
from specdec.model.eagle import Eagle3, EagleDecoder
from specdec.model.linear import Quantization, pack_linears
from specdec.model.stock import steady_context

NOT_OURS = ("rotary_emb", "verifier_")
"""Beginnings of weights' names that some checkpoints have and no forward needs."""

MAPS = ("d2t", "t2d")
"""Between the draft's tokens and the target's; they are no weights."""

CONVERT = (
    "convert its pytorch_model.bin: `safetensors.torch.save_file(torch.load('pytorch_model.bin', "
    "weights_only=True), 'model.safetensors')`"
)


def eagle_config(source: ModelSource) -> EagleConfig | None:
    """The config of a draft if it is EAGLE-3, from a folder or a hub.

    Raises:
        PairError: it cannot be read, or is of a draft that cannot run.
    """
    from transformers import PretrainedConfig

    if source.path is not None and source.path.is_file():
        return None
    try:
        config, _ = PretrainedConfig.get_config_dict(
            str(source.path or source.name), revision=source.revision
        )
    except Exception as error:  # of transformers or the hub's client
        raise PairError(f"model {source.name} cannot be loaded: {reason(error)}") from error
    return EagleConfig.of(source.name, config)


def load_eagle(
    dtype: DType,
    source: ModelSource,
    config: EagleConfig,
    target: PackedDecoder,
    tokens: int,
    *,
    pack: bool,
    quantization: Quantization | None,
) -> EagleDecoder:
    """A draft on the target's device.

    Args:
        dtype: of its weights.
        source: where the draft is.
        config: its config.
        target: its embedding and LM head are used where the checkpoint has none.
        tokens: token ids that the target can sample.
        pack: whether to pack its linear layers, as on a CPU, with such a `quantization`.

    Raises:
        PairError: its weights are missing, or it does not fit the target.
    """
    hidden_size = target.model.config.get_text_config().hidden_size
    if not target.layers:
        raise PairError(
            f"draft {source.name}: EAGLE-3 reads hidden states of single layers, and those of this "
            "target are not known"
        )
    config.check(hidden_size, target.layers, tokens)
    layers = config.layers_of(target.layers)
    folder = eagle_folder(source)
    weights = eagle_weights(source.name, folder, target.device, getattr(torch, dtype))
    parts, text, known = eagle_parts(config, weights, target, len(layers) * hidden_size)
    if (embedded := parts.embed_tokens.weight.shape[0]) < tokens:
        raise PairError(
            f"draft {source.name} has embeddings of {embedded} tokens, but the target has "
            f"{tokens}: it was made for another target"
        )
    model = Eagle3(
        text,
        parts,
        norm_before_residual=config.norm_before_residual,
        norm_output=config.norm_output,
        known=known,
        vocab_size=target.vocab_size,
    )
    model.eval().requires_grad_(False)
    if source.path is None:
        model.config._commit_hash = folder.name
    if pack:
        pack_linears(model, quantization)
    context = target.context_length
    if model.config.rope_parameters.get("rope_type") in ("dynamic", "longrope"):
        context = min(context, steady_context(model.config))
    kernels = target.use_kernels or target.device.type == "cpu"
    return EagleDecoder(model, layers, context, use_kernels=kernels, kv_dtype=target.kv_dtype)


def eagle_folder(source: ModelSource) -> Path:
    """Where a draft's files lie: its own folder, or the hub's snapshot of it.

    Raises:
        PairError: the hub does not have it, or cannot be asked.
    """
    return source.path or _from_hub(source)


def eagle_weights(
    draft: str, folder: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A checkpoint's weights, by the names of the `speculators` format.

    Raises:
        PairError: they are missing or cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PairError(f"draft {draft} has no safetensors; {CONVERT}")
    weights: dict[str, Tensor] = {}
    for file in files:
        try:
            read = load_file(file)
        except Exception as error:  # of safetensors, which has classes of its own
            raise PairError(f"draft {draft}: {file.name}: {reason(error)}") from error
        for name, weight in read.items():
            name = name.removeprefix("model.").replace("midlayer.", "layers.0.", 1)
            if not name.startswith(NOT_OURS):
                weights[name] = weight if name in MAPS else weight.to(device, dtype)
    return weights


def _from_hub(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source.name,
                revision=source.revision,
                allow_patterns=["*.safetensors", "config.json"],
            )
        )
    except Exception as error:  # network, HTTP and validation errors have no common class
        raise PairError(f"model {source.name} cannot be loaded: {reason(error)}") from error


def eagle_parts(
    config: EagleConfig,
    weights: dict[str, Tensor],
    target: PackedDecoder,
    states: int,
) -> tuple[Any, Any, Tensor | None]:
    """A draft's modules with their weights, and what it has not from the target.

    Args:
        config: the draft's.
        weights: by their names.
        target: the target.
        states: numbers of the hidden states that a feature is fused of.

    Returns:
        The modules, transformers' config of the layers, and which of the target's tokens each of
        the draft's is (None: the same).

    Raises:
        PairError: weights are missing, left over, or of other shapes than the config says.
    """
    head = weights.get("lm_head.weight")
    known = _known(config, weights, target.vocab_size)
    known = None if known is None else known.to(target.device)
    text = _layer_config(config, weights)
    with torch.device("meta"):
        parts = _skeleton(config, text, states, weights)
    try:
        parts.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        said = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        what = said[0][:LONGEST_REASON]
        raise PairError(f"draft {config.name}: its weights are not EAGLE-3's: {what}") from None
    shared = [each for each in ("embed_tokens", "lm_head") if not hasattr(parts, each)]
    if not hasattr(parts, "embed_tokens"):
        parts.embed_tokens = target.model.get_input_embeddings()
    if head is None and config.tied:
        outputs, inputs = parts.embed_tokens.weight.shape
        parts.lm_head = nn.Linear(inputs, outputs, bias=False, device="meta")
        parts.lm_head.weight = parts.embed_tokens.weight
    elif head is None:
        parts.lm_head = target.model.get_output_embeddings()
        if parts.lm_head.weight.device not in (target.device, torch.device("meta")):
            raise PairError(
                f"draft {config.name} has no lm_head, and the target's is on another device than "
                "its embedding; set models.device_map to null"
            )
    widths = {each.weight.shape[1] for each in (parts.embed_tokens, parts.lm_head)}
    if widths != {text.hidden_size}:
        raise PairError(
            f"draft {config.name} has no {' and '.join(shared)} and cannot use the target's: its "
            f"hidden size is {text.hidden_size}, the target's {config.target_hidden_size}"
        )
    return parts, text, known


def _layer_config(config: EagleConfig, weights: dict[str, Tensor]) -> Any:
    """transformers' config of the draft's layers, as many as there are weights of."""
    from transformers import AutoConfig

    numbers = [int(name.split(".")[1]) for name in weights if name.startswith("layers.")]
    fields = {**config.layer, "num_hidden_layers": 1 + max(numbers, default=0)}
    fields.pop("layer_types", None)
    try:
        text = type(AutoConfig.for_model(config.layer["model_type"])).from_dict(fields)
    except Exception as error:  # of transformers' checks
        raise PairError(f"draft {config.name}: its config.json: {reason(error)}") from error
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise PairError(f"draft {config.name} has a sliding window, which EAGLE-3 drafts have not")
    text._attn_implementation = "eager"
    return text


def _skeleton(config: EagleConfig, text: Any, states: int, weights: dict[str, Tensor]) -> Any:
    """Modules by the names that weights have, without any."""
    if text.model_type == "llama":
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer as Layer
        from transformers.models.llama.modeling_llama import LlamaRMSNorm as Norm
    else:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer as Layer
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm as Norm

    width, epsilon = text.hidden_size, text.rms_norm_eps
    parts: Any = nn.Module()
    parts.fc = nn.Linear(states, width, bias="fc.bias" in weights)
    if config.norm_before_fc:
        parts.input_norm = Norm(states, eps=epsilon)
    if config.fc_norm:
        each = config.target_hidden_size
        parts.fc_norm = nn.ModuleList(Norm(each, eps=epsilon) for _ in range(states // each))
    parts.layers = nn.ModuleList(Layer(text, i) for i in range(text.num_hidden_layers))
    first = parts.layers[0]
    first.hidden_norm = Norm(width, eps=epsilon)
    for name in ("q_proj", "k_proj", "v_proj"):
        narrow = getattr(first.self_attn, name)
        wide = nn.Linear(2 * width, narrow.out_features, bias=narrow.bias is not None)
        setattr(first.self_attn, name, wide)
    parts.norm = Norm(width, eps=epsilon)
    if (embedding := weights.get("embed_tokens.weight")) is not None:
        parts.embed_tokens = nn.Embedding(len(embedding), width)
    if (head := weights.get("lm_head.weight")) is not None:
        parts.lm_head = nn.Linear(width, len(head), bias=False)
    return parts


def _known(config: EagleConfig, weights: dict[str, Tensor], rows: int) -> Tensor | None:
    """Which of the target's tokens each of the draft's is; None: the same.

    Takes the maps out of the weights.

    Args:
        config: the draft's.
        weights: `d2t` has the difference between each draft token and the target's, `t2d` says of
            each of the target's whether the draft has it.
        rows: tokens of the target.

    Raises:
        PairError: the map is missing or does not fit.
    """
    d2t, t2d = (weights.pop(each, None) for each in MAPS)
    head, name = weights.get("lm_head.weight"), config.name
    outputs = len(head) if head is not None else rows
    reduced = config.draft_vocab_size not in (None, config.vocab_size)
    if reduced and head is None:
        raise PairError(f"draft {name} has a vocabulary of its own, but its weights lack lm_head")
    if d2t is not None and head is not None:
        known = torch.arange(len(d2t)) + d2t.long()
    elif t2d is not None and head is not None:
        known = t2d.nonzero()[:, 0]
    elif reduced:
        raise PairError(f"draft {name} proposes some tokens only, and its weights lack d2t")
    else:
        known = torch.arange(min(outputs, rows))
        return None if outputs >= rows else known
    fits = len(known) == outputs and len(set(known.tolist())) == outputs
    if not fits or int(known.min()) < 0 or int(known.max()) >= rows:
        raise PairError(
            f"draft {name}: its d2t does not name {outputs:,} different tokens out of the target's "
            f"{rows:,}: it was made for another target"
        )
    return None if torch.equal(known, torch.arange(rows)) else known
