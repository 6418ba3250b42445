"""Whether models of a family run, told from a config alone, before anything is loaded.

`families.yaml` beside this module is what `benchmarks/families.py` found. A model is compared with
its own plain forward when it is loaded, whatever is said here.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from pipeline.errors import UserError

LAYERS = {
    "fused": "layers with a third of the operators, hand-written attention",
    "kernels": "transformers' layers, hand-written attention",
    "torch": "torch's operators alone",
}
"""What runs of a model, by its name in the table."""


class Family(NamedTuple):
    """What became of tiny random models of an architecture.

    Attributes:
        runs: whether the output is what it should be.
        layers: which of LAYERS ran, if any did.
        why: why not, or not in each variant; otherwise empty.
    """

    runs: bool
    layers: Literal["fused", "kernels", "torch"] | None
    why: str


@cache
def families() -> dict[str, Family]:
    """The table, by the model types of transformers."""
    text = resources.files("pipeline.config").joinpath("families.yaml").read_text(encoding="utf-8")
    return {kind: Family(**found) for kind, found in yaml.safe_load(text).items()}


def expected(name: str) -> tuple[str, bool]:
    """What is to be expected of a model, in a line, and whether that is no reason to worry.

    Args:
        name: as in a job file. A GGUF file, or a hub model that is not in the cache, gives "".

    Raises:
        UserError: there is no such folder, or its config cannot be read.
    """
    config = _config(name)
    if line := _eagle(name, config):
        return line, True
    kinds = _model_types(config)
    if not kinds:
        return "", True
    kind = next((each for each in kinds if each in families()), None)
    if kind is None:
        return f"{kinds[0]} is no family that was tried; it is checked when it is loaded", False
    family = families()[kind]
    if family.runs:
        return f"{kind} runs: {LAYERS[family.layers or 'torch']}", True
    return f"{kind} was refused when it was tried: {family.why}", False


def eagle(name: str) -> str:
    """What an EAGLE-3 draft is, in a line; "" for another model, or one that is not here.

    Raises:
        UserError: there is no such folder, or its config is of a draft that cannot run.
    """
    return _eagle(name, _config(name))


def refuse_eagle(name: str | None, why: str) -> None:
    """Refuse an EAGLE-3 draft where a language model is needed, and say why.

    Raises:
        UserError: the draft of that name is EAGLE-3.
    """
    if name is not None and eagle(name):
        raise UserError(f"models.draft: {name} is EAGLE-3, and {why}; give a language model")


def _eagle(name: str, config: dict[str, Any]) -> str:
    from specdec.loading.eagle_config import EagleConfig
    from specdec.loading.sources import PairError

    try:
        found = EagleConfig.of(name, config)
    except PairError as error:
        raise UserError(f"models.draft: {error}") from None
    return found.described() if found is not None else ""


def _model_types(config: dict[str, Any]) -> list[str]:
    """Of the model and of its part for text, as far as the config says."""
    parts = config, config.get("text_config")
    kinds = [part.get("model_type") for part in parts if isinstance(part, dict)]
    return [kind for kind in kinds if isinstance(kind, str)]


def _config(name: str) -> dict[str, Any]:
    """A model's `config.json`, if it is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    from specdec.loading.sources import PairError, find_model

    try:
        source = find_model(name)
    except PairError as error:
        raise UserError(str(error)) from None
    if source.path is None:
        cached = try_to_load_from_cache(source.name, "config.json", revision=source.revision)
        path = Path(cached) if isinstance(cached, str) else None
    else:
        path = source.path / "config.json" if source.path.is_dir() else None
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {name}: {path} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}
