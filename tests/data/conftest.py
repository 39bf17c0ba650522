"""Image folders made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Return a function that writes `root/<place>/<class>/<n>.png` of random pixels and returns `root`."""

    def make(*places: str, classes: tuple[str, ...] = ("cat", "dog"), count: int = 4, side: int = 12) -> Path:
        rng = np.random.default_rng(0)
        root = tmp_path / "images"
        for place in places or ("",):
            for name in classes:
                folder = root / place / name
                folder.mkdir(parents=True)
                for number in range(count):
                    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{number}.png")
        return root

    return make


@pytest.fixture
def spoil() -> Callable[[Path], list[Path]]:
    """Return a function that puts a truncated JPEG, a text named .png and an empty file into a folder."""

    def add(folder: Path) -> list[Path]:
        truncated = folder / "truncated.jpg"
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(truncated)
        truncated.write_bytes(truncated.read_bytes()[:-400])
        text = folder / "text.png"
        text.write_text("this is no image")
        empty = folder / "empty.webp"
        empty.write_bytes(b"")
        return [truncated, text, empty]

    return add
