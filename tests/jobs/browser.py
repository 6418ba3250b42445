"""Headless Chromium: pages as a reader sees them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.image import imread


def chromium() -> str | None:
    """The browser, if this machine has one."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def screenshot(page: Path, picture: Path, width: int, height: int = 3000) -> str:
    """Write a picture of the page; return its DOM as it was after loading."""
    browser = chromium()
    assert browser is not None
    with tempfile.TemporaryDirectory() as profile:
        common = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        common += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        for option in (f"--screenshot={picture}", "--dump-dom"):
            result = subprocess.run(
                [*common, option, page.as_uri()], capture_output=True, text=True, timeout=120
            )
    return result.stdout


def columns_at_the_right_edge(picture: Path, width: int) -> int:
    """How many colours the pixels at the right edge have: 1 where nothing sticks out."""
    pixels = imread(picture)
    assert pixels.shape[1] == width
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50  # it is not blank
    return len(np.unique(pixels[:, -4:].reshape(-1, pixels.shape[2]), axis=0))
