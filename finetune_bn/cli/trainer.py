"""Lightning's Trainer with the verbs of the command: plan, recalibrate, export, and a predict that writes a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn
from typing_extensions import override

from finetune_bn.callbacks import BatchNormConversion, BatchNormRecalibration
from finetune_bn.callbacks.auto import BudgetName
from finetune_bn.callbacks.compare_in_trainer import compare_in
from finetune_bn.callbacks.recalibrate_checkpoint import Split, load_into, recalibrate_checkpoint
from finetune_bn.cli.diagnose import Asked, diagnose_config, shown
from finetune_bn.cli.fitting import COUNTED, Fitting, gib_of, state_of
from finetune_bn.cli.predictions import check_output, write_predictions
from finetune_bn.cli.run_config import overlay_text
from finetune_bn.conversion.export import export
from finetune_bn.conversion.merge import fold
from finetune_bn.conversion.plan import plan
from finetune_bn.diagnosis.memory import MemoryReport, memory_report
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.recalibration.settings import RecalibrationSettings
from finetune_bn.utilities.files import check_output as check_file
from finetune_bn.utilities.files import to_json, write_atomically


class Trainer(pl.Trainer):
    """Lightning's Trainer, and five verbs more.

    Attributes:
        asked: what the config asks of the machine, where a verb runs on one device of it.
    """

    asked = Asked()

    @override
    def predict(  # type: ignore[override]
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: pl.LightningDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        output: str | None = None,
    ) -> Any:
        """Write classes and scores, or embeddings, of the test images to a CSV file.

        It runs on one device, whatever the config asks for.

        Args:
            model: The model of the config.
            dataloaders: Loaders in place of the data.
            datamodule: The data of the config.
            return_predictions: Whether the predictions are kept, and so written to the file.
            ckpt_path: The checkpoint.
            weights_only: Read tensors and plain values from the checkpoint, and no other objects. The default.
            output: The CSV file, overwritten if it is there. Default: predictions.csv in the folder of the run.
        """
        check_output(output)
        predictions = super().predict(model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only)
        if predictions and self.lightning_module is not None:
            path = Path(output if output is not None else self.log_dir or self.default_root_dir)
            path = path / "predictions.csv" if output is None else path
            count = write_predictions(path, self.lightning_module, self.predict_dataloaders, predictions)
            print(f"Predictions of {count} images: {path}")
        return predictions

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        format: Literal["text", "json"] = "text",
        output: str | None = None,
        memory: bool = False,
        batch_size: Literal["auto"] | None = None,
        memory_gib: list[float] | float | str | None = None,
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
            batch_size: With memory, auto says the largest batch that fits, before and after. Computed from what is kept
                for backward, the weights, their gradients and the optimizer's state, with a tenth of the memory left
                free; it was not measured.
            memory_gib: Memory of the devices for that, in GiB: 8,16,24. Default: that of the GPU, or these.
            ckpt_path: Not read. It may be there so that the run_config.yaml that `fit` leaves can be planned again.
            weights_only: As ckpt_path.
        """
        conversion = next(c for c in self.callbacks if isinstance(c, BatchNormConversion))  # type: ignore[attr-defined]
        if conversion.undecided:
            remedy = "finetune-bn compare finds one; fit decides by itself."
            raise FinetuneBNError(complaint("batch_norm.policy", "auto", "a policy, to plan for it", remedy))
        if batch_size is not None and not memory:
            raise FinetuneBNError(complaint("batch_size", batch_size, "auto together with --memory true"))
        sizes = gib_of(memory_gib)
        model.configure_model()
        the_plan = plan(conversion.target(model), conversion.policy)
        text = the_plan.to_json() if format == "json" else str(the_plan)
        if memory:
            kept = self._memory(model, datamodule, conversion)
            found = the_plan.to_dict() | {"memory": kept.to_dict()}
            text = f"{text}\n\n{kept}"
            if batch_size is not None:
                reports = [self._memory(model, datamodule, conversion, batch) for batch in COUNTED]
                fitting = Fitting.of(conversion.target(model), reports, state_of(model), sizes)
                found, text = found | {"fits": fitting.to_dict()}, f"{text}\n\n{fitting}"
            text = to_json(found) if format == "json" else text
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

    def diagnose(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        format: Literal["text", "json", "html"] = "text",
        output: str | None = None,
        overlay: str | None = None,
        max_images: int = 1000,
        seconds: float = 60.0,
        curvature: bool = True,
        memory: bool = True,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Say what model, data and batches mean for the BatchNorm layers, and advise. Trains nothing.

        It runs on one device, whatever the config asks for.

        Args:
            model: The model of the config.
            datamodule: The data of the config.
            format: What to write. text: findings, layers, advice. json: all figures, by diagnosis.schema.json of the
                docs. html: one page that opens from disk, without any request.
            output: A file to write to instead of the terminal.
            overlay: A YAML file for what is advised, to pass as one more --config.
            max_images: So many training images are looked at.
            seconds: About so long it may take; what there is no time for is left out, and named.
            curvature: Whether the curvature of the loss is measured, for the learning rate.
            memory: Whether memory and launches of the policies are counted.
            ckpt_path: Not read. It may be there so that the run_config.yaml that `fit` leaves can be diagnosed.
            weights_only: As ckpt_path.
        """
        for name, path in (("output", output), ("overlay", overlay)):
            if path is not None:
                check_file(name, path)
        conversion = next(c for c in self.callbacks if isinstance(c, BatchNormConversion))  # type: ignore[attr-defined]
        options = {"max_images": max_images, "seconds": seconds, "curvature": curvature, "memory": memory}
        found, advice = diagnose_config(self, model, datamodule, conversion, self.asked, **options)
        text = shown(found, advice, format)
        if overlay is not None:
            write_atomically(overlay, advice.overlay)
        if output is None:
            print(text)
        else:
            write_atomically(output, text if text.endswith("\n") else f"{text}\n")
            print(f"Diagnosis of {len(found.layers)} layers: {output}. Advice: {advice.title}.")

    def compare(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule,
        budget: BudgetName = "fast",
        folder: str | None = None,
        format: Literal["text", "json"] = "text",
        output: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Try several treatments of the BatchNorm layers by short trainings, each at several learning rates.

        What `fit --batch_norm.policy auto` does before its training. Copies of the model are trained, scored by the
        metric that ModelCheckpoint or EarlyStopping monitor; the policy of the config is not used. The best treatment
        is written as a config (policy.yaml), to be put on top: fit --config ... --config FOLDER/policy.yaml.

        Args:
            model: The model of the config.
            datamodule: The data of the config.
            budget: fast takes about 2 minutes, good about 8, best about 30; less where the training itself is short.
            folder: Where finished trainings, comparison.json, comparison.csv, comparison.html and policy.yaml are kept.
                A comparison that was cut off goes on there. Default: policy_auto in the Trainer's default_root_dir.
            format: A table to look at (text), or JSON.
            output: A file to write to instead of the terminal.
            ckpt_path: Not read. It may be there so that the run_config.yaml that `fit` leaves can be used.
            weights_only: As ckpt_path.
        """
        if output is not None:
            check_file("output", output)
        conversion = next(c for c in self.callbacks if isinstance(c, BatchNormConversion))  # type: ignore[attr-defined]
        chosen = compare_in(self, model, datamodule, conversion.module, budget, folder)
        text = chosen.comparison.to_json() if format == "json" else str(chosen.comparison)
        if chosen.folder is not None:
            write_atomically(chosen.folder / "policy.yaml", overlay_text(chosen.decision, conversion.module))
            chosen.comparison.save_html(chosen.folder / "comparison.html")
        if output is not None:
            write_atomically(output, text + "\n")
            text = f"Comparison of {len(chosen.comparison.arms)} treatments: {output}"
        print(text)
        if chosen.folder is not None and format == "text":
            print(f"To train with the best: fit --config ... --config {chosen.folder / 'policy.yaml'}")

    def _memory(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None,
        conversion: BatchNormConversion,
        batch: int | None = None,
    ) -> MemoryReport:
        if batch is not None and not isinstance(getattr(datamodule, "image_size", None), int):
            allowed = "data with an image_size, to know what images of another batch are like"
            raise FinetuneBNError(complaint("data", type(datamodule).__name__, allowed))
        size: int = getattr(datamodule, "batch_size", 1) if batch is None else batch
        images = _images(model, datamodule, size)
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
            weights_only: Read tensors and plain values from the checkpoint, and no other objects. The default.
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
        forward: Callable[[nn.Module, Any], Any] | None = None,
        mask: Callable[[Any], Any] | None = None,
        seed: int = 0,
        weights_only: bool | None = None,
        **settings: Any,
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
            forward: The function `(module, batch)` that passes a batch to the part, by its import path. Default: the
                first tensor of a batch.
            mask: The function `(batch)` that tells which values of a padded batch count, by its import path.
            seed: Decides the order of the images, and so which are taken.
            weights_only: Read tensors and plain values from the checkpoint, and no other objects. The default.
            settings: The other arguments of a recalibration.
        """
        if ckpt_path is None:
            raise FinetuneBNError(complaint("ckpt_path", None, "the checkpoint to recalibrate"))
        if report is not None and (Path(report).is_dir() or not Path(report).absolute().parent.is_dir()):
            raise FinetuneBNError(complaint("report", report, "a file in a folder that there is"))
        checked = RecalibrationSettings(**settings)
        if source_first and checked.how == "preserve":
            raise FinetuneBNError(complaint("source_first", True, "false with how=preserve", "It is that step."))
        recalibration = BatchNormRecalibration(
            when="test" if checked.how == "renormalize" else "validation",
            source_first=source_first,
            module=module,
            layers=layers,
            forward=forward,
            mask=mask,
            seed=seed,
            **dataclasses.asdict(checked),
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
