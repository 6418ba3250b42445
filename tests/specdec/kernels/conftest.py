from __future__ import annotations

from collections.abc import Iterator

import pytest

from specdec.kernels import choose


@pytest.fixture
def anew() -> Iterator[None]:
    """Look for a compiler again, and once more when the test is over."""
    caches = (choose.cpu_kernels, choose._library)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
