"""Read image files as 8-bit RGB, and know the errors that Pillow raises for those that it cannot read."""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any

from finetune_bn.errors import BadData, MissingDependency, complaint


def import_pillow() -> Any:
    """Return the module `PIL.Image`, or raise `MissingDependency` where Pillow is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependency(
            complaint("pillow", "not installed", "pillow 10.3 and newer", "Run: pip install pillow")
        ) from error
    return Image


def unreadable() -> tuple[type[Exception], ...]:
    """Return what Pillow raises for files that are missing, empty, truncated, damaged, too large or no images."""
    bomb: type[Exception] = import_pillow().DecompressionBombError
    return (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, bomb)


def as_rgb(image: Any) -> Any:
    """Bring a Pillow image to RGB with 8 bits per channel; 16-bit gray is scaled, where Pillow would clip it to white.

    Raises:
        ValueError: the pixels are floats or do not fit 16 bits, so that white is at no agreed value.
    """
    import numpy as np

    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
            raise ValueError("its pixels do not fit 16 bits; save it with 8 or 16 bits")
        # 257 = 65535 / 255
        image = import_pillow().fromarray((pixels // 257).astype(np.uint8))
    return image.convert("RGB")


def open_rgb(path: str | os.PathLike[str]) -> Any:
    """Read an image file whole, as RGB.

    Raises:
        BadData: it cannot be read; it is named.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise BadData(complaint("image", os.fspath(path), "an image file", "There is no such file."))
    try:
        with import_pillow().open(path) as image:
            return as_rgb(image)
    except unreadable() as error:
        why = f"It failed with: {type(error).__name__}: {error}."
        raise BadData(complaint("image", os.fspath(path), "an image file that can be read whole", why)) from error
