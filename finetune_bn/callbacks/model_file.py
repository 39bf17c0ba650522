"""Leave the network of a run as one file that `finetune_bn.load` takes."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from finetune_bn.backbones.card import Task, Transform
from finetune_bn.backbones.create import data_config
from finetune_bn.backbones.saved import save
from finetune_bn.backbones.weights import load_safely
from finetune_bn.errors import BadData, complaint


def write_model_file(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    path: Path,
    checkpoint: str | None,
    class_names: Sequence[str],
    about: Mapping[str, Any],
) -> list[str]:
    """Write the network of a checkpoint, or that in memory, to a file for `finetune_bn.load`.

    Whatever goes wrong is returned, not raised: the results of a training must not be lost to it.

    Args:
        trainer: whose data module says how images are prepared.
        pl_module: with a timm network as `net`.
        path: the file.
        checkpoint: path of the checkpoint with the weights; None for those in memory.
        class_names: names of the classes; others than the network has outputs are not used.
        about: plain data to keep in the file.

    Returns:
        What the reader of a report should know, a sentence each; the first begins with "The model file" where none was
        written, and an older one was removed.
    """
    net = getattr(pl_module, "net", None)
    if not isinstance(net, nn.Module) or not isinstance(getattr(net, "pretrained_cfg", None), dict):
        path.unlink(missing_ok=True)
        return [f"The model file: {type(pl_module).__name__} has no timm network as `net`."]
    try:
        transform, notes = _transform(trainer, net)
        task: Task = getattr(pl_module, "task_kind", "classification" if int(net.num_classes) > 1 else "embedding")  # type: ignore[arg-type]
        named = task == "classification" and len(class_names) == int(net.num_classes)  # type: ignore[arg-type]
        name = pl_module.hparams.get("backbone")
        save(
            net if checkpoint is None else _with_weights(net, Path(checkpoint)),
            path,
            classes=list(class_names) if named else None,
            task=task,
            normalize=task == "embedding" and bool(getattr(pl_module, "normalize", False)),
            transform=transform,
            backbone=name if isinstance(name, str) and ":" not in name else None,
            arguments=dict(pl_module.hparams.get("backbone_args") or {}),
            about=about,
        )
    except Exception as error:
        path.unlink(missing_ok=True)
        return [f"The model file: {type(error).__name__}: {str(error).rstrip('.')}."]
    return notes


def _transform(trainer: pl.Trainer, net: nn.Module) -> tuple[Transform, list[str]]:
    """Return how the images of the test were prepared, and what is to be said of it."""
    data = getattr(trainer, "datamodule", None)
    size, normalization = getattr(data, "image_size", None), getattr(data, "normalization", None)
    if isinstance(size, int) and normalization is not None:
        mean, std = normalization
        options = {"interpolation": data.interpolation, "crop_pct": data.crop_pct}  # type: ignore[union-attr]
        return Transform((size, size), tuple(mean), tuple(std), **options), []
    who = "there is no data module" if data is None else f"{type(data).__name__} does not say how it prepares images"
    note = f"How the model file prepares images: as the pretrained weights want it, since {who}."
    return Transform.from_config(data_config(net)), [note]


def _with_weights(net: nn.Module, checkpoint: Path) -> nn.Module:
    """Return a copy of the module's `net` with the weights of a Lightning checkpoint."""
    found = load_safely(checkpoint)
    state = found.get("state_dict") if isinstance(found, Mapping) else None
    if not isinstance(state, Mapping):
        raise BadData(complaint("checkpoint", str(checkpoint), "a checkpoint that Lightning saved"))
    own = OrderedDict((name.removeprefix("net."), value) for name, value in state.items() if name.startswith("net."))
    known = getattr(state, "_metadata", {})
    own._metadata = {  # type: ignore[attr-defined]
        name[4:]: values for name, values in known.items() if f"{name}.".startswith("net.")
    }
    twin = copy.deepcopy(net)
    twin.load_state_dict(own, strict=True)
    return twin
