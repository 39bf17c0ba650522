"""Recalibrate a checkpoint file: load it, measure the statistics of the data, and write a new file beside it."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from finetune_bn.callbacks.batches import ModuleBatches, training_batches
from finetune_bn.callbacks.lightning_names import attach_data
from finetune_bn.callbacks.module import load_sources, sources_of
from finetune_bn.callbacks.recalibration import CHECKPOINT_KEY, BatchNormRecalibration
from finetune_bn.callbacks.saved_plan import replay
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.recalibration.record import Recalibration
from finetune_bn.utilities.files import check_output, write_atomically

Split = Literal["train", "val", "test"]
RECORD_KEY = "finetune_bn_recalibrated"


def recalibrate_checkpoint(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule,
    ckpt_path: str | Path,
    output: str | Path | None,
    recalibration: BatchNormRecalibration,
    *,
    split: Split = "train",
    domain: str | None = None,
    weights_only: bool | None = None,
) -> tuple[Path, Recalibration]:
    """Write a checkpoint with the statistics of the data; everything else in it stays what it is.

    So it can be tested, resumed and loaded into plain timm as the old one can. The old file is read only, and the new
    one is written as a whole or not at all.

    Args:
        trainer: a Trainer of one process, which gives device and precision.
        model: the module that the checkpoint is of, as it was built for its training.
        datamodule: its data.
        ckpt_path: a checkpoint that Lightning saved.
        output: the new file, overwritten if it is there; None: the old name with `-recalibrated` behind it.
        recalibration: how it is done.
        split: whose images are taken: train, val or test; no label is used.
        domain: only the images of this domain, of a data module of finetune_bn.
        weights_only: read tensors and plain values, and run no code. None is True, also for an address.

    Returns:
        The path of the new file, and what was measured.

    Raises:
        FinetuneBNError: there is no such checkpoint, it is of another module, or the data cannot be used.
    """
    if output is None and "://" in str(ckpt_path):
        raise FinetuneBNError(complaint("output", None, "a file, where the checkpoint is an address"))
    source = Path(ckpt_path)
    path = source.with_name(f"{source.stem}-recalibrated{source.suffix}") if output is None else Path(output)
    check_output("output", path)
    checkpoint = _load(trainer, ckpt_path, weights_only)
    attach_alone(trainer, model, datamodule, split)
    _restore(model, checkpoint)
    trainer.precision_plugin.convert_module(model).to(trainer.strategy.root_device)
    iid_dataloader = getattr(datamodule, "iid_dataloader", None)
    if domain is None:
        batches = training_batches(trainer, model, datamodule, split, recalibration.seed)
    elif callable(iid_dataloader):
        batches = ModuleBatches(trainer, model, iid_dataloader(split, domain=domain))
    else:
        raise FinetuneBNError(complaint("domain", domain, f"null, as a {type(datamodule).__name__} has no domains"))
    recalibration.prepare(trainer, model, progress=None)
    record = recalibration.recalibrate(trainer, model, batches, progress=None)
    if record is None:
        raise FinetuneBNError(complaint("model", type(model).__name__, "a model with BatchNorm layers"))
    _update(checkpoint, model, record)
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    try:
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise FinetuneBNError(complaint("output", str(path), "a file that can be written", f"{error}.")) from error
    return path, record


def load_into(
    model: pl.LightningModule, trainer: pl.Trainer, ckpt_path: str | Path, weights_only: bool | None = None
) -> None:
    """Give a module the weights of a checkpoint, its BatchNorm layers converted as they were in training.

    Args:
        model: the module that the checkpoint is of, as it was built for its training.
        trainer: a Trainer of one process.
        ckpt_path: a checkpoint that Lightning saved.
        weights_only: read tensors and plain values, and run no code. None is True, also for an address.

    Raises:
        FinetuneBNError: there is no such checkpoint, or it is of another module.
    """
    checkpoint = _load(trainer, ckpt_path, weights_only)
    trainer.strategy.connect(model)
    model.configure_model()
    _restore(model, checkpoint)


def _load(trainer: pl.Trainer, path: str | Path, weights_only: bool | None) -> dict[str, Any]:
    allowed = "a checkpoint that Lightning saved"
    try:
        # Lightning's default is torch's, and for an address False.
        checkpoint = trainer.strategy.load_checkpoint(path, weights_only=True if weights_only is None else weights_only)
    except Exception as error:  # torch.load raises whatever broken bytes lead it to
        why = (str(error).strip().splitlines() or [""])[0]
        raise FinetuneBNError(complaint("ckpt_path", str(path), allowed, f"{type(error).__name__}: {why}")) from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise FinetuneBNError(complaint("ckpt_path", str(path), allowed))
    return checkpoint


def attach_alone(
    trainer: pl.Trainer, model: pl.LightningModule, datamodule: pl.LightningDataModule, split: str
) -> None:
    """Do what a Trainer does before its loops, for a module without any: hooks and data find their Trainer."""
    if trainer.world_size > 1:
        raise FinetuneBNError(complaint("trainer.devices", trainer.world_size, "1: a file is written by one process"))
    trainer.strategy.connect(model)
    attach_data(trainer, model, datamodule)
    trainer.strategy.setup_environment()
    trainer.state.fn = TrainerFn.VALIDATING
    trainer.validating = True
    datamodule.prepare_data()
    datamodule.setup({"train": "fit", "val": "validate", "test": "test"}[split])
    model.setup("validate")
    model.configure_model()


def _restore(model: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    # Hooks may change it; a dict() would drop the metadata, by which layers know older files.
    handed_out = {**checkpoint, "state_dict": copy.copy(checkpoint["state_dict"])}
    replay(handed_out, model)
    model.on_load_checkpoint(handed_out)
    try:
        model.load_state_dict(handed_out["state_dict"], strict=model.strict_loading)
    except RuntimeError as error:
        allowed = f"a checkpoint of {type(model).__name__} as it is configured"
        why = " ".join(str(error).split())[:200]
        raise FinetuneBNError(complaint("ckpt_path", "weights of another module", allowed, f"{why}...")) from error
    # Behind the weights, by which `merged` layers forget what they were.
    load_sources(model, checkpoint.get(CHECKPOINT_KEY, {}).get("sources", {}))


def _update(checkpoint: dict[str, Any], model: pl.LightningModule, record: Recalibration) -> None:
    """Put the tensors of the BatchNorm layers into the checkpoint, in the dtypes that it has."""
    state = checkpoint["state_dict"]
    layers = {name for site in find_batch_norms(model) for name in site.names}
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] in layers and name in state:
            state[name] = value.detach().to("cpu", state[name].dtype, copy=True)
    checkpoint[CHECKPOINT_KEY] = {"of_training": {}} | checkpoint.get(CHECKPOINT_KEY, {})
    checkpoint[CHECKPOINT_KEY]["sources"] = sources_of(model)
    checkpoint[RECORD_KEY] = record.to_dict()
