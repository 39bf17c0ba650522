"""Any torchvision classification data set by its name."""

from __future__ import annotations

import inspect
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from finetune_bn.data.base import Contents, ImageDataModule
from finetune_bn.data.checks import choice
from finetune_bn.data.images import UNREADABLE, ImageSource, with_bar
from finetune_bn.errors import BadData, MissingDependency, complaint

# Images with boxes, masks, captions, flow, a second image, no label at all, or videos.
NOT_CLASSIFICATION = frozenset(
    {
        "CREStereo", "CarlaStereo", "Cityscapes", "CocoCaptions", "CocoDetection", "ETH3DStereo",
        "FallingThingsStereo", "Flickr30k", "Flickr8k", "FlyingChairs", "FlyingThings3D", "HD1K", "HMDB51",
        "InStereo2k", "Kinetics", "Kitti", "Kitti2012Stereo", "Kitti2015Stereo", "KittiFlow", "LFWPairs",
        "LSUNClass", "Middlebury2014Stereo", "MovingMNIST", "PhotoTour", "SBDataset", "SBU", "SceneFlowStereo",
        "Sintel", "SintelStereo", "UCF101", "VOCDetection", "VOCSegmentation", "WIDERFace",
    }
)  # fmt: skip
# Built on folders; ImageFolderData does more for them.
FOLDERS = frozenset({"ImageFolder", "DatasetFolder"})
# What data sets call a split, most common name first.
SPLIT_WORDS = {
    "train": ("train", "trainval", "train-standard"),
    "val": ("val", "valid"),
    "test": ("test",),
}
# Where data sets keep all labels, so that no image has to be decoded to know them.
LABEL_ATTRIBUTES = ("targets", "_labels", "labels", "y", "_samples", "samples")
_FILTER_LOCK = threading.RLock()


class WrappedImages(ImageSource):
    """Torchvision data sets, one behind the other.

    Args:
        sets: the data sets by what they are called in messages.
        labels: their labels, one behind the other.
    """

    def __init__(self, sets: dict[str, Any], labels: list[int]) -> None:
        self.sets = list(sets.items())
        self.labels = labels
        self.domains = ["all"] * len(labels)
        self.in_memory = all(
            isinstance(getattr(data, "data", None), np.ndarray | torch.Tensor) for data in sets.values()
        )

    def _find(self, index: int) -> tuple[str, Any, int]:
        for name, data in self.sets:
            if index < len(data):
                return name, data, index
            index -= len(data)
        raise IndexError(index)

    def open(self, index: int) -> Image.Image:
        """Return image `index`, decoded."""
        _, data, position = self._find(index)
        image = data[position][0]
        if not isinstance(image, Image.Image):
            raise ValueError(f"it is a {type(image).__name__}, not a PIL image")
        return image

    def name(self, index: int) -> str:
        """Return the name of the data set and the position of image `index` in it."""
        name, _, position = self._find(index)
        return f"{name}[{position}]"


class TorchvisionData(ImageDataModule):
    """A classification data set of torchvision, by its name: CIFAR10, MNIST, Flowers102, Food101, FakeData, ...

    Its own splits are used. Where it has no validation split, a part of the training images becomes one; where it has
    a validation but no test split, the validation split is the test set and a part of the training images becomes
    the validation set; where it has no splits at all, it is cut into three by the seed. Gray images become RGB.

    Args:
        name: Name of the class in torchvision.datasets.
        root: Folder where the data set lies, or is downloaded to.
        download: Whether to download it if it is not there.
        options: More arguments of the data set, e.g. `{split: balanced}` for EMNIST or `{size: 100}` for FakeData.
    """

    def __init__(
        self,
        name: str,
        *,
        root: str = "datasets",
        download: bool = False,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._factory = _find_class(name)
        self._name = name
        self.root = root
        self.download = download
        self.options = dict(options or {})
        self._parameters = _constructor_parameters(self._factory)
        unknown = [option for option in self.options if option not in self._parameters]
        if unknown:
            choice("options", unknown[0], sorted(self._parameters))

    def prepare_data(self) -> None:
        """Download the data set, if that was asked for, in one process only."""
        if self.download:
            self._official_splits()

    def _scan(self) -> Contents:
        sets = self._official_splits()
        labels = {split: self._labels_of(split, data) for split, data in sets.items()}
        for split in [split for split, found in labels.items() if found is None]:
            if split == "train":
                raise BadData(complaint("name", self._name, "a data set whose training images have labels"))
            rank_zero_warn(f"{self._name}: the official {split} split has no labels and is left out.")
            del sets[split], labels[split]
        flat = [label for found in labels.values() for label in found or []]
        class_names = self._class_names(sets["train"], flat)
        source = WrappedImages({f"{self._name} {split}": data for split, data in sets.items()}, flat)
        keys = [source.name(index) for index in range(len(source))]
        return Contents(source, class_names, ["all"], self._splits_of(sets, flat, keys), keys)

    def _official_splits(self) -> dict[str, Any]:
        """Build the data set once per split that it comes with; train first."""
        if "train" in self._parameters and "train" not in self.options:
            return {"train": self._build(train=True), "test": self._build(train=False)}
        if "split" not in self._parameters or "split" in self.options:
            return {"train": self._build()}
        found = {}
        for split, words in SPLIT_WORDS.items():
            for word in words:
                try:
                    found[split] = self._build(split=word)
                    break
                except _NoSuchSplit:
                    continue
        return found or {"train": self._build()}

    def _build(self, **which: Any) -> Any:
        arguments = {**self.options, **which}
        if "root" in self._parameters:
            arguments["root"] = self.root
        if "download" in self._parameters:
            arguments["download"] = self.download
        called = f"torchvision.datasets.{self._name}"
        try:
            with _safe_archives():
                return self._factory(**arguments)
        except tarfile.FilterError as error:
            remedy = f"It said: {error}. Nothing of it is to be trusted; fetch the data set from where it is published."
            allowed = "an archive whose files all stay in the folder that it is unpacked in"
            raise BadData(complaint("root", self.root, allowed, remedy)) from error
        except ImportError as error:
            raise MissingDependency(f"{called} needs a package that is not installed: {error}") from error
        except TypeError as error:
            missing = [name for name, required in self._parameters.items() if required and name not in arguments]
            if not missing:
                raise BadData(
                    complaint("options", self.options, f"what {called} takes", f"It said: {error}.")
                ) from error
            remedy = "Pass them in options."
            raise BadData(
                complaint("options", self.options, f"with {missing}, which {called} needs", remedy)
            ) from error
        except ValueError as error:
            if "split" in which and str(which["split"]) in str(error) and "split" in str(error):
                raise _NoSuchSplit from error
            raise BadData(complaint("options", arguments, f"what {called} takes", f"It said: {error}.")) from error
        except (RuntimeError, OSError) as error:
            remedy = f"It said: {error}. "
            if self.download:
                remedy += "Without a network, fetch it elsewhere and put it there."
            else:
                remedy += "Pass download: true to fetch it, or the root that holds it."
            raise BadData(complaint("root", self.root, f"a folder that holds {called}", remedy)) from error

    def _labels_of(self, split: str, data: Any) -> list[int] | None:
        """Return the labels of all images, or `None` if this split has none."""
        for attribute in LABEL_ATTRIBUTES:
            labels = _as_labels(getattr(data, attribute, None), len(data))
            if labels is not None and _agrees(data, labels):
                return labels
        found: list[Any] = []
        for index in with_bar(range(len(data)), len(data), f"Reading the labels of {self._name} ({split})"):
            label = _target(data, index)
            if label is None:
                return None
            if not _is_integer(label):
                given = f"{self._name}, whose target is {_describe(label)}"
                remedy = "Some data sets have a suitable target under options, e.g. {target_type: identity}."
                raise BadData(complaint("name", given, "a data set with one class number per image", remedy))
            found.append(int(label))
        return found

    def _class_names(self, train: Any, labels: list[int]) -> list[str]:
        lowest, highest = min(labels), max(labels)
        if lowest < 0:
            remedy = "It may be a split without labels; choose another in options."
            raise BadData(complaint("name", self._name, f"labels from 0 up, not {lowest}", remedy))
        for attribute in ("classes", "categories"):
            names = getattr(train, attribute, None)
            if isinstance(names, Sequence) and len(names) > highest:
                return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]
        count = getattr(train, "num_classes", highest + 1)
        return [str(label) for label in range(max(int(count), highest + 1))]

    def _splits_of(self, sets: dict[str, Any], labels: list[int], keys: list[str]) -> dict[str, list[int]]:
        official, start = {}, 0
        for split, data in sets.items():
            official[split] = list(range(start, start + len(data)))
            start += len(data)
        if len(official) == 1:
            return self._cut(keys, labels, self.val_fraction, self.test_fraction)
        if "val" in official and "test" in official:
            return official
        held_out = official["test"] if "test" in official else official["val"]
        count = len(official["train"])
        return {**self._cut(keys[:count], labels[:count], self.val_fraction, 0.0), "test": held_out}


@contextmanager
def _safe_archives() -> Iterator[None]:
    """Unpack no file of a tar archive outside its folder; Python does so by itself from 3.14 on, zip always did."""
    with _FILTER_LOCK:
        before = tarfile.TarFile.extraction_filter
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
        try:
            yield
        finally:
            tarfile.TarFile.extraction_filter = before


class _NoSuchSplit(Exception):
    """The data set does not know a split by this word."""


def _find_class(name: str) -> Any:
    import torchvision.datasets

    classes = {
        key
        for key in torchvision.datasets.__all__
        if inspect.isclass(getattr(torchvision.datasets, key)) and key != "VisionDataset"
    }
    if name in FOLDERS:
        raise BadData(complaint("name", name, "a data set with files of its own", "Use ImageFolderData for folders."))
    if name in NOT_CLASSIFICATION:
        raise BadData(complaint("name", name, "a data set with one class per image"))
    choice("name", name, sorted(classes - FOLDERS - NOT_CLASSIFICATION))
    return getattr(torchvision.datasets, name)


def _constructor_parameters(factory: Any) -> dict[str, bool]:
    """Return the constructor's arguments and whether each is required, those passed on by `**kwargs` included."""
    found: dict[str, bool] = {}
    for kind in factory.__mro__:
        parameters = inspect.signature(kind.__init__).parameters.values() if "__init__" in vars(kind) else ()
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and parameter.name != "self":
                found.setdefault(parameter.name, parameter.default is parameter.empty)
        if parameters and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _target(data: Any, index: int) -> Any:
    item = data[index]
    return item[1] if isinstance(item, tuple) and len(item) == 2 else item


def _is_integer(label: Any) -> bool:
    if isinstance(label, np.ndarray | torch.Tensor):
        return label.ndim == 0 and not (
            label.is_floating_point() if isinstance(label, torch.Tensor) else label.dtype.kind == "f"
        )
    return isinstance(label, int | np.integer) and not isinstance(label, bool)


def _describe(label: Any) -> str:
    shape = f" of shape {tuple(label.shape)}" if hasattr(label, "shape") else ""
    return f"a {type(label).__name__}{shape}"


def _as_labels(values: Any, count: int) -> list[int] | None:
    """Return `values` as labels, if it is `count` integers or `count` tuples that end in one."""
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    if not isinstance(values, list) or len(values) != count:
        return None
    labels = [value[-1] if isinstance(value, tuple) and value else value for value in values]
    return [int(label) for label in labels] if all(_is_integer(label) for label in labels) else None


def _agrees(data: Any, labels: list[int]) -> bool:
    """Return whether the first and last items have these labels; an unreadable image counts for neither side."""
    for index in {0, len(labels) - 1} if labels else ():
        try:
            if _target(data, index) != labels[index]:
                return False
        except UNREADABLE:
            continue
    return True
