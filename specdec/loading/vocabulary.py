"""Whether two models speak of the same tokens, seen from their files alone."""

from __future__ import annotations

from pathlib import Path

from specdec.loading.conversion import tokenizer_folder
from specdec.loading.eagle_config import read_eagle_config, text_sizes
from specdec.loading.loader import load_tokenizer
from specdec.loading.pair import compare_vocabularies
from specdec.loading.sources import ModelSource, find_model


def check_tokenizers(target: str, draft: str, *, trust_remote_code: bool = False) -> None:
    """Compare the vocabularies of two models before either is loaded, where both are at hand.

    Models on a hub, GGUF files that were not converted yet and drafts without a tokenizer are left
    to `ModelPair.load`, which compares again. Of an EAGLE-3 draft sizes are compared as well.

    Raises:
        PairError: names the first token that differs, or the size.
    """
    sources = [find_model(name) for name in (target, draft)]
    _check_eagle(*sources)
    files = [_tokenizer_file(source) for source in sources]
    if None in files or _same_vocabulary(*(file for file in files if file is not None)):
        return
    # Special tokens may be said elsewhere, too: the last word is transformers'.
    ours, theirs = (load_tokenizer(source, trust_remote_code) for source in sources)
    compare_vocabularies(ours, theirs, target, draft)


def _check_eagle(target: ModelSource, draft: ModelSource) -> None:
    """Compare an EAGLE-3 draft with what is at hand of its target."""
    eagle, sizes = read_eagle_config(draft), text_sizes(target)
    if eagle is not None and sizes is not None:
        file = _tokenizer_file(target)
        eagle.check(*sizes, tokens=len(_vocabulary(file)) if file is not None else 0)


def _tokenizer_file(source: ModelSource) -> Path | None:
    folder = tokenizer_folder(source)
    file = folder / "tokenizer.json" if folder is not None else None
    return file if file is not None and file.is_file() else None


def _same_vocabulary(first: Path, second: Path) -> bool:
    if first.read_bytes() == second.read_bytes():
        return True
    ours, theirs = _vocabulary(first), _vocabulary(second)
    return bool(ours) and ours == theirs


def _vocabulary(file: Path) -> dict[str, int]:
    """Tokens and their ids; none if the file cannot be read."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file)).get_vocab()
    except Exception:  # tokenizers raises nothing more exact
        return {}
