"""Whether models of a family run, told from a config alone, before anything is loaded.

`families.yaml` beside this module is what `benchmarks/families.py` found. A model is compared with
its own plain forward when it is loaded, whatever is said here.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple

import yaml

from pipeline.config.model_files import read_model_file
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
        runs: whether the output is what it should be, or is where it is not refused.
        layers: which of LAYERS ran, if any did.
        why: why not; of one that runs in part, what was refused and why; otherwise empty.
        recurrent: whether they had layers whose state runs on: Mamba, gated delta nets.
    """

    runs: bool
    layers: Literal["fused", "kernels", "torch"] | None
    why: str
    recurrent: bool = False

    @property
    def verdict(self) -> str:
        """In a word or two: a variant or dtype of a family may be refused while others run."""
        if not self.runs:
            return "refused"
        return "in part" if self.why else "yes"


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
    config = read_model_file(name, "config.json")
    if line := _eagle(name, config):
        return line, True
    kind, family = _family(config)
    if not kind:
        return "", True
    if family is None:
        return f"{kind} is no family that was tried; it is checked when it is loaded", False
    if family.runs:
        layers = LAYERS[family.layers or "torch"]
        if family.why:
            return f"{kind} runs in part ({layers}); refused was {family.why}", False
        return f"{kind} runs: {layers}", True
    return f"{kind} was refused when it was tried: {family.why}", False


def eagle(name: str) -> str:
    """What an EAGLE-3 draft is, in a line; "" for another model, or one that is not here.

    Raises:
        UserError: there is no such folder, or its config is of a draft that cannot run.
    """
    return _eagle(name, read_model_file(name, "config.json"))


def without_trees(target: str, draft: str | None) -> str:
    """Why candidates of a pair cannot branch; "" if they can, or configs do not tell a family.

    Raises:
        UserError: a folder is not there, or a config cannot be read.
    """
    if draft is None:
        return "there is no draft"
    for role, name in (("draft", draft), ("target", target)):
        config = read_model_file(name, "config.json")
        if _eagle(name, config):
            return "the draft is EAGLE-3, which proposes chains"
        _, family = _family(config)
        if family is not None and family.recurrent:
            return f"the {role} has layers whose state runs on, which cannot branch"
    return ""


def _eagle(name: str, config: dict[str, Any]) -> str:
    from specdec.loading.eagle_config import EagleConfig
    from specdec.loading.sources import PairError

    try:
        found = EagleConfig.of(name, config)
    except PairError as error:
        raise UserError(f"models.draft: {error}") from None
    return found.described() if found is not None else ""


def _family(config: dict[str, Any]) -> tuple[str, Family | None]:
    """The model type of a config, and what the table has of it.

    A config of a model with images has another one for its part for text. The first of the two that
    the table has counts; the type is "" where a config says none.
    """
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, dict) else [])]
    kinds = [kind for part in parts if isinstance(kind := part.get("model_type"), str)]
    kind = next((each for each in kinds if each in families()), next(iter(kinds), ""))
    return kind, families().get(kind)
