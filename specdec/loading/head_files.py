"""Acceptance heads on disk: a folder with `head.safetensors` and `card.json`.

The card says what the head was trained for and how well it does. A head knows one draft's hidden
states and how one target judges its candidates, so it is refused for any other pair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from specdec.atomic import write_bytes
from specdec.loading.sources import PairError
from specdec.model.decoder import PackedDecoder
from specdec.policies.signals import AcceptanceHead

WEIGHTS, CARD = "head.safetensors", "card.json"
"""The two files of a head's folder."""

_FORMAT = 1
"""Of the card; raised whenever heads of before can no longer be read, which are then refused."""


class HeadError(PairError):
    """A head that cannot be used with this pair, or at all; the message says why."""


class DescribedPair(Protocol):
    """What loading a head needs of a `ModelPair`."""

    draft: PackedDecoder | None

    def describe(self) -> dict[str, Any]:
        """Names and content digests or revisions of target and draft."""


def save_head(
    folder: str | Path, head: AcceptanceHead, pair: DescribedPair, details: Mapping[str, Any]
) -> dict[str, Any]:
    """Write a head and its card, the card last; each file in one step.

    Args:
        folder: made if it is not there; another head in it is replaced.
        head: in any dtype; kept as float32.
        pair: what it was trained on.
        details: JSON-able: sampling settings, calibration, metrics, versions.

    Returns:
        The card.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = save({name: _plain(tensor) for name, tensor in head.state_dict().items()})
    described = pair.describe()
    card = {
        "format": _FORMAT,
        "pair": {key: described.get(key) for key in ("target", "draft", "dtype", "quantization")},
        "width": head.width,
        "depth": head.depth,
        "reject_weight": head.reject_weight,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        **details,
    }
    text = json.dumps(card, indent=2, allow_nan=False)
    write_bytes(folder / WEIGHTS, weights)
    write_bytes(folder / CARD, text.encode())
    return card


def load_head(folder: str | Path, pair: DescribedPair) -> AcceptanceHead:
    """The head in a folder, on the draft's device and ready to judge its candidates.

    Raises:
        HeadError: there is none, it is damaged, or it was trained for other models.
    """
    folder, card = Path(folder), read_card(folder)
    if pair.draft is None:
        raise HeadError(f"head {folder}: a head judges a draft's candidates; this pair has none")
    ours = pair.describe()
    for role in ("draft", "target"):
        if reason := _differs(card["pair"][role], ours[role]):
            raise HeadError(
                f"head {folder} was trained for another {role}: {reason}; "
                "train one for this pair with `specbatch train-head`"
            )
    width = pair.draft.model.config.get_text_config().hidden_size
    if card["width"] != width:
        raise HeadError(
            f"head {folder} reads hidden states of {card['width']} numbers, but the draft's have "
            f"{width}"
        )
    head = AcceptanceHead(card["width"], card["depth"], card["reject_weight"])
    try:
        data = (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(data).hexdigest() != card["weights_sha256"]:
            raise HeadError(f"head {folder}: {WEIGHTS} is not the file that {CARD} was written for")
        head.load_state_dict(load(data))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise HeadError(f"head {folder}: {WEIGHTS} cannot be used: {reason}") from error
    return head.to(pair.draft.device).eval().requires_grad_(False)


def read_card(folder: str | Path) -> dict[str, Any]:
    """What the card in a folder says.

    Raises:
        HeadError: there is none, or it is not a head's card.
    """
    try:
        card: Any = json.loads((Path(folder) / CARD).read_bytes())
    except FileNotFoundError:
        raise HeadError(f"head {folder}: no acceptance head here: there is no {CARD}") from None
    except (OSError, ValueError) as error:
        raise HeadError(f"head {folder}: {CARD} cannot be read: {error}") from None
    needed = {"format", "pair", "width", "depth", "reject_weight", "weights_sha256"}
    if not isinstance(card, dict) or not needed <= card.keys():
        raise HeadError(f"head {folder}: {CARD} is not the card of an acceptance head")
    if card["format"] != _FORMAT:
        raise HeadError(
            f"head {folder}: its format is {card['format']}, this version reads {_FORMAT}; "
            "train it anew"
        )
    return card


def _differs(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """How two model descriptions differ in content; None if they do not.

    A digest pins a model wherever it lies, so its name is free; a revision pins it with its name.
    """
    pinned = ("digest",) if "digest" in theirs and "digest" in ours else ("name", "revision")
    if all(theirs.get(key) == ours.get(key) for key in pinned):
        return None
    return f"{_named(theirs)}, not {_named(ours)}"


def _named(model: Mapping[str, Any]) -> str:
    pin = ", ".join(f"{key} {model[key]}" for key in ("digest", "revision") if model.get(key))
    return f"{model['name']} ({pin})" if pin else str(model["name"])


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()
