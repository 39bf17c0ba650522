"""The embedded data set: 1,852 emoji, each drawn by three vendors, 64 pixels wide."""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune_bn.data.base import Contents, ImageDataModule
from finetune_bn.data.checks import choice, choices
from finetune_bn.data.images import ImageSource
from finetune_bn.errors import BadData, complaint

VENDORS = ("noto", "twemoji", "fluent")
TARGETS = ("category", "subcategory", "identity", "vendor")
SIDE = 64


class Emoji(NamedTuple):
    """One line of the index."""

    codepoints: str
    name: str
    category: str
    subcategory: str


@cache
def emoji_index() -> tuple[Emoji, ...]:
    """Return all emoji of the embedded set."""
    with _archive() as archive:
        rows = csv.DictReader(io.StringIO(archive.read("index.csv").decode("utf-8")))
        return tuple(Emoji(row["codepoints"], row["name"], row["category"], row["subcategory"]) for row in rows)


def _archive() -> zipfile.ZipFile:
    path = resources.files("finetune_bn.data").joinpath("emoji64.zip")
    return zipfile.ZipFile(io.BytesIO(path.read_bytes()))


class EmojiImages(ImageSource):
    """The images of some emoji by some vendors; decoded once, on first need, and kept as uint8.

    Args:
        emojis: which emoji.
        vendors: which vendors; image `i` is emoji `i // len(vendors)` by vendor `i % len(vendors)`.
        labels: class number of each image.
    """

    in_memory = True

    def __init__(self, emojis: Sequence[Emoji], vendors: Sequence[str], labels: list[int]) -> None:
        self.labels = labels
        self.codepoints = [emoji.codepoints for emoji in emojis for _ in vendors]
        self.domains = [vendor for _ in emojis for vendor in vendors]
        self._pixels: NDArray[np.uint8] = np.zeros((len(labels), SIDE, SIDE, 3), dtype=np.uint8)
        self._loaded = [False] * len(labels)

    def load(self, indices: Sequence[int]) -> None:
        """Decode those images that have not been decoded yet."""
        missing = [index for index in indices if not self._loaded[index]]
        if not missing:
            return
        with _archive() as archive:
            for index in missing:
                with Image.open(io.BytesIO(archive.read(self.name(index)))) as image:
                    self._pixels[index] = np.asarray(image.convert("RGB"))
                self._loaded[index] = True

    def open(self, index: int) -> Image.Image:
        """Return image `index` from memory."""
        self.load([index])
        return Image.fromarray(self._pixels[index])

    def name(self, index: int) -> str:
        """Return the image's name in the archive, `vendor/codepoints.webp`."""
        return f"{self.domains[index]}/{self.codepoints[index]}.webp"


class EmojiData(ImageDataModule):
    """The embedded emoji: 1,852 emoji in the drawings of three vendors, 64 pixels wide. No network needed.

    The vendor is the domain. The split is by emoji: none is in two of train, val and test, whichever the vendor.
    Licences of the drawings are in `emoji64_NOTICE.md` beside the archive.

    Args:
        target: What the label is. category: one of 9. subcategory: one of 97. identity: which emoji. vendor: who drew
            it. Labels are numbered over all emoji in use; with identity, those of training emoji come first, and
            validation and test emoji have labels that are never trained on (retrieval of unseen identities).
        vendors: Whose drawings are evaluated, one loader each: noto, twemoji, fluent. Default: all.
        train_vendors: Whose drawings are trained on. Default: vendors.
        categories: Only emoji of these categories. Default: all.
        subcategories: Only emoji of these subcategories. Default: all.
        image_size: Height and width in pixels of the images that the model sees; the drawings have 64.
    """

    def __init__(
        self,
        *,
        target: Literal["category", "subcategory", "identity", "vendor"] = "category",
        vendors: list[str] | None = None,
        train_vendors: list[str] | None = None,
        categories: list[str] | None = None,
        subcategories: list[str] | None = None,
        image_size: int = SIDE,
        **kwargs: Any,
    ) -> None:
        # The archive holds no unreadable image, so on_bad_image has nothing to decide here.
        super().__init__(image_size=image_size, on_bad_image="error", **kwargs)
        # Not an argument of this class, so it must not come back from a checkpoint as one.
        self.hparams.pop("on_bad_image", None)  # the CLI saves the arguments of the config alone
        self.target = choice("target", target, TARGETS)
        self.vendors = choices("vendors", vendors, VENDORS)
        self.train_vendors = list(self.vendors)
        if train_vendors is not None:
            self.train_vendors = choices("train_vendors", train_vendors, VENDORS)
        index = emoji_index()
        self.categories = choices("categories", categories, sorted({emoji.category for emoji in index}))
        self.subcategories = choices("subcategories", subcategories, sorted({emoji.subcategory for emoji in index}))
        self._emojis = [e for e in index if e.category in self.categories and e.subcategory in self.subcategories]
        if not self._emojis:
            allowed = "subcategories of the chosen categories: " + ", ".join(
                sorted({emoji.subcategory for emoji in index if emoji.category in self.categories})
            )
            raise BadData(complaint("subcategories", subcategories, allowed))

    def _scan(self) -> Contents:
        emojis = self._emojis
        vendors = [vendor for vendor in VENDORS if vendor in {*self.vendors, *self.train_vendors}]
        targets = {
            "category": [emoji.category for emoji in emojis for _ in vendors],
            "subcategory": [emoji.subcategory for emoji in emojis for _ in vendors],
            "identity": [emoji.name for emoji in emojis for _ in vendors],
            "vendor": [vendor for _ in emojis for vendor in vendors],
        }[self.target]
        keys = [emoji.codepoints for emoji in emojis]
        # by category whatever the target, so that all targets share one split
        strata = [emoji.category for emoji in emojis]
        by_emoji = self._cut(keys, strata, self.val_fraction, self.test_fraction)
        if self.target == "identity":
            # Training emoji from 0 up: a loss with a vector for each label then has none without an image.
            class_names = [emojis[index].name for split in ("train", "val", "test") for index in by_emoji[split]]
        else:
            class_names = list(dict.fromkeys(targets)) if self.target == "vendor" else sorted(set(targets))
        number = {name: label for label, name in enumerate(class_names)}
        source = EmojiImages(emojis, vendors, [number[name] for name in targets])
        used = {"train": self.train_vendors, "val": self.vendors, "test": self.vendors}
        splits = {
            split: [
                emoji * len(vendors) + vendors.index(vendor)
                for emoji in members
                for vendor in vendors
                if vendor in used[split]
            ]
            for split, members in by_emoji.items()
        }
        names = [source.name(image) for image in range(len(source))]
        return Contents(source, class_names, list(self.vendors), splits, names)

    def identities(self, split: str) -> list[str]:
        """Return the code points of the emoji in `train`, `val` or `test`, in the order of the data set."""
        source = self.contents.source
        assert isinstance(source, EmojiImages)
        return list(dict.fromkeys(source.codepoints[index] for index in self.split(split)))
