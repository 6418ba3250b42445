"""What earlier jobs wrote, as a file that all actors of a machine map into memory.

The first actor of a machine that wants it makes it of the outputs, and the others wait. It lies in
the user's cache under a name that says what it was made of, so that a resumed job finds it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import layout
from pipeline.commit import manifest
from pipeline.config.job import JobConfig
from pipeline.errors import UserError
from pipeline.storage.folder import Folder
from specdec.user_cache import cache_folder

if TYPE_CHECKING:
    from specdec.drafters.corpus import Corpus

KEPT = 8
"""Corpora that a machine keeps, 270 MB each at most; those used longest ago go.

Raised, more disk is taken; lowered, jobs of several corpora build them again.
"""

_COLUMNS = ["completion", "finish_reason"]


def corpus_folders(job: JobConfig) -> list[Folder]:
    """The output folders that the job's corpus is made of.

    Raises:
        UserError: one is no job's output, or out of reach.
    """
    try:
        return [manifest.open_output(url, job.s3_of_output) for url in job.speculation.corpus]
    except UserError as error:
        raise UserError(f"speculation.corpus: {error}") from None


def job_corpus(job: JobConfig, tokenizer: Any, vocab_size: int) -> Corpus | None:
    """The job's corpus, opened; None if it has none.

    It is made if this machine has it not, and made again if what the machine has is damaged.

    Args:
        job: the job.
        tokenizer: the target's (transformers).
        vocab_size: tokens that the models share; a tokenizer may have more.

    Raises:
        UserError: a folder is no job's output, there is no completion, or a file cannot be read.
    """
    from specdec.drafters.corpus import VERSION, Corpus, CorpusError, build_corpus

    if not job.generates or not (folders := corpus_folders(job)):
        return None
    units = [sorted(manifest.committed_ids(folder)) for folder in folders]
    mine = tokenizer_mark(tokenizer)
    digest = hashlib.sha256(f"{VERSION} {mine} {vocab_size}".encode())
    for folder, ids in zip(folders, units, strict=True):
        digest.update(json.dumps([folder.url, ids]).encode() + (folder.read(layout.JOB) or b""))
    file = cache_folder() / "corpora" / f"{digest.hexdigest()[:32]}.corpus"
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                corpus = Corpus(file, mine)
            except CorpusError:
                build_corpus(_texts(folders, units, tokenizer, vocab_size), file, mine)
                _forget(file)
                corpus = Corpus(file, mine)
            file.touch()
        return corpus
    except CorpusError as error:
        listed = ", ".join(folder.url for folder in folders)
        raise UserError(f"speculation.corpus ({listed}): {error}") from None


def tokenizer_mark(tokenizer: Any) -> str:
    """What tells tokenizers apart: a digest of their tokens."""
    tokens = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:32]


def _texts(
    folders: Sequence[Folder], units: Sequence[Sequence[str]], tokenizer: Any, vocab_size: int
) -> Iterator[list[int]]:
    """Tokens of the completions in folders, in the order of their units.

    A completion ends before a token that the models do not have.
    """
    for folder, ids in zip(folders, units, strict=True):
        for unit in ids:
            name = layout.completions(unit)
            try:
                with folder.open(name) as file:
                    rows = pq.read_table(file, columns=_COLUMNS).to_pydict()
            except (OSError, pa.ArrowException) as error:
                raise UserError(
                    f"speculation.corpus: {folder.join(name)} cannot be read: {error}"
                ) from None
            texts = [text or "" for text in rows["completion"]]
            for tokens in corpus_tokens(tokenizer, texts, rows["finish_reason"]):
                yield list(itertools.takewhile(lambda token: token < vocab_size, tokens))


def corpus_tokens(
    tokenizer: Any, completions: list[str], reasons: Sequence[str]
) -> Iterator[list[int]]:
    """The tokens of completions, with the end behind those that the target ended.

    Args:
        tokenizer: the target's (transformers).
        completions: texts.
        reasons: the `finish_reason` of each.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not completions:  # a tokenizer asks for some
        return
    tokens = tokenizer(completions, add_special_tokens=False)["input_ids"]
    for each, reason in zip(tokens, reasons, strict=True):
        yield each + end if reason == "stop" else each


def _forget(newest: Path) -> None:
    """Remove the corpora that were used longest ago; who has one open keeps it."""
    files = sorted(newest.parent.glob("*.corpus"), key=lambda file: -file.stat().st_mtime)
    for file in files[KEPT:]:
        file.unlink(missing_ok=True)
