"""Where converted models and compiled kernels are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$SPECBATCH_CACHE, or specbatch/ in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("SPECBATCH_CACHE") or f"{base}/specbatch").expanduser()
