"""Checkpoints are whole or not there, wherever the system keeps its temporary files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from finetune_bn.callbacks.checkpoint_io import AtomicCheckpointIO, keep_checkpoints_whole

STATE: dict[str, Any] = {"state_dict": {"x": torch.arange(5)}, "epoch": 3}


def test_a_checkpoint_is_read_as_it_was_written_and_its_folder_is_made(tmp_path: Path) -> None:
    plugin, path = AtomicCheckpointIO(), tmp_path / "deep" / "a.ckpt"
    plugin.save_checkpoint(STATE, path)
    plugin.save_checkpoint(STATE | {"epoch": 4}, str(path))
    found = plugin.load_checkpoint(path, weights_only=True)
    assert found["epoch"] == 4
    assert torch.equal(found["state_dict"]["x"], torch.arange(5))
    plugin.remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []


def test_nothing_passes_through_the_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved from another file system, a checkpoint would be copied, and half of it be there in between."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "a.ckpt")
    with pytest.raises(FileNotFoundError):
        TorchCheckpointIO().save_checkpoint(STATE, tmp_path / "b.ckpt")  # Lightning 2.6: once it can, this file can go


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint(STATE | {"epoch": 9}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
    assert path.read_bytes() == before


def test_an_address_is_written_as_lightning_writes_it() -> None:
    plugin, path = AtomicCheckpointIO(), "memory://run/a.ckpt"
    plugin.save_checkpoint(STATE, path)
    assert plugin.load_checkpoint(path, weights_only=True)["epoch"] == 3
    with pytest.raises(TypeError, match="storage_options"):
        plugin.save_checkpoint(STATE, path, storage_options={"key": 1})


def test_a_trainer_takes_it_unless_another_plugin_was_chosen() -> None:
    class Own(TorchCheckpointIO):
        """A plugin of the user's."""

    plain, own = pl.Trainer(accelerator="cpu"), pl.Trainer(accelerator="cpu", plugins=[Own()])
    for trainer in (plain, own):
        keep_checkpoints_whole(trainer)
    assert type(plain.strategy.checkpoint_io) is AtomicCheckpointIO
    assert type(own.strategy.checkpoint_io) is Own
