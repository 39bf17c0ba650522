"""The report callback: what it collects, what it writes, and the test of the checkpoint in plain timm."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn import Freeze
from finetune_bn.callbacks import BatchNormConversion, BatchNormRecalibration
from finetune_bn.callbacks.report import FinetuneReport
from finetune_bn.errors import FinetuneBNError, MissingDependency
from finetune_bn.layers.frozen import FrozenBatchNorm

CLASSES = 4
DOMAINS = ["noto", "fluent"]


class Images(pl.LightningDataModule):
    """Random images of two domains, 12 and 9 of them."""

    batch_size = 6
    domains = DOMAINS
    class_names = ("a", "b", "c", "$d_1$")
    image_size, normalization, interpolation, crop_pct = 32, ((0.5,) * 3, (0.25,) * 3), "bilinear", 0.9

    def loader(self, size: int, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(size, 3, 32, 32, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(size) % CLASSES), batch_size=6)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(12, 0)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [self.loader(6, 1)]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self.loader(12, 2), self.loader(9, 3)]


class Classifier(pl.LightningModule):
    """A timm net as `net`, named in the hyperparameters as our tasks do it."""

    test_confusion: Tensor

    def __init__(self, backbone: str = "test_resnet", num_classes: int = CLASSES, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = timm.create_model(backbone, num_classes=num_classes)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("late_loss", torch.tensor(10.0 + self.current_epoch))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def on_test_start(self) -> None:
        self.test_confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.long)

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        predicted = self.net(batch[0]).argmax(1)
        self.test_confusion.index_put_((batch[1], predicted), torch.tensor(1), accumulate=True)
        right, size = (predicted == batch[1]).float().mean(), len(predicted)
        self.log(f"test_accuracy/{DOMAINS[dataloader_idx]}", right, batch_size=size, add_dataloader_idx=False)

    def on_test_epoch_end(self) -> None:
        self.log("test_accuracy", self.test_confusion.diagonal().sum() / self.test_confusion.sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class Foreign(pl.LightningModule):
    """Nothing of what this package knows: no `net`, no hyperparameters, other metric names, one batch layout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(CLASSES))
        self.body(torch.zeros(2, 3, 32, 32))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.body(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("test_acc", (self.body(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def make_trainer(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"accelerator": "cpu", "max_epochs": 2, "num_sanity_val_steps": 1, "default_root_dir": folder}
    return pl.Trainer(callbacks=list(callbacks), **(quiet | defaults | options))


def read(report: FinetuneReport) -> dict[str, Any]:
    assert report.path is not None
    data: dict[str, Any] = json.loads(report.path.with_name("report.json").read_text(encoding="utf-8"))
    return data


@pytest.fixture(scope="module")
def main_job(tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneReport, pl.Trainer, Classifier]:
    """Fit and test, as in the main job, with trained gamma' and beta'."""
    folder = tmp_path_factory.mktemp("main")
    torch.manual_seed(0)
    report, best = FinetuneReport(), ModelCheckpoint(folder / "checkpoints", monitor="val_loss")
    trainer = make_trainer(folder, BatchNormConversion(Freeze(affine="merged")), report, best)
    module = Classifier()
    trainer.fit(module, datamodule=Images())
    trainer.test(module, datamodule=Images(), ckpt_path="best", verbose=False)
    return report, trainer, module


def test_the_report_lies_in_the_folder_of_the_run_and_nothing_else_is_left_there(main_job: Any) -> None:
    report, trainer, _ = main_job
    assert report.path == Path(trainer.default_root_dir) / "report" / "report.html"
    files = ["model.safetensors", "report.html", "report.json", "report.png"]
    assert sorted(p.name for p in report.path.parent.iterdir()) == files


def test_the_images_of_which_the_network_is_most_wrong_are_on_the_page(main_job: Any) -> None:
    report, _, module = main_job
    worst = read(report)["worst"]
    loaders = Images().test_dataloader()
    module.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(module.net(x), y, reduction="none") for loader in loaders for x, y in loader]
    expected = torch.cat(losses).sort(descending=True).values[:12]
    assert [image["loss"] for image in worst] == pytest.approx(expected.tolist(), rel=1e-4)
    assert {image["domain"] for image in worst} <= set(DOMAINS)
    page = report.path.read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 12
    assert "Those of the test images with the highest loss" in page
    assert not any(part._forward_hooks for part in module.modules())


def test_the_reloaded_network_answers_as_the_trained_one_on_every_domain(main_job: Any) -> None:
    data = read(main_job[0])
    assert [result["domain"] for result in data["results"]] == DOMAINS
    assert [result["images"] for result in data["results"]] == [12, 9]
    for result in [*data["results"], data["overall"]]:
        assert result["reloaded"] == pytest.approx(result["accuracy"], abs=1e-6)
        assert 0 <= result["difference"] <= data["tolerance"] == 1e-4
    assert data["overall"]["images"] == 21
    assert data["errors"] == data["notes"] == []


def test_the_history_is_what_each_epoch_logged_late_values_in_their_own_epoch(main_job: Any) -> None:
    history = read(main_job[0])["history"]
    assert [record["epoch"] for record in history] == [0, 1]
    assert [record["late_loss"] for record in history] == [10.0, 11.0]
    names = {"epoch", "train_loss", "val_loss", "val_accuracy", "late_loss"}
    assert [set(record) for record in history] == [names, names]


def test_confusion_class_names_and_plan_are_those_of_the_run(main_job: Any) -> None:
    report, _, module = main_job
    data = read(report)
    assert data["confusion"] == module.test_confusion.tolist()
    assert data["class_names"] == list(Images.class_names)
    layers = sum(isinstance(m, FrozenBatchNorm) for m in module.modules())
    assert data["batch_norm"].startswith(f"{layers} x freeze, affine=merged; ")
    assert data["subtitle"].startswith(f"BatchNorm: {layers} x freeze, affine=merged · 4 classes")
    assert data["title"] == "test_resnet fine-tuned on Images"


def test_the_code_on_the_page_loads_the_checkpoint_without_this_package(
    main_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, trainer, module = main_job
    code, names = read(report)["loading_code"], {}
    assert "finetune_bn" not in code
    monkeypatch.chdir(report.path.parent)
    exec(code, names)
    assert not any(isinstance(layer, FrozenBatchNorm) for layer in names["model"].modules())
    module.load_state_dict(torch.load(trainer.ckpt_path, weights_only=True)["state_dict"])
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(names["model"](images), module.eval().net(images), rtol=0, atol=1e-5)


def test_the_page_needs_no_other_file_and_no_host(main_job: Any) -> None:
    page = main_job[0].path.read_text(encoding="utf-8")
    assert page.count('<svg class="plot curves"') == 2  # loss and accuracy
    assert re.findall(r"https?://|<link|src=(?!.data:image)", page) == []
    assert page.count("<script") == 1
    assert "$d_1$" in page


def test_a_table_and_the_place_of_the_report_are_the_last_lines_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = FinetuneReport(str(tmp_path / "elsewhere"))
    trainer = make_trainer(tmp_path, report, max_epochs=1, enable_checkpointing=False)
    trainer.test(Classifier(), datamodule=Images())
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"Report: {tmp_path / 'elsewhere' / 'report.html'}"
    assert any("noto" in line and "%" in line for line in printed[-10:])


def test_after_fit_alone_there_is_a_report_that_says_that_nothing_was_tested(tmp_path: Path) -> None:
    report = FinetuneReport()
    make_trainer(tmp_path, report).fit(Classifier(), datamodule=Images())
    data = read(report)
    assert len(data["history"]) == 2
    assert data["results"] == []
    assert data["confusion"] is None
    assert any("none was run" in note for note in data["notes"])
    assert "load_state_dict" in data["loading_code"]


def test_after_fit_alone_the_worst_images_are_those_of_the_last_validation(tmp_path: Path) -> None:
    report = FinetuneReport(worst_images=2)
    make_trainer(tmp_path, report, max_epochs=1, enable_checkpointing=False).fit(Classifier(), datamodule=Images())
    assert len(read(report)["worst"]) == 2
    assert read(report)["worst_of"] == "last validation's images"


def test_a_metric_that_an_epoch_did_not_log_is_not_in_its_record(tmp_path: Path) -> None:
    report = FinetuneReport()
    trainer = make_trainer(tmp_path, report, max_epochs=4, check_val_every_n_epoch=2, enable_checkpointing=False)
    trainer.fit(Classifier(), datamodule=Images())
    assert ["val_loss" in record for record in report.history] == [False, True, False, True]
    assert [record["late_loss"] for record in report.history] == [10.0, 11.0, 12.0, 13.0]


def test_the_sanity_check_is_not_in_the_history(tmp_path: Path) -> None:
    report = FinetuneReport()
    trainer = make_trainer(tmp_path, report, max_epochs=1, check_val_every_n_epoch=2, enable_checkpointing=False)
    trainer.fit(Classifier(), datamodule=Images())
    assert "val_loss" not in report.history[0]


def test_a_resumed_training_has_the_history_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(epochs: int, ckpt_path: str | None = None) -> FinetuneReport:
        torch.manual_seed(0)
        report = FinetuneReport(str(tmp_path / "report"))
        saving = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
        make_trainer(tmp_path, report, saving, max_epochs=epochs).fit(
            Classifier(), datamodule=Images(), ckpt_path=ckpt_path
        )
        return report

    train(2)
    resumed = train(3, str(tmp_path / "last.ckpt"))
    whole = train(3)
    assert len(whole.history) == 3
    for ours, reference in zip(resumed.history, whole.history, strict=True):
        for name in ("epoch", "train_loss", "val_loss", "val_accuracy"):
            assert ours[name] == pytest.approx(reference[name])


def test_a_second_training_does_not_inherit_the_history_of_the_first(tmp_path: Path) -> None:
    report = FinetuneReport(str(tmp_path))
    for epochs in (3, 2):
        trainer = make_trainer(tmp_path, report, max_epochs=epochs, enable_checkpointing=False)
        trainer.fit(Classifier(), datamodule=Images())
    assert [record["epoch"] for record in report.history] == [0, 1]


def test_a_test_of_a_checkpoint_alone_has_the_curves_of_its_training(main_job: Any, tmp_path: Path) -> None:
    trained, trainer, _ = main_job
    report = FinetuneReport(str(tmp_path))
    alone = make_trainer(tmp_path, BatchNormConversion(Freeze(affine="merged")), report)
    alone.test(Classifier(), datamodule=Images(), ckpt_path=trainer.ckpt_path, verbose=False)
    history = read(report)["history"]
    assert history
    assert [record["train_loss"] for record in history] == [
        pytest.approx(record["train_loss"], rel=1e-5) for record in trained.history[: len(history)]
    ]


def test_a_foreign_module_gets_what_can_be_drawn_and_is_told_what_was_left_out(tmp_path: Path) -> None:
    report = FinetuneReport()
    trainer = make_trainer(tmp_path, report, max_epochs=1)
    module = Foreign()
    trainer.fit(module, Images().train_dataloader())
    trainer.test(module, Images().test_dataloader(), ckpt_path="best", verbose=False)
    data = read(report)
    assert data["title"] == "Foreign fine-tuned"
    assert data["batch_norm"] == "1 x BatchNorm2d"
    assert [result["domain"] for result in data["results"]] == ["0", "1"]
    assert all(0 <= result["accuracy"] <= 1 and result["reloaded"] is None for result in data["results"])
    worst, reload, confusion, model = data["notes"]
    assert worst == "The worst images: Foreign is no classifier that says how many classes there are, as `num_classes`."
    assert "plain timm: Foreign does not have what it takes: a timm network as `net`" in reload
    assert "confusion matrix: Foreign has no `test_confusion`" in confusion
    assert model == "The model file: Foreign has no timm network as `net`."


def test_weights_that_come_from_no_file_are_not_reloaded_and_that_is_said(tmp_path: Path) -> None:
    report = FinetuneReport()
    make_trainer(tmp_path, report).test(Classifier(), datamodule=Images(), verbose=False)
    data = read(report)
    assert ["no checkpoint was tested but the weights in memory" in note for note in data["notes"]] == [True]
    assert data["title"] == "test_resnet tested on Images"
    assert all(result["accuracy"] is not None for result in data["results"])


def test_the_check_can_be_switched_off_and_the_report_says_so(main_job: Any, tmp_path: Path) -> None:
    report = FinetuneReport(str(tmp_path), check_reload=False)
    ckpt_path = main_job[1].ckpt_path
    trainer = make_trainer(tmp_path, BatchNormConversion(Freeze(affine="merged")), report)
    trainer.test(Classifier(), datamodule=Images(), ckpt_path=ckpt_path, verbose=False)
    assert ["check_reload is false" in note for note in read(report)["notes"]] == [True]


def test_a_network_that_is_not_what_the_checkpoint_gives_is_an_error_and_a_warning(
    main_job: Any, tmp_path: Path
) -> None:
    class Scaled(Classifier):
        def on_test_start(self) -> None:
            super().on_test_start()
            self.net.fc.register_forward_hook(lambda module, args, output: output * 1.01)

    report = FinetuneReport(str(tmp_path))
    trainer = make_trainer(tmp_path, BatchNormConversion(Freeze(affine="merged")), report)
    with pytest.warns(UserWarning, match=r"logits differ from those of the trained network by more than 1e-04: noto"):
        trainer.test(Scaled(), datamodule=Images(), ckpt_path=main_job[1].ckpt_path, verbose=False)
    data = read(report)
    assert len(data["errors"]) == 1
    assert data["errors"][0] in report.path.read_text(encoding="utf-8").replace("&#x27;", "'")
    assert all(result["difference"] > 5e-3 for result in data["results"])


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16-true", 5e-2), ("bf16-mixed", 1e-4), ("64-true", 1e-4)])
def test_the_check_holds_at_the_precision_of_the_training(tmp_path: Path, precision: str, tolerance: float) -> None:
    report, saving = FinetuneReport(), ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(
        tmp_path, BatchNormConversion(Freeze(affine="merged")), report, saving, precision=precision, max_epochs=1
    )
    module = Classifier()
    trainer.fit(module, datamodule=Images())
    trainer.test(module, datamodule=Images(), ckpt_path="best", verbose=False)
    data = read(report)
    assert (data["tolerance"], data["errors"]) == (tolerance, [])
    for result in data["results"]:
        assert result["reloaded"] == pytest.approx(result["accuracy"], abs=1e-2)


def test_averaged_weights_that_were_not_those_tested_are_told_apart(tmp_path: Path) -> None:
    report, saving = FinetuneReport(), ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = make_trainer(tmp_path, BatchNormConversion(), EMAWeightAveraging(decay=0.9), report, saving)
    module = Classifier()
    trainer.fit(module, datamodule=Images())
    with pytest.warns(UserWarning, match="the weights in the file are the averaged ones"):
        trainer.test(module, datamodule=Images(), ckpt_path="best", verbose=False)
    alone = make_trainer(tmp_path, BatchNormConversion(), FinetuneReport(str(tmp_path / "alone")))
    alone.test(Classifier(), datamodule=Images(), ckpt_path=saving.best_model_path, verbose=False)
    assert read(alone.callbacks[1])["errors"] == []


def test_a_logged_accuracy_that_is_none_is_found_out(main_job: Any, tmp_path: Path) -> None:
    class Boasting(Classifier):
        def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log(f"test_accuracy/{DOMAINS[dataloader_idx]}", torch.tensor(1.0), add_dataloader_idx=False)

        def on_test_epoch_end(self) -> None:
            pass

    report = FinetuneReport(str(tmp_path))
    trainer = make_trainer(tmp_path, BatchNormConversion(Freeze(affine="merged")), report)
    with pytest.warns(UserWarning, match=r"its accuracy is not the one that was logged \(noto .* against 100\.0 %"):
        trainer.test(Boasting(), datamodule=Images(), ckpt_path=main_job[1].ckpt_path, verbose=False)


def test_a_checkpoint_that_plain_timm_refuses_is_an_error_and_the_report_is_written(
    main_job: Any, tmp_path: Path
) -> None:
    class Renamed(Classifier):
        def on_test_start(self) -> None:
            super().on_test_start()
            self.hparams["backbone"] = "test_vit"

    report = FinetuneReport(str(tmp_path))
    trainer = make_trainer(tmp_path, BatchNormConversion(Freeze(affine="merged")), report)
    with pytest.warns(UserWarning, match="checkpoint in plain timm: BadData"):
        trainer.test(Renamed(), datamodule=Images(), ckpt_path=main_job[1].ckpt_path, verbose=False)
    data = read(report)
    assert len(data["errors"]) == 1
    assert [result["reloaded"] for result in data["results"]] == [None, None]
    assert all(result["accuracy"] is not None for result in data["results"])


def test_the_check_looks_at_the_same_images_as_the_test_and_leaves_random_state_and_modes(
    main_job: Any, tmp_path: Path
) -> None:
    class Looking(FinetuneReport):
        def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            before = torch.get_rng_state(), [module.training for module in pl_module.modules()]
            super().on_test_end(trainer, pl_module)
            assert torch.equal(before[0], torch.get_rng_state())
            assert before[1] == [module.training for module in pl_module.modules()]

    report = Looking(str(tmp_path))
    trainer = make_trainer(tmp_path, BatchNormConversion(Freeze(affine="merged")), report, limit_test_batches=1)
    trainer.test(Classifier(), datamodule=Images(), ckpt_path=main_job[1].ckpt_path, verbose=False)
    data = read(report)
    assert [result["images"] for result in data["results"]] == [6, 6]
    for result in data["results"]:
        assert result["reloaded"] == pytest.approx(result["accuracy"], abs=1e-6)


def test_a_value_that_is_not_finite_is_null_in_the_history_and_named(tmp_path: Path) -> None:
    report = FinetuneReport()
    trainer = make_trainer(tmp_path, report, max_epochs=2, enable_checkpointing=False)
    trainer.fit(Classifier(lr=1e30), datamodule=Images())
    data = read(report)
    assert data["history"][-1]["train_loss"] is None
    assert any(note.startswith("train_loss, not finite in epoch") for note in data["notes"])
    assert data["diverged"].startswith("The run diverged: not finite were train_loss")
    assert data["model_file"] is None
    assert any(note.startswith("The model file: ") and "NaN" in note for note in data["notes"])


def test_a_missing_matplotlib_is_noticed_before_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install matplotlib"):
        FinetuneReport()


def test_a_dirpath_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(FinetuneBNError, match=r"dirpath: got .*notes\.txt"):
        FinetuneReport(str(file))
    assert file.read_text(encoding="utf-8") == "mine"


# --- the model file ---------------------------------------------------------------------------------------------------


def test_the_model_file_is_the_tested_network_with_its_classes_and_its_images(main_job: Any) -> None:
    report, trainer, module = main_job
    model = fbn.load(report.path.with_name("model.safetensors"))
    assert model.classes == Images.class_names
    transform = model.card.transform
    assert (transform.size, transform.mean, transform.std) == ((32, 32), *Images.normalization)
    assert (transform.interpolation, transform.crop_pct) == ("bilinear", 0.9)
    module.load_state_dict(torch.load(trainer.ckpt_path, weights_only=True)["state_dict"])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), module.eval().net(images), rtol=0, atol=1e-5)
    data = read(report)
    assert data["model_file"] == "model.safetensors"
    assert model.card.about["test_metrics"]["test_accuracy"] == pytest.approx(data["overall"]["accuracy"], abs=1e-6)
    assert {layer["state"] for layer in data["layers"]["layers"]} == {"frozen"}


@pytest.mark.parametrize("policy", [Freeze("original"), fbn.ToGroupNorm(groups=2), fbn.EvalNorm(0.5)], ids=str)
def test_after_fit_alone_the_model_file_has_the_best_weights_and_not_the_last(
    tmp_path: Path, policy: fbn.Policy
) -> None:
    class BestAtFirst(Classifier):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("val_score", float(-self.current_epoch))

    report, best = FinetuneReport(), ModelCheckpoint(tmp_path, monitor="val_score", mode="max")
    module = BestAtFirst(lr=0.1)
    make_trainer(tmp_path, BatchNormConversion(policy), report, best).fit(module, datamodule=Images())
    model, images = fbn.load(report.path.with_name("model.safetensors")), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        last = module.eval().net(images)
        module.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
        torch.testing.assert_close(model(images), module.net(images), rtol=0, atol=1e-5)
        assert not torch.allclose(model(images), last, atol=1e-3)


def test_a_module_for_embeddings_leaves_a_file_that_answers_with_embeddings(tmp_path: Path) -> None:
    class Embedder(Classifier):
        task_kind = "embedding"
        normalize = True

    report = FinetuneReport(check_reload=False)
    make_trainer(tmp_path, report, max_epochs=1).fit(Embedder(), datamodule=Images())
    model = fbn.load(report.path.with_name("model.safetensors"))
    (found,) = model.predict(torch.rand(1, 3, 20, 20))
    assert float(found.vector.norm()) == pytest.approx(1.0, abs=1e-5)


def test_where_the_images_come_from_is_not_known_the_pretrained_transform_is_taken_and_said(tmp_path: Path) -> None:
    report = FinetuneReport()
    trainer = make_trainer(tmp_path, report, max_epochs=1)
    trainer.fit(Classifier(), Images().train_dataloader(), Images().val_dataloader())
    notes = read(report)["notes"]
    assert sum("as the pretrained weights want it, since there is no data module" in note for note in notes) == 1
    model = fbn.load(report.path.with_name("model.safetensors"))
    assert model.card.transform.size == tuple(model.net.pretrained_cfg["input_size"][1:])
    assert model.classes == ("0", "1", "2", "3")


def test_the_model_file_can_be_left_out(tmp_path: Path) -> None:
    report = FinetuneReport(save_model=False)
    make_trainer(tmp_path, report, max_epochs=1).fit(Classifier(), datamodule=Images())
    assert not report.path.with_name("model.safetensors").exists()
    assert "The model file: save_model is false." in read(report)["notes"]


# --- a test by other statistics, several runs in one folder, the terminal --------------------------------------------


@pytest.mark.parametrize("report_first", [True, False])
def test_a_network_adapted_to_the_test_images_is_not_called_wrong(
    main_job: Any, tmp_path: Path, report_first: bool
) -> None:
    report = FinetuneReport(str(tmp_path / "report"))
    adaptation = BatchNormRecalibration(when="test", per_domain=True, min_samples=4, module="net")
    both = [report, adaptation] if report_first else [adaptation, report]
    trainer = make_trainer(tmp_path, BatchNormConversion(Freeze(affine="merged")), *both)
    trainer.test(Classifier(), datamodule=Images(), ckpt_path=main_job[1].ckpt_path, verbose=False)
    data = read(report)
    assert data["errors"] == []
    assert all(result["difference"] <= data["tolerance"] for result in data["results"])
    assert sum("took them from the test images, and no file holds them" in note for note in data["notes"]) == 1
    # In plain timm and in the model file the network has the statistics of its checkpoint.
    assert [r["reloaded"] for r in data["results"]] == [r["reloaded"] for r in read(main_job[0])["results"]]
    images = torch.randn(2, 3, 32, 32)
    own, other = (fbn.load(r.path.with_name("model.safetensors")) for r in (report, main_job[0]))
    with torch.no_grad():
        assert torch.equal(own(images), other(images))


def test_two_runs_in_one_folder_do_not_overwrite_each_others_report(tmp_path: Path) -> None:
    def run(report: FinetuneReport, lr: float) -> FinetuneReport:
        trainer = make_trainer(tmp_path, report, max_epochs=1, enable_checkpointing=False, limit_train_batches=1)
        trainer.fit(Classifier(lr=lr), datamodule=Images())
        return report

    first, second = run(FinetuneReport(check_reload=False), 0.01), run(FinetuneReport(str(tmp_path / "report")), 0.02)
    folders = [report.path.parent for report in (first, second)]
    trainer = make_trainer(tmp_path, first, limit_test_batches=1)
    trainer.test(Classifier(lr=0.01), datamodule=Images(), verbose=False)  # a part of the first run
    folders += [first.path.parent, run(first, 0.03).path.parent]  # another run with the callback of the first
    assert [folder.name for folder in folders] == ["report", "report-1", "report", "report-2"]
    for folder, lr in (("report", 0.01), ("report-1", 0.02), ("report-2", 0.03)):
        data = json.loads((tmp_path / folder / "report.json").read_text(encoding="utf-8"))
        assert f"learning rate {lr}" in data["subtitle"]
        assert bool(data["results"]) == (folder == "report")
        assert (tmp_path / folder / "model.safetensors").exists()


def test_a_folder_that_is_there_and_empty_is_taken(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    report = FinetuneReport(str(tmp_path / "mine"))
    make_trainer(tmp_path, report, limit_test_batches=1).test(Classifier(), datamodule=Images(), verbose=False)
    assert report.path.parent == tmp_path / "mine"


def test_a_place_where_no_folder_can_be_made_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(FinetuneBNError, match=r"dirpath: got .*file/report'; allowed: a folder that can be written to"):
        make_trainer(tmp_path, FinetuneReport(str(tmp_path / "file" / "report"))).fit(Classifier(), datamodule=Images())


def test_each_figure_is_printed_once_whatever_the_number_of_loaders(
    main_job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Logging(Classifier):
        def on_test_epoch_end(self) -> None:
            super().on_test_epoch_end()
            self.log("test_loss", torch.tensor(0.12345))

    trainer = make_trainer(tmp_path, FinetuneReport(str(tmp_path / "report")))
    trainer.test(Logging(), datamodule=Images())
    printed = capsys.readouterr().out
    data = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    assert printed.count(f"{100 * data['overall']['accuracy']:.1f} %") >= 1
    assert printed.count("test_loss") == 1
    assert "0.1235" in printed
    assert "DataLoader" not in printed


def test_a_name_with_brackets_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Named(Images):
        domains = ["[red]", "fluent"]  # noqa: RUF012

    make_trainer(tmp_path, FinetuneReport()).test(Classifier(), datamodule=Named(), verbose=False)
    assert "[red]" in capsys.readouterr().out
