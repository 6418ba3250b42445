from __future__ import annotations

import pytest

from specdec.policies.base import context_class


@pytest.mark.parametrize(
    ("tokens", "least"), [(0, 128), (1, 128), (128, 128), (129, 256), (256, 256), (1025, 2048)]
)
def test_context_class(tokens: int, least: int) -> None:
    assert context_class(tokens) == least
