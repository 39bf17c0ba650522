"""Batches for a recalibration inside a Trainer: i.i.d., each rank its part, as the module's own hooks hand them on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Generator, nn
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from finetune_bn.callbacks.lightning_names import before_transfer
from finetune_bn.data.order import SeededOrder
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.batches import Feeder, Forward, kind_of
from finetune_bn.utilities.probe import undisturbed
from finetune_bn.utilities.randomness import RandomStates

_BATCH_SIZE = 32  # where the loader has a batch sampler that names none
_SAMPLE = 2  # images of a batch that is tried
_PASS_DATA = "Pass a DataLoader as `data`."


class ModuleBatches:
    """The batches of a loader as the steps of a module get them: in its precision, on its device, after its hooks.

    Args:
        trainer: the Trainer that the module is attached to.
        pl_module: the module; its `on_before_batch_transfer`, `transfer_batch_to_device` and `on_after_batch_transfer`
            (or those of the data module) are called.
        loader: any iterable of batches.
        share: (rank, number of ranks): of all batches this process takes every so many.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        loader: Iterable[Any],
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._trainer, self._module, self._loader, self._share = trainer, pl_module, loader, share

    def __iter__(self) -> Iterator[Any]:
        rank, world_size = self._share
        trainer, module = self._trainer, self._module
        for batch in islice(self._loader, rank, None, world_size):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = before_transfer(module, batch)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    def __len__(self) -> int:
        """Return the number of batches of this process; a TypeError where the loader does not know how many it has."""
        rank, world_size = self._share
        return len(range(rank, len(self._loader), world_size))  # type: ignore[arg-type]

    def sample(self) -> Any:
        """Return a small batch without iterating over the loader; None where there is no other way to one."""
        loader, random = self._loader, RandomStates()
        try:
            if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
                if not isinstance(loader.dataset, Sized) or loader.batch_sampler is None:
                    return None
                few = range(min(len(loader.dataset), _SAMPLE))
                batches = [loader.collate_fn([loader.dataset[i] for i in few])] if few else []
            else:
                batches = list(loader[:1]) if isinstance(loader, (list, tuple)) else []
        except (LookupError, TypeError):  # the data set knows no numbers
            return None
        finally:
            random.restore()
        return next(iter(ModuleBatches(self._trainer, self._module, batches)), None)


def try_batch(trainer: pl.Trainer, target: nn.Module, batches: ModuleBatches, forward: Forward | None) -> None:
    """Pass a small batch through the part that is to be measured: what does not fit is said before the training.

    Raises:
        FinetuneBNError: nothing says which part of a batch the network takes, or it does not take it.
    """
    with torch.inference_mode(False):
        batch = batches.sample()
        if batch is None:
            return
        feeder = Feeder(target, forward, None)
        chunk = feeder.chunk(batch, 0)
        with undisturbed(target), trainer.precision_plugin.forward_context():
            try:
                feeder(chunk)
            except FinetuneBNError:
                raise
            except Exception as error:
                allowed = f"what {type(target).__name__} takes"
                remedy = f"It said: {type(error).__name__}: {error}. Or pass forward=, a function (module, batch)."
                raise FinetuneBNError(complaint("data", kind_of(batch), allowed, remedy)) from error


def training_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, data: Any = None, split: str = "train", seed: int = 0
) -> ModuleBatches:
    """Return this process's part of the batches to recalibrate on.

    Args:
        trainer: with its training loader set up, unless `data` or its data module says more.
        pl_module: the module that takes the batches.
        data: a DataLoader or other iterable, taken as it is; a LightningDataModule; None: the training data.
        split: of a data module: train, val or test.
        seed: decides the order of the images.

    Raises:
        FinetuneBNError: there is no loader, or more than one, or none that could be shuffled.
    """
    own = trainer.datamodule if data is None else data  # type: ignore[attr-defined]
    world_size = trainer.world_size
    if isinstance(own, pl.LightningDataModule):
        attach(trainer, own)
        iid = getattr(own, "iid_dataloader", None)
        # Without the augmentation of training, and already this rank's part.
        if callable(iid):
            return ModuleBatches(trainer, pl_module, iid(split))
        if split != "train":
            return pooled_batches(trainer, pl_module, flattened(getattr(own, f"{split}_dataloader")()), seed)
        source = trainer.train_dataloader if data is None else None
        return _shuffled(trainer, pl_module, source or own.train_dataloader(), seed)
    if data is not None:
        shared = isinstance(getattr(data, "sampler", None), DistributedSampler)
        share = (0, 1) if shared else (trainer.global_rank, world_size)
        return ModuleBatches(trainer, pl_module, data, share)
    return _shuffled(trainer, pl_module, trainer.train_dataloader, seed)


def pooled_batches(
    trainer: pl.Trainer, pl_module: pl.LightningModule, loaders: Sequence[Any], seed: int = 0
) -> ModuleBatches:
    """Return this process's part of the images of several loaders, mixed."""
    datasets = [getattr(loader, "dataset", None) for loader in loaders]
    if len(loaders) > 1 and all(isinstance(d, Sized) and not isinstance(d, IterableDataset) for d in datasets):
        first: DataLoader[Any] = loaders[0]
        mixed: ConcatDataset[Any] = ConcatDataset(datasets)  # type: ignore[arg-type]
        size, workers = _batch_size(first), first.num_workers
        loaders = [DataLoader(mixed, batch_size=size, num_workers=workers, collate_fn=first.collate_fn)]
    return _shuffled(trainer, pl_module, list(loaders), seed)


def flattened(loaders: Any) -> list[Any]:
    """Return the loaders in whatever form Lightning takes them as a list."""
    return [] if loaders is None else list(CombinedLoader(loaders).flattened)


def attach(trainer: pl.Trainer, datamodule: pl.LightningDataModule) -> None:
    """Prepare a data module that the Trainer did not prepare itself."""
    if datamodule is trainer.datamodule or datamodule.trainer is trainer:  # type: ignore[attr-defined]
        return
    datamodule.trainer = trainer
    if trainer.local_rank == 0:
        datamodule.prepare_data()
    trainer.strategy.barrier("recalibration data")
    datamodule.setup("fit")


def iid_loader(loader: DataLoader[Any], seed: int = 0, rank: int = 0, world_size: int = 1) -> DataLoader[Any]:
    """Return a loader over the same data set in shuffled order, whatever sampler the given one has.

    Collate function, batch size and workers are those of the loader; every image comes once, no batch is dropped, and
    the order is the same at each pass. A data set that can only be iterated over keeps its own order, and all of it.

    Args:
        loader: a DataLoader; it is not iterated over.
        seed: decides the order.
        rank: which process this is.
        world_size: number of processes; each gets its part, no image twice.

    Raises:
        FinetuneBNError: the data set has no length.
    """
    options: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": Generator().manual_seed(seed),
    }
    if loader.num_workers:
        options["prefetch_factor"] = loader.prefetch_factor
    dataset, size = loader.dataset, _batch_size(loader)
    if isinstance(dataset, IterableDataset):
        return DataLoader(dataset, batch_size=size, **options)
    if not isinstance(dataset, Sized):
        raise FinetuneBNError(complaint("dataset", type(dataset).__name__, "a data set with a length", _PASS_DATA))
    order = _SameOrder(dataset, seed=seed, rank=rank, world_size=world_size, even=False)
    return DataLoader(dataset, batch_size=size, sampler=order, **options)


def _batch_size(loader: DataLoader[Any]) -> int | None:
    """Return how many images a batch has; None where the data set returns whole batches."""
    if loader.batch_size is not None or loader.batch_sampler is None:
        return loader.batch_size
    return getattr(loader.batch_sampler, "batch_size", None) or _BATCH_SIZE


class _SameOrder(SeededOrder):
    """Draws the same images at each pass: what changes from one recalibration to the next is then the network alone."""

    def __iter__(self) -> Iterator[Any]:
        self.epoch = 0
        return super().__iter__()


def _shuffled(trainer: pl.Trainer, pl_module: pl.LightningModule, loader: Any, seed: int) -> ModuleBatches:
    loaders = flattened(loader)
    if len(loaders) != 1 or not isinstance(loaders[0], DataLoader):
        given = [type(one).__name__ for one in loaders]
        raise FinetuneBNError(complaint("data", given, "one torch DataLoader, to be shuffled", _PASS_DATA))
    rank, world_size = trainer.global_rank, trainer.world_size
    if isinstance(loaders[0].dataset, IterableDataset):
        rank_zero_warn(
            f"Recalibration: {type(loaders[0].dataset).__name__} is an IterableDataset, which cannot be shuffled: its "
            "images are taken in its own order. Statistics of the first ones alone may be off where it is sorted."
        )
        return ModuleBatches(trainer, pl_module, iid_loader(loaders[0], seed), (rank, world_size))
    return ModuleBatches(trainer, pl_module, iid_loader(loaders[0], seed, rank, world_size))
