"""A checkpoint file with new statistics: everything else in it stays, and the old file does in any case."""

from __future__ import annotations

import copy
import hashlib
import logging
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, BatchNormRecalibration
from finetune_bn.callbacks.recalibrate_checkpoint import RECORD_KEY, recalibrate_checkpoint
from finetune_bn.callbacks.recalibration import CHECKPOINT_KEY
from finetune_bn.errors import BadData, FinetuneBNError, UnsupportedLayer


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def images(n: int, seed: int, shift: float = 2.0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(shift + torch.randn(n, 3, 6, 6, generator=generator), torch.arange(n) % 3)


class Data(pl.LightningDataModule):
    """A data module that knows nothing of this package; its test images are of two domains."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)
        self.train, self.test = images(24, 1), [images(16, 2, -1.0), images(12, 3, 5.0)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, 4)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(dataset, 4) for dataset in self.test]


class Foreign(pl.LightningModule):
    """Builds its network in configure_model."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(3, self.width, 3), nn.BatchNorm2d(self.width), nn.ReLU(), nn.Conv2d(self.width, 5, 3),
                nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
            )  # fmt: skip
            # As after a pretraining.
            nn.init.constant_(self.net[1].running_mean, 0.3)
            nn.init.constant_(self.net[4].running_var, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        assert self.net is not None
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


def trainer(folder: Path, *callbacks: Callback, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    quiet |= {"max_epochs": 1, "default_root_dir": folder, "enable_checkpointing": saves}
    return pl.Trainer(callbacks=list(callbacks), **quiet | kwargs)


def trained(folder: Path, *callbacks: Callback) -> Path:
    """Return the checkpoint of a short training."""
    trainer(folder, *callbacks, ModelCheckpoint(folder, filename="net")).fit(Foreign(), datamodule=Data())
    return folder / "net.ckpt"


def recalibrated(path: Path, output: Path | None = None, model: Any = None, **kwargs: Any) -> Any:
    names = ("split", "domain", "weights_only")
    options = {name: kwargs.pop(name) for name in names if name in kwargs}
    recalibration = BatchNormRecalibration(**{"max_samples": None, "source_first": False} | kwargs)
    module = Foreign() if model is None else model
    return recalibrate_checkpoint(trainer(path.parent), module, Data(), path, output, recalibration, **options)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def built(state: dict[str, Tensor], policy: fbn.Policy | None = None) -> Foreign:
    model = Foreign()
    model.configure_model()
    if policy is not None:
        fbn.convert(model, policy)
    model.load_state_dict(state)
    return model


def same(a: Any, b: Any) -> bool:
    """Tell whether two nested structures are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def test_the_new_file_has_the_statistics_of_the_training_images_and_all_else_of_the_old_one(tmp_path: Path) -> None:
    path = trained(tmp_path)
    before = digest(path)
    found, record = recalibrated(path)
    assert found == tmp_path / "net-recalibrated.ckpt"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net-recalibrated.ckpt", "net.ckpt"]
    assert digest(path) == before
    old, new = load(path), load(found)
    expected = built(old["state_dict"])
    fbn.recalibrate(expected, [images(24, 1).tensors[0]])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(new["state_dict"][name], value, rtol=1e-4, atol=1e-5)
        if "running" not in name:
            assert torch.equal(new["state_dict"][name], old["state_dict"][name])
    ours = {"state_dict", CHECKPOINT_KEY, RECORD_KEY}
    assert same({k: v for k, v in new.items() if k not in ours}, {k: v for k, v in old.items() if k not in ours})
    assert new[RECORD_KEY] == record.to_dict()
    assert record.images == 24


def test_a_training_resumes_from_the_new_file(tmp_path: Path) -> None:
    found, _ = recalibrated(trained(tmp_path), tmp_path / "other.ckpt")
    model = Foreign()
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, datamodule=Data(), ckpt_path=found)
    assert run.global_step == 12


@pytest.mark.parametrize("affine", ["none", "original", "merged"])
def test_frozen_layers_are_replayed_and_renormalized_or_preserved(affine: Any, tmp_path: Path) -> None:
    policy = fbn.Freeze(affine)
    path = trained(tmp_path, BatchNormConversion(policy), BatchNormRecalibration("test"))
    x = images(5, 9).tensors[0]
    before = built(load(path)["state_dict"], policy).eval()(x)
    preserved, _ = recalibrated(path, how="preserve")
    torch.testing.assert_close(built(load(preserved)["state_dict"], policy).eval()(x), before, rtol=1e-4, atol=1e-5)
    found, record = recalibrated(path)
    assert {row.kind for row in record.rows} == {"FrozenBatchNorm2d"}
    after = built(load(found)["state_dict"], policy).eval()(x)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(built(load(found)["state_dict"]).eval()(x), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("affine", ["none", "merged"])
def test_frozen_layers_first_get_the_statistics_of_the_training_images_with_their_function_preserved(
    affine: Any, tmp_path: Path
) -> None:
    policy = fbn.Freeze(affine)
    path = trained(tmp_path, BatchNormConversion(policy))
    found, record = recalibrated(path, split="test", source_first=None)
    expected = built(load(path)["state_dict"], policy).eval()
    train, test = images(24, 1).tensors[0], torch.cat([images(16, 2, -1.0).tensors[0], images(12, 3, 5.0).tensors[0]])
    fbn.recalibrate(expected, [train], how="preserve")
    fbn.recalibrate(expected, [test])
    x = images(5, 9).tensors[0]
    torch.testing.assert_close(built(load(found)["state_dict"], policy).eval()(x), expected(x), rtol=1e-4, atol=1e-5)
    assert record.images == 28
    same_images, _ = recalibrated(path, source_first=None)
    before = built(load(path)["state_dict"], policy).eval()(x)
    torch.testing.assert_close(built(load(same_images)["state_dict"], policy).eval()(x), before, rtol=1e-2, atol=1e-3)


def test_merged_layers_of_which_nothing_is_kept_cannot_be_renormalized(tmp_path: Path) -> None:
    path = trained(tmp_path, BatchNormConversion(fbn.Freeze("merged")))
    with pytest.raises(UnsupportedLayer, match=r"are gone .* use how='preserve'"):
        recalibrated(path)
    recalibrated(path, how="preserve")
    assert [p.name for p in tmp_path.glob("*recal*")] == ["net-recalibrated.ckpt"]


def test_what_merged_layers_were_is_kept_from_one_recalibration_to_the_next(tmp_path: Path) -> None:
    path = trained(tmp_path, BatchNormConversion(fbn.Freeze("merged")), BatchNormRecalibration("test"))
    once, _ = recalibrated(path, tmp_path / "once.ckpt", split="test")
    twice, _ = recalibrated(once, tmp_path / "twice.ckpt")
    direct, _ = recalibrated(path, tmp_path / "direct.ckpt")
    assert not same(load(once)["state_dict"], load(direct)["state_dict"])
    for name, value in load(direct)["state_dict"].items():
        torch.testing.assert_close(load(twice)["state_dict"][name], value, rtol=1e-3, atol=1e-4)


def test_the_average_of_weight_averaging_is_what_is_recalibrated(tmp_path: Path) -> None:
    path = trained(tmp_path, WeightAveraging())
    found, _ = recalibrated(path)
    assert same(load(found)["current_model_state"], load(path)["current_model_state"])
    assert not same(load(found)["state_dict"], load(path)["state_dict"])


def test_the_images_of_all_test_loaders_can_be_taken(tmp_path: Path) -> None:
    path = trained(tmp_path)
    found, record = recalibrated(path, split="test")
    assert record.images == 28
    expected = built(load(path)["state_dict"])
    fbn.recalibrate(expected, [torch.cat([images(16, 2, -1.0).tensors[0], images(12, 3, 5.0).tensors[0]])])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(load(found)["state_dict"][name], value, rtol=1e-4, atol=1e-5)


def test_a_file_that_is_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = trained(tmp_path)
    output = tmp_path / "out.ckpt"
    output.write_text("an older one")
    assert recalibrated(path, output)[0] == output
    assert RECORD_KEY in load(output)


# ---- failures


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = trained(tmp_path)
    before = digest(path)
    with pytest.raises(BadData, match="min_samples=100"):
        recalibrated(path, min_samples=100)
    assert [(p.name, digest(p)) for p in tmp_path.iterdir()] == [("net.ckpt", before)]


def test_an_error_in_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trained(tmp_path)
    output = tmp_path / "out.ckpt"
    output.write_text("an older one")

    def full(handle: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FinetuneBNError, match=r"output: got .*out\.ckpt'; allowed: a file that can be written. no sp"):
        recalibrated(path, output)
    assert output.read_text() == "an older one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.ckpt", "out.ckpt"]


def test_a_process_that_is_killed_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    class Fatal(Foreign):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    path = trained(tmp_path)
    before = digest(path)
    process = multiprocessing.get_context("fork").Process(target=lambda: recalibrated(path, model=Fatal()))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert [(p.name, digest(p)) for p in tmp_path.iterdir()] == [("net.ckpt", before)]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, r"ckpt_path: got .*net\.ckpt'; allowed: a checkpoint that Lightning saved"),
        (b"nothing of the kind", "allowed: a checkpoint that Lightning saved"),
        ({"weight": torch.zeros(1)}, "allowed: a checkpoint that Lightning saved"),
        ({"state_dict": {"weight": torch.zeros(1)}}, "weights of another module'; allowed: a checkpoint of Foreign"),
    ],
    ids=["missing", "damaged", "no checkpoint", "other weights"],
)
def test_a_file_that_is_no_checkpoint_of_the_module_is_named(content: Any, match: str, tmp_path: Path) -> None:
    path = tmp_path / "net.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(FinetuneBNError, match=match):
        recalibrated(path)


@pytest.mark.parametrize("output", ["nowhere/out.ckpt", "."])
def test_an_output_that_cannot_be_a_file_is_refused_before_anything_is_read(output: str, tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match=r"output: got .*; allowed: a file in a folder that there is"):
        recalibrated(tmp_path / "net.ckpt", tmp_path / output)


def test_an_address_without_a_place_for_the_new_file_and_several_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match="output: got None; allowed: a file, where the checkpoint is an address"):
        recalibrate_checkpoint(
            trainer(tmp_path), Foreign(), Data(), "s3://bucket/net.ckpt", None, BatchNormRecalibration()
        )
    path = trained(tmp_path)
    two = trainer(tmp_path, devices=2, strategy="ddp_fork")
    with pytest.raises(FinetuneBNError, match=r"trainer\.devices: got 2; allowed: 1: a file is written by one process"):
        recalibrate_checkpoint(two, Foreign(), Data(), path, tmp_path / "new.ckpt", BatchNormRecalibration())
    assert [file.name for file in tmp_path.glob("*.ckpt")] == ["net.ckpt"]


def test_a_domain_needs_a_data_module_that_knows_domains(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match="domain: got 'noto'; allowed: null, as a Data has no domains"):
        recalibrated(trained(tmp_path), domain="noto")


def test_a_model_without_batch_norm_is_an_error(tmp_path: Path) -> None:
    class Without(Foreign):
        def configure_model(self) -> None:
            self.net = nn.Conv2d(3, 3, 1)

    model = Without()
    model.configure_model()
    torch.save({"state_dict": copy.deepcopy(model.state_dict())}, tmp_path / "net.ckpt")
    with (
        pytest.warns(UserWarning, match="no BatchNorm layers"),
        pytest.raises(FinetuneBNError, match="model: got 'Without'; allowed: a model with BatchNorm layers"),
    ):
        recalibrated(tmp_path / "net.ckpt", model=model)
