"""`finetune-bn diagnose`: what it reads from a config, what it writes, and the schema of its JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging

from finetune_bn.callbacks import StepLimit
from finetune_bn.cli import main
from finetune_bn.cli.diagnose import _averaging, _loss_of, _optimizer_of, _steps, _training_loader, on_one_device
from finetune_bn.diagnosis.advise import TREATMENTS, overlay
from finetune_bn.diagnosis.rule import ARMS, Arm
from finetune_bn.errors import FinetuneBNError

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "use" / "diagnosis.schema.json"
CONFIG = (
    *("--model", "ImageClassification", "--model.weights", "none", "--model.backbone", "test_efficientnet"),
    *("--data", "EmojiData", "--data.image_size", "32", "--data.batch_size", "8", "--data.num_workers", "0"),
    *("--trainer.accelerator", "cpu", "--trainer.logger", "false"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, and keep the seed that the command leaves in the environment out of other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune-bn"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def violations(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Return where a value breaks a JSON schema, as far as ours goes: types, enums, properties, items."""
    kinds = {
        "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int,
        "number": (int, float),
    }  # fmt: skip
    allowed = schema.get("type", list(kinds))
    allowed = [allowed] if isinstance(allowed, str) else allowed
    fits = any(isinstance(value, kinds[k]) and (k == "boolean" or not isinstance(value, bool)) for k in allowed)
    found = [] if fits else [f"{where}: {value!r} is no {allowed}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r} is none of {schema['enum']}")
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        found += [f"{where}: no {name}" for name in schema.get("required", []) if name not in value]
        if schema.get("additionalProperties") is False:
            found += [f"{where}: {name} is not in the schema" for name in value if name not in properties]
        for name, part in value.items():
            found += violations(part, properties.get(name, {}), f"{where}.{name}")
    if isinstance(value, list):
        found += [v for i, part in enumerate(value) for v in violations(part, schema.get("items", {}), f"{where}[{i}]")]
    return found


def test_the_json_keeps_to_its_schema_and_the_overlay_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--format", "json", "--output", "out.json", "--overlay", "advised.yaml", "--max_images", "64")
    main(["diagnose", *CONFIG, *options, "--trainer.accumulate_grad_batches", "4", "--trainer.devices", "2"])
    assert "Advice: " in capsys.readouterr().out
    found = json.loads(Path("out.json").read_text(encoding="utf-8"))
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert violations(found, schema) == []
    assert violations(found | {"more": 1}, schema) == ["$: more is not in the schema"]
    batches = found["diagnosis"]["batches"]
    assert (batches["batch_size"], batches["devices"], batches["accumulate"]) == (8, 2, 4)
    assert found["diagnosis"]["curvature"]["frozen"] is not None  # by the loss of the training step
    assert found["diagnosis"]["curvature"]["optimizer"] == "adamw"
    assert Path("advised.yaml").read_text(encoding="utf-8") == found["advice"]["overlay"]


def test_a_page_is_written_and_a_folder_that_is_not_there_is_named_before_the_work() -> None:
    quick = ("--curvature", "false", "--memory", "false", "--max_images", "16")
    main(["diagnose", *CONFIG, "--format", "html", "--output", "page.html", *quick])
    assert Path("page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    with pytest.raises(SystemExit) as caught:
        main(["diagnose", *CONFIG, "--output", "nowhere/out.txt"])
    assert "output: got 'nowhere/out.txt'" in str(caught.value.code)


class Options:
    """The section `trainer` of a config."""

    def __init__(self, **values: Any) -> None:
        defaults = {
            "devices": "auto",
            "num_nodes": 1,
            "strategy": "ddp",
            "sync_batchnorm": False,
            "accelerator": "auto",
        }
        vars(self).update(defaults | values)


def test_what_a_config_asks_of_a_machine_is_kept_and_one_device_runs() -> None:
    options = Options(devices=4, num_nodes=2, sync_batchnorm=True)
    asked = on_one_device(options)
    assert (asked.devices, asked.synced, asked.notes) == (8, True, [])
    assert (options.devices, options.num_nodes, options.strategy) == (1, 1, "auto")
    assert on_one_device(Options(devices=[0, 2])).devices == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_finding() -> None:
    options = Options(accelerator="gpu", devices=2)
    (note,) = on_one_device(options).notes
    assert note.name == "device"
    assert "no" in note.sentence
    assert options.accelerator == "cpu"


class Module(pl.LightningModule):
    """A foreign module; `kind` is what its step, its loader and its optimizer are like."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.net, self.kind = torch.nn.Linear(2, 2), kind

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(batch).sum()
        return {"dict": {"loss": loss}, "none": {"accuracy": 1.0}}.get(self.kind, loss)

    def train_dataloader(self) -> Any:
        return [1, 2] if self.kind == "list" else DataLoader(TensorDataset(torch.zeros(4, 2)))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        if self.kind == "trainer":
            _ = self.trainer.max_epochs
        forms = {"dict": {"optimizer": optimizer}, "lists": ([optimizer], []), "none": None}
        return forms.get(self.kind, optimizer)


def test_the_optimizer_of_a_module_is_found_in_each_form_or_left_out() -> None:
    for kind in ("", "dict", "lists"):
        optimizer, lr = _optimizer_of(Module(kind))
        assert isinstance(optimizer, torch.optim.SGD)
        assert lr is None
    assert _optimizer_of(Module("none")) == (None, None)
    needs_trainer: Any = Module("trainer")
    assert _optimizer_of(needs_trainer) == (None, None)
    needs_trainer.lr = 0.3
    assert _optimizer_of(needs_trainer) == (None, 0.3)
    needs_trainer.optimizer_name = "lamb"
    assert _optimizer_of(needs_trainer) == ("lamb", 0.3)


def test_the_loss_of_a_step_is_found_and_a_step_without_one_is_refused() -> None:
    for kind in ("", "dict"):
        module = Module(kind)
        assert torch.equal(_loss_of(module)(module, torch.ones(1, 2)), module.net(torch.ones(1, 2)).sum())
    with pytest.raises(FinetuneBNError, match="training_step: got 'dict'; allowed: one that returns a loss"):
        _loss_of(Module("none"))(Module(), torch.ones(1, 2))


def test_a_module_that_brings_its_own_loader_is_diagnosed_by_it_and_what_is_no_loader_is_named() -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    assert len(_training_loader(trainer, Module(), None)) == 4
    with pytest.raises(FinetuneBNError, match="train_dataloader: got 'list'; allowed: one DataLoader"):
        _training_loader(trainer, Module("list"), None)


def test_a_training_ends_by_steps_or_by_epochs_whichever_comes_first() -> None:
    def steps(batches: int | None, together: int, **ends: Any) -> int | None:
        return _steps(
            pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **ends), batches, together
        )

    assert steps(10, 4, max_epochs=3) == 9
    assert steps(10, 4, max_epochs=3, max_steps=5) == 5
    assert steps(None, 4, max_epochs=3) is None
    assert steps(10, 4, max_epochs=-1) is None


def test_decay_and_begin_of_averaged_weights_are_read_from_the_callback() -> None:
    def averaging(*callbacks: Any) -> Any:
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=list(callbacks))
        return _averaging(trainer)

    assert averaging() is None
    assert averaging(WeightAveraging()) is None  # the mean of all steps, which has no decay
    decay, start = averaging(EMAWeightAveraging(decay=0.9, update_starting_at_step=7))
    assert (round(decay, 6), start) == (0.9, 7)


def overlay_of(arm: Any) -> str:
    """Write what is advised where an arm comes first, and return the file."""
    path = Path(f"{arm}.yaml")
    path.write_text(overlay(arm, 5e-5), encoding="utf-8")
    return str(path)


SMALL = (
    *("--model.backbone", "test_efficientnet", "--model.weights", "none", "--data.image_size", "32"),
    *("--trainer.accelerator", "cpu", "--data.num_workers", "0"),
)


@pytest.mark.parametrize("arm", ARMS)
def test_every_overlay_is_understood_on_top_of_the_quickstart(arm: Arm, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--config", "quickstart", "--config", overlay_of(arm), *SMALL])
    assert TREATMENTS[arm].policy.describe().partition(",")[0] in capsys.readouterr().out


def test_an_overlay_is_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[StepLimit] = []
    monkeypatch.setattr(StepLimit, "on_train_end", lambda self, *_: ended.append(self))
    main(["fit", "--config", "quickstart", "--config", overlay_of("limited"), *SMALL, "--trainer.fast_dev_run", "true"])
    assert [limit.ratio for limit in ended] == [5e-4]
