"""Load a target and its draft, and make sure that they belong together."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from specdec.kernels.stored import KvDtype
from specdec.loading.eagle import eagle_config, load_eagle
from specdec.loading.eagle_config import EagleConfig
from specdec.loading.heap import keep_freed_memory
from specdec.loading.loader import DType, Loader, load_tokenizer, stored_weights_dtype
from specdec.loading.quantised import quantised_by
from specdec.loading.sources import ModelSource, PairError, find_model, model_digest
from specdec.model.decoder import PackedDecoder
from specdec.model.linear import (
    Quantization,
    is_invariant,
    outputs_of,
    pack_linears,
    packable,
    stays_quantised,
)
from specdec.model.stock import UnsupportedModel

FP8_CAPABILITY = (8, 9)
"""Of NVIDIA GPUs that compute in fp8: what Triton asks of them."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ModelPair:
    """A target and a draft, ready for an `Engine`.

    Attributes:
        target: the model whose distribution the output has.
        draft: the model that proposes, or None.
        tokenizer: the target's (transformers).
        vocab_size: token ids both models know; the engine uses no others.
        context_length, draft_context_length: most positions of each.
        eos_token_ids: what ends an output.
        description: what was loaded, JSON-able, for job records.
    """

    target: PackedDecoder
    draft: PackedDecoder | None
    tokenizer: Any
    vocab_size: int
    context_length: int
    draft_context_length: int
    eos_token_ids: frozenset[int]
    description: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        target: str,
        draft: str | None = None,
        *,
        dtype: DType = "auto",
        kv_dtype: KvDtype = "auto",
        quantization: Quantization | None = None,
        draft_quantization: Quantization | Literal["none"] | None = None,
        deterministic: bool = False,
        device: str | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        trainable: bool = False,
    ) -> ModelPair:
        """Load both models from safetensors (or GGUF) and check that they fit.

        Args:
            target, draft: see `find_model`. A draft checkpoint without embeddings or LM head uses
                the target's. It may be EAGLE-3 (specdec/loading/eagle_config.py).
            dtype: of weights and activations; "auto": see `chosen_dtype`. A GGUF file is converted
                to it on disk, too.
            kv_dtype: of the keys and values of both; see `check_kv_dtype`.
            quantization: int8 linear layers, on a CPU (specdec/model/linear.py).
            draft_quantization: the same for the draft alone, or "none". By default int8 on a CPU: a
                draft only proposes, so that this costs some acceptance and no quality.
            deterministic: batch-invariant kernels for the target: float32 or a quantization, on a
                CPU.
            device: by default "cuda" if there is one, otherwise "cpu".
            device_map: how transformers spreads the target over several devices.
            trust_remote_code: run Python code that comes with the models.
            trainable: leave linear layers as they are; those that are repacked for speed on a CPU
                let no gradient through.

        Raises:
            PairError: a model is missing, unsupported, or does not fit the other.
        """
        try:
            place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError:
            raise PairError(f"device {device}: torch knows no such device") from None
        asked = {"quantization": quantization, "draft_quantization": draft_quantization}
        if draft_quantization is None:
            draft_quantization = "int8" if place.type == "cpu" else "none"
        for kind in (quantization, draft_quantization):
            if kind not in (None, "none") and place.type != "cpu":
                raise PairError(f"quantization {kind} runs on CPUs only, not on {place.type}")
        if (deterministic or quantization) and dtype not in ("auto", "float32"):
            raise PairError(
                f"deterministic and quantization keep everything but linear layers in float32; "
                f"set dtype to float32, not {dtype}"
            )
        if deterministic and place.type != "cpu":
            raise PairError(
                f"deterministic runs on CPUs only: the kernels of {place.type} give a token "
                "different bits in different batches"
            )
        check_kv_dtype(kv_dtype, place)
        if place.type == "cpu":
            keep_freed_memory()
        target_source = find_model(target)
        if dtype == "auto":
            full = trainable or deterministic or quantization is not None
            stored = None if full else stored_weights_dtype(target_source, trust_remote_code)
            dtype = chosen_dtype(stored, place)
        loader = Loader(dtype, place, trust_remote_code)
        target_model, missing = loader.model(target_source, device_map)
        if missing:
            raise PairError(f"target {target}: its weights lack {' and '.join(sorted(missing))}")
        tokenizer = load_tokenizer(target_source, trust_remote_code)
        draft_model: Any = None
        eagle: EagleConfig | None = None
        if draft is not None:
            draft_source = find_model(draft)
            eagle = eagle_config(draft_source)
            if eagle is None:
                draft_model = _load_draft(loader, draft_source, target_model, tokenizer, target)
        _refuse_if_quantised(target_model, target, asked["quantization"], deterministic)
        if draft_model is not None and draft is not None:
            _refuse_if_quantised(draft_model, draft, asked["draft_quantization"])
        models = [model for model in (target_model, draft_model) if model is not None]
        vocab_size = _shared_vocabulary(models, tokenizer)
        try:
            packed = [
                PackedDecoder(
                    model,
                    invariant=deterministic and model is target_model,
                    fuse=not trainable,
                    kv_dtype=kv_dtype,
                )
                for model in models
            ]
        except UnsupportedModel as error:
            raise PairError(str(error)) from error
        pack = place.type == "cpu" and packable(getattr(torch, dtype)) and not trainable
        kind = None if draft_quantization == "none" else draft_quantization
        if pack:
            head = target_model.get_output_embeddings()
            pack_linears(target_model, quantization)
            if draft_model is not None:
                # A draft on the target's LM head packs its own copy only in another precision.
                if draft_model.get_output_embeddings() is head and kind == quantization:
                    draft_model.set_output_embeddings(target_model.get_output_embeddings())
                pack_linears(draft_model, kind)
            if deterministic and not is_invariant(target_model):
                raise PairError(
                    "deterministic: on this processor the linear layers of "
                    f"{quantization or dtype} give a token different bits in different batches"
                )
        if eagle is not None:
            tokens = min(len(tokenizer), vocab_size)
            packed.append(
                load_eagle(
                    dtype, draft_source, eagle, packed[0], tokens, pack=pack, quantization=kind
                )
            )
            draft_model, vocab_size = packed[-1].model, min(vocab_size, packed[-1].vocab_size)
        return cls(
            target=packed[0],
            draft=packed[1] if draft_model is not None else None,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            context_length=packed[0].context_length,
            draft_context_length=packed[-1].context_length,
            eos_token_ids=_eos_token_ids(target_model, tokenizer),
            description={
                "target": _describe(target_source, target_model),
                "draft": _describe(draft_source, draft_model) if draft_model is not None else None,
                "dtype": dtype,
                "kv_dtype": kv_dtype,
                "quantization": quantization,
                "draft_quantization": draft_quantization if draft_model is not None else None,
                "deterministic": deterministic,
                "device": place.type,
            },
        )

    def describe(self) -> dict[str, Any]:
        """What was loaded: names, content digests or revisions, dtype, quantization, device."""
        return self.description


def chosen_dtype(stored: torch.dtype | None, place: torch.device) -> DType:
    """What "auto" is: the dtype of the target's weights where the device is fast in it.

    Args:
        stored: the checkpoint's; None if it has none or full precision is needed anyway.
        place: where the model will be.
    """
    fast = packable(stored) if place.type == "cpu" and stored is not None else True
    if stored == torch.bfloat16 and fast:
        return "bfloat16"
    return "float16" if stored == torch.float16 and fast else "float32"


def check_kv_dtype(kv_dtype: KvDtype, place: torch.device) -> None:
    """Check that a device computes with keys and values of this kind.

    CPUs compute with all of them, on torch's operators.

    Raises:
        PairError: it is an NVIDIA GPU without fp8.
    """
    if kv_dtype != "auto" and place.type == "cpu":
        log.warning("kv_dtype %s: on a CPU layers run on torch's operators, slower", kv_dtype)
    if kv_dtype != "fp8" or place.type != "cuda" or torch.version.cuda is None:
        return
    if (found := torch.cuda.get_device_capability(place)) < FP8_CAPABILITY:
        raise PairError(
            f"kv_dtype fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or more; this one "
            f"has {found[0]}.{found[1]}: set models.kv_dtype to int8"
        )


def load_draft(pair: ModelPair, name: str, *, trust_remote_code: bool = False) -> Any:
    """A draft for the target of a pair that was loaded with `trainable`, as a transformers model.

    Args:
        pair: its target's embedding and LM head are used where the draft's checkpoint has none.
        name: see `find_model`.
        trust_remote_code: run Python code that comes with the draft.

    Raises:
        PairError: the draft is missing or does not fit the target.
    """
    if eagle_config(find_model(name)) is not None:
        raise PairError(f"draft {name} is EAGLE-3; give a draft that is a language model")
    loader = Loader(pair.description["dtype"], pair.target.device, trust_remote_code)
    target_name = pair.description["target"]["name"]
    return _load_draft(loader, find_model(name), pair.target.model, pair.tokenizer, target_name)


def _load_draft(
    loader: Loader, source: ModelSource, target: Any, tokenizer: Any, target_name: str
) -> Any:
    """A model that shares with the target what its checkpoint lacks, vocabularies checked."""
    model, missing = loader.model(source, None)
    _share_modules(target, model, missing, source.name)
    if not missing or _has_tokenizer(source):
        own = load_tokenizer(source, loader.trust_remote_code)
        compare_vocabularies(tokenizer, own, target_name, source.name)
    return model


def _refuse_if_quantised(
    model: Any, name: str, quantization: str | None, deterministic: bool = False
) -> None:
    """Refuse what would change layers that stay as another quantised them.

    Raises:
        PairError: they cannot be quantised again, or made deterministic.
    """
    asked = quantization not in (None, "none")
    if not (asked or deterministic) or not stays_quantised(model):
        return
    method = quantised_by(model.config)
    if asked:
        raise PairError(
            f"quantization {quantization}: the weights of {name} are quantised already, by "
            f"{method}; leave it out"
        )
    raise PairError(
        f"deterministic: layers of {name} stay quantised by {method}, whose kernels give a token "
        "different bits in different batches; take a checkpoint that is not quantised"
    )


def _has_tokenizer(source: ModelSource) -> bool:
    """Whether a local source brings a tokenizer of its own."""
    path = source.path
    return path is None or path.is_file() or any(path.glob("tokenizer*"))


def _share_modules(target: Any, draft: Any, missing: frozenset[str], name: str) -> None:
    """Give the draft the target's embedding and LM head where its checkpoint has none."""
    ours, theirs = (model.config.get_text_config() for model in (target, draft))
    if missing and ours.hidden_size != theirs.hidden_size:
        raise PairError(
            f"draft {name} has no {' and '.join(sorted(missing))} and cannot use the target's: "
            f"its hidden size is {theirs.hidden_size}, the target's {ours.hidden_size}"
        )
    if "embed_tokens.weight" in missing:
        draft.set_input_embeddings(target.get_input_embeddings())
    if "lm_head.weight" in missing or (missing and theirs.tie_word_embeddings):
        draft.set_output_embeddings(target.get_output_embeddings())


def _shared_vocabulary(models: list[Any], tokenizer: Any) -> int:
    """How many token ids all models, of which the target is the first, give logits for.

    Raises:
        PairError: the draft lacks tokens that the target can sample.
    """
    sizes: list[int] = [outputs_of(model.get_output_embeddings()) for model in models]
    vocab_size = min(sizes)
    if min(len(tokenizer), sizes[0]) > vocab_size:
        raise PairError(
            f"the target's tokenizer has {len(tokenizer)} tokens, but the models share only "
            f"{vocab_size}"
        )
    if len(tokenizer) > vocab_size:
        log.warning(
            "the tokenizer has %d tokens, the target gives logits for %d: a prompt with one of the "
            "others is an error of its row, and none of them is ever sampled",
            len(tokenizer), vocab_size,
        )  # fmt: skip
    return vocab_size


def compare_vocabularies(target: Any, draft: Any, target_name: str, draft_name: str) -> None:
    """Check that both tokenizers give the same token to every id; only padding rows may differ.

    Raises:
        PairError: names the first token that differs.
    """
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    by_id = [{index: token for token, index in vocab.items()} for vocab in (ours, theirs)]
    for index in sorted(by_id[0].keys() | by_id[1].keys()):
        left, right = (tokens.get(index) for tokens in by_id)
        if left != right:
            raise PairError(
                f"the vocabularies differ at token {index}: {left!r} in {target_name}, {right!r} "
                f"in {draft_name}; a draft must use its target's tokenizer"
            )


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        ids.update(value if isinstance(value, list) else [value] if value is not None else [])
    return frozenset(ids)


def _describe(source: ModelSource, model: nn.Module) -> dict[str, Any]:
    """A model's name and what pins its content."""
    pinned: dict[str, Any] = {"name": source.name}
    if source.path is None:
        pinned["revision"] = getattr(model.config, "_commit_hash", None) or source.revision
    else:
        pinned["digest"] = model_digest(source.path)
    return pinned
