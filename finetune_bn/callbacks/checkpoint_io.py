"""Checkpoints that are whole, or not there: written beside their name, brought to the disk, and renamed."""

from __future__ import annotations

import io
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from typing_extensions import override

from finetune_bn.utilities.files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints so that a process that is killed leaves the old file or the new one, never half of it.

    Lightning (seen in 2.6) writes to the system's folder for temporary files and moves from there. Where that is
    another file system than the run's, as it often is, moving is copying, and a kill amid it leaves a file that cannot
    be read. The tasks of this package use this plugin; others pass it on: `Trainer(plugins=[AtomicCheckpointIO()])`.
    Files elsewhere than on this machine are written as Lightning does.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or not isinstance(get_filesystem(path), LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(str(path).removeprefix("file://"), buffer.getbuffer())  # no copy


def keep_checkpoints_whole(trainer: pl.Trainer) -> None:
    """Let a Trainer write its checkpoints by `AtomicCheckpointIO`, where nobody chose another plugin.

    Args:
        trainer: a Trainer whose strategy writes whole checkpoints with `torch.save`.
    """
    strategy = trainer.strategy
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
