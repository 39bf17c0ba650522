"""The command `finetune-bn`: fine-tune, evaluate, plan, recalibrate and export from a config file."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse import ActionConfigFile, ArgumentError
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

# Imported for their class names, which can then be written without a path in a config.
import finetune_bn.data
import finetune_bn.tasks  # noqa: F401
from finetune_bn import __version__
from finetune_bn.callbacks import BatchNormConversion, BatchNormRecalibration
from finetune_bn.callbacks.recalibrate_checkpoint import Split, load_into, recalibrate_checkpoint
from finetune_bn.cli import configs
from finetune_bn.conversion.export import export
from finetune_bn.conversion.merge import fold
from finetune_bn.conversion.plan import plan
from finetune_bn.conversion.policies import Policy
from finetune_bn.diagnosis.figures import to_json
from finetune_bn.diagnosis.memory import MemoryReport, memory_report
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.recalibration.measurement import How, Mode, Part
from finetune_bn.utilities.files import write_atomically


class Trainer(pl.Trainer):
    """Lightning's Trainer, and three verbs more."""

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        format: Literal["text", "json"] = "text",
        output: str | None = None,
        memory: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Show what would happen to each BatchNorm layer of the model, and why. Trains nothing.

        Args:
            model: The model of the config.
            datamodule: The data of the config; it is not read.
            format: A table to look at (text), or JSON.
            output: A file to write to instead of the terminal.
            memory: Also show the bytes that a training step keeps for its backward pass, layer by layer, before and
                after. For a batch of the data's batch_size and image_size, or else of the model's example_input_array.
            ckpt_path: Not read. It may be there so that the run_config.yaml that `fit` leaves can be planned again.
            weights_only: As ckpt_path.
        """
        conversion = next(c for c in self.callbacks if isinstance(c, BatchNormConversion))  # type: ignore[attr-defined]
        model.configure_model()
        the_plan = plan(conversion.target(model), conversion.policy)
        text = the_plan.to_json() if format == "json" else str(the_plan)
        if memory:
            kept = self._memory(model, datamodule, conversion)
            text = to_json(the_plan.to_dict() | {"memory": kept.to_dict()}) if format == "json" else f"{text}\n\n{kept}"
        if output is None:
            print(text)
            return
        try:
            if not Path(output).parent.is_dir():
                raise FileNotFoundError(f"there is no folder {Path(output).parent}")
            write_atomically(Path(output), text + "\n")
        except OSError as error:
            raise FinetuneBNError(complaint("output", output, "a file that can be written", f"{error}.")) from error
        print(f"Plan of {len(the_plan.rows)} layers: {output}")

    def _memory(
        self, model: pl.LightningModule, datamodule: pl.LightningDataModule | None, conversion: BatchNormConversion
    ) -> MemoryReport:
        images = _images(model, datamodule, getattr(datamodule, "batch_size", 1))
        autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(str(self.precision))
        return memory_report(conversion.target(model), images, conversion.policy, autocast=autocast)

    def export(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        output: str | None = None,
        merge: bool = True,
        weights_only: bool | None = None,
    ) -> None:
        """Write the network of a checkpoint to a file that needs neither its code nor this package. Trains nothing.

        The file takes images as the data module hands them out, resized and normalized, in batches of any size where
        the network allows it, and is compared with the network before it is written.

        Args:
            model: The model of the config.
            datamodule: The data of the config; only its image_size is read.
            ckpt_path: The checkpoint. It is read only.
            output: The file, overwritten if it is there; .onnx, or .pt2 for `torch.export.load`.
            merge: Merge BatchNorm layers into the convolutions in front of them, where they fit.
            weights_only: Read tensors and plain values from the checkpoint, and no other objects.
        """
        for name, path in (("ckpt_path", ckpt_path), ("output", output)):
            if path is None:
                raise FinetuneBNError(complaint(name, None, "a file"))
        assert ckpt_path is not None
        assert output is not None
        load_into(model, self, ckpt_path, weights_only)
        images = _images(model, datamodule, 2)
        if merge and find_batch_norms(model, group_norms=True):
            fold(model, images)
        print(f"Exported: {export(model, output, images)}")

    def recalibrate(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        ckpt_path: str | None = None,
        output: str | None = None,
        report: str | None = None,
        split: Split = "train",
        domain: str | None = None,
        source_first: bool | None = None,
        module: str | None = None,
        layers: str | list[str] = "*",
        mode: Mode = "auto",
        how: How = "renormalize",
        part: Part = "both",
        prior: float = 0,
        max_samples: int | None = None,
        min_samples: int = 8,
        tolerance: float | None = None,
        batch_size: int | None = None,
        memory: int | None = None,
        seed: int = 0,
        weights_only: bool | None = None,
    ) -> None:
        """Give a checkpoint the BatchNorm statistics of the data, and write it to a new file. Trains nothing.

        It runs on one device, whatever the config asks for.

        Args:
            model: The model of the config.
            datamodule: The data of the config.
            ckpt_path: The checkpoint. It is read only.
            output: The new checkpoint, overwritten if it is there. Default: beside the old one, under its name with
                -recalibrated behind it.
            report: A JSON file for what was measured, layer by layer.
            split: Whose images are taken: train, val or test. Labels are not used.
            domain: Only the images of this domain.
            source_first: Give the layers the statistics of the training images first, the function preserved. A network
                that was fine-tuned with frozen layers works by the statistics of its pretraining, and to replace those
                by other images' destroys it. Default: where there are frozen layers.
            module: Attribute path of the part that takes the images and whose layers are recalibrated, such as `net`.
                By default the whole model.
            layers: Name patterns of the layers, such as `layer4.*`, relative to module; all by default.
            mode: exact: all images together, layer by layer, so that it does not matter how they are cut into batches.
                one_pass: each chunk of images is normalized by itself. auto: exact where the activations fit in memory.
            how: renormalize: gamma and beta keep their values and the function changes. preserve: the function stays,
                and gamma and beta are solved anew.
            part: The mean and the variance (both), or one of them.
            prior: Weight of the statistics from before, in images.
            max_samples: How many images are taken at most. Default: all.
            min_samples: Fewer images are an error.
            tolerance: Stop when the standard error of all statistics is at most this, in standard deviations.
            batch_size: Images that one_pass normalizes together. Default: as many as fit in memory, 1,024 at most.
            memory: Bytes for activations that wait in mode exact. Default: half of what the device has free.
            seed: Decides the order of the images, and so which are taken.
            weights_only: Read tensors and plain values from the checkpoint, and no other objects.
        """
        if ckpt_path is None:
            raise FinetuneBNError(complaint("ckpt_path", None, "the checkpoint to recalibrate"))
        if report is not None and (Path(report).is_dir() or not Path(report).absolute().parent.is_dir()):
            raise FinetuneBNError(complaint("report", report, "a file in a folder that there is"))
        if source_first and how == "preserve":
            raise FinetuneBNError(complaint("source_first", True, "false with how=preserve", "It is that step."))
        recalibration = BatchNormRecalibration(
            when="test" if how == "renormalize" else "validation",
            source_first=source_first,
            module=module,
            layers=layers,
            mode=mode,
            how=how,
            part=part,
            prior=prior,
            max_samples=max_samples,
            min_samples=min_samples,
            tolerance=tolerance,
            batch_size=batch_size,
            memory=memory,
            seed=seed,
        )
        path, record = recalibrate_checkpoint(
            self,
            model,
            datamodule,
            ckpt_path,
            output,
            recalibration,
            split=split,
            domain=domain,
            weights_only=weights_only,
        )
        if report is not None:
            facts = {"ckpt_path": ckpt_path, "output": str(path), "split": split, "domain": domain}
            write_atomically(report, to_json(facts | record.to_dict()))
        print(f"{record}\nRecalibrated checkpoint: {path}")


def _images(model: pl.LightningModule, datamodule: pl.LightningDataModule | None, batch_size: int) -> Any:
    """Return input for the model, of the size of the data or else the model's own example."""
    size = getattr(datamodule, "image_size", None)
    if isinstance(size, int):
        return torch.randn(batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    if model.example_input_array is None:
        allowed = "data with an image_size, or a model with an example_input_array, to know what goes in"
        raise FinetuneBNError(complaint("data", type(datamodule).__name__, allowed))
    return model.example_input_array


class ConfigByName(ActionConfigFile):
    """`--config`: a file, or the name of a packaged config."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        self.apply_config(parser, cfg, self.dest, configs.find(values) if isinstance(values, str) else values)


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
            # A name of its own: without a logger it lands in the current folder, perhaps beside a config.yaml.
            save_config_kwargs={"config_filename": "run_config.yaml", "overwrite": True},
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
        own = {"model", "datamodule"}
        return LightningCLI.subcommands() | {"plan": own, "recalibrate": own, "export": own}

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("dump_header", [f"finetune_bn=={__version__}", f"lightning.pytorch=={pl.__version__}"])
        parser = LightningArgumentParser(**kwargs)
        words = "A YAML file, or the name of a packaged one (`finetune-bn configs`). Of several the later ones win."
        parser.add_argument("-c", "--config", action=ConfigByName, help=words)
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
    def before_instantiate_classes(self) -> None:
        """Let what writes one file run on one device of those that the config asks for."""
        if self.subcommand in ("recalibrate", "export"):
            options = self.config[self.subcommand].trainer
            options.devices, options.num_nodes, options.strategy = 1, 1, "auto"

    @override
    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Return the Trainer; what Lightning finds wrong with its arguments becomes an error of ours."""
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise FinetuneBNError(f"trainer: {error}") from error

    def after_fit(self) -> None:
        """Test the best checkpoint, where the config asks for it."""
        if not self.config["fit"]["test_after_fit"] or self.trainer.interrupted:
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if not best:  # so it is with fast_dev_run and without a ModelCheckpoint
            rank_zero_info("No checkpoint was kept: the weights at the end of the training are tested.")
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best or None)


def main(args: Any = None) -> None:
    """Run the command; a mistake in the config or the data ends in one line, not in a traceback."""
    try:
        if (sys.argv[1:] if args is None else args) == ["configs"]:
            print(configs.listing())
            return
        FinetuneBNCLI(args)
    except ArgumentError as error:
        sys.exit(f"finetune-bn: error: {readable(str(error))} See `finetune-bn fit --help` and `finetune-bn configs`.")
    except Exception as error:
        # jsonargparse wraps what a constructor raises; an error of ours is meant for the user, any other is a fault.
        own = _for_the_user(error)
        if own is None:
            raise
        sys.exit(f"finetune-bn: error: {' '.join(str(own).split())}")


def _for_the_user(error: BaseException | None) -> BaseException | None:
    while error is not None and not isinstance(error, (FinetuneBNError, MisconfigurationException)):
        error = error.__cause__
    return error


# What jsonargparse says of the mistakes that people make, in the midst of its account of every type that it tried.
_MISTAKE = re.compile(
    r"class_path '(?P<owner>[\w.]+)':\s+Option '(?P<option>[\w.]+)' is not accepted"
    r"|dot import path string: (?P<name>\S+)"
    r"|module '[\w.]+' has no attribute '(?P<missing>\w+)'"
    r"|does not correspond to a subclass of (?P<base>\w+)"
    r"|(?P<fact>No module named '[\w.]+')"
    r"|Expected an? (?P<type>.+)\. Got value: (?P<value>.*)"
    r"|does not accept option '(?P<key>[\w.]+)'"
    r"|unrecognized arguments: --(?P<argument>[\w.]+)"
)
_SECTIONS = {
    "model": pl.LightningModule,
    "data": pl.LightningDataModule,
    "batch_norm": Policy,
    "trainer": pl.Callback,
}


def readable(message: str) -> str:
    """Return what is wrong with a config as one line, out of jsonargparse's account of every type that it tried.

    Args:
        message: the text of its error.
    """
    found = _MISTAKE.search(message)
    part = found.groupdict() if found else {}
    given = re.search(r"Given value: (.*)", message)  # the first one is the innermost
    ahead = message[: found.start() if found else given.start() if given else len(message)]
    where = ".".join(re.findall(r'Parser key "([^"]*)":', ahead))
    if part.get("option"):
        name = str(part["owner"]).rpartition(".")[2]
        option = str(part["option"])
        return f"{where}: {name} has no {option!r}. {_closest(option, _arguments(str(part['owner'])))}"
    if part.get("key") or part.get("argument"):
        key = str(part["key"] or part["argument"])
        return f"There is no {key!r}. {_closest(key, _keys())}".strip()
    if part.get("fact"):
        return f"{where}: {part['fact']}."
    if part.get("value") is not None:
        return complaint(where, part["value"], _in_words(str(part["type"])))
    missing = part.get("name") or part.get("missing")
    if missing or part.get("base"):
        base = _SECTIONS.get(where.partition(".")[0], object)
        allowed = f"the name of a {part.get('base') or base.__name__} or the import path of one"
        return complaint(where, missing or (given and given[1]), allowed, _closest(missing or "", _subclasses(base)))
    types = [kind for kind in re.findall(r"Expected an? (.+)", ahead) if "NoneType" not in kind and "path" not in kind]
    if given and where and types:
        return complaint(where, given[1], ", ".join(_in_words(kind) for kind in types))
    return re.sub(r'Parser key "([^"]*)":', r"\1:", " ".join(message.split()))


def _closest(name: str, known: set[str]) -> str:
    """Return what was probably meant, or what there is, where that is not too much to read."""
    first = name.partition(".")[0]
    close = difflib.get_close_matches(name, known, n=2) or difflib.get_close_matches(first, known, n=1)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"There are: {', '.join(sorted(known))}." if 0 < len(known) <= 40 else ""


def _arguments(class_path: str) -> set[str]:
    """Return the arguments of a class, those that it passes on to its parents included."""
    module, _, name = class_path.rpartition(".")
    found = {"init_args"}
    for cls in inspect.getmro(getattr(sys.modules.get(module), name, object)):
        found |= set(inspect.signature(cls).parameters) - {"self", "args", "kwargs"}
    return found


def _keys() -> set[str]:
    """Return the keys of a config, as far as they do not depend on a class that is chosen in it."""
    top = {*_SECTIONS, "seed_everything", "test_after_fit", "ckpt_path", "optimizer", "lr_scheduler"}
    groups = {"trainer": Trainer, "batch_norm": BatchNormConversion}
    return top | {f"{name}.{key}" for name, cls in groups.items() for key in inspect.signature(cls).parameters}


def _subclasses(base: type) -> set[str]:
    """Return the names of the classes that a config can name without a path."""
    found: set[str] = set()
    classes: list[type] = [] if base is object else base.__subclasses__()
    for cls in classes:
        named = not inspect.isabstract(cls) and not cls.__name__.startswith("_")
        found |= _subclasses(cls) | ({cls.__name__} if named else set())
    return found


def _in_words(kind: str) -> str:
    return re.sub(r"<class '([\w.]+)'>", r"\1", re.sub(r"typing\.Literal\[(.*)\]", r"\1", kind))
