"""What transformers loads a model from: its folder, or the folder that a GGUF file becomes.

A GGUF file is converted once for each dtype that is asked for, to safetensors in the user's cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from specdec.atomic import atomic_folder
from specdec.loading.gguf_header import stored_dtype
from specdec.loading.sources import ModelSource, PairError
from specdec.user_cache import cache_folder

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What models are loaded in, and GGUF files are converted to."""


def model_folder(source: ModelSource, dtype: torch.dtype) -> str:
    """What from_pretrained takes; a GGUF file is converted if it was not yet.

    Args:
        source: from `find_model`.
        dtype: what the model will be loaded in, and a GGUF file is converted to.

    Raises:
        PairError: the GGUF file cannot be read.
    """
    path = source.path
    if path is None:
        return source.name
    if not path.is_file():
        return str(path)
    folder = _converted(path, dtype)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as fresh:
            _convert(source.name, path, dtype, fresh)
    return str(folder)


def tokenizer_folder(source: ModelSource) -> Path | None:
    """The folder with the tokenizer of a model that is here; None for others.

    All conversions of a GGUF file have the same one, and before the first there is none.
    """
    path = source.path
    if path is None or not path.is_file():
        return path
    conversions = (_converted(path, dtype) for dtype in DTYPES)
    return next((folder for folder in conversions if folder.is_dir()), None)


def _converted(gguf: Path, dtype: torch.dtype) -> Path:
    """Where the conversion of a GGUF file is, or will be."""
    stat = gguf.stat()
    content = f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    return cache_folder() / "gguf" / f"{gguf.stem}-{key}-{str(dtype).removeprefix('torch.')}"


def _convert(name: str, gguf: Path, dtype: torch.dtype, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # From some version on transformers keeps weights packed where it has kernels for them.
    config: Any = getattr(transformers, "GgufConfig", None)
    plain = {"quantization_config": config(dequantize=True)} if config is not None else {}
    try:
        stored_dtype(gguf)  # which says of a damaged file what is wrong with it
        model: Any = AutoModelForCausalLM.from_pretrained(**where, **plain, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError, KeyError) as error:
        raise PairError(f"model {name}: cannot read this GGUF file: {error}") from error
    # The weights are plain numbers now, but transformers does not save what it calls quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
