"""transformers' loading of one model, with whatever goes wrong in one line.

Checkpoints of vision-language models are loaded by their own class, and their text part is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from specdec.loading.conversion import model_folder, tokenizer_folder
from specdec.loading.gguf_header import stored_dtype
from specdec.loading.quantised import (
    check_dtype,
    check_packages,
    decompress,
    how_to_load,
    quantised_by,
)
from specdec.loading.sources import ModelSource, PairError
from specdec.model.linear import PLAIN

DType = Literal["auto", "float32", "bfloat16", "float16"]

SHARED_MODULES = ("embed_tokens.weight", "lm_head.weight")
"""Ends of the names of weights that a draft's checkpoint may lack: it uses the target's."""

NOT_FOR_TEXT = (
    "visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector",
)  # fmt: skip
"""Parts of multimodal models that no text goes through; they are dropped once loaded."""

LONGEST_REASON = 400
"""Characters of an error's text that are shown; raised, a whole report of weights may be."""

QUANTISED_AS = torch.bfloat16
"""The dtype in which quantised weights count as stored where the checkpoint does not say.

Quantised numbers have a scale and at most 8 bits each, so bfloat16's 8 bits lose little. float32
would double the file on disk and the time to stream its weights.
"""


@dataclass(frozen=True, slots=True)
class Loader:
    """transformers' loading, with the errors of a user's mistake made readable."""

    dtype: DType
    device: torch.device
    trust_remote_code: bool

    def model(
        self, source: ModelSource, device_map: str | Mapping[str, Any] | None
    ) -> tuple[Any, frozenset[str]]:
        """The model, in evaluation mode, and which of SHARED_MODULES its checkpoint lacks."""
        dtype = getattr(torch, self.dtype)
        folder = model_folder(source, dtype)
        config = _config(folder, source, self.trust_remote_code)
        options: dict[str, Any] = {}
        if method := quantised_by(config):
            check_packages(source.name, method)
            check_dtype(source.name, method, dtype, self.device)
            # Its kernels are chosen for the device that the weights are loaded to.
            device_map = device_map or {"": self.device}
            options = how_to_load(config, method)
        try:
            loaded: Any = _auto_class(config).from_pretrained(
                folder,
                revision=source.revision,
                dtype=dtype,
                device_map=device_map,
                use_safetensors=True,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
            if method:
                decompress(loaded[0])
        except Exception as error:  # of transformers or a package for quantised weights
            raise PairError(f"model {source.name} cannot be loaded: {reason(error)}") from error
        model, info = loaded
        missing = {name for name in info["missing_keys"] if "rotary" not in name}
        shared = frozenset(end for end in SHARED_MODULES for name in missing if name.endswith(end))
        other = sorted(name for name in missing if not name.endswith(SHARED_MODULES))
        if other:
            raise PairError(
                f"model {source.name}: its weights lack {other[0]} and {len(other) - 1} more"
            )
        if info["mismatched_keys"]:
            key = sorted(str(mismatch) for mismatch in info["mismatched_keys"])[0]
            raise PairError(
                f"model {source.name}: weights do not have the shapes of its config.json: {key}"
            )
        _drop_other_parts(model)
        if method:
            _convert_plain_weights(model, dtype)
        if device_map is None:
            model = model.to(self.device)
        return model.eval().requires_grad_(False), shared


def _auto_class(config: Any) -> Any:
    """What loads a model: AutoModelForCausalLM, or the one for models with images as well."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _config(folder: str, source: ModelSource, trust_remote_code: bool) -> Any:
    """A model's config (transformers).

    Raises:
        PairError: it has none, or one that cannot be used.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            folder, revision=source.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # of transformers, or of Python code that comes with the model
        raise PairError(f"model {source.name} cannot be loaded: {reason(error)}") from error


def stored_weights_dtype(source: ModelSource, trust_remote_code: bool) -> torch.dtype | None:
    """The dtype of a checkpoint's weights, by its config.json or a GGUF file's header.

    Raises:
        PairError: neither can be read.
    """
    path = source.path
    if path is not None and path.is_file():
        try:
            return stored_dtype(path) or QUANTISED_AS
        except (OSError, ValueError) as error:
            raise PairError(f"model {source.name} cannot be loaded: {reason(error)}") from error
    config = _config(str(path or source.name), source, trust_remote_code)
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if quantised_by(config) and stored not in (torch.bfloat16, torch.float16):
        return QUANTISED_AS
    return stored if isinstance(stored, torch.dtype) else None


def _drop_other_parts(model: nn.Module) -> None:
    """Drop what a multimodal model has for images and sound, and with it its memory."""
    for module in [model, *model.children()]:
        for name in NOT_FOR_TEXT:
            if isinstance(getattr(module, name, None), nn.Module):
                delattr(module, name)


def _convert_plain_weights(model: Any, dtype: torch.dtype) -> None:
    """Bring weights that a quantiser left in another precision to the dtype that was asked for.

    What it expands may have the dtype of its scales. Numbers that it packed stay as they are, and
    so does what an architecture keeps in float32.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, weight in model.named_parameters():
        exact = weight.dtype == torch.float32 and any(part in name for part in kept)
        if type(weight) is nn.Parameter and weight.dtype in PLAIN and not exact:
            weight.data = weight.data.to(dtype)


def load_tokenizer(source: ModelSource, trust_remote_code: bool) -> Any:
    """A model's tokenizer (transformers); a GGUF file must have been converted.

    Raises:
        PairError: it has none, or one that cannot be used.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(tokenizer_folder(source) or source.name),
            revision=source.revision,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:  # of transformers, or of a package that the tokenizer needs
        raise PairError(f"model {source.name} has no usable tokenizer: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What went wrong, in one line, with the packages to install if some are missing."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            "it needs Python code of its own; if you trust it, set models.trust_remote_code to true"
        )
    if isinstance(error, ImportError):
        missing = getattr(error, "name", None)
        install = f"; try `pip install {missing}`" if missing and "pip install" not in text else ""
        return f"a package is missing: {text[:LONGEST_REASON]}{install}"
    if isinstance(error, (OSError, ValueError, RuntimeError)) and text:
        return str(error).strip().splitlines()[0][:LONGEST_REASON]
    return f"{type(error).__name__}: {text[:LONGEST_REASON]}" if text else type(error).__name__
