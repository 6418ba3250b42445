from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specdec.loading.head_files import CARD, WEIGHTS, HeadError, load_head, read_card, save_head
from specdec.loading.pair import ModelPair
from specdec.loading.sources import PairError
from specdec.policies.signals import AcceptanceHead
from tests.specdec.loading.saved_models import saved
from tests.specdec.tiny_models import noisy_copy, tiny_model

HIDDEN = 64


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    target = tiny_model()
    return {
        "target": saved(root / "target", target),
        "draft": saved(root / "draft", noisy_copy(target, 0.05)),
        "other": saved(root / "other", noisy_copy(target, 0.2)),
    }


def load(
    folders: dict[str, Path], target: str = "target", draft: str | None = "draft"
) -> ModelPair:
    draft_folder = str(folders[draft]) if draft else None
    return ModelPair.load(str(folders[target]), draft_folder, device="cpu")


@pytest.fixture(scope="module")
def pair(folders: dict[str, Path]) -> ModelPair:
    return load(folders)


@pytest.fixture
def head() -> AcceptanceHead:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = AcceptanceHead(HIDDEN, depth=2, reject_weight=6.0)
        for parameter in made.parameters():
            parameter.data = torch.randn_like(parameter)
    return made


@pytest.fixture
def folder(tmp_path: Path, pair: ModelPair, head: AcceptanceHead) -> Path:
    save_head(tmp_path / "head", head, pair, {"metrics": {"ece": 0.01}})
    return tmp_path / "head"


def test_a_head_comes_back_bit_for_bit(folder: Path, pair: ModelPair, head: AcceptanceHead) -> None:
    loaded = load_head(folder, pair)
    assert (loaded.width, loaded.depth, loaded.reject_weight) == (HIDDEN, 2, 6.0)
    hidden, signals = torch.randn(5, HIDDEN), torch.randn(5, 3)
    with torch.no_grad():
        assert torch.equal(loaded.debiased(hidden, signals), head.debiased(hidden, signals))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert sorted(file.name for file in folder.iterdir()) == [CARD, WEIGHTS]


def test_the_card_says_what_the_head_is_for(folder: Path, pair: ModelPair) -> None:
    card = read_card(folder)
    for role in ("target", "draft"):
        assert card["pair"][role] == pair.describe()[role]
    assert card["metrics"] == {"ece": 0.01}
    assert card["width"] == HIDDEN


def test_saving_again_replaces_the_head(
    folder: Path, pair: ModelPair, head: AcceptanceHead
) -> None:
    head.before.bias.data += 1
    save_head(folder, head, pair, {})
    assert torch.equal(load_head(folder, pair).before.bias, head.before.bias)


@pytest.mark.parametrize(
    ("names", "role"), [({"draft": "other"}, "draft"), ({"target": "other"}, "target")]
)
def test_another_pair_is_refused(
    folder: Path, folders: dict[str, Path], names: dict[str, str], role: str
) -> None:
    with pytest.raises(PairError, match=f"another {role}: .*digest .*, not .*train-head"):
        load_head(folder, load(folders, **names))


def test_a_pair_is_the_same_wherever_its_files_are(
    folder: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in folders["draft"].iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    load_head(folder, load({**folders, "draft": moved}))


def test_a_pair_without_draft_is_refused(folder: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(HeadError, match="this pair has none"):
        load_head(folder, load(folders, draft=None))


def test_another_width_is_refused(tmp_path: Path, pair: ModelPair) -> None:
    save_head(tmp_path, AcceptanceHead(32, 1), pair, {})
    with pytest.raises(HeadError, match="hidden states of 32 numbers, but the draft's have 64"):
        load_head(tmp_path, pair)


def test_what_is_no_head_is_refused(tmp_path: Path, pair: ModelPair) -> None:
    with pytest.raises(HeadError, match="no acceptance head here"):
        load_head(tmp_path, pair)
    (tmp_path / CARD).write_text("{")
    with pytest.raises(HeadError, match="cannot be read"):
        load_head(tmp_path, pair)
    (tmp_path / CARD).write_text('{"model": 1}')
    with pytest.raises(HeadError, match="not the card of an acceptance head"):
        load_head(tmp_path, pair)


def test_weights_of_another_card_are_refused(folder: Path, pair: ModelPair) -> None:
    (folder / WEIGHTS).write_bytes(b"half of a file")
    with pytest.raises(HeadError, match="not the file that"):
        load_head(folder, pair)
    (folder / WEIGHTS).unlink()
    with pytest.raises(HeadError, match="cannot be used"):
        load_head(folder, pair)


def test_another_format_is_refused(folder: Path, pair: ModelPair) -> None:
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps(card | {"format": 99}))
    with pytest.raises(HeadError, match="its format is 99"):
        load_head(folder, pair)


@pytest.mark.parametrize("changed", [{}, {"revision": "b"}, {"name": "o/n"}, {"digest": "d"}])
def test_hub_models_are_told_apart_by_name_and_revision(
    tmp_path: Path, pair: ModelPair, changed: dict[str, str]
) -> None:
    class Hub:
        draft = pair.draft

        def __init__(self, draft: dict[str, str]) -> None:
            self.named = draft

        def describe(self) -> dict[str, object]:
            return {"target": {"name": "o/t", "revision": "1"}, "draft": self.named}

    named = {"name": "o/m", "revision": "a"}
    save_head(tmp_path, AcceptanceHead(HIDDEN, 1), Hub(named), {})
    other = {"name": "./m", "digest": "d"} if "digest" in changed else named | changed
    if not changed:
        load_head(tmp_path, Hub(other))
        return
    with pytest.raises(HeadError, match="another draft"):
        load_head(tmp_path, Hub(other))
