"""Test a checkpoint once more, in a plain timm model: what was trained can be used without this package."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from finetune_bn.backbones.create import create_backbone
from finetune_bn.callbacks.recalibration import BatchNormRecalibration
from finetune_bn.functional.frozen import TOLERANCE
from finetune_bn.layers.sites import is_converted_group_norm
from finetune_bn.utilities.probe import distance, quietly


class TimmNet(NamedTuple):
    """How a module's network is made by timm."""

    name: str
    num_classes: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reload:
    """What came of the test in plain timm, one entry a domain; without entries, `problem` or `left_out` says why.

    Attributes:
        images: how many images were looked at.
        accuracies: share of right answers, 0 to 1.
        differences: largest |difference| to the logits of the trained network on the first batch, relative to the
            largest |logit|.
        tolerance: up to where such a difference is rounding.
        problem: what went wrong.
        left_out: why it was not tried.
    """

    images: Sequence[int] = ()
    accuracies: Sequence[float] = ()
    differences: Sequence[float] = ()
    tolerance: float | None = None
    problem: str = ""
    left_out: str = ""


def timm_net(pl_module: pl.LightningModule) -> TimmNet | None:
    """Return how to make the module's `net` by timm, from its hyperparameters; None where they do not say."""
    hparams = pl_module.hparams
    name, num_classes = hparams.get("backbone"), hparams.get("num_classes")
    if not isinstance(getattr(pl_module, "net", None), nn.Module):
        return None
    if not isinstance(name, str) or not isinstance(num_classes, int):
        return None
    return TimmNet(name, num_classes, dict(hparams.get("backbone_args") or {}))


def end_adaptation(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Give the module its own statistics back where a test used others, and tell whether it did.

    `BatchNormRecalibration(when="test")` puts them back at the end of the test, which for the callbacks before it is
    too late: what was tested would be taken for what the checkpoint holds.
    """
    adapting = [c for c in trainer.callbacks if isinstance(c, BatchNormRecalibration) and c.when == "test"]  # type: ignore[attr-defined]
    for callback in adapting:
        callback.on_test_end(trainer, pl_module)
    return bool(adapting)


def reload_and_test(trainer: pl.Trainer, pl_module: pl.LightningModule, domains: Sequence[str]) -> Reload:
    """Load the checkpoint that is being tested into `timm.create_model` and test that on the same images.

    To be called by all processes at the end of a test. Whatever goes wrong is returned, not raised: the results of a
    training must not be lost to the check of its checkpoint.

    Args:
        trainer: in its test, with batches of (images, labels).
        pl_module: the module as it was tested.
        domains: names of the test loaders.
    """
    recipe = timm_net(pl_module)
    if recipe is None:
        needs = "a timm network as `net`, and `backbone` (its name) and `num_classes` among its hyperparameters"
        return Reload(left_out=f"{type(pl_module).__name__} does not have what it takes: {needs}")
    if any(map(is_converted_group_norm, pl_module.modules())):
        return Reload(
            left_out="its layers were converted to GroupNorm, which timm's network of that name does not have"
        )
    if trainer.ckpt_path is None:
        remedy = "test(ckpt_path='best'), or the path of a checkpoint, tests a file"
        return Reload(left_out=f"no checkpoint was tested but the weights in memory; {remedy}")
    counts, differences = torch.zeros(len(domains), 2, dtype=torch.long), torch.zeros(len(domains))
    problem = ""
    try:
        _fill(trainer, pl_module, recipe, counts, differences)
    except Exception as error:
        problem = f"{type(error).__name__}: {str(error).rstrip('.')}"
        if not trainer.is_global_zero:  # the report is written elsewhere
            warnings.warn(f"FinetuneReport, process {trainer.global_rank}: {problem}.", stacklevel=2)
    failed, counts, differences = _over_processes(trainer, bool(problem), counts, differences)
    if failed:
        return Reload(problem=problem or "it failed in another process, which says why")
    dtype = next(pl_module.net.parameters()).dtype  # type: ignore[union-attr]
    # timm makes float32 weights, so double precision does not survive the way through them.
    tolerance = max(TOLERANCE[dtype], TOLERANCE[torch.float32])
    off = [f"{name} by {d:.1e}" for name, d in zip(domains, differences.tolist(), strict=True) if not d <= tolerance]
    if off:
        problem = f"its logits differ from those of the trained network by more than {tolerance:.0e}: {', '.join(off)}"
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            problem += (
                "; the weights in the file are the averaged ones, but with WeightAveraging among its callbacks the "
                "Trainer tests those of the last step: test in a Trainer without it"
            )
    images = counts[:, 1].tolist()
    accuracies = (counts[:, 0] / counts[:, 1].clamp_min(1)).tolist()
    return Reload(images, accuracies, differences.tolist(), tolerance, problem)


def _fill(
    trainer: pl.Trainer, pl_module: pl.LightningModule, recipe: TimmNet, counts: Tensor, differences: Tensor
) -> None:
    """Write into `counts` (right answers, images) and `differences`, a row for each test loader."""
    trained: nn.Module = pl_module.net  # type: ignore[assignment]
    dtype = next(trained.parameters()).dtype
    # The random state is left alone: timm draws the weights that the checkpoint then replaces.
    with torch.random.fork_rng(devices=[]):
        plain = create_backbone(recipe.name, trainer.ckpt_path, num_classes=recipe.num_classes, **recipe.arguments)
        plain.to(pl_module.device, dtype).eval()
        for i, (loader, limit) in enumerate(zip(_loaders(trainer), trainer.num_test_batches, strict=True)):
            batches = itertools.islice(loader, None if limit == float("inf") else int(limit))
            for number, batch in enumerate(batches):
                images, labels = trainer.strategy.batch_to_device(
                    trainer.precision_plugin.convert_input(batch), dataloader_idx=i
                )
                if number == 0:
                    differences[i] = _difference(plain, trained, images)
                with torch.no_grad(), trainer.precision_plugin.forward_context():
                    right = plain(images).argmax(1) == labels
                counts[i] += torch.tensor([int(right.sum()), len(labels)])


def _difference(plain: nn.Module, trained: nn.Module, images: Tensor) -> float:
    # Compiling anew for one batch without autocast would take longer than all the rest.
    with torch.compiler.set_stance("force_eager"), quietly(plain), quietly(trained):
        return distance([plain(images)], [trained(images)])


def _loaders(trainer: pl.Trainer) -> list[Any]:
    return tree_leaves(trainer.test_dataloaders)


def _over_processes(
    trainer: pl.Trainer, failed: bool, counts: Tensor, differences: Tensor
) -> tuple[bool, Tensor, Tensor]:
    device, reduce = trainer.strategy.root_device, trainer.strategy.reduce
    failures = reduce(torch.tensor(int(failed), device=device), reduce_op="sum")
    counts, differences = reduce(counts.to(device), reduce_op="sum"), reduce(differences.to(device), reduce_op="max")
    return bool(failures), counts.cpu(), differences.cpu()
