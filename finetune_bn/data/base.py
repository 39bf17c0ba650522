"""What the data modules share: splits, transforms, loaders, seeding, and what happens to unreadable images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from finetune_bn.data.checks import choice, fractions, whole
from finetune_bn.data.images import ImageSet, ImageSource, collate, cpu_count, find_unreadable
from finetune_bn.data.order import SeededLabelBatches, SeededOrder
from finetune_bn.data.splits import derive_seed, stratified_split, stratified_subset
from finetune_bn.data.transforms import (
    AUGMENTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INTERPOLATIONS,
    Augment,
    Interpolation,
    Triple,
    checked_normalization,
    image_transform,
    model_normalization,
)
from finetune_bn.errors import BadData, complaint
from finetune_bn.metric_learning.pk_sampler import SHORT, Short
from finetune_bn.metric_learning.resumable_loader import ResumableDataLoader

# Lightning's words for a stage beside the names of the splits.
SPLITS = {"train": "train", "val": "val", "test": "test", "fit": "train", "validate": "val", "predict": "test"}
# The first split of a stage is required, the others are used where the data set has them.
NEEDED = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["test"]}
NAMES_SHOWN = 5


@dataclass(frozen=True)
class Contents:
    """What a data set holds, known without reading an image."""

    source: ImageSource
    class_names: list[str]
    """In the order of the class numbers."""
    domains: list[str]
    """The domains that are evaluated, one loader each; `["all"]` without domains."""
    splits: dict[str, list[int]]
    """Image numbers of `train`, `val` and `test`; empty where the data set has none."""
    keys: list[str]
    """One name per image that does not depend on the machine; subsets are drawn by it."""


class ImageDataModule(LightningDataModule):
    """Images with one label each, as `(images float32 [N, 3, H, W], labels int64 [N])` batches.

    Training mixes all domains. Validation, test and prediction have one loader per domain, in the order of `domains`.
    A last training batch of one image is possible (`drop_last` is off, so that no image is lost unseen) and is warned
    of: a live BatchNorm has no variance to normalize by there.

    Attributes:
        normalization: the mean and the standard deviation in use, once a loader was built.
        normalization_source: where they are from: `arguments`, `model` or `ImageNet`.
        skipped: the images left out because they cannot be read (with `on_bad_image: skip`).

    Args:
        image_size: Height and width in pixels of the images that the model sees.
        batch_size: Images per training batch (on each device).
        eval_batch_size: Images per batch in validation, test and prediction. Default: batch_size, but at least 64.
        augment: Random changes to training images. none: resize only. light: crops that keep 70 to 100 % of the area,
            no flip, no change of color (for emoji, digits, signs). full: timm's default for photos, with crops down
            to 8 % of the area, horizontal flips, and changes of brightness, contrast and saturation.
        mean: Mean of the red, green and blue channel that is subtracted. Default: that of the model, else ImageNet's.
        std: Standard deviation per channel that is divided by. Default: that of the model, else ImageNet's.
        interpolation: How images are resized.
        crop_pct: In evaluation, the side of the middle square that is kept, as a share of the short side.
            ImageNet models are often tested with 0.875.
        val_fraction: Share of the images that becomes the validation set, where the data set does not come with one.
        test_fraction: Share of the images that becomes the test set, where the data set does not come with any split.
        train_size: Train on this many images only, chosen by the seed, with each class's share kept.
        seed: Decides the split, the order of training images and their augmentation. The same seed gives the same
            split on any machine and the same batches with any number of workers; every epoch has another order.
        split_seed: Decides the split and the choice of train_size instead of seed. Set it to repeat a training with
            other seeds on the same images.
        num_workers: Processes that read images. auto: none if the images are in memory, else one per CPU
            less one, at most 8.
        pin_memory: Whether batches are put in page-locked memory, which a GPU reads faster. auto: if there is a GPU.
        drop_last: Whether a last training batch that is not full is left out.
        images_per_label: For metric learning: how many images of a label a training batch holds (K). A batch is then of
            batch_size / images_per_label labels, each equally often in an epoch, whatever number of images it has.
            Default: images are drawn one by one, whatever their labels.
        short_labels: With images_per_label, what happens to labels of fewer training images. repeat: their images come
            more than once in a batch, each time with another random augmentation. drop: they are left out. error: stop.
        on_bad_image: What to do with an image that cannot be read. error: stop and name it. skip: read every image
            once before training, leave the bad ones out, count and list them.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        augment: Augment = "light",
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        interpolation: Interpolation = "bicubic",
        crop_pct: float = 1.0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.2,
        train_size: int | None = None,
        seed: int = 0,
        split_seed: int | None = None,
        num_workers: int | Literal["auto"] = "auto",
        pin_memory: bool | Literal["auto"] = "auto",
        drop_last: bool = False,
        images_per_label: int | None = None,
        short_labels: Short = "repeat",
        on_bad_image: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        self.image_size = whole("image_size", image_size, 1)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.eval_batch_size = max(self.batch_size, 64)
        if eval_batch_size is not None:
            self.eval_batch_size = whole("eval_batch_size", eval_batch_size, 1)
        choice("augment", augment, AUGMENTS)
        self.augment: Augment = augment
        self.interpolation = choice("interpolation", interpolation, INTERPOLATIONS)
        if not 0 < crop_pct <= 1:
            raise BadData(complaint("crop_pct", crop_pct, "a number above 0 and at most 1"))
        self.crop_pct = crop_pct
        self.val_fraction, self.test_fraction = fractions(val_fraction, test_fraction)
        self.train_size = None if train_size is None else whole("train_size", train_size, 1)
        self.seed = whole("seed", seed, 0)
        self.split_seed = self.seed if split_seed is None else whole("split_seed", split_seed, 0)
        self.num_workers = None if num_workers == "auto" else whole("num_workers", num_workers, 0, " or auto")
        self.pin_memory = torch.cuda.is_available() if pin_memory == "auto" else pin_memory
        self.drop_last = drop_last
        self.images_per_label = None if images_per_label is None else whole("images_per_label", images_per_label, 1)
        if self.images_per_label is not None and self.batch_size % self.images_per_label:
            allowed = f"a multiple of {images_per_label} (images_per_label)"
            raise BadData(complaint("batch_size", batch_size, allowed))
        choice("short_labels", short_labels, SHORT)
        self.short_labels: Short = short_labels
        self.on_bad_image = choice("on_bad_image", on_bad_image, ("error", "skip"))
        self._given_normalization = checked_normalization(mean, std)
        self.normalization: tuple[Triple, Triple] | None = None
        self.normalization_source: str | None = None
        self.skipped: list[str] = []
        self._contents: Contents | None = None
        self._splits: dict[str, list[int]] = {}
        # Not to the logger: Lightning refuses to start when a foreign module's hyperparameters have the same names.
        self.save_hyperparameters(logger=False)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, weights_only: bool | None = True, **kwargs: Any) -> Any:
        """Return what a checkpoint holds, as Lightning does; no code in it is run, wherever it comes from.

        Lightning's default for an address is to unpickle it.
        """
        if len(args) < 5:  # the fifth is weights_only
            kwargs["weights_only"] = weights_only is None or weights_only
        return super().load_from_checkpoint(*args, **kwargs)

    @abstractmethod
    def _scan(self) -> Contents:
        """Find out what the data set holds; called once, on first need."""

    @property
    def contents(self) -> Contents:
        """What the data set holds; the first access looks at the disk (and downloads, where that was asked for)."""
        if self._contents is None:
            contents = self._scan()
            if len(contents.class_names) < 2:
                remedy = "A folder with a single sub-folder is usually one level too high or too low."
                raise BadData(complaint("classes", contents.class_names, "two classes or more", remedy))
            self._contents = contents
        return self._contents

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return self.contents.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.contents.class_names)

    @property
    def num_train_classes(self) -> int:
        """The number above the largest label of the training images: what a loss with a vector for each label needs."""
        contents = self.contents
        return 1 + max((contents.source.labels[index] for index in contents.splits["train"]), default=-1)

    @property
    def domains(self) -> list[str]:
        """Names of the domains that are evaluated, in the order of the validation and test loaders."""
        return self.contents.domains

    def setup(self, stage: str | None = None) -> None:
        """Choose the images of the stage (`None`: of all stages), so that a bad data set fails before training."""
        required, *others = NEEDED[stage] if stage else ["train", "val", "test"]
        self.split(required)
        for split in others:
            if self.contents.splits[split]:
                self.split(split)

    def split(self, name: str) -> list[int]:
        """Return the numbers, in `contents.source`, of the images of `train`, `val` or `test`; decided once.

        Raises:
            BadData: the split has no image, has fewer than `train_size`, or none that can be read.
        """
        name = SPLITS[choice("split", name, SPLITS)]
        if name not in self._splits:
            self._splits[name] = self._choose(name)
        return self._splits[name]

    def _choose(self, name: str) -> list[int]:
        contents = self.contents
        indices = contents.splits[name]
        if not indices:
            remedy = "Add such images, or, where the split is by fractions, change val_fraction and test_fraction."
            raise BadData(complaint(f"{name} set", [], "one image or more", remedy))
        if self.on_bad_image == "skip":
            indices = self._readable(name, indices)
        if name == "train" and self.train_size is not None:
            if self.train_size > len(indices):
                allowed = f"at most {len(indices)}, the number of training images"
                raise BadData(complaint("train_size", self.train_size, allowed))
            strata = list(zip(contents.source.labels, contents.source.domains, strict=True))
            indices = stratified_subset(indices, contents.keys, strata, self.train_size, self.split_seed)
        contents.source.load(indices)
        return indices

    def _readable(self, name: str, indices: list[int]) -> list[int]:
        source = self.contents.source
        bad = find_unreadable(source, indices)
        if not bad:
            return indices
        names = [source.name(index) for index in bad]
        if len(bad) == len(indices):
            raise BadData(complaint(f"{name} set", names, "one image or more that can be read"))
        self.skipped += names
        shown = "; ".join(f"{source.name(index)} ({reason})" for index, reason in list(bad.items())[:NAMES_SHOWN])
        rest = f"; and {len(bad) - NAMES_SHOWN} more, see `skipped`" if len(bad) > NAMES_SHOWN else ""
        rank_zero_warn(f"{len(bad)} of {len(indices)} {name} images cannot be read and are left out: {shown}{rest}")
        return [index for index in indices if index not in bad]

    def _cut(
        self, keys: Sequence[str], strata: Sequence[Hashable], val_fraction: float, test_fraction: float
    ) -> dict[str, list[int]]:
        """Split by `stratified_split`; a share that was asked for but comes out empty raises `BadData`."""
        splits = stratified_split(keys, strata, val_fraction, test_fraction, self.split_seed)
        for name, share in (("val", val_fraction), ("test", test_fraction)):
            if share > 0 and not splits[name]:
                remedy = f"Of {len(keys)} images in {len(set(strata))} groups no group is large enough to give one."
                raise BadData(complaint(f"{name}_fraction", share, "0, or a share that gives some image", remedy))
        return splits

    def train_dataloader(self) -> DataLoader[Any]:
        """Return one loader over all training domains, in the seed's order."""
        images = self.image_set("train", augment=self.augment)
        if self.images_per_label is not None:
            return self._label_loader(images, self.images_per_label)
        rank, world_size = self._rank()
        order = SeededOrder(images, seed=derive_seed(self.seed, "train"), rank=rank, world_size=world_size)
        if self.drop_last and len(order) < self.batch_size:
            allowed = f"at most {len(order)}, the number of training images (per device), when drop_last is set"
            raise BadData(complaint("batch_size", self.batch_size, allowed))
        if self.batch_size > 1 and len(order) % self.batch_size == 1 and not self.drop_last:
            rank_zero_warn(
                f"The last training batch has one image ({len(order)} images in batches of {self.batch_size}). A live "
                "BatchNorm behind global pooling fails on it, the others normalize it by itself alone. "
                "Set drop_last: true, or another train_size or batch_size."
            )
        options = self._options(images, training=True)
        return ResumableDataLoader(
            images, sampler=order, batch_size=self.batch_size, drop_last=self.drop_last, **options
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per domain; an empty list if the data set has no validation images."""
        return self._per_domain("val") if self.contents.splits["val"] else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per domain."""
        return self._per_domain("test")

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return the test loaders; the names of their images are in `loader.dataset.names`."""
        return self._per_domain("test")

    def iid_dataloader(
        self,
        stage: str = "train",
        batch_size: int | None = None,
        augment: bool = False,
        shuffle: bool = True,
        domain: str | None = None,
    ) -> DataLoader[Any]:
        """Return a plain loader over the images of a stage, e.g. to estimate BatchNorm statistics.

        Under a distributed `Trainer` each rank gets its own share, no image twice.

        Args:
            stage: whose images: train, val or test (or Lightning's fit, validate, predict).
            batch_size: images per batch; default `eval_batch_size`.
            augment: whether the training augmentation is applied; if not, the evaluation transform.
            shuffle: whether the order is random (seeded); if not, that of the data set.
            domain: only the images of this domain; default all.
        """
        images = self.image_set(stage, domain=domain, augment=self.augment if augment else "none")
        rank, world_size = self._rank()
        seed = derive_seed(self.seed, "iid")
        order = SeededOrder(images, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, even=False)
        size = self.eval_batch_size if batch_size is None else whole("batch_size", batch_size, 1)
        return self._loader(images, order, size)

    def image_set(self, stage: str, *, domain: str | None = None, augment: Augment = "none") -> ImageSet:
        """Return the images of a stage as a data set, with `labels`, `domains` and `names` for samplers.

        Args:
            stage: train, val or test (or Lightning's fit, validate, predict).
            domain: only the images of this domain; default all.
            augment: none, light or full.
        """
        indices = self.split(stage)
        source = self.contents.source
        if domain is not None:
            present = sorted({source.domains[index] for index in indices})
            choice("domain", domain, present, f"The {stage} set has no image of another domain.")
            indices = [index for index in indices if source.domains[index] == domain]
        mean, std = self._normalize_by()
        transform = image_transform(augment, self.image_size, mean, std, self.interpolation, self.crop_pct)
        return ImageSet(source, indices, transform, augmented=augment != "none")

    def _per_domain(self, stage: str) -> list[DataLoader[Any]]:
        sets = [self.image_set(stage, domain=domain) for domain in self.domains]
        return [self._loader(images, None, self.eval_batch_size) for images in sets]

    def _label_loader(self, images: ImageSet, images_per_label: int) -> DataLoader[Any]:
        """Return a loader of batches of so many images of each label."""
        rank, world_size = self._rank()
        sampler = SeededLabelBatches(
            images.labels,
            self.batch_size // images_per_label,
            images_per_label,
            short=self.short_labels,
            seed=derive_seed(self.seed, "labels"),
            rank=rank,
            world_size=world_size,
        )
        return ResumableDataLoader(images, batch_sampler=sampler, **self._options(images, training=True))

    def _loader(self, images: ImageSet, order: SeededOrder | None, batch_size: int) -> DataLoader[Any]:
        options = self._options(images, training=order is not None)
        return DataLoader(images, batch_size=batch_size, sampler=order, **options)

    def _options(self, images: ImageSet, training: bool) -> dict[str, Any]:
        workers = self.num_workers
        if workers is None:
            workers = 0 if images.source.in_memory else min(8, max(0, cpu_count() - 1))
        return {
            "num_workers": workers,
            "collate_fn": collate,
            "pin_memory": self.pin_memory,
            # Seeds the workers (Python, NumPy, torch) and leaves the global generator as it is.
            "generator": torch.Generator().manual_seed(derive_seed(self.seed, "workers")),
            "persistent_workers": workers > 0 and training,
        }

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _normalize_by(self) -> tuple[Triple, Triple]:
        # Looked up whenever a loader is built: the trainer and its model may be another one by then.
        model = self.trainer.lightning_module if self.trainer else None
        of_model = model_normalization(model)
        if self._given_normalization:
            found, origin = self._given_normalization, "arguments"
        elif of_model:
            found, origin = of_model, "model"
        else:
            found, origin = (IMAGENET_MEAN, IMAGENET_STD), "ImageNet"
            if self.normalization_source != origin:
                rank_zero_info("Images are normalized by ImageNet's mean and std: no argument or model gives others.")
        self.normalization, self.normalization_source = found, origin
        return found
