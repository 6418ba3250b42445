from __future__ import annotations

from pathlib import Path

import pytest

from specdec.loading.sources import PairError
from tests.specdec.loading.saved_models import EOS, complete, load, saved
from tests.specdec.tiny_models import VOCAB, tiny_model


def test_different_vocabularies_are_an_error_that_names_the_first_difference(
    target: Path, tmp_path: Path
) -> None:
    words = [f"w{i}" for i in range(EOS)]
    words[7], words[9] = "other", "w7"
    draft = saved(tmp_path / "d", tiny_model(seed=1), words)
    with pytest.raises(PairError, match=f"differ at token 7: 'w7' in {target}, 'other' in {draft}"):
        load(target, draft)


def test_a_missing_token_is_a_difference(target: Path, tmp_path: Path) -> None:
    fewer = [f"w{i}" for i in range(EOS - 1)]
    draft = saved(tmp_path / "d", tiny_model(seed=1), fewer)
    with pytest.raises(PairError, match=f"differ at token {EOS - 1}: 'w{EOS - 1}' .*'</s>'"):
        load(target, draft)


@pytest.mark.parametrize(("target_rows", "draft_rows"), [(VOCAB, 112), (128, VOCAB), (128, 112)])
def test_padding_of_a_vocabulary_is_cut_off(
    tmp_path: Path, target_rows: int, draft_rows: int
) -> None:
    target = saved(tmp_path / "t", tiny_model(vocab=target_rows))
    draft = saved(tmp_path / "d", tiny_model(vocab=draft_rows, seed=1))
    pair = load(target, draft)
    assert pair.vocab_size == min(target_rows, draft_rows)
    assert max(complete(pair)) < pair.vocab_size
    assert complete(pair) == complete(pair, k=0)
