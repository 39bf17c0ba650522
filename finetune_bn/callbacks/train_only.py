"""Train the norm layers and the head alone, and write them to a small file."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from finetune_bn.callbacks.averaging import keep_constants
from finetune_bn.callbacks.intercept import intercept
from finetune_bn.callbacks.lightning_names import FINETUNING, is_a, overrides
from finetune_bn.callbacks.module import check_whole_network, part_of
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.optim.train_only import train_only
from finetune_bn.optim.trained_part import save_trained


class TrainOnly(Callback):
    """Train a part of the network alone, such as the norm layers and the head, and write that part to a small file.

    What is trained is decided just before the optimizer is made, when layers have been converted and weights loaded.
    With norm or affine, convert the layers by BatchNormConversion with Freeze and affine original: constants cannot be
    trained. The file is written when the training ends, with the weights that there are then; apply_trained puts it
    onto a backbone.

    Args:
        what: norm for gamma and beta of all norm layers and the head, affine for gamma and beta alone, or patterns of
            names of parameters or modules.
        module: Attribute path of the part to choose from, such as net; what is outside of it is trained as it would be
            without. By default the whole LightningModule.
        path: The file, which ends in .safetensors; if relative, in the Trainer's default_root_dir. By default none is
            written.
    """

    def __init__(self, what: str | list[str] = "norm", module: str | None = None, path: str | None = None) -> None:
        super().__init__()
        self.what, self.module, self.path = what, module, path
        self._intercepted: list[Callable[[], None]] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()
        if stage != "fit":
            return
        check_whole_network(trainer)
        _check_others(trainer)

        def so_far() -> None:
            # DDP looks at requires_grad before the optimizer is made; what is not there yet has its turn later.
            with contextlib.suppress(FinetuneBNError):
                self._choose(pl_module)

        so_far()
        for name in ("setup", "configure_model"):
            if overrides(pl_module, name):
                self._intercepted.append(intercept(pl_module, name, after=so_far))
        last = intercept(pl_module, "configure_optimizers", lambda: rank_zero_info(f"{self._choose(pl_module)}."))
        self._intercepted.append(last)

    def _choose(self, pl_module: pl.LightningModule) -> str:
        return f"TrainOnly: {train_only(part_of(pl_module, self.module), self.what)}"

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()
        keep_constants(trainer.callbacks, pl_module)  # type: ignore[attr-defined]

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.path is None or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / self.path
        size = save_trained(part_of(pl_module, self.module), path)
        rank_zero_info(f"TrainOnly: what was trained is in {path}, {size / 1e6:.2f} MB.")

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        while self._intercepted:
            self._intercepted.pop()()


def _check_others(trainer: pl.Trainer) -> None:
    """Raise where another callback decides, too, what is trained: it would set free in mid-training what is not."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = [type(c).__name__ for c in callbacks if is_a(c, FINETUNING)]
    if others:
        given = [type(c).__name__ for c in callbacks]
        why = f"{others[0]} sets free, later on, what TrainOnly leaves out."
        raise FinetuneBNError(complaint("callbacks", given, f"one of TrainOnly and {others[0]}", why))
