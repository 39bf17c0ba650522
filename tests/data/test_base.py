from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from finetune_bn.data import Batch, EmojiData, ImageDataModule, ImageFolderData
from finetune_bn.data.order import SeededOrder
from finetune_bn.errors import BadData

MakeFolder = Callable[..., Path]
Spoil = Callable[[Path], list[Path]]
# A small part of the emoji, so that little has to be decoded.
SMALL: dict[str, Any] = {"subcategories": ["arrow", "zodiac", "drink", "game"], "image_size": 16, "batch_size": 10}


class Foreign(LightningModule):
    """A module that knows nothing of this package; `batch_size` is a hyperparameter of its own."""

    def __init__(self, num_classes: int, batch_size: int = 999) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(num_classes))
        self.net(torch.zeros(2, 3, 16, 16))
        self.seen: list[list[int]] = []
        self.loaders: set[int] = set()

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen[-1] += [hash_of(image) for image in images]
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.loaders.add(dataloader_idx)
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        logits: Tensor = self.net(batch[0])
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def hash_of(image: Tensor) -> int:
    return hash(tuple(image.flatten()[::7].tolist()))


def trainer(root: Path, **kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    given: dict[str, Any] = {"accelerator": "cpu", "default_root_dir": root, "enable_checkpointing": False, **kwargs}
    return Trainer(**quiet, **given)


def all_batches(data: ImageDataModule, epochs: int = 1) -> list[Batch]:
    loader = data.train_dataloader()
    return [batch for _ in range(epochs) for batch in loader]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(left, right, strict=True)
    )


def test_the_seed_decides_order_and_augmentation_whatever_else_is_drawn() -> None:
    first = all_batches(EmojiData(**SMALL, seed=1))
    torch.manual_seed(99)
    random.seed(99)
    assert same(first, all_batches(EmojiData(**SMALL, seed=1)))
    assert not same(first, all_batches(EmojiData(**SMALL, seed=2, split_seed=1)))


def test_epochs_differ_in_order_and_in_augmentation() -> None:
    batches = all_batches(EmojiData(**SMALL), epochs=2)
    half = len(batches) // 2
    epochs = [torch.cat([batch.images for batch in part]) for part in (batches[:half], batches[half:])]
    hashes = [{hash_of(image) for image in epoch} for epoch in epochs]
    assert len(hashes[0] & hashes[1]) < len(hashes[0]) // 10
    plain = EmojiData(**SMALL, augment="none").train_dataloader()
    first, second = ([hash_of(image) for batch in plain for image in batch.images] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def test_the_number_of_workers_changes_no_batch() -> None:
    assert same(all_batches(EmojiData(**SMALL), epochs=2), all_batches(EmojiData(**SMALL, num_workers=2), epochs=2))


def test_loading_draws_nothing_from_the_global_generators() -> None:
    data = EmojiData(**SMALL)
    before = torch.get_rng_state(), random.getstate()
    all_batches(data)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_foreign_module_trains_tests_and_predicts_per_domain(tmp_path: Path) -> None:
    data = EmojiData(**SMALL)
    model = Foreign(data.num_classes)
    runner = trainer(tmp_path, max_epochs=2)
    runner.fit(model, datamodule=data)
    assert [len(epoch) for epoch in model.seen] == [len(data.split("train"))] * 2
    assert model.loaders == {0, 1, 2}
    assert len(runner.test(model, datamodule=data, verbose=False)) == 3
    predictions = runner.predict(model, datamodule=data)
    assert predictions is not None
    names = [loader.dataset.names for loader in data.predict_dataloader()]  # type: ignore[attr-defined]
    assert [sum(len(batch) for batch in domain) for domain in predictions] == [len(part) for part in names]  # type: ignore[arg-type]
    assert [{name.split("/")[0] for name in part} for part in names] == [{"noto"}, {"twemoji"}, {"fluent"}]


def test_fast_dev_run_of_two_batches_needs_nothing_else(tmp_path: Path) -> None:
    data = EmojiData(**SMALL)
    model = Foreign(data.num_classes)
    trainer(tmp_path, fast_dev_run=2, max_epochs=2).fit(model, datamodule=data)
    assert [len(epoch) for epoch in model.seen] == [20]


def test_a_resumed_run_goes_on_with_the_order_it_would_have_had(tmp_path: Path) -> None:
    whole = Foreign(4)
    trainer(tmp_path, max_epochs=3).fit(whole, datamodule=EmojiData(**SMALL))

    first = Foreign(4)
    runner = trainer(tmp_path, max_epochs=2)
    runner.fit(first, datamodule=EmojiData(**SMALL))
    runner.save_checkpoint(tmp_path / "two.ckpt")
    resumed = Foreign(4)
    trainer(tmp_path, max_epochs=3).fit(resumed, datamodule=EmojiData(**SMALL), ckpt_path=str(tmp_path / "two.ckpt"))
    assert first.seen + resumed.seen == whole.seen


def test_the_checkpoint_rebuilds_the_data_module(tmp_path: Path) -> None:
    data = EmojiData(**SMALL, train_size=40, mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5), train_vendors=["noto"])
    runner = trainer(tmp_path, fast_dev_run=1)
    runner.fit(Foreign(4), datamodule=data)
    runner.save_checkpoint(tmp_path / "one.ckpt")
    again = EmojiData.load_from_checkpoint(str(tmp_path / "one.ckpt"), map_location="cpu")
    assert dict(again.hparams) == dict(data.hparams)
    assert again.split("train") == data.split("train")


@pytest.mark.parametrize("with_arguments", [True, False])
def test_the_normalization_is_that_of_the_arguments_then_of_the_model(with_arguments: bool, tmp_path: Path) -> None:
    given: dict[str, Any] = {"mean": (0.1, 0.1, 0.1), "std": (0.2, 0.2, 0.2)} if with_arguments else {}
    data = EmojiData(**SMALL, **given)
    model = Foreign(data.num_classes)
    model.data_config = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    trainer(tmp_path, fast_dev_run=1).fit(model, datamodule=data)
    expected = ("arguments", (0.1, 0.1, 0.1)) if with_arguments else ("model", (0.5, 0.5, 0.5))
    assert data.normalization is not None
    assert (data.normalization_source, data.normalization[0]) == expected


def test_without_arguments_or_model_the_normalization_is_imagenets() -> None:
    data = EmojiData(**SMALL)
    assert data.normalization_source is None
    data.train_dataloader()
    assert data.normalization_source == "ImageNet"
    assert data.normalization == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_iid_dataloader_has_the_training_images_without_augmentation() -> None:
    data = EmojiData(**SMALL)
    plain = data.image_set("train")
    loader = data.iid_dataloader(shuffle=False, batch_size=10)
    assert torch.equal(torch.cat([batch.images for batch in loader]), torch.stack([image for image, _ in plain]))
    shuffled = [batch.labels for batch in data.iid_dataloader()]
    assert len(shuffled[0]) == data.eval_batch_size == 64
    assert sorted(torch.cat(shuffled).tolist()) == sorted(plain.labels.tolist())
    assert torch.cat(shuffled).tolist() != plain.labels.tolist()
    augmented = next(iter(data.iid_dataloader(shuffle=False, batch_size=10, augment=True)))
    assert not torch.equal(augmented.images, next(iter(loader)).images)


def test_iid_dataloader_can_be_cut_to_a_stage_and_a_domain() -> None:
    data = EmojiData(**SMALL)
    loader = data.iid_dataloader("predict", domain="fluent")
    assert set(loader.dataset.domains) == {"fluent"}  # type: ignore[attr-defined]
    assert len(loader.dataset) == len(data.split("test")) // 3  # type: ignore[arg-type]
    with pytest.raises(BadData, match=r"domain: got 'fluant'.*Did you mean 'fluent'"):
        data.iid_dataloader(domain="fluant")
    with pytest.raises(BadData, match=r"split: got 'trian'.*Did you mean 'train'"):
        data.iid_dataloader("trian")
    with pytest.raises(BadData, match="batch_size: got 0"):
        data.iid_dataloader(batch_size=0)


def test_train_size_is_seeded_stratified_and_leaves_val_and_test_alone() -> None:
    whole, part = EmojiData(**SMALL), EmojiData(**SMALL, train_size=60)
    assert len(part.split("train")) == 60
    assert set(part.split("train")) < set(whole.split("train"))
    assert part.split("val") == whole.split("val")
    assert part.split("test") == whole.split("test")
    full, cut = (torch.bincount(data.image_set("train").labels) for data in (whole, part))
    assert ((cut - 60 * full / full.sum()).abs() <= 2).all()
    assert part.split("train") != EmojiData(**SMALL, train_size=60, seed=1).split("train")
    assert part.split("train") == EmojiData(**SMALL, train_size=60, seed=1, split_seed=0).split("train")
    with pytest.raises(BadData, match="train_size: got 100000; allowed: at most"):
        EmojiData(**SMALL, train_size=100_000).setup("fit")


def test_a_last_batch_of_one_image_is_warned_of_and_drop_last_drops_it() -> None:
    with pytest.warns(UserWarning, match=r"last training batch has one image \(41 images in batches of 10\)"):
        loader = EmojiData(**SMALL, train_size=41).train_dataloader()
    assert [len(batch.labels) for batch in loader] == [10] * 4 + [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader = EmojiData(**SMALL, train_size=41, drop_last=True).train_dataloader()
        EmojiData(**SMALL, train_size=42).train_dataloader()
    assert len(loader) == 4
    with pytest.raises(BadData, match="batch_size: got 10; allowed: at most 7"):
        EmojiData(**SMALL, train_size=7, drop_last=True).train_dataloader()


def test_no_validation_share_means_no_validation_loaders(tmp_path: Path) -> None:
    data = EmojiData(**SMALL, val_fraction=0.0)
    assert data.val_dataloader() == []
    model = Foreign(data.num_classes)
    trainer(tmp_path, max_epochs=1).fit(model, datamodule=data)
    assert model.loaders == set()
    with pytest.raises(BadData, match="val set: got \\[\\]; allowed: one image or more"):
        data.setup("validate")


def test_skip_leaves_bad_images_out_counts_and_names_them(make_folder: MakeFolder, spoil: Spoil) -> None:
    root = make_folder(count=10)
    bad = spoil(root / "cat")
    data = ImageFolderData(str(root), image_size=8, num_workers=0, on_bad_image="skip", val_fraction=0.25)
    with pytest.warns(UserWarning, match=r"of \d+ (train|val|test) images cannot be read and are left out: .*cat"):
        data.setup()
    assert sorted(data.skipped) == sorted(map(str, bad))
    loaders = [data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]
    assert sum(len(batch.labels) for loader in loaders for batch in loader) == 20


def test_error_stops_at_a_bad_image_and_names_it_also_from_a_worker(make_folder: MakeFolder, spoil: Spoil) -> None:
    root = make_folder(count=10)
    bad = spoil(root / "cat")
    for workers in (0, 2):
        data = ImageFolderData(str(root), image_size=8, num_workers=workers, val_fraction=0.0, test_fraction=0.0)
        with pytest.raises(BadData, match="|".join(path.name for path in bad)):
            all_batches(data)


def test_a_set_of_bad_images_only_is_an_error_even_when_skipping(make_folder: MakeFolder) -> None:
    root = make_folder("train", "val", "test")
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(BadData, match=r"val set: .*allowed: one image or more that can be read"):
        ImageFolderData(str(root), on_bad_image="skip").setup("fit")


def test_a_distributed_run_keeps_the_sampler_and_its_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        data = EmojiData(**SMALL)
        monkeypatch.setattr(data, "_rank", lambda rank=rank: (rank, 3))
        sampler = data.train_dataloader().sampler
        # Lightning leaves a DistributedSampler as it is and sets its epoch
        assert isinstance(sampler, SeededOrder)
        assert isinstance(sampler, torch.utils.data.DistributedSampler)
        shares += [int(draw) for draw in sampler]
    assert set(shares) == set(range(len(data.split("train"))))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("image_size", 0, "image_size: got 0; allowed: a whole number from 1 up"),
        ("batch_size", 0, "batch_size: got 0"),
        ("eval_batch_size", -1, "eval_batch_size: got -1"),
        ("augment", "heavy", "augment: got 'heavy'; allowed: none, light, full"),
        ("interpolation", "cubic", "interpolation: got 'cubic'.*Did you mean 'bicubic'"),
        ("crop_pct", 1.5, "crop_pct: got 1.5"),
        ("val_fraction", 0.9, "sum below 1"),
        ("train_size", 0, "train_size: got 0"),
        ("seed", -1, "seed: got -1"),
        ("num_workers", "many", "num_workers: got 'many'; allowed: a whole number from 0 up or auto"),
        ("mean", (0.5, 0.5, 0.5), "mean, std: .*both or neither"),
    ],
)
def test_each_bad_argument_is_one_error_that_says_what_is_allowed(argument: str, value: Any, message: str) -> None:
    with pytest.raises(BadData, match=message):
        EmojiData(**{argument: value})


def test_on_bad_image_must_be_known(make_folder: MakeFolder) -> None:
    with pytest.raises(BadData, match="on_bad_image: got 'drop'; allowed: error, skip"):
        ImageFolderData(str(make_folder()), on_bad_image="drop")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("EmojiData", {"vendors": ["noto"], "target": "subcategory", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}),
        ("ImageFolderData", {"root": "IMAGES", "on_bad_image": "skip", "image_size": 32}),
        ("TorchvisionData", {"name": "FakeData", "options": {"size": 12, "num_classes": 3}}),
    ],
)
def test_a_config_file_builds_each_with_the_shared_arguments(
    name: str, arguments: dict[str, Any], make_folder: MakeFolder
) -> None:
    arguments = {key: str(make_folder()) if value == "IMAGES" else value for key, value in arguments.items()}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    shared = {"batch_size": 4, "augment": "full", "num_workers": 0, "pin_memory": False, "val_fraction": 0.25}
    config = parser.parse_object({"data": {"class_path": f"finetune_bn.data.{name}", "init_args": arguments | shared}})
    data = parser.instantiate(config).data
    assert type(data).__name__ == name
    assert (data.batch_size, data.augment, data.eval_batch_size) == (4, "full", 64)
    assert data.num_classes >= 2


def test_help_shows_the_shared_arguments_of_a_data_module(capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(EmojiData, "data")
    text = " ".join(parser.format_help().split())
    assert "--data.target" in text
    assert "--data.batch_size" in text
    assert "Random changes to training images." in text
    # the archive holds no unreadable image
    assert "on_bad_image" not in text
