"""Image files, damaged at random, before every reader: a picture, or an error that names the file."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageFile

from finetune_bn.data import ImageFolderData
from finetune_bn.errors import BadData
from finetune_bn.utilities.images import open_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MODES = {
    "PNG": ("RGB", "RGBA", "L", "P", "1", "I;16", "LA"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "P", "1"),
    "TIFF": ("RGB", "F", "I;16", "I", "CMYK", "1"),
    "PPM": ("RGB", "L"),
}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif")
SIZES = ((60_000, 60_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 0), (100_000, 3), (2**31 - 1, 2**31 - 1), (12, 11))

Damage = tuple[Any, ...]


@cache
def encoded(kind: str, mode: str) -> bytes:
    """Return a picture of 12 x 10 pixels as a file of this format and mode."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode.startswith(("I", "F")):
        gray = pixels[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        image = Image.fromarray(gray * 200 if mode != "F" else gray)
    else:
        image = image.convert(mode)
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def damages() -> st.SearchStrategy[Damage]:
    """Draw one kind of damage."""
    place = st.floats(0, 1)
    return st.one_of(
        st.tuples(st.just("cut"), place),
        st.tuples(st.just("flip"), st.lists(st.tuples(place, st.integers(0, 7)), min_size=1, max_size=20)),
        st.tuples(st.just("zeros"), place, st.integers(1, 60)),
        st.tuples(st.just("noise"), place, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("twice"), place),
        st.tuples(st.just("header"), st.sampled_from(SIZES)),
        st.tuples(
            st.just("other"), st.sampled_from(["", "text", "svg", "html", "zip", "random"]), st.binary(max_size=200)
        ),
        st.just(("none",)),
    )


def files() -> st.SearchStrategy[tuple[str, str, list[Damage], str]]:
    """Draw a file: format, mode, what is done to it, and the suffix of its name."""
    kinds = st.sampled_from(FORMATS).flatmap(lambda kind: st.tuples(st.just(kind), st.sampled_from(MODES[kind])))
    return st.tuples(kinds, st.lists(damages(), min_size=1, max_size=3), st.sampled_from(SUFFIXES)).map(
        lambda drawn: (*drawn[0], drawn[1], drawn[2])
    )


def damage(content: bytes, damages: list[Damage]) -> bytes:
    """Return the bytes of a file after the damage."""
    for kind, *how in damages:
        at = int(how[0] * len(content)) if how and isinstance(how[0], float) else 0
        if kind == "cut":
            content = content[:at]
        elif kind == "flip":
            changed = bytearray(content)
            for place, bit in how[0]:
                if changed:
                    changed[min(int(place * len(changed)), len(changed) - 1)] ^= 1 << bit
            content = bytes(changed)
        elif kind == "zeros":
            content = content[:at] + bytes(how[1]) + content[at + how[1] :]
        elif kind == "noise":
            content = content[:at] + how[1] + content[at + len(how[1]) :]
        elif kind == "twice":
            content = content + content[at:]
        elif kind == "header":
            content = _with_size(content, *how[0])
        elif kind == "other":
            content = _other(how[0], how[1])
    return content


def _with_size(content: bytes, width: int, height: int) -> bytes:
    """Write another size into the header of a PNG, BMP, GIF or PPM file; other files stay."""
    if content.startswith(b"\x89PNG") and len(content) > 33:
        head = content[12:16] + struct.pack(">II", width, height) + content[24:29]
        return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]
    if content.startswith(b"BM") and len(content) > 26:
        return content[:18] + struct.pack("<ii", width, height) + content[26:]
    if content.startswith(b"GIF8") and len(content) > 10:
        return content[:6] + struct.pack("<HH", width % 65536, height % 65536) + content[10:]
    if content[:2] in (b"P5", b"P6"):
        return content[:3] + f"{width} {height}\n255\n".encode() + content[12:]
    return content


def _other(kind: str, noise: bytes) -> bytes:
    starts = {
        "text": b"not an image\n",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
        "html": b"<!DOCTYPE html><title>404</title>",
        "zip": b"PK\x03\x04",
    }
    return starts.get(kind, b"") + (noise if kind else b"")


def look_at(file: tuple[str, str, list[Damage], str], model: Any, folder: Path, thorough: bool) -> Counter[str]:
    """Read a damaged file every way there is; assert that each gives a picture or names the file.

    Args:
        file: see `files`.
        model: a `TrainedModel`, which predicts from paths.
        folder: an empty folder to work in.
        thorough: also as part of a data set, and predict from it.
    """
    kind, mode, damages, suffix = file
    happened: Counter[str] = Counter()
    path = folder / f"damaged{suffix}"
    path.write_bytes(damage(encoded(kind, mode), damages))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = open_rgb(path)
            assert image.mode == "RGB"
            assert min(image.size) > 0
            good = True
        except BadData as error:
            assert path.name in str(error)
            assert "\n" not in str(error)
            good = False
        happened["read" if good else "refused by name"] += 1
        if thorough:
            happened.update(_as_data(path, folder, good))
            happened.update(_predicted(path, model, good))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "a setting of Pillow was changed"
    return happened


def _as_data(path: Path, folder: Path, good: bool) -> Counter[str]:
    root = folder / "data"
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(4):
            (root / name / f"{i}.png").write_bytes(encoded("PNG", "RGB"))
    broken = root / "b" / path.name
    broken.write_bytes(path.read_bytes())
    settings: dict[str, Any] = {"image_size": 8, "batch_size": 9, "val_fraction": 0.3, "test_fraction": 0.0, "seed": 3}
    settings |= {"num_workers": 0, "augment": "none"}
    skipping = ImageFolderData(str(root), on_bad_image="skip", **settings)
    skipping.setup("fit")
    assert [Path(name).name for name in skipping.skipped] == ([] if good else [path.name])
    batches = [*skipping.train_dataloader(), *_loaders(skipping.val_dataloader())]
    assert sum(len(batch[0]) for batch in batches) == 8 + good
    strict = ImageFolderData(str(root), **settings)
    try:
        strict.setup("fit")
        for _ in (*strict.train_dataloader(), *_loaders(strict.val_dataloader())):
            pass
        assert good, "a damaged image went unnoticed"
    except BadData as error:
        assert not good
        assert path.name in str(error)
    return Counter({"in a data set": 1})


def _loaders(loaders: Any) -> list[Any]:
    found = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    return [batch for loader in found for batch in loader]


def _predicted(path: Path, model: Any, good: bool) -> Counter[str]:
    try:
        answers = model.predict([path])
        assert good
        assert len(answers) == 1
    except BadData as error:
        assert not good
        assert path.name in str(error)
    return Counter({"predicted from": 1})
