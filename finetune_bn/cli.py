"""The command `finetune-bn`: fine-tune, evaluate and plan from a config file."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from jsonargparse import ArgumentError
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
        the_plan = plan(conversion.target(model), conversion.policy)
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
            parser_kwargs={
                "prog": "finetune-bn",
                "description": "Fine-tune backbones with their BatchNorm layers in hand.",
                "exit_on_error": False,
                **{name: {"exit_on_error": False} for name in self.subcommands()},
            },
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
    except ArgumentError as error:
        sys.exit(f"finetune-bn: error: {readable(str(error))}")
    except Exception as error:
        # jsonargparse wraps what a constructor raises; an error of ours is meant for the user, any other is a fault.
        own = _own_error(error)
        if own is None:
            raise
        sys.exit(f"finetune-bn: error: {own}")


def readable(message: str) -> str:
    """Return what is wrong with a config, out of jsonargparse's account of every type that it tried.

    Args:
        message: the text of its error.
    """
    noise = ("Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(noise)]
    text = " ".join(kept).replace("typing.Literal", "one of ").replace("Expected a one of", "expected one of")
    text = re.sub(r'Parser key "([^"]*)":', r"\1:", text)
    unknown = re.search(r"class_path '([\w.]+)'.*Option '([\w.]+)' is not accepted", text)
    if unknown:
        text += f". {_suggestion(*unknown.groups())}"
    return f"{text}\nSee `finetune-bn fit --help`, and configs/ for examples."


def _suggestion(class_path: str, option: str) -> str:
    module, _, name = class_path.rpartition(".")
    known: set[str] = set()
    for cls in inspect.getmro(getattr(sys.modules.get(module), name, object)):
        known |= set(inspect.signature(cls).parameters) - {"self", "args", "kwargs"}
    close = difflib.get_close_matches(option, known, n=2)
    return f"Did you mean {' or '.join(close)}?" if close else f"{name} takes {', '.join(sorted(known))}."


def _own_error(error: BaseException | None) -> FinetuneBNError | None:
    while error is not None and not isinstance(error, FinetuneBNError):
        error = error.__cause__ or error.__context__
    return error
