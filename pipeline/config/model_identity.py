"""The job's models and acceptance head before they are loaded: there, and which ones exactly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.config.job import JobConfig, ModelsConfig
from pipeline.errors import UserError


def model_identity(name: str) -> dict[str, str]:
    """What pins a model's content: digest of local files, or the commit of a hub name.

    Raises:
        UserError: the model is not there.
    """
    from specdec.loading.sources import PairError, find_model, model_digest

    try:
        source = find_model(name)
    except PairError as error:
        raise UserError(str(error)) from None
    if source.path is not None:
        return {"name": source.path.name, "digest": model_digest(source.path)}
    return {"name": source.name, "revision": _hub_commit(source.name, source.revision)}


def head_identity(folder: str) -> str:
    """What pins an acceptance head's content.

    Raises:
        UserError: there is no head in the folder.
    """
    card = _head_card(folder)
    return digest([card[name] for name in ("weights_sha256", "depth", "reject_weight")])


def check_models(job: JobConfig, *, ask_hub: bool = True) -> None:
    """Check that draft and head are there and the head is for this pair, as far as files tell.

    The target is in every fingerprint; with `coupled` verification draft and head are not.

    Args:
        job: the job.
        ask_hub: whether the hub is asked for models that are not here; otherwise it has them.

    Raises:
        UserError: names what is missing, or the model that the head was trained for.
    """
    models, folder = job.models, job.speculation.head
    if models.draft is None or not job.drafts:
        return
    pair = {} if folder is None else _head_card(folder)["pair"]
    names = {"draft": models.draft} | ({} if folder is None else {"target": models.target})
    ours = {role: model_identity(name) for role, name in names.items() if ask_hub or is_here(name)}
    check_tokenizers(models)
    for role, mine in ours.items():
        theirs = pair.get(role) or {}
        if {"digest"} <= theirs.keys() & mine.keys() and theirs["digest"] != mine["digest"]:
            raise UserError(
                f"speculation.head: {folder} was trained for another {role}, "
                f"{theirs.get('name')}; train one for this pair with `specbatch train-head`"
            )


def is_here(name: str) -> bool:
    """Whether a model is a file or folder of this machine, and not a name on the hub."""
    from specdec.loading.sources import find_model

    return find_model(name).path is not None


def check_tokenizers(models: ModelsConfig) -> None:
    """Check that the draft has its target's vocabulary, where both are local.

    Raises:
        UserError: names the first token that differs.
    """
    from specdec.loading import vocabulary
    from specdec.loading.sources import PairError

    if models.draft is None:
        return
    code = models.trust_remote_code
    try:
        vocabulary.check_tokenizers(models.target, models.draft, trust_remote_code=code)
    except PairError as error:
        raise UserError(f"models.draft: {error}") from None


def _head_card(folder: str) -> dict[str, Any]:
    from specdec.loading.head_files import WEIGHTS, HeadError, read_card

    try:
        card = read_card(folder)
    except HeadError as error:
        raise UserError(f"speculation.head: {error}") from None
    if not Path(folder, WEIGHTS).is_file():
        raise UserError(f"speculation.head: {folder} has no {WEIGHTS}")
    return card


def _hub_commit(name: str, revision: str | None) -> str:
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        # …/snapshots/COMMIT/config.json
        return cached.replace("\\", "/").split("/")[-2]
    try:
        return str(HfApi().model_info(name, revision=revision, timeout=20).sha)
    except Exception as error:  # network, HTTP and validation errors have no common class
        raise UserError(
            f"model {name}: not in the local Hugging Face cache, and the hub did not give it "
            f"({type(error).__name__}); check the name, the network, or give a folder"
        ) from None


def digest(value: object) -> str:
    """A short digest of plain data."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
