"""Fit a network that was converted to GroupNorm to images before its training: by moments, and by distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from finetune_bn.callbacks.batches import ModuleBatches, training_batches
from finetune_bn.callbacks.module import check_whole_network, target_of
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.group_norm.calibrate import calibrate_group_norm
from finetune_bn.group_norm.distil import Distillation, check_distillation, distil
from finetune_bn.group_norm.record import Calibration
from finetune_bn.layers.sites import find_batch_norms, is_converted_group_norm
from finetune_bn.utilities.checks import number

_TRIAL_IMAGES = 64  # are enough for a run that only looks for faults (fast_dev_run)


class _BeforeTraining(Callback):
    """Works on the converted network once, before the first training step; not when a training is resumed."""

    def __init__(
        self,
        data: DataLoader[Any] | pl.LightningDataModule | None,
        module: str | None,
        max_samples: int | None,
        seed: int,
        forward: Callable[[nn.Module, Any], Any] | None,
    ) -> None:
        super().__init__()
        self.max_samples = number("max_samples", max_samples, least=8, whole=True, none=True)
        self.data, self.module, self.seed, self.forward = data, module, seed, forward

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_whole_network(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step:
            return
        target = target_of(pl_module, self.module)
        name = type(self).__name__
        if not any(is_converted_group_norm(site.module) for site in find_batch_norms(target, group_norms=True)):
            rank_zero_warn(f"{name}: no layer of {type(target).__name__} was converted by ToGroupNorm: nothing to do")
            return
        images = self.max_samples
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            images = min(images or _TRIAL_IMAGES, _TRIAL_IMAGES)
        batches = training_batches(trainer, pl_module, self.data, seed=self.seed)
        with torch.inference_mode(False), trainer.precision_plugin.forward_context():
            record = self._work(target, batches, images)
        rank_zero_info(f"{name}: {str(record).splitlines()[0]}")

    def _work(self, target: nn.Module, batches: ModuleBatches, max_samples: int | None) -> object:
        raise NotImplementedError


class GroupNormCalibration(_BeforeTraining):
    """Fit layers that were converted to GroupNorm to training images, without their labels, before the training.

    Layer by layer, so that each returns what its BatchNorm returned: see `finetune_bn.calibrate_group_norm`. It takes
    seconds, and goes with BatchNormConversion and the policy ToGroupNorm. A resumed training is left as it is.

    Attributes:
        record: what was fitted, layer by layer.

    Args:
        data: The images: a DataLoader, taken as it is, or a data module. Default: those of the training, in random
            order, without augmentation where the data module is one of finetune_bn.
        module: Attribute path of the part that takes the images, such as `net`. By default the whole LightningModule.
        max_samples: How many images are taken at most, over all processes; null takes all.
        balance: Also multiply the channels of the convolution in front of each layer by powers of two, with which the
            layer loses least of its BatchNorm; `revert` takes that back.
        seed: Decides which images are taken.
        forward: The function `(module, batch)` that passes a batch to the part, by its import path; for batches that
            are no tensor, or that the part's `forward` does not take as they are. Default: the first tensor of a batch.
    """

    def __init__(
        self,
        data: DataLoader[Any] | pl.LightningDataModule | None = None,
        module: str | None = None,
        max_samples: int | None = 256,
        balance: bool = True,
        seed: int = 0,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__(data, module, max_samples, seed, forward)
        if not isinstance(balance, bool):
            raise FinetuneBNError(complaint("balance", balance, "true or false"))
        self.balance = balance
        self.record: Calibration | None = None

    @override
    def _work(self, target: nn.Module, batches: ModuleBatches, max_samples: int | None) -> Calibration:
        more: dict[str, Any] = {"max_samples": max_samples, "balance": self.balance, "forward": self.forward}
        self.record = calibrate_group_norm(target, batches, progress=False, **more)
        return self.record


class GroupNormDistillation(_BeforeTraining):
    """Train a network converted to GroupNorm towards the BatchNorm network it was, without labels, before the training.

    See `finetune_bn.distil`. Put it behind GroupNormCalibration, which goes most of the way in less time. The Trainer's
    optimizer has no part in it. A resumed training is left as it is.

    Attributes:
        record: distances before and after.

    Args:
        data: The images: a DataLoader, taken as it is, or a data module. Default: those of the training, in random
            order, without augmentation where the data module is one of finetune_bn.
        module: Attribute path of the part that takes the images, such as `net`. By default the whole LightningModule.
        max_samples: How many images are taken at most, over all processes; null takes all.
        epochs: How often each image is used.
        batch_size: Images in a step.
        lr: Highest learning rate.
        affine_only: Share of the steps in which only weight and bias of the converted layers are trained.
        blend: Share of the steps over which BatchNorm's outputs are faded out; 0 has none of them.
        seed: Decides which images are taken, and in what order.
        forward: The function `(module, batch)` that passes a batch to the part, by its import path; for batches that
            are no tensor, or that the part's `forward` does not take as they are. Default: the first tensor of a batch.
    """

    def __init__(
        self,
        data: DataLoader[Any] | pl.LightningDataModule | None = None,
        module: str | None = None,
        max_samples: int | None = 1000,
        epochs: int = 1,
        batch_size: int = 2,
        lr: float = 1e-5,
        affine_only: float = 0.1,
        blend: float = 0.0,
        seed: int = 0,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        super().__init__(data, module, max_samples, seed, forward)
        self.settings: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "affine_only": affine_only,
            "blend": blend,
        }
        check_distillation(max_samples=max_samples, **self.settings)
        self.record: Distillation | None = None

    @override
    def _work(self, target: nn.Module, batches: ModuleBatches, max_samples: int | None) -> Distillation:
        more = self.settings | {"max_samples": max_samples, "seed": self.seed, "forward": self.forward}
        self.record = distil(target, batches, progress=False, **more)
        return self.record
