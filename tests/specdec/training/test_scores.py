from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.loading.pair import ModelPair
from specdec.model.decoder import PackedDecoder
from specdec.training.examples import Example
from specdec.training.scores import output_positions, score
from tests.specdec.tiny_models import VOCAB
from tests.specdec.training.drafts import (
    load,
    plain_probs,
)


@pytest.fixture(scope="module")
def pair(target: Path) -> ModelPair:
    return load(target)


def test_output_positions() -> None:
    assert output_positions([(3, 2), (1, 1)]) == [2, 3, 4]
    assert output_positions([(3, 2), (1, 1)], stride=6) == [2, 3, 6]


def scored(pair: ModelPair, examples: list[Example], folder: Path, **options: Any) -> Any:
    settings = {"vocab_size": VOCAB, "top_k": 8, "identity": "t", **options}
    return score(pair.target, examples, folder, **settings)


def test_scores_are_the_targets_top_k(
    pair: ModelPair, examples: list[Example], tmp_path: Path
) -> None:
    scores = scored(pair, examples, tmp_path)
    for index in (0, 17, len(examples) - 1):
        ids, probs = scores.of([index])
        expected = plain_probs(examples[index])
        assert torch.allclose(probs, expected.topk(8).values, atol=1e-5)
        assert torch.allclose(expected.gather(1, ids), probs, atol=1e-5)
    ids, probs = scores.of([5, 2])
    assert torch.equal(probs, torch.cat([scores.of([5])[1], scores.of([2])[1]]))


def test_scores_are_computed_once(
    pair: ModelPair,
    examples: list[Example],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specdec.training.scores._SHARD_EXAMPLES", 8)
    first = scored(pair, examples, tmp_path).of(range(len(examples)))
    shards = set(tmp_path.iterdir())
    assert len(shards) > 3
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    # One example less changes the shard that it was in, and no other.
    scored(pair, examples[1:], tmp_path, progress=tell)
    assert len(set(tmp_path.iterdir()) - shards) == 1
    assert told == [(told[0][1], told[0][1])]
    (new,) = set(tmp_path.iterdir()) - shards
    new.unlink()

    def refuse(*arguments: object) -> None:
        raise AssertionError("the target was asked again")

    monkeypatch.setattr(PackedDecoder, "forward", refuse)
    again = scored(pair, examples, tmp_path).of(range(len(examples)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in ({"top_k": 4}, {"vocab_size": 90}, {"identity": "u"}):
        with pytest.raises(AssertionError, match="asked again"):
            scored(pair, examples, tmp_path, **other)
