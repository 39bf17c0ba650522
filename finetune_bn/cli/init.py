"""`finetune-bn init`: a config that fits a folder of images, and what was chosen and why."""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn

from PIL import Image

from finetune_bn.cli import configs
from finetune_bn.data import ImageFolderData
from finetune_bn.data.image_folder import SPLIT_FOLDERS
from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.utilities.files import write_atomically

LOOKED_AT = 200  # images whose size is read
SMALL = 96  # pixels: images up to this are signs, digits, icons rather than photos


class Choice(NamedTuple):
    """One value of the config that is written, and why."""

    key: str
    value: Any
    why: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FinetuneBNError(f"init: {message}. finetune-bn init my_images.yaml --data path/to/images")


def init_from(args: list[str]) -> None:
    """Write a config for a folder of images, as the arguments of the command say, and print what was chosen.

    Args:
        args: what is typed behind `finetune-bn init`.

    Raises:
        FinetuneBNError: the arguments are wrong, the file is there already, or the folder holds no images by class.
    """
    parser = _Parser("finetune-bn init", description="Write a config that fits a folder of images; nothing is asked.")
    parser.add_argument("file", help="the config to write, such as my_images.yaml; it must not be there yet")
    parser.add_argument("--data", required=True, metavar="FOLDER", help="a folder with one sub-folder per class")
    parser.add_argument("--backbone", default="resnet50", help="a timm name (default: %(default)s)")
    given = parser.parse_args(args)
    path = Path(given.file)
    if path.suffix not in (".yaml", ".yml"):
        raise FinetuneBNError(complaint("file", given.file, "a name that ends in .yaml"))
    if path.exists():
        raise FinetuneBNError(complaint("file", given.file, "a file that is not there yet", "Choose another name."))
    if not path.absolute().parent.is_dir():
        raise FinetuneBNError(complaint("file", given.file, "a file in a folder that there is"))
    found, choices = look_at(given.data, given.backbone)
    text = filled(choices, path)
    write_atomically(path, text)
    width = max(len(f"{choice.key}: {choice.value}") for choice in choices)
    print(found)
    print("\n".join(f"  {f'{choice.key}: {choice.value}':{width}}  {choice.why}" for choice in choices))
    print(f"Written: {path}\nNext: finetune-bn plan --config {path}; finetune-bn fit --config {path}")


def look_at(folder: str, backbone: str) -> tuple[str, list[Choice]]:
    """Return what is in a folder, in a sentence, and the values of a config that fit it.

    Args:
        folder: images by class, `<class>/*.jpg`, or the same under train, val and test.
        backbone: the network.

    Raises:
        FinetuneBNError: there are no images, or not by class.
    """
    data = ImageFolderData(folder, num_workers=0)
    try:
        contents = data.contents
    except BadData as error:
        if not str(error).startswith(("val_fraction", "test_fraction")):
            raise
        allowed = "a folder with more images of each class, so that some can be cut off to validate and to test"
        remedy = "Or put them into train/, val/ and test/ yourself."
        raise FinetuneBNError(complaint("data", folder, allowed, remedy)) from error
    splits = {split: len(indices) for split, indices in contents.splits.items()}
    counts = Counter(contents.source.labels)
    sides = _short_sides(contents.source.paths)  # type: ignore[attr-defined]
    side = int(median(sides))
    ready = _ready_splits(Path(folder).expanduser())
    fewest = min(counts, key=lambda label: counts[label])
    found = (
        f"{folder}: {sum(splits.values())} images of {len(contents.class_names)} classes ({splits['train']} to train "
        f"on, {splits['val']} to validate, {splits['test']} to test), {counts[fewest]} of the rarest, "
        f"{contents.class_names[fewest]!r}; their short side is {min(sides)} to {max(sides)} pixels, {side} in median."
    )
    size, size_why = _image_size(side)
    batch = max(2, min(16, splits["train"] // 8))
    epochs = max(3, min(30, round(5000 / max(1, splits["train"]))))
    packaged = backbone in ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
    choices = [
        Choice("backbone", backbone, "a network of timm; `timm.list_models()` has their names"),
        Choice("weights", "package" if packaged else "pretrained", "of ImageNet" if packaged else "downloaded once"),
        Choice("root", folder, "absolute or relative to where the command runs"),
    ]
    if "val" not in ready:
        choices.append(Choice("val_fraction", 0.15, "cut off the training images at random, class by class"))
    if not ready:
        choices.append(Choice("test_fraction", 0.2, "cut off at random, class by class"))
    choices += [
        Choice("image_size", size, size_why),
        Choice("batch_size", batch, "frozen layers do not mind small ones; larger is faster where memory allows"),
        Choice(
            "augment",
            "light" if side <= SMALL else "full",
            "small images: signs or icons, so no flips and colors" if side <= SMALL else "photos; else: light",
        ),
        Choice("test_after_fit", "true" if splits["test"] else "false", f"{splits['test']} test images"),
        Choice("max_epochs", epochs, f"some 5,000 images in all, 3 to 30 times over {splits['train']}"),
    ]
    return found, choices


def filled(choices: list[Choice], path: Path) -> str:
    """Return the text of the packaged image_folder config with these values and reasons in place of its own.

    Args:
        choices: the values.
        path: the file that it is for; its name is that of the folder for the results.
    """
    text = configs.packaged()["image_folder"].read_text(encoding="utf-8")
    _, _, body = text.partition("\n\n")
    for choice in [*choices, Choice("default_root_dir", f"runs/{path.stem}", "checkpoints, metrics and the report")]:
        line = f"{choice.key}: {_quoted(choice.value)} # {choice.why}".replace("\\", r"\\")
        body, count = re.subn(rf"^( *){choice.key}: .*$", rf"\1{line}", body, flags=re.MULTILINE)
        assert count == 1, choice.key
    chosen = {choice.key: choice.value for choice in choices}
    dropped = {"val_fraction", "test_fraction"} - chosen.keys()
    lines = [line for line in body.splitlines() if line.strip().partition(":")[0] not in dropped]
    lines = [re.sub(r"# CHANGE[^.:]*[.:]? ?", "# ", line) for line in lines]
    head = [
        f"# What `finetune-bn init` chose for the images in {chosen['root']!r}.",
        "#",
        f"#   finetune-bn plan --config {path.name}",
        f"#   finetune-bn fit --config {path.name}",
    ]
    return "\n".join([*head, "", *lines]) + "\n"


def _short_sides(paths: list[Path]) -> list[int]:
    """Return the short sides of some images, taken evenly from all; only their headers are read."""
    sides = []
    for path in paths[:: max(1, len(paths) // LOOKED_AT)]:
        try:
            with Image.open(path) as image:
                sides.append(min(image.size))
        except OSError as error:  # so PIL says that it is none, too
            remedy = "Remove it, or write the config by hand with data.on_bad_image: skip."
            raise FinetuneBNError(complaint("data", str(path), "an image that can be read", remedy)) from error
    return sides


def _ready_splits(root: Path) -> set[str]:
    """Return which of train, val and test are folders of their own; without train none is."""
    found = {
        split
        for split, names in SPLIT_FOLDERS.items()
        if any((root / name).is_dir() and any(path.is_dir() for path in (root / name).iterdir()) for name in names)
    }
    return found if "train" in found else set()


def _image_size(side: int) -> tuple[int, str]:
    if side >= 200:
        return 224, "what most ImageNet weights were trained on"
    size = max(32, side // 32 * 32)
    return size, f"near the {side} pixels that the images have; a larger size shows no more of them"


def _quoted(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./~+-]+", text) else json.dumps(text, ensure_ascii=False)
