"""What an EAGLE-3 draft is, seen from its config.json alone, in the two formats there are.

- `speculators`: `speculators_model_type` is "eagle3", and `transformer_layer_config` has the layer.
- That of EAGLE-3 itself and of SGLang: a Llama config with a `draft_vocab_size`, whose weights have
  a `midlayer`.

Both name the target's layers that the draft reads, or leave that to a rule. They count differently:
vLLM's `eagle_aux_hidden_state_layer_ids` are layers whose inputs count, those in SGLang's
`eagle_config` layers whose outputs do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.loading.sources import ModelSource, PairError

LAYER_KINDS = ("llama", "qwen3")
"""What a draft's layers are, as `model_type` of transformers."""

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"

FEWEST_LAYERS = 7
"""Layers from which on the rule names three different ones: 2, the middle, and the last but two."""


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """An EAGLE-3 draft's config.

    Attributes:
        name: the draft's.
        speculators: whether it is in the `speculators` format.
        layer: its layers' config, by the keys of transformers.
        vocab_size: tokens of the target that it was made for.
        draft_vocab_size: tokens that it proposes; None: all.
        target_hidden_size: numbers of each of the target's hidden states.
        layer_ids: the target's layers whose inputs it reads, rising; None: by the rule.
        norm_before_residual: whether the first layer adds to the normed state.
        norm_before_fc, fc_norm: whether states are normed before they are fused, as one or each.
        norm_output: whether further candidates read its last state behind its norm.
        tied: whether its LM head is its embedding.
    """

    name: str
    speculators: bool
    layer: Mapping[str, Any]
    vocab_size: int
    draft_vocab_size: int | None
    target_hidden_size: int
    layer_ids: tuple[int, ...] | None
    norm_before_residual: bool
    norm_before_fc: bool
    fc_norm: bool
    norm_output: bool
    tied: bool

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any]) -> EagleConfig | None:
        """What a config.json says; None if it is of another kind of model.

        Raises:
            PairError: it is of a kind of draft that specbatch does not run.
        """
        if not _is_eagle(name, config):
            return None
        speculators = "speculators_model_type" in config
        layer = config.get("transformer_layer_config") if speculators else config
        nested = config.get("eagle_config") or {}
        if not isinstance(layer, dict) or not isinstance(nested, dict):
            raise PairError(f"draft {name}: its config.json has no layer's config of EAGLE-3")
        kind = layer.get("model_type", LAYER_KINDS[0])
        if kind not in LAYER_KINDS:
            raise PairError(
                f"draft {name}: its layers are of {kind}; EAGLE-3 drafts run with layers of "
                f"{' or '.join(LAYER_KINDS)}"
            )
        if not nested.get("use_aux_hidden_state", True):
            raise PairError(
                f"draft {name} reads the target's last hidden state alone, which is EAGLE-1 or 2; "
                "give an EAGLE-3 draft"
            )
        try:
            return cls(
                name,
                speculators,
                {**layer, "model_type": kind},
                vocab_size=int(layer["vocab_size"]),
                draft_vocab_size=config.get("draft_vocab_size"),
                target_hidden_size=int(config.get("target_hidden_size") or layer["hidden_size"]),
                layer_ids=_layer_ids(config.get(LAYER_IDS), nested.get(LAYER_IDS)),
                norm_before_residual=bool(config.get("norm_before_residual", False)),
                norm_before_fc=bool(nested.get("norm_before_fc", config.get("norm_before_fc"))),
                fc_norm=bool(config.get("fc_norm")),
                norm_output=bool(config.get("norm_output")),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PairError(
                f"draft {name}: its config.json is none of EAGLE-3: {type(error).__name__}: {error}"
            ) from None

    def layers_of(self, layers: int) -> tuple[int, ...]:
        """The layers of a target of so many that it reads.

        Raises:
            PairError: there are no such layers.
        """
        ids = self.layer_ids
        if ids is None and layers < FEWEST_LAYERS:
            raise PairError(
                f"draft {self.name}: its config.json does not say which of the target's {layers} "
                f"layers it reads; add {LAYER_IDS}"
            )
        ids = ids or (2, layers // 2, layers - 3)
        if ids[-1] >= layers or ids[0] < 0:
            raise PairError(
                f"draft {self.name} reads the target's layers {', '.join(map(str, ids))}, but the "
                f"target has {layers}: it was made for another target"
            )
        return ids

    def as_speculators(self, layer_ids: Sequence[int]) -> dict[str, Any]:
        """config.json of the same draft in the `speculators` format, reading these layers.

        Its weights are taken to be stored in bfloat16.
        """
        return {
            "architectures": ["Eagle3DraftModel"],
            "dtype": "bfloat16",
            "speculators_model_type": "eagle3",
            "speculators_version": "0.3.0",
            "draft_vocab_size": self.draft_vocab_size or self.vocab_size,
            "target_hidden_size": self.target_hidden_size,
            "norm_before_residual": self.norm_before_residual,
            "norm_before_fc": self.norm_before_fc,
            "fc_norm": self.fc_norm,
            "norm_output": self.norm_output,
            LAYER_IDS: list(layer_ids),
            "tie_word_embeddings": self.tied,
            "transformer_layer_config": dict(self.layer),
        }

    def check(self, hidden_size: int, layers: int, tokens: int) -> None:
        """Check that it is for a target of such sizes.

        Args:
            hidden_size, layers: the target's.
            tokens: token ids that the target can sample.

        Raises:
            PairError: says what does not fit.
        """
        self.layers_of(layers)
        if self.target_hidden_size != hidden_size:
            raise PairError(
                f"draft {self.name} reads hidden states of {self.target_hidden_size} numbers, but "
                f"the target's have {hidden_size}: it was made for another target"
            )
        if self.vocab_size < tokens:
            raise PairError(
                f"draft {self.name} knows {self.vocab_size} tokens, but the target has {tokens}: "
                "it was made for another target"
            )

    def described(self) -> str:
        """What it is, in a line."""
        kind = "speculators format" if self.speculators else "EAGLE/SGLang format"
        tokens = f"{self.vocab_size:,} tokens"
        if self.draft_vocab_size is not None and self.draft_vocab_size < self.vocab_size:
            tokens = f"{self.draft_vocab_size:,} of {tokens}"
        return (
            f"EAGLE-3 ({kind}): {self.layer['model_type']} layer over the target's hidden states, "
            f"proposes {tokens}"
        )


def read_eagle_config(source: ModelSource) -> EagleConfig | None:
    """The config of a local EAGLE-3 draft; None if it is another model or not on this machine.

    Raises:
        PairError: its config.json cannot be read, or is of a draft that cannot run.
    """
    if source.path is None or source.path.is_file():
        return None
    config = _read(source.path / "config.json", source.name)
    return EagleConfig.of(source.name, config)


def text_sizes(source: ModelSource) -> tuple[int, int] | None:
    """A local model's hidden size and number of layers; None if its config.json is not at hand.

    Raises:
        PairError: it cannot be read.
    """
    if source.path is None or source.path.is_file():
        return None
    config = _read(source.path / "config.json", source.name)
    config = config.get("text_config") or config
    hidden_size, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    return (hidden_size, layers) if isinstance(hidden_size, int) and layers else None


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PairError(f"model {name}: {path} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}


def _is_eagle(name: str, config: Mapping[str, Any]) -> bool:
    kind = config.get("speculators_model_type")
    if kind is not None:
        if kind != "eagle3":
            raise PairError(
                f"draft {name} is a speculator of the kind {kind}; of these, eagle3 runs"
            )
        return True
    names = config.get("architectures") or []
    return "draft_vocab_size" in config or any("Eagle3" in str(each) for each in names)


def _layer_ids(inputs: Any, outputs: Any) -> tuple[int, ...] | None:
    """Layers whose inputs count, of such a list or of one of layers whose outputs do."""
    if inputs:
        return tuple(sorted(int(layer) for layer in inputs))
    return tuple(sorted(int(layer) + 1 for layer in outputs)) if outputs else None
