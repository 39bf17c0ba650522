"""The config that a run leaves beside its results; that of another run in the same folder stays."""

from __future__ import annotations

import itertools
from pathlib import Path

import lightning.pytorch as pl
import yaml  # type: ignore[import-untyped]
from lightning.pytorch.cli import SaveConfigCallback
from typing_extensions import override

from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.callbacks.decision import Decision
from finetune_bn.utilities.files import write_atomically


class SaveRunConfig(SaveConfigCallback):
    """Save the config of a run, with a number in its name where another config lies there under the same name."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir  # all processes have to ask for it
        if not self.already_saved and trainer.is_global_zero and log_dir is not None:
            text = self.parser.dump(self.config, skip_none=False)
            self.config_filename = _free_name(Path(log_dir), self.config_filename, text)
        super().setup(trainer, pl_module, stage)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what policy auto has decided in its place, so that the config trains the same without comparing."""
        conversions = [c for c in trainer.callbacks if isinstance(c, BatchNormConversion)]  # type: ignore[attr-defined]
        decided = next((c for c in conversions if c.decision is not None), None)
        if decided is None or decided.decision is None or not trainer.is_global_zero or trainer.log_dir is None:
            return
        path = Path(trainer.log_dir) / self.config_filename
        if path.exists():
            write_atomically(path, with_decision(path.read_text(encoding="utf-8"), decided.decision, decided.module))


def with_decision(text: str, decision: Decision, module: str | None) -> str:
    """Return a config with what policy auto has decided in place of it; what was compared is a comment in front.

    Args:
        text: the config, as YAML.
        decision: what was decided.
        module: attribute path of the part that is treated.
    """
    config = yaml.safe_load(text)
    if not isinstance(config, dict) or config.get("batch_norm", {}).get("policy") != "auto":
        return text
    head = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    overlay = decision.overlay(module)
    config["batch_norm"]["policy"] = overlay["batch_norm"]["policy"]
    arguments = config.get("model", {}).get("init_args")
    if "model" in overlay and isinstance(arguments, dict):
        arguments |= {name: value for name, value in overlay["model"]["init_args"].items() if name in arguments}
    given = config["trainer"].get("callbacks") or []
    added = overlay.get("trainer", {}).get("callbacks+", [])
    config["trainer"]["callbacks"] = [*(given if isinstance(given, list) else [given]), *added] or None
    said = f"# batch_norm.policy was auto (budget {decision.budget}): {decision.said}\n"
    return head + said + str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000))


def overlay_text(decision: Decision, module: str | None) -> str:
    """Return a decision as a config to put on top of the one that was compared for.

    Args:
        decision: what was decided.
        module: attribute path of the part that is treated.
    """
    config = str(yaml.safe_dump(decision.overlay(module), sort_keys=False, allow_unicode=True))
    return f"# {decision.said}\n# finetune-bn fit --config ... --config THIS_FILE\n{config}"


def _free_name(folder: Path, name: str, text: str) -> str:
    """Return a name under which there is no file in the folder, or one with this very text."""
    stem, suffix = Path(name).stem, Path(name).suffix
    for i in itertools.count():
        path = folder / (f"{stem}-{i}{suffix}" if i else name)
        if not path.exists() or path.read_text(encoding="utf-8").strip() == text.strip():
            return path.name
    raise AssertionError  # there is always another number
