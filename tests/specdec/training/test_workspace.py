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
    arguments = {"epochs": 2, "layers": (0, 1), "lr": 1e-3}
    space.check(arguments)
    space.begin(arguments, examples)
    space.check(arguments)
    assert space.examples() == examples
    with pytest.raises(DistillError, match=r"(?s)other arguments.*lr: 0.001 there, 0.002 here$"):
        space.check({**arguments, "lr": 2e-3})


def test_a_run_that_was_stopped_may_go_on_for_longer(
    examples: list[Example], tmp_path: Path
) -> None:
    """One that is done has been that long."""
    space, arguments = Workspace(tmp_path), {"epochs": 2, "minutes": None}
    space.begin(arguments, examples)
    space.check({"epochs": 3, "minutes": 10.0})
    space.finish({"arguments": arguments})
    space.check(arguments)
    with pytest.raises(DistillError, match="epochs: 2 there, 3 here"):
        space.check({**arguments, "epochs": 3})
