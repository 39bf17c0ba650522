"""A run that is cut off twice ends like the one that was not: bit for bit, in tasks and in foreign modules."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.callbacks.checkpoint_io import AtomicCheckpointIO
from finetune_bn.callbacks.run_state import KEY, ResumeWhole
from finetune_bn.data import EmojiData
from finetune_bn.data.order import SeededOrder
from finetune_bn.errors import FinetuneBNError
from finetune_bn.tasks import ImageClassification, MetricLearning
from tests.tools import assert_same_state

EPOCHS = 3
# Where a run is cut: ("step", n) is amid an epoch, ("epoch", n) behind its validation.
MID_THEN_END = [("step", 3), ("epoch", 1)]
END_THEN_MID = [("epoch", 0), ("step", 16)]


class PowerCut(Exception):
    """Ends a run."""


class Cut(pl.Callback):
    """Saves a checkpoint at one point of a run, and ends the run there."""

    def __init__(self, at: tuple[str, int], file: Path) -> None:
        self.at, self.file = at, file

    def _cut(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.file)
        raise PowerCut

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.at == ("step", trainer.global_step):
            self._cut(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and self.at == ("epoch", trainer.current_epoch):
            self._cut(trainer)


class Diary(pl.Callback):
    """Notes what each training batch held, and what was logged at the end of each epoch."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int, list[float]]] = []
        self.scores: dict[int, dict[str, float]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        sums = batch[0].double().reshape(len(batch[0]), -1).sum(1).tolist()
        self.batches.append((trainer.current_epoch, batch_idx, sums))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        names = [name for name in trainer.callback_metrics if not name.endswith("_step")]
        self.scores[trainer.current_epoch] = {name: float(trainer.callback_metrics[name]) for name in names}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def quiet_trainer(folder: Path, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"max_epochs": EPOCHS, "accelerator": "cpu", "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **quiet | defaults | arguments)


class Run:
    """A run of a task on its data, cut off at some points and resumed behind each."""

    def __init__(
        self,
        folder: Path,
        make: Callable[[], tuple[Any, Any]],
        cuts: list[tuple[str, int]],
        more: Sequence[pl.Callback] = (),
        **arguments: Any,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.diary = Diary()
        file: Path | None = None
        for number, at in enumerate([*cuts, None]):
            torch.manual_seed(number)  # a new process: what the global generators hold is of no use
            self.module, data = make()
            if number:
                torch.manual_seed(100 + number)
            following = folder / f"{number}.ckpt"
            callbacks = [*more, self.diary] if at is None else [*more, self.diary, Cut(at, following)]
            if hasattr(self.module, "net"):
                callbacks.append(BatchNormConversion(fbn.Keep()))
            self.trainer = quiet_trainer(folder, *callbacks, **arguments)
            fed = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"train_dataloaders": data}
            try:
                self.trainer.fit(self.module, **fed, ckpt_path=file)
            except PowerCut:
                assert at is not None
            else:
                assert at is None, f"the run was not cut at {at}"
            file = following


def assert_same_run(cut: Run, whole: Run) -> None:
    assert cut.diary.batches == whole.diary.batches
    assert_same_state(cut.module.state_dict(), whole.module.state_dict())
    ours, theirs = (run.trainer.optimizers[0].state_dict() for run in (cut, whole))
    assert ours["param_groups"] == theirs["param_groups"]
    for parameter, values in theirs["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(ours["state"][parameter][name]), torch.as_tensor(value))
    assert cut.trainer.train_dataloader.state_dict() == whole.trainer.train_dataloader.state_dict()  # type: ignore[union-attr]
    assert (cut.trainer.current_epoch, cut.trainer.global_step) == (EPOCHS, whole.trainer.global_step)
    # An epoch that a checkpoint behind its validation closed is told of by the run that was cut, if at all.
    assert cut.diary.scores == {epoch: whole.diary.scores[epoch] for epoch in cut.diary.scores}
    assert EPOCHS - 1 in cut.diary.scores


SMALL: dict[str, Any] = {"subcategories": ["zodiac"], "image_size": 32, "val_fraction": 0.3, "test_fraction": 0}


def images(workers: int) -> tuple[ImageClassification, EmojiData]:
    data = EmojiData(**SMALL, target="vendor", batch_size=4, num_workers=workers)
    # Live BatchNorm and dropout: a run is the same only if batches and random numbers are.
    task = ImageClassification(
        3, backbone="test_resnet", weights=None, lr=1e-2, backbone_args={"drop_rate": 0.3, "drop_path_rate": 0.2}
    )
    return task, data


def pairs(workers: int) -> tuple[MetricLearning, EmojiData]:
    data = EmojiData(**SMALL, target="identity", batch_size=4, images_per_label=2, num_workers=workers)
    return MetricLearning(backbone="test_resnet", weights=None, lr=1e-2, dimension=8), data


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Run]:
    """The uninterrupted run of each task."""
    folder = tmp_path_factory.mktemp("whole")
    return {make: Run(folder / make.__name__, lambda make=make: make(0), []) for make in (images, pairs)}  # type: ignore[misc]


@pytest.mark.parametrize(("workers", "cuts"), [(0, MID_THEN_END), (0, END_THEN_MID), (2, MID_THEN_END)])
@pytest.mark.parametrize("make", [images, pairs])
def test_a_task_that_is_cut_twice_ends_like_the_whole_run(
    wholes: dict[Any, Run], tmp_path: Path, make: Any, workers: int, cuts: list[tuple[str, int]]
) -> None:
    assert_same_run(Run(tmp_path, lambda: make(workers), cuts), wholes[make])


def test_two_cuts_in_one_epoch_lose_nothing(wholes: dict[Any, Run], tmp_path: Path) -> None:
    assert_same_run(Run(tmp_path, lambda: images(0), [("step", 2), ("step", 4)]), wholes[images])


def test_a_cut_at_the_last_step_of_an_epoch_lacks_its_validation_is_warned_of_and_trains_the_same(
    wholes: dict[Any, Run], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match=r"last step of epoch 0, in front of a validation.*lose nothing"):
        run = Run(tmp_path, lambda: images(0), [("step", 7), ("step", 16)])
    assert_same_run(run, wholes[images])
    assert set(run.diary.scores) == {1, 2}


@pytest.mark.parametrize("cut", [("epoch", 1), ("step", 10)])
def test_a_cut_at_or_in_front_of_a_validation_amid_an_epoch(tmp_path: Path, cut: tuple[str, int]) -> None:
    """Behind it nothing is lost; in front of it Lightning leaves it out, which is said."""

    def run(folder: str, cuts: list[tuple[str, int]]) -> Run:
        return Run(tmp_path / folder, lambda: images(0), cuts, val_check_interval=3)

    whole = run("whole", [])
    if cut[0] == "epoch":
        assert_same_run(run("cut", [cut]), whole)
        return
    with pytest.warns(UserWarning, match=r"step 3 of epoch 1, in front of a validation.*leaves out the validation"):
        found = run("cut", [cut])
    assert found.diary.batches == whole.diary.batches
    assert_same_state(found.module.state_dict(), whole.module.state_dict())


class Foreign(pl.LightningModule):
    """Knows nothing of this package, and asks for the number of steps before Lightning has read the checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.zeros(1, 3)))

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == EPOCHS * 6
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Noisy(Foreign):
    """Has dropout, and logs means, and one value at the second step of the last epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if (self.current_epoch, batch_idx) == (2, 1):
            self.log("once", 7.0, on_step=True, on_epoch=False)
        loss = nn.functional.dropout(self.layer(batch[0]), 0.5).square().mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max")
        return loss


@pytest.mark.parametrize("cuts", [MID_THEN_END, END_THEN_MID])
def test_a_callback_keeps_random_numbers_and_the_log_of_a_foreign_module(
    tmp_path: Path, cuts: list[tuple[str, int]]
) -> None:
    def run(folder: str, cuts: list[tuple[str, int]], *more: pl.Callback) -> Run:
        return Run(tmp_path / folder, lambda: (Noisy(), shuffled(0)), cuts, more)

    whole = run("whole", [])
    assert set(whole.diary.scores[0]) == {"train_loss", "largest"}
    assert set(whole.diary.scores[2]) == {"train_loss", "largest", "once"}
    assert_same_run(run("cut", cuts, ResumeWhole()), whole)
    with pytest.raises(AssertionError):
        assert_same_run(run("without", cuts), whole)


def test_a_task_that_keeps_its_own_state_is_left_alone_by_the_callback(wholes: dict[Any, Run], tmp_path: Path) -> None:
    assert_same_run(Run(tmp_path, lambda: images(0), [("step", 3)], [ResumeWhole()]), wholes[images])


DATA = TensorDataset(torch.randn(24, 3, generator=torch.Generator().manual_seed(0)), torch.arange(24) // 4)


def shuffled(workers: int) -> Any:
    return fbn.ResumableDataLoader(DATA, sampler=SeededOrder(DATA, seed=3), batch_size=4, num_workers=workers)


def shuffled_uneven(workers: int) -> Any:
    order = SeededOrder(DATA, seed=3, world_size=2, rank=1)
    return fbn.ResumableDataLoader(DATA, sampler=order, batch_size=2, num_workers=workers, persistent_workers=True)


def in_order(workers: int) -> Any:
    return fbn.ResumableDataLoader(DATA, batch_size=4, num_workers=workers)


def in_labels(workers: int) -> Any:
    sampler = fbn.PKBatchSampler(DATA.tensors[1], 2, 2, seed=1)
    return fbn.ResumableDataLoader(DATA, batch_sampler=sampler, num_workers=workers)


@pytest.mark.parametrize("cuts", [MID_THEN_END, END_THEN_MID, [("step", 6), ("step", 13)]])
@pytest.mark.parametrize(
    ("make", "workers"), [(shuffled, 0), (shuffled, 2), (shuffled_uneven, 1), (in_order, 0), (in_labels, 0)]
)
def test_a_foreign_module_that_reads_the_number_of_steps_goes_on_with_the_next_batch(
    tmp_path: Path, make: Any, workers: int, cuts: list[tuple[str, int]]
) -> None:
    """Case: lightning fit_loop.py, `setup_data` before `on_load_checkpoint`; faults.md F2, F3."""
    whole = Run(tmp_path / "whole", lambda: (Foreign(), make(workers)), [])
    assert_same_run(Run(tmp_path / "cut", lambda: (Foreign(), make(workers)), cuts), whole)


class Both(Foreign):
    """Trains on two loaders at once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[list[float]]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append([images[:, 0].tolist() for images, _ in batch])
        return self.layer(torch.cat([images for images, _ in batch])).square().mean()


def test_each_of_several_loaders_takes_its_own_state(tmp_path: Path) -> None:
    def fit(cut: tuple[str, int] | None, file: Path | None) -> list[Any]:
        module, callbacks = Both(), [] if cut is None else [Cut(cut, tmp_path / f"{cut[1]}.ckpt")]
        with contextlib.suppress(PowerCut):
            quiet_trainer(tmp_path, *callbacks).fit(module, [shuffled(0), in_labels(0)], ckpt_path=file)
        return module.seen

    whole = fit(None, None)
    assert len(whole) == EPOCHS * 6
    parts = fit(("step", 4), None), fit(("step", 9), tmp_path / "4.ckpt"), fit(None, tmp_path / "9.ckpt")
    assert [step for part in parts for step in part] == whole


class Augmented(TensorDataset):
    """Adds noise from the global generator of the process that reads."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = super().__getitem__(index)
        return image + torch.rand(3), label


def test_workers_that_draw_from_global_generators_draw_the_same_after_an_epoch(tmp_path: Path) -> None:
    data = Augmented(*DATA.tensors)

    def make() -> tuple[Foreign, Any]:
        order = SeededOrder(data, seed=3)
        return Foreign(), fbn.ResumableDataLoader(data, sampler=order, batch_size=4, num_workers=2)

    whole = Run(tmp_path / "whole", make, [])
    assert_same_run(Run(tmp_path / "cut", make, [("epoch", 0), ("epoch", 1)]), whole)


def test_overfitting_on_a_few_batches_works_as_with_any_loader(tmp_path: Path) -> None:
    """Lightning puts torch's SequentialSampler into the loader, which then keeps its place in that order."""
    task, data = images(0)
    diary = Diary()
    with pytest.warns(UserWarning, match="requested to overfit"):
        quiet_trainer(tmp_path, diary, max_epochs=2, overfit_batches=2).fit(task, data)
    assert [batch[:2] for batch in diary.batches] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_shuffle_without_a_seeded_order_is_refused_with_what_to_do() -> None:
    with pytest.raises(FinetuneBNError, match=r"shuffle: got True.*Pass sampler=SeededOrder"):
        fbn.ResumableDataLoader(DATA, batch_size=4, shuffle=True)
    with pytest.raises(FinetuneBNError, match="sampler: got 'RandomSampler'; allowed: a SeededOrder"):
        fbn.ResumableDataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA))


def test_a_state_of_other_data_amid_an_epoch_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PowerCut):
        quiet_trainer(tmp_path, Cut(("step", 2), tmp_path / "cut.ckpt")).fit(Foreign(), shuffled(0))
    other = fbn.ResumableDataLoader(DATA, sampler=SeededOrder(DATA, seed=4), batch_size=4)
    with pytest.raises(FinetuneBNError, match="image 8 of a plan with other arguments: seed 3 -> 4"):
        quiet_trainer(tmp_path).fit(Foreign(), other, ckpt_path=tmp_path / "cut.ckpt")


def test_a_task_writes_checkpoints_whole_or_not_at_all(wholes: dict[Any, Run]) -> None:
    assert type(wholes[images].trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_a_checkpoint_with_the_generators_is_plain_data(wholes: dict[Any, Run], tmp_path: Path) -> None:
    file = tmp_path / "plain.ckpt"
    wholes[images].trainer.save_checkpoint(file)
    (state,) = torch.load(file, weights_only=True)[KEY]
    assert {"torch", "python", "numpy"} <= state["generators"].keys()


def test_weights_that_are_loaded_for_a_new_run_leave_its_generators_alone(
    wholes: dict[Any, Run], tmp_path: Path
) -> None:
    """What a checkpoint holds is for the run that is resumed."""
    file = tmp_path / "loaded.ckpt"
    wholes[images].trainer.save_checkpoint(file)
    task = ImageClassification.load_from_checkpoint(file, weights_only=True)
    states: list[Tensor] = []

    class Note(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            states.append(torch.get_rng_state())

        on_train_epoch_start = on_train_start  # the module's own on_train_start was in between

    quiet_trainer(tmp_path, Note(), max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(task, images(0)[1])
    assert torch.equal(*states)
