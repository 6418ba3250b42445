"""An EAGLE-3 draft in training: its weights, where they come from, and how it is kept.

Checkpoints are in the `speculators` format; the embedding is the target's and stays out of them.
The LM head is rows of the target's, and stays as it is: with little text a draft learns faster
around it (SmolLM2-135M, 56,000 tokens: Σ min(p, q) 0.297 on held-out text, and 0.279 when the head
was trained as well; 0.280 when layer and norm began at random).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.atomic import atomic_file, write_bytes
from specdec.loading.eagle import MAPS, eagle_config, eagle_folder, eagle_parts, eagle_weights
from specdec.loading.eagle_config import FEWEST_LAYERS, LAYER_IDS, EagleConfig
from specdec.loading.pair import ModelPair
from specdec.loading.sources import find_model
from specdec.model.decoder import PackedDecoder
from specdec.model.fused import FusedLayer
from specdec.training.eagle_lessons import Lesson
from specdec.training.eagle_rollout import Rollout, positions_of, rolled_out
from specdec.training.evaluate import DEPTH, JUDGED, Batch
from specdec.training.examples import Example
from specdec.training.loss import backward_through_head, distill_loss
from specdec.training.settings import DistillError, DistillSettings
from specdec.training.student import WEIGHTS

STEP_DECAY = 0.8
"""What a step's loss counts of the one before it, as in EAGLE-3.

Raised, the draft gives up some of its first candidates for its later ones.
"""

FROZEN = {"embed_tokens.weight", "lm_head.weight"}
"""Weights that training leaves alone."""

SMALL = 0.02
"""Standard deviation of weights that begin at random. A usual value."""


class EagleStudent:
    """An EAGLE-3 draft whose weights, all but embedding and LM head, can be trained.

    Args:
        config: config.json of the draft, in the `speculators` format.
        weights: float32, by the names of that format, the maps between vocabularies among them.
        target: the target.
        name: how it was made, for errors and records.

    Attributes:
        layers: the target's layers whose inputs it reads.
        known: int64 [draft vocabulary], the target's tokens that it proposes.
    """

    needs_tokenizer = False

    def __init__(
        self, config: dict[str, Any], weights: dict[str, Tensor], target: PackedDecoder, name: str
    ) -> None:
        read = EagleConfig.of(name, config)
        assert read is not None, "it is EAGLE-3's"
        self.name, self.layers = name, read.layers_of(target.layers)
        width = target.model.config.get_text_config().hidden_size * len(self.layers)
        maps = {each: weights[each] for each in MAPS if each in weights}
        own = set(weights) - set(maps)
        if "lm_head.weight" not in own:
            raise DistillError(f"{name} has no LM head of its own; begin a new draft")
        parts, text, known = eagle_parts(read, dict(weights), target, width)
        # vLLM takes a map for an error where a draft proposes all of the target's tokens.
        self._maps = {} if known is None else maps
        if len(parts.layers) != 1:
            raise DistillError(f"{name} has {len(parts.layers)} layers; one can be trained")
        self.vocab_size, self.context_length = target.vocab_size, target.context_length
        self.known = torch.arange(target.vocab_size) if known is None else known.cpu()
        variant = {n: getattr(read, n) for n in ("norm_before_residual", "norm_output")}
        self.rollout = Rollout(parts, text, **variant).to(target.device)
        self._config = config
        self._own = {key: p for key, p in parts.named_parameters() if key in own}
        parts.requires_grad_(False)
        for key, parameter in self._own.items():
            parameter.requires_grad_(key not in FROZEN)

    @classmethod
    def begin(cls, pair: ModelPair, examples: Sequence[Example], tokens: int) -> EagleStudent:
        """A new draft of one layer.

        Args:
            pair: the target.
            examples: what it will learn from.
            tokens: how many it shall propose: those that the examples' outputs have most often.

        Raises:
            DistillError: the target's hidden states cannot be read.
        """
        target = pair.target
        if not target.layers:
            raise DistillError(
                "EAGLE-3 drafts read hidden states of single layers, and those of this target are "
                "not known; train a draft of the kind model"
            )
        known = vocabulary_of(examples, tokens, len(pair.tokenizer))
        config = new_config(pair, len(known))
        weights = new_weights(config, target, torch.tensor(known))
        return cls(config, weights, target, "a new EAGLE-3 draft")

    @classmethod
    def from_draft(cls, pair: ModelPair, name: str) -> EagleStudent:
        """A draft that exists, in either format.

        Raises:
            PairError: it is missing or does not fit the target.
            DistillError: it is not of EAGLE-3.
        """
        source = find_model(name)
        read = eagle_config(source)
        if read is None:
            raise DistillError(f"draft {name} is not of EAGLE-3; give --kind model")
        text = pair.target.model.config.get_text_config()
        read.check(text.hidden_size, pair.target.layers, len(pair.tokenizer))
        weights = eagle_weights(name, eagle_folder(source), pair.target.device, torch.float32)
        config = read.as_speculators(read.layers_of(pair.target.layers))
        config["speculators_config"] = _serving(pair)
        return cls(config, weights, pair.target, f"draft {name}")

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self._own.items() if p.requires_grad}

    def learn(
        self, examples: Sequence[Example], lesson: Lesson, settings: DistillSettings
    ) -> float:
        """Add a step's gradients.

        The draft runs over the examples' own tokens several times: first on the target's features,
        then on its own states of the run before (training-time test).

        Args:
            examples: what is learned from.
            lesson: of these examples (specdec/training/eagle_lessons.py).

        Returns:
            The mean loss of a first candidate, in nats per output token.
        """
        places = positions_of(examples, settings.rollout)
        device = lesson.states.device
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            steps = rolled_out(self.rollout, places, lesson.states, settings.rollout)
            states = torch.cat([self.rollout.normed(state) for state in steps])
            counts = [len(at) for at in places.kept]
            shares = torch.cat(
                [torch.full((n,), STEP_DECAY**i / max(1, n)) for i, n in enumerate(counts)]
            ).to(device)
            at = torch.cat(places.kept).to(device)
            ids, probs = lesson.ids[at], lesson.probs[at]

            def losses(logits: Tensor, rows: slice) -> Tensor:
                likeliest = ids[rows][:, 0]
                return shares[rows] * distill_loss(
                    logits, likeliest, ids[rows], probs[rows], settings.ce_weight
                )

            found = backward_through_head(states, self.rollout.head, losses)
        return float(found[: counts[0]].sum())

    def predicted(self, batch: Batch) -> list[Tensor]:
        """States [n, hidden] that each output token would be proposed from, by DEPTH of rollout."""
        places = positions_of(batch.examples, 1)
        states = torch.cat([batch.inputs[layer] for layer in self.layers], -1)
        steps = rolled_out(self.rollout, places, states, DEPTH, everywhere=True)
        found = []
        for kept, state in zip(places.kept * DEPTH, steps, strict=False):
            whole = state.new_zeros(places.outputs, state.shape[-1])
            whole[kept.to(state.device)] = state
            found.append(self.rollout.normed(whole))
        return found

    def logits(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n, draft vocabulary], and which tokens they are of."""
        logits: Tensor = self.rollout.head(states)
        return logits, self.known.to(states.device)

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `models.draft` can name; the weights come last, in one step."""
        write_bytes(folder / "config.json", f"{json.dumps(self._config, indent=2)}\n".encode())
        weights = {
            key: p.detach().to("cpu", torch.bfloat16).contiguous() for key, p in self._own.items()
        }
        with atomic_file(folder / WEIGHTS) as fresh:
            save_file(weights | self._maps, fresh, metadata={"format": "pt"})

    def restore(self, folder: Path) -> None:
        """Take the weights that `save` wrote."""
        there = load_file(folder / WEIGHTS)
        with torch.no_grad():
            for key, parameter in self._own.items():
                parameter.copy_(there[key])


def vocabulary_of(examples: Iterable[Example], size: int, tokens: int) -> list[int]:
    """The tokens that outputs have most often, rising; where there are too few, low ids follow.

    Args:
        size: of the vocabulary.
        tokens: of the target.
    """
    seen = Counter(token for example in examples for token in example.output_ids)
    order = sorted(seen, key=lambda token: (-seen[token], token))
    order += [token for token in range(tokens) if token not in seen]
    return sorted(order[: min(size, tokens)])


def new_config(pair: ModelPair, tokens: int) -> dict[str, Any]:
    """config.json of a new draft of so many tokens: a layer as wide as the target's."""
    target = pair.target
    text, layers = target.model.config.get_text_config(), target.layers
    ids: tuple[int, ...] = (2, layers // 2, layers - 3)
    if layers < FEWEST_LAYERS:
        ids = tuple(sorted({0, layers // 2, layers - 1}))
    rope = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" not in rope or rope.get("rope_type", "default") != "default":
        rope = {"rope_theta": 10000.0, "rope_type": "default"}
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    layer = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": text.hidden_size,
        "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "num_hidden_layers": 1,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": getattr(text, "rms_norm_eps", None) or 1e-6,
        "rope_theta": rope["rope_theta"],
        "rope_parameters": {key: rope[key] for key in ("rope_theta", "rope_type") if key in rope},
        "max_position_embeddings": target.context_length,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": target.vocab_size,
    }
    new = EagleConfig.of(
        "", {"speculators_model_type": "eagle3", "transformer_layer_config": layer}
    )
    assert new is not None, "it is of EAGLE-3"
    config = replace(new, draft_vocab_size=tokens).as_speculators(ids)
    return {**config, "speculators_config": _serving(pair)}


def _serving(pair: ModelPair) -> dict[str, Any]:
    """What vLLM asks a draft for besides its layer: how it is used, and beside which target."""
    config = pair.target.model.config
    return {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [
            {"proposal_type": "greedy", "speculative_tokens": JUDGED, "verifier_accept_k": 1}
        ],
        "verifier": {
            "name_or_path": pair.describe()["target"]["name"],
            "architectures": list(getattr(config, "architectures", None) or []),
        },
    }


def new_weights(config: dict[str, Any], target: PackedDecoder, known: Tensor) -> dict[str, Tensor]:
    """Weights to begin with: the target's last layer, final norm and LM head, where they fit.

    The layer reads the highest of the target's states as the last layer would. What else there is
    to read begins with weights that are small and random, from a fixed seed.

    Args:
        known: int64, rising, the target's tokens that it proposes.
    """
    layer = config["transformer_layer_config"]
    h, inner, dim = layer["hidden_size"], layer["intermediate_size"], layer["head_dim"]
    queries, keys = (layer[f"num_{kind}_heads"] * dim for kind in ("attention", "key_value"))
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * SMALL

    others = torch.zeros(h, (len(config[LAYER_IDS]) - 1) * h)
    own = "layers.0."
    weights = {
        "fc.weight": torch.cat([others, torch.eye(h)], 1),
        "norm.weight": torch.ones(h),
        own + "hidden_norm.weight": torch.ones(h),
        own + "input_layernorm.weight": torch.ones(h),
        own + "post_attention_layernorm.weight": torch.ones(h),
        own + "self_attn.q_proj.weight": matrix(queries, 2 * h),
        own + "self_attn.k_proj.weight": matrix(keys, 2 * h),
        own + "self_attn.v_proj.weight": matrix(keys, 2 * h),
        own + "self_attn.o_proj.weight": matrix(h, queries),
        own + "mlp.gate_proj.weight": matrix(inner, h),
        own + "mlp.up_proj.weight": matrix(inner, h),
        own + "mlp.down_proj.weight": matrix(h, inner),
        "lm_head.weight": target.logits(_eye(h, target)).T.float().cpu()[known].contiguous(),
        "d2t": known - torch.arange(len(known)),
        "t2d": torch.zeros(target.vocab_size, dtype=torch.bool).scatter_(0, known, True),
    }
    weights |= {
        name: weight
        for name, weight in _last_layer(target, weights).items()
        if weight.shape == weights[name].shape
    }
    return {name: weight.to(target.device) for name, weight in weights.items()}


def _last_layer(target: PackedDecoder, begun: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last layer and the final norm of a target as a draft's weights; {} if it has others."""
    last = target.decoder.layers[-1]
    known = isinstance(last, FusedLayer) and last.is_silu and last.query_norm is None
    if not known or last.qkv.bias is not None:
        return {}
    sizes = [last.query_heads * last.head_dim, *[last.key_heads * last.head_dim] * 2]
    gate, up = _weight(last.gate_up, target).chunk(2)
    own = "layers.0."
    found = {
        own + "hidden_norm.weight": last.input_norm.weight.float().cpu(),
        own + "post_attention_layernorm.weight": last.mlp_norm.weight.float().cpu(),
        own + "self_attn.o_proj.weight": _weight(last.output, target),
        own + "mlp.gate_proj.weight": gate.contiguous(),
        own + "mlp.up_proj.weight": up.contiguous(),
        own + "mlp.down_proj.weight": _weight(last.down, target),
    }
    for kind, rows in zip("qkv", torch.split(_weight(last.qkv, target), sizes), strict=True):
        name = f"{own}self_attn.{kind}_proj.weight"
        found[name] = torch.cat([begun[name][: len(rows), : rows.shape[1]], rows], 1)
    if (norm := getattr(target.decoder, "norm", None)) is not None:
        found["norm.weight"] = norm.weight.float().cpu()
    return found


def _weight(linear: Any, target: PackedDecoder) -> Tensor:
    """The weight [out, in] of a linear layer without bias, however it is packed."""
    weight: Tensor = linear(_eye(linear.weight.shape[1], target)).T
    return weight.float().cpu().contiguous()


def _eye(size: int, target: PackedDecoder) -> Tensor:
    return torch.eye(size, dtype=target.dtype, device=target.device)
