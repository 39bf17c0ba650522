"""The config that a run leaves beside its results; that of another run in the same folder stays."""

from __future__ import annotations

import itertools
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override


class SaveRunConfig(SaveConfigCallback):
    """Save the config of a run, with a number in its name where another config lies there under the same name."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir  # all processes have to ask for it
        if not self.already_saved and trainer.is_global_zero and log_dir is not None:
            text = self.parser.dump(self.config, skip_none=False)
            self.config_filename = _free_name(Path(log_dir), self.config_filename, text)
        super().setup(trainer, pl_module, stage)


def _free_name(folder: Path, name: str, text: str) -> str:
    """Return a name under which there is no file in the folder, or one with this very text."""
    stem, suffix = Path(name).stem, Path(name).suffix
    for i in itertools.count():
        path = folder / (f"{stem}-{i}{suffix}" if i else name)
        if not path.exists() or path.read_text(encoding="utf-8").strip() == text.strip():
            return path.name
    raise AssertionError  # there is always another number
