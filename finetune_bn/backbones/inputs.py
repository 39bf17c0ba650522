"""What `predict` takes: paths, folders, Pillow images, tensors of pixels, or a list of these."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.utilities.images import import_pillow, open_rgb

Item = tuple[str, Callable[[], Any]]
_ALLOWED = "the path of an image or a folder, a Pillow image, a tensor [C, H, W] or [N, C, H, W], or a list of these"


def is_many(images: Any) -> bool:
    """Tell whether `images` stands for a list of them: a folder, a tensor [N, C, H, W], a list."""
    if isinstance(images, Tensor):
        return images.ndim == 4
    return Path(images).is_dir() if isinstance(images, (str, os.PathLike)) else isinstance(images, Iterable)


def items_of(images: Any, in_chans: int) -> Iterator[Item]:
    """Yield the name of each image, and a function that reads it as a Pillow image.

    Args:
        images: what `TrainedModel.predict` takes.
        in_chans: channels that the network takes.

    Raises:
        BadData: there is no such file or folder, or no image.
        FinetuneBNError: it is nothing that holds images.
    """
    if in_chans not in (1, 3):
        remedy = "Prepare the images yourself, and call the model itself with [N, C, H, W]."
        raise FinetuneBNError(complaint("images", f"images for {in_chans} channels", "gray or color images", remedy))
    found = 0
    for given in images if is_many(images) and not isinstance(images, (str, os.PathLike)) else [images]:
        for name, read in _one(given):
            yield name or f"image {found}", read
            found += 1
    if not found:
        raise BadData(complaint("images", images, _ALLOWED, "It holds no image."))


def _one(given: Any) -> Iterator[Item]:
    if isinstance(given, (str, os.PathLike)):
        path = Path(given).expanduser()
        if not path.exists():
            raise BadData(complaint("images", str(given), _ALLOWED, "There is no such file or folder."))
        for file in _image_files(path) if path.is_dir() else [path]:
            yield str(file), lambda file=file: open_rgb(file)  # type: ignore[misc]
    elif isinstance(given, Tensor):
        yield "", lambda: _from_tensor(given)
    elif isinstance(given, import_pillow().Image):
        yield "", lambda: given
    else:
        remedy = "PIL.Image.fromarray(array) makes an image of an RGB array." if hasattr(given, "__array__") else ""
        raise FinetuneBNError(complaint("images", type(given).__name__, _ALLOWED, remedy))


def _image_files(folder: Path) -> list[Path]:
    """Return the visible images in a folder and the folders in it, in the order of their paths; links are not gone."""
    Image = import_pillow()
    Image.init()
    suffixes = set(Image.registered_extensions())
    found = [
        Path(place, name)
        for place, folders, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in suffixes and not name.startswith(".")
        if not any(part.startswith(".") for part in Path(place).relative_to(folder).parts)
    ]
    if not found:
        remedy = f"Suffixes that count: {', '.join(sorted(suffixes)[:8])}, ..."
        raise BadData(complaint("images", str(folder), "a folder with images", remedy))
    return sorted(found)


def _from_tensor(pixels: Tensor) -> Any:
    """Return the Pillow image of pixels [1 or 3, H, W]."""
    allowed = "pixels [C, H, W] of 1 or 3 channels: uint8, or floats between 0 and 1"
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or 0 in pixels.shape:
        raise FinetuneBNError(complaint("images", f"a tensor {list(pixels.shape)}", allowed))
    if pixels.is_floating_point():
        low, high = (float(value) for value in pixels.detach().aminmax())
        if not (low >= 0 and high <= 1):
            remedy = "Where they are normalized already, call the model itself: model(images)."
            raise FinetuneBNError(complaint("images", f"floats from {low:.3g} to {high:.3g}", allowed, remedy))
        pixels = (pixels.detach().float() * 255).round().to(torch.uint8)
    elif pixels.dtype != torch.uint8:
        raise FinetuneBNError(complaint("images", f"a tensor of {pixels.dtype}", allowed))
    array = pixels.detach().cpu().permute(1, 2, 0).contiguous().numpy()
    return import_pillow().fromarray(array[..., 0] if array.shape[2] == 1 else array)
