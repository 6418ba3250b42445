"""A target and its draft, saved in folders of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.specdec.loading.saved_models import saved
from tests.specdec.tiny_models import noisy_copy, tiny_model


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return saved(tmp_path / "target", tiny_model())


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return saved(tmp_path / "draft", noisy_copy(tiny_model(), 0.05))
