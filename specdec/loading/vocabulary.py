"""Whether two models speak of the same tokens, seen from their tokenizers' files alone."""

from __future__ import annotations

from pathlib import Path

from specdec.loading.conversion import tokenizer_folder
from specdec.loading.loader import load_tokenizer
from specdec.loading.pair import compare_vocabularies
from specdec.loading.sources import ModelSource, find_model


def check_tokenizers(target: str, draft: str, *, trust_remote_code: bool = False) -> None:
    """Compare the vocabularies of two models before either is loaded, where both are at hand.

    Models on a hub, GGUF files that were not converted yet and drafts without a tokenizer are left
    to `ModelPair.load`, which compares again.

    Raises:
        PairError: names the first token that differs.
    """
    sources = [find_model(name) for name in (target, draft)]
    files = [_tokenizer_file(source) for source in sources]
    if None in files or _same_vocabulary(*(file for file in files if file is not None)):
        return
    # Special tokens may be said elsewhere, too: the last word is transformers'.
    ours, theirs = (load_tokenizer(source, trust_remote_code) for source in sources)
    compare_vocabularies(ours, theirs, target, draft)


def _tokenizer_file(source: ModelSource) -> Path | None:
    folder = tokenizer_folder(source)
    file = folder / "tokenizer.json" if folder is not None else None
    return file if file is not None and file.is_file() else None


def _same_vocabulary(first: Path, second: Path) -> bool:
    from tokenizers import Tokenizer

    if first.read_bytes() == second.read_bytes():
        return True
    try:
        ours, theirs = (Tokenizer.from_file(str(file)).get_vocab() for file in (first, second))
    except Exception:  # tokenizers raises nothing more exact
        return False
    return bool(ours == theirs)
