"""The draft in training: made from layers of the target, or a draft that exists."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from specdec.atomic import atomic_file, write_bytes
from specdec.loading.pair import ModelPair, load_draft
from specdec.loading.quantised import quantised_by
from specdec.model.linear import outputs_of, stays_quantised
from specdec.training.evaluate import Batch
from specdec.training.examples import Example
from specdec.training.loss import backward_through_head, distill_loss
from specdec.training.scores import lengths_of, output_positions
from specdec.training.settings import DistillError, DistillSettings

WEIGHTS = "model.safetensors"


class Student:
    """A draft whose weights, all but embedding and LM head, can be trained.

    Args:
        model: a transformers causal LM. Modules that are the target's own stay out of its
            checkpoint.
        target: the model it may share them with.
        name: how it was made, for errors and records.
    """

    layers: tuple[int, ...] = ()
    """Of the target, whose hidden states it reads: none."""

    def __init__(self, model: Any, target: PreTrainedModel, name: str) -> None:
        self.model, self.name = model, name
        self._shared_vocab = min(
            outputs_of(each.get_output_embeddings()) for each in (model, target)
        )
        self._head: nn.Module | None = None
        model.set_attn_implementation("sdpa")
        # Evaluation mode in training too: without dropout a step is a function of its batch.
        model.eval().requires_grad_(True)
        for module in _ends(model):
            module.requires_grad_(False)
        theirs = {id(p) for module in _ends(target) for p in module.parameters()}
        seen: set[int] = set()
        self._own: list[str] = []
        for key, tensor in model.state_dict(keep_vars=True).items():
            # A tied LM head is the embedding under another name; the first name is enough.
            if id(tensor) not in theirs | seen:
                self._own.append(key)
                seen.add(id(tensor))

    @classmethod
    def from_layers(cls, pair: ModelPair, layers: Sequence[int]) -> Student:
        """Copies of the target's layers, between its own embedding and final norm, and LM head.

        Args:
            pair: loaded with `trainable`.
            layers: their indices in the new order, counted from 0; from -1 backwards from the end.

        Raises:
            DistillError: there are no such layers, or they stay quantised.
        """
        target = pair.target.model
        _refuse_quantised(
            target,
            f"target {pair.description['target']['name']}",
            "give --kind eagle3, or --draft with a model that is not quantised",
        )
        count = target.config.num_hidden_layers
        if not layers or any(not -count <= layer < count for layer in layers):
            raise DistillError(
                f"layers {','.join(map(str, layers)) or '(none)'}: the target has {count}, "
                f"0 to {count - 1}"
            )
        chosen = [layer % count for layer in layers]
        prefix = _layer_prefix(target, count)
        build: Any = type(target)
        model = build(_config_with(target.config, chosen)).to(pair.target.device, target.dtype)
        there = target.state_dict()
        weights = {}
        for key in model.state_dict():
            source = key
            if key.startswith(prefix):
                index, _, rest = key.removeprefix(prefix).partition(".")
                source = f"{prefix}{chosen[int(index)]}.{rest}"
            weights[key] = there[source]
        model.load_state_dict(weights)
        embedding, head = _ends(target)
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)
        return cls(model, target, f"layers {','.join(map(str, chosen))} of the target")

    @classmethod
    def from_draft(cls, pair: ModelPair, name: str, *, trust_remote_code: bool = False) -> Student:
        """A draft that exists, with its own embedding and LM head or the target's.

        Raises:
            PairError: it is missing or does not fit the target.
            DistillError: it has fewer tokens than the target's tokenizer, or stays quantised.
        """
        model = load_draft(pair, name, trust_remote_code=trust_remote_code)
        _refuse_quantised(model, f"draft {name}", "give one that is not quantised")
        student = cls(model, pair.target.model, f"draft {name}")
        if student.vocab_size < len(pair.tokenizer):
            raise DistillError(
                f"draft {name} has {student.vocab_size} tokens, the target's tokenizer "
                f"{len(pair.tokenizer)}"
            )
        return student

    @property
    def needs_tokenizer(self) -> bool:
        """Whether its checkpoint has an embedding or LM head, and so a vocabulary of its own."""
        ends = {id(p) for module in _ends(self.model) for p in module.parameters()}
        named = self.model.state_dict(keep_vars=True)
        return any(id(named[key]) in ends for key in self._own)

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head."""
        return outputs_of(self.model.get_output_embeddings())

    @property
    def context_length(self) -> int:
        """Most positions."""
        return int(self.model.config.max_position_embeddings)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def states(self, examples: Sequence[Example]) -> Tensor:
        """Last hidden states [n, hidden] at the n output positions of the examples."""
        inputs = [torch.tensor(e.input_ids) for e in examples]
        # Padding comes last, where causal attention hides it from every token that counts.
        padded = nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(self.model.device)
        hidden = self.model.base_model(input_ids=padded, use_cache=False).last_hidden_state
        keep = output_positions(lengths_of(examples), padded.shape[1])
        states: Tensor = hidden.flatten(0, 1)[torch.tensor(keep, device=hidden.device)]
        return states

    def learn(
        self, examples: Sequence[Example], lesson: tuple[Tensor, Tensor], settings: DistillSettings
    ) -> float:
        """Add a step's gradients; returns the mean loss per output token, in nats.

        Args:
            examples: what is learned from.
            lesson: the target's likeliest tokens and their probabilities (specdec/training/scores).
        """
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            hidden = self.states(examples)
        head = self._head_in(torch.bfloat16 if settings.bf16 else torch.float32)
        tokens = torch.tensor([t for e in examples for t in e.output_ids], device=device)
        ids, probs = (each.to(device) for each in lesson)

        def losses(logits: Tensor, rows: slice) -> Tensor:
            given = tokens[rows], ids[rows], probs[rows]
            found = distill_loss(logits[:, : self._shared_vocab], *given, settings.ce_weight)
            return found / len(tokens)

        dtype = next(head.parameters()).dtype
        return float(backward_through_head(hidden.to(dtype), head, losses).sum())

    def predicted(self, batch: Batch) -> list[Tensor]:
        """States [n, hidden] that each output token would be proposed from; see `Draft`."""
        return [self.states(batch.examples)]

    def logits(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n, V], of the target's first tokens."""
        logits: Tensor = self.model.get_output_embeddings()(states)
        return logits, None

    def _head_in(self, dtype: torch.dtype) -> nn.Module:
        """The LM head in `dtype`: itself, or a copy."""
        head: nn.Module = self.model.get_output_embeddings()
        if next(head.parameters()).dtype == dtype:
            return head
        if self._head is None:
            self._head = copy.deepcopy(head).to(dtype)
        return self._head

    def save(self, folder: Path) -> None:
        """Write a checkpoint that `models.draft` can name; the weights come last, in one step."""
        write_bytes(folder / "config.json", self.model.config.to_json_string().encode())
        state = self.model.state_dict()
        weights = {key: state[key].detach().cpu().contiguous() for key in self._own}
        with atomic_file(folder / WEIGHTS) as fresh:
            save_file(weights, fresh, metadata={"format": "pt"})

    def restore(self, folder: Path) -> None:
        """Take the weights that `save` wrote."""
        self.model.load_state_dict(load_file(folder / WEIGHTS), strict=False)


def _refuse_quantised(model: Any, name: str, instead: str) -> None:
    """Refuse layers that no gradient goes through.

    Raises:
        DistillError: they stay as another quantised them.
    """
    if stays_quantised(model):
        method = quantised_by(model.config)
        raise DistillError(
            f"{name}: its layers stay quantised by {method} and cannot be trained; {instead}"
        )


def _ends(model: Any) -> list[nn.Module]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _layer_prefix(model: PreTrainedModel, count: int) -> str:
    """What the names of the layers' weights begin with, such as `model.layers.`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{name}."
    raise DistillError(f"{type(model).__name__} has no list of {count} layers to take some from")


def _config_with(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """The config of a model that has only these layers of another."""
    result = copy.deepcopy(config)
    count = config.num_hidden_layers
    for key, value in config.to_dict().items():
        # `layer_types` and its like say something about each layer.
        if "layer" in key and isinstance(value, list) and len(value) == count:
            setattr(result, key, [value[layer] for layer in layers])
    result.num_hidden_layers = len(layers)
    return result
