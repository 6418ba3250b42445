"""JSON files of a model, such as its `config.json`, read from its folder or the hub's cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


class HubError(UserError):
    """The hub did not give a file that is not on this machine."""


def read_model_file(name: str, file: str, *, ask_hub: bool = False) -> dict[str, Any]:
    """What a JSON file of a model says; empty if the model has none, as GGUF files do not.

    Args:
        name: the model, as in a job file.
        file: such as `config.json`.
        ask_hub: whether the hub is asked for a file that is not in its cache here.

    Raises:
        UserError: there is no such model, or the file cannot be read.
        HubError: the hub does not answer.
    """
    path = _find(name, file, ask_hub)
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {name}: {path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _find(name: str, file: str, ask_hub: bool) -> Path | None:
    """Where a model's file is on this machine, or is now."""
    from specdec.loading.sources import PairError, find_model

    try:
        source = find_model(name)
    except PairError as error:
        raise UserError(str(error)) from None
    if source.path is not None:
        path = source.path / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(source.name, file, revision=source.revision)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None or not ask_hub:  # known not to be there
        return None
    try:
        return Path(hf_hub_download(source.name, file, revision=source.revision))
    except Exception as error:  # network, HTTP and validation errors have no common class
        # What is not in the cache of a machine without network may well be on the hub.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise HubError(
            f"model {name}: the hub did not give its {file} ({type(error).__name__}); check the "
            "name, the network, or give a folder"
        ) from None
