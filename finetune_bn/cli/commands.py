"""The command as a LightningCLI: sections of a config, verbs, and what is looked at before they run."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from typing_extensions import override

# Imported for their class names, which can then be written without a path in a config.
import finetune_bn.data
import finetune_bn.tasks  # noqa: F401
from finetune_bn import __version__
from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.callbacks.processes import warn_of_open_devices
from finetune_bn.cli.checkpoints import check_class_names, compare, decided_rate, is_local, read_checkpoint
from finetune_bn.cli.diagnose import Asked, on_one_device
from finetune_bn.cli.help import VERBS
from finetune_bn.cli.parser import ConfigByName, HelpForAll, Parser
from finetune_bn.cli.run_config import SaveRunConfig
from finetune_bn.cli.trainer import Trainer
from finetune_bn.data.base import ImageDataModule
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.tasks.base import TimmTask

ONE_DEVICE = ("recalibrate", "export", "predict", "compare")  # they write one file


class FinetuneBNCLI(LightningCLI):
    """LightningCLI with a `batch_norm` section for the layers and the number of classes taken from the data.

    What config and command line say counts. A checkpoint behind `--ckpt_path` gives weights and the state of a
    training, and is compared with them; Lightning's own command would take its hyperparameters in their place.

    Attributes:
        checkpoint: what the checkpoint holds; empty without one, and where it is not a file on this machine.
    """

    @override
    def __init__(self, args: Any = None, run: bool = True) -> None:
        self.checkpoint: dict[str, Any] = {}
        given = sys.argv[1:] if args is None else args
        first = given[0] if isinstance(given, list) and given else None
        self._typed = [verb for verb in self.subcommands() if verb == first]
        super().__init__(
            model_class=pl.LightningModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            parser_class=Parser,
            save_config_callback=SaveRunConfig,
            # A name of its own: without a logger it lands in the current folder, perhaps beside a config.yaml.
            save_config_kwargs={"config_filename": "run_config.yaml", "overwrite": True},
            seed_everything_default=0,
            parser_kwargs={
                "prog": "finetune-bn",
                "description": "Fine-tune backbones with their BatchNorm layers in hand.",
                "exit_on_error": False,
                **{name: {"exit_on_error": False, "description": VERBS[name]} for name in self.subcommands()},
            },
            args=args,
            run=run,
        )

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        own = {"model", "datamodule"}
        verbs = ("plan", "diagnose", "compare", "recalibrate", "export")
        return LightningCLI.subcommands() | dict.fromkeys(verbs, own)

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"finetune_bn=={__version__}", f"lightning.pytorch=={pl.__version__}"])
        parser = Parser(**kwargs)
        words = "A YAML file, or the name of a packaged one (`finetune-bn configs`). Of several the later ones win."
        parser.add_argument("-c", "--config", action=ConfigByName, help=words)
        return parser

    @override
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Only the parser of the command that was typed: to build all seven takes longer than to plan a network.
        if self._typed:
            self.__dict__["subcommands"] = lambda: {verb: FinetuneBNCLI.subcommands()[verb] for verb in self._typed}
        super()._add_subcommands(parser, **kwargs)

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        assert isinstance(parser, Parser)
        parser.verb = subcommand
        parser.add_argument("--help.all", action=HelpForAll, help="Show all options, those of the Trainer too.")
        return parser

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(BatchNormConversion, "batch_norm")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="After `fit`, test its best checkpoint. (default: false)"
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.link_arguments("data.class_names", "model.init_args.class_names", apply_on="instantiate")

    @override
    def _parse_ckpt_path(self) -> None:
        verb = self.config.get("subcommand")
        options = self.config[verb] if verb is not None else {}
        path = options.get("ckpt_path")
        if path is None or verb in ("plan", "diagnose", "compare"):
            return
        if options.get("weights_only") is None:
            options["weights_only"] = True  # Lightning's own default unpickles what comes from an address
        if not is_local(path) or (verb in ("recalibrate", "export") and not Path(path).is_file()):
            return  # these two say themselves what is missing
        self.checkpoint = read_checkpoint(path, options["weights_only"])
        decided = decided_rate(self.checkpoint)
        if decided is not None and options["batch_norm"]["policy"] == "auto" and "init_args" in options["model"]:
            options["model"]["init_args"]["lr"] = decided
        self._dump_config()
        model = self.config_dump["model"]
        del self.config_dump  # weights may yet change
        compare(path, self.checkpoint, model["class_path"], model.get("init_args", {}), verb)
        if verb != "fit" and _is_task(model["class_path"]):
            options["model"]["init_args"]["weights"] = None  # all of them are in the checkpoint

    @override
    def before_instantiate_classes(self) -> None:
        """Refuse empty sections, and let what writes one file run on one device of those that the config asks for."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        for section in ("batch_norm", "trainer"):  # all lines below it commented out, as a rule
            given = config.get(section)
            if not isinstance(given, Namespace):
                remedy = "Take the line out, for the defaults, or put settings below it."
                raise FinetuneBNError(complaint(section, given, "its settings", remedy))
        self.asked = Asked()
        if self.subcommand == "diagnose":
            self.asked = on_one_device(config.trainer)
        if self.subcommand in ONE_DEVICE:
            options = self.config[self.subcommand].trainer
            options.devices, options.num_nodes, options.strategy = 1, 1, "auto"

    @override
    def after_instantiate_classes(self) -> None:
        """Look whether the classes of model, data and checkpoint are the same."""
        options = self.config[self.subcommand] if self.subcommand else self.config
        arguments = options["model"].get("init_args")
        typed = arguments.get("num_classes") if arguments is not None else None
        found = getattr(self.datamodule, "num_classes", None)
        if isinstance(typed, int) and isinstance(found, int) and typed != found:
            allowed = f"{found}, the number of classes of the data, or none: it is taken from the data"
            raise FinetuneBNError(complaint("model.num_classes", typed, allowed))
        if self.checkpoint:
            check_class_names(options["ckpt_path"], self.checkpoint, getattr(self.model, "class_names", None))

    @override
    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        """Put the conversion in front of all callbacks: weight averaging copies the network in its own `setup`.

        What Lightning finds wrong with the arguments of a Trainer becomes an error of ours.
        """
        given = config.get("callbacks") or []
        first = [callback for callback in callbacks if isinstance(callback, BatchNormConversion)]
        config["callbacks"] = [*first, *(given if isinstance(given, list) else [given])]
        try:
            return super()._instantiate_trainer(config, [callback for callback in callbacks if callback not in first])
        except ValueError as error:
            raise FinetuneBNError(f"trainer: {error}") from error

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit as stop:
            if stop.code == 1 and self.trainer.interrupted:  # so Lightning ends after Ctrl-C
                last = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
                raise KeyboardInterrupt(f"Go on with --ckpt_path {last}" if last else "") from None
            raise

    def before_fit(self) -> None:
        """Say before the training what cannot be done after it, and what several devices make of it."""
        if self.config["fit"]["trainer"].get("devices") == "auto":
            warn_of_open_devices(self.trainer.world_size, getattr(self.datamodule, "batch_size", None))
        splits = self.datamodule.contents.splits if isinstance(self.datamodule, ImageDataModule) else {}
        if self.config["fit"]["test_after_fit"] and splits and not splits["test"]:
            rank_zero_warn("test_after_fit: there are no test images, so nothing will be tested after the training.")
            self.config["fit"]["test_after_fit"] = False
        if splits and not splits["val"]:
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and str(callback.monitor).startswith("val"):
                    rank_zero_warn(
                        f"ModelCheckpoint: there are no validation images, so {callback.monitor} is never measured and "
                        "no checkpoint would be kept. The last one is kept."
                    )
                    callback.monitor, callback.save_top_k = None, min(callback.save_top_k, 1)

    def before_diagnose(self) -> None:
        """Hand on what the config asked of the machine: the Trainer has one device of it."""
        assert isinstance(self.trainer, Trainer)
        self.trainer.asked = self.asked

    def before_validate(self) -> None:
        """Say what is evaluated without a checkpoint."""
        self._warn_untrained()

    def before_test(self) -> None:
        """Say what is evaluated without a checkpoint."""
        self._warn_untrained()

    def before_predict(self) -> None:
        """Say what predicts without a checkpoint."""
        self._warn_untrained()

    def _warn_untrained(self) -> None:
        options: Mapping[str, Any] = self.config[self.subcommand]
        if options.get("ckpt_path") is None:
            rank_zero_warn(
                f"{self.subcommand}: there is no --ckpt_path, so the model is taken as the config builds it: where its "
                "weights come without a head for these classes, the head is untrained."
            )

    def after_fit(self) -> None:
        """Test the best checkpoint, where the config asks for it."""
        if not self.config["fit"]["test_after_fit"] or self.trainer.interrupted:
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if not best:  # so it is with fast_dev_run and without a ModelCheckpoint
            rank_zero_info("No checkpoint was kept: the weights at the end of the training are tested.")
        else:
            # In the Trainer of the training it would put the weights of the last step in place of the averaged ones.
            kept = [c for c in self.trainer.callbacks if not isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
            self.trainer.callbacks = kept  # type: ignore[attr-defined]
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None, weights_only=True)


def _is_task(class_path: str) -> bool:
    """Tell whether a class, which the parser has imported, is one of ours: its checkpoints hold all weights."""
    module, _, name = class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name, None) if module else None
    return isinstance(cls, type) and issubclass(cls, TimmTask)
