from __future__ import annotations

from pathlib import Path

import pytest

from specdec.loading.pair import ModelPair
from specdec.training.examples import Example
from specdec.training.settings import DistillError
from specdec.training.workspace import Workspace
from tests.specdec.training.drafts import (
    load,
)


@pytest.fixture(scope="module")
def pair(target: Path) -> ModelPair:
    return load(target)


def test_a_folder_of_something_else(
    pair: ModelPair, examples: list[Example], target: Path, tmp_path: Path
) -> None:
    with pytest.raises(DistillError, match="holds another model"):
        Workspace(target).check({"epochs": 1})
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DistillError, match="is a file"):
        Workspace(file).check({})


def test_other_arguments_are_refused_with_the_difference(
    examples: list[Example], tmp_path: Path
) -> None:
    space = Workspace(tmp_path)
    space.check({"epochs": 2, "layers": (0, 1)})
    space.begin({"epochs": 2, "layers": (0, 1)}, examples)
    space.check({"epochs": 2, "layers": (0, 1)})
    assert space.examples() == examples
    with pytest.raises(DistillError, match=r"(?s)other arguments.*epochs: 2 there, 3 here$"):
        space.check({"epochs": 3, "layers": (0, 1)})
