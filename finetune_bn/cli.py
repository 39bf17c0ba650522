"""The command `finetune-bn`: fine-tune, evaluate and plan from a config file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from typing_extensions import override

import finetune_bn.data  # noqa: F401 (their class names can then be written without a path in a config)
import finetune_bn.tasks  # noqa: F401
from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.plans import plan


class Trainer(pl.Trainer):
    """Lightning's Trainer, and one verb more."""

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        format: Literal["text", "json"] = "text",  # noqa: A002 (the name of the command's option)
        output: str | None = None,
    ) -> None:
        """Show what would happen to each BatchNorm layer of the model, and why. Trains nothing.

        Args:
            model: The model of the config.
            datamodule: The data of the config; it is not read.
            format: A table to look at (text), or JSON.
            output: A file to write to instead of the terminal.
        """
        conversion = next(c for c in self.callbacks if isinstance(c, BatchNormConversion))  # type: ignore[attr-defined]
        model.configure_model()
        the_plan = plan(model.get_submodule(conversion.module or ""), conversion.policy)
        text = the_plan.to_json() if format == "json" else str(the_plan)
        if output is None:
            print(text)
            return
        path = Path(output)
        if not path.parent.is_dir():
            raise FinetuneBNError(complaint("output", output, "a file in a folder that exists"))
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
        print(f"Plan of {len(the_plan.rows)} layers: {path}")


class FinetuneBNCLI(LightningCLI):
    """LightningCLI with a `batch_norm` section for the layers and the number of classes taken from the data."""

    @override
    def __init__(self, args: Any = None, run: bool = True) -> None:
        super().__init__(
            model_class=pl.LightningModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"prog": "finetune-bn", "description": "Fine-tune backbones with their BatchNorm layers in hand."},
            args=args,
            run=run,
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return LightningCLI.subcommands() | {"plan": {"model", "datamodule"}}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BatchNormConversion, "batch_norm")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="After `fit`, test its best checkpoint. (default: false)"
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.class_names", "model.init_args.class_names", apply_on="instantiate")

    def after_fit(self) -> None:
        """Test the best checkpoint, where the config asks for it."""
        if self.config["fit"]["test_after_fit"] and not self.trainer.interrupted:
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path="best")


def main(args: Any = None) -> None:
    """Run the command; a mistake in the config or the data ends in one line, not in a traceback."""
    try:
        FinetuneBNCLI(args)
    except FinetuneBNError as error:
        sys.exit(f"finetune-bn: error: {error}")
