from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from finetune_bn.data import Batch, EmojiData, ImageDataModule, ImageFolderData
from finetune_bn.data.order import Draw, SeededLabelBatches, SeededOrder
from finetune_bn.errors import BadData
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler
from tests.data.conftest import MakeFolder

# 24 emoji to train on, each by three vendors.
SMALL: dict[str, Any] = {"subcategories": ["zodiac", "game"], "image_size": 16, "target": "identity"}


def pairs(**arguments: Any) -> EmojiData:
    return EmojiData(**SMALL | {"batch_size": 8, "images_per_label": 2} | arguments)


def epochs(data: ImageDataModule, number: int = 1) -> list[list[Batch]]:
    loader = data.train_dataloader()
    return [list(loader) for _ in range(number)]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(left, right, strict=True)
    )


def is_whole(labels: Tensor, p: int, k: int) -> bool:
    """Whether a batch is of p different labels with k images each, those of a label side by side."""
    table = labels.view(p, k)
    return bool((table == table[:, :1]).all()) and len(set(table[:, 0].tolist())) == p


# --- the sampler ----------------------------------------------------------------------------------------------------


def test_the_images_are_those_of_the_plain_sampler_with_a_seed_each() -> None:
    arguments: dict[str, Any] = {"num_labels": 3, "images_per_label": 2, "seed": 4}
    labels = [i % 5 for i in range(20)]
    seeded, plain = SeededLabelBatches(labels, **arguments), PKBatchSampler(labels, **arguments)
    for epoch in range(2):
        drawn = list(seeded)
        assert drawn == list(plain.batches(epoch))
        assert all(isinstance(image, Draw) for batch in drawn for image in batch)
    seeds = [image.seed for epoch in range(2) for batch in seeded.batches(epoch) for image in batch]  # type: ignore[attr-defined]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [image.seed for epoch in range(2) for batch in seeded.batches(epoch) for image in batch]  # type: ignore[attr-defined]


def test_a_batch_has_the_same_seeds_however_it_is_come_to() -> None:
    sampler = SeededLabelBatches([i % 5 for i in range(40)], 3, 2)
    whole = [[image.seed for image in batch] for batch in sampler.batches(2)]  # type: ignore[attr-defined]
    rest = [[image.seed for image in batch] for batch in sampler.batches(2, start=3)]  # type: ignore[attr-defined]
    assert rest == whole[3:] != []


def test_ranks_augment_differently() -> None:
    ranks = [SeededLabelBatches([0, 1], 2, 1, rank=rank, world_size=2) for rank in (0, 1)]
    first = [{image.seed for image in next(sampler.batches(0))} for sampler in ranks]  # type: ignore[attr-defined]
    assert not first[0] & first[1]


# --- the data module ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "k"), [(8, 2), (12, 3), (4, 4), (6, 1)])
def test_every_batch_has_exactly_k_images_of_p_labels(batch_size: int, k: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # three vendors are fewer than four images
        data = pairs(batch_size=batch_size, images_per_label=k)
        drawn = [batch for epoch in epochs(data, 3) for batch in epoch]
    assert len(drawn) == 3 * (72 // batch_size)
    for batch in drawn:
        assert is_whole(batch.labels, batch_size // k, k)
        assert batch.images.shape == (batch_size, 3, 16, 16)
    in_first_epoch = Counter(label for batch in drawn[: 72 // batch_size] for label in batch.labels.tolist())
    assert {in_first_epoch[label] // k for label in range(24)} <= {
        72 // batch_size * batch_size // k // 24 + i for i in (0, 1)
    }


def test_two_images_of_an_emoji_are_by_different_vendors() -> None:
    data = pairs(augment="none")
    images = data.image_set("train")
    by_pixels = {images[i][0].numpy().tobytes(): images.domains[i] for i in range(len(images))}
    assert len(by_pixels) == len(images)
    for batch in epochs(data)[0]:
        vendors = [by_pixels[image.numpy().tobytes()] for image in batch.images]
        assert all(vendors[i] != vendors[i + 1] for i in range(0, len(vendors), 2))


def test_the_seed_decides_batches_and_augmentation_whatever_the_workers() -> None:
    first = epochs(pairs(seed=1), 2)
    torch.manual_seed(99)
    again = epochs(pairs(seed=1, num_workers=2), 2)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(*first)
    assert not same(first[0], epochs(pairs(seed=2, split_seed=1))[0])


def test_an_image_that_comes_twice_in_a_batch_is_augmented_twice() -> None:
    with pytest.warns(UserWarning, match=r"24 of 24 labels have fewer than 4 images .*more than once in a batch"):
        batches = epochs(pairs(images_per_label=4))[0]
    for batch in batches:
        views = {image.numpy().tobytes() for image in batch.images}
        assert len(views) == len(batch.images)


def test_labels_of_few_images_are_left_out_or_refused_as_asked() -> None:
    with pytest.raises(BadData, match=r"labels: got '24 of 24 labels with fewer'; allowed: at least 4 images"):
        pairs(images_per_label=4, short_labels="error").train_dataloader()
    with pytest.raises(BadData, match=r"num_labels: got 2; allowed: at most 0.* left out"):
        pairs(images_per_label=4, short_labels="drop").train_dataloader()


def test_any_data_module_has_such_batches(make_folder: MakeFolder) -> None:
    root = make_folder(classes=("ant", "bee", "cat"), count=6)
    data = ImageFolderData(str(root), image_size=12, batch_size=4, images_per_label=2, num_workers=0)
    batches = epochs(data)[0]
    assert batches
    assert all(is_whole(batch.labels, 2, 2) for batch in batches)
    assert data.num_train_classes == data.num_classes == 3


def test_only_training_batches_are_made_of_labels() -> None:
    data = pairs()
    assert isinstance(data.iid_dataloader().sampler, SeededOrder)
    found = torch.cat([batch.labels for loader in data.val_dataloader() for batch in loader])
    assert len(found) == len(data.split("val"))


def test_labels_of_training_emoji_come_first_and_none_is_left_out() -> None:
    data = pairs()
    seen = {split: set(data.image_set(split).labels.tolist()) for split in ("train", "val", "test")}
    assert seen["train"] == set(range(data.num_train_classes))
    assert min(seen["val"]) == data.num_train_classes
    assert seen["train"] | seen["val"] | seen["test"] == set(range(data.num_classes))
    assert not seen["train"] & (seen["val"] | seen["test"])
    names = {name.split("/")[1] for name in data.image_set("train").names}
    assert len(names) == data.num_train_classes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_label": 3}, r"batch_size: got 8; allowed: a multiple of 3 \(images_per_label\)"),
        ({"images_per_label": 0}, "images_per_label: got 0; allowed: a whole number from 1 up"),
        ({"images_per_label": True}, "images_per_label: got True"),
        ({"short_labels": "keep"}, "short_labels: got 'keep'; allowed: repeat, drop, error"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadData, match=message):
        pairs(**arguments)


def test_more_labels_than_there_are_is_refused() -> None:
    with pytest.raises(BadData, match="num_labels: got 25; allowed: at most 24"):
        pairs(batch_size=50).train_dataloader()


# --- in a Trainer ---------------------------------------------------------------------------------------------------


class Watch(pl.LightningModule):
    """Notes the batches, and raises where one is not of 4 labels with 2 images each."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        self.seen: list[tuple[int, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        assert is_whole(labels, 4, 2)
        sums = self.all_gather(images.double().sum()).reshape(-1)
        assert len(set(sums.tolist())) == self.trainer.world_size, "the ranks must have batches of their own"
        self.log("steps", float(len(self.seen) + 1))
        self.seen.append((self.current_epoch, float(images.double().sum())))
        loss: Tensor = self.layer(images.mean((2, 3))).mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def runner(root: Path, **arguments: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=root, max_epochs=2, **quiet, **arguments)


def test_a_run_that_was_cut_in_an_epoch_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, filename="cut", every_n_train_steps=12)  # 9 steps are an epoch
    whole, resumed = Watch(), Watch()
    runner(tmp_path, callbacks=[checkpoint]).fit(whole, datamodule=pairs())
    assert len(whole.seen) == 2 * 9
    runner(tmp_path, enable_checkpointing=False).fit(resumed, datamodule=pairs(), ckpt_path=tmp_path / "cut.ckpt")
    assert resumed.seen == whole.seen[12:]


@pytest.mark.slow
@pytest.mark.parametrize("replace", [True, False])
def test_every_rank_has_whole_batches_of_its_own(tmp_path: Path, replace: bool) -> None:
    trainer = runner(
        tmp_path, enable_checkpointing=False, strategy="ddp_fork", devices=2, use_distributed_sampler=replace
    )
    trainer.fit(Watch(), datamodule=pairs())
    assert trainer.callback_metrics["steps"] == 2 * (72 // 16)
