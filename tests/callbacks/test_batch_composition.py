"""P x K batches inside real Trainers of one and more processes: whole, guarded, and resumed with the next batch."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from pytorch_metric_learning.losses import NTXentLoss
from pytorch_metric_learning.samplers import MPerClassSampler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks.batch_composition import (
    BatchCompositionGuard,
    labels_of,
    pk_violation,
    warn_of_small_batches,
)
from finetune_bn.callbacks.conversion import BatchNormConversion
from finetune_bn.errors import BadData, FinetuneBNError
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler
from finetune_bn.metric_learning.resumable_loader import ResumableDataLoader

P, K = 4, 2
LABELS = torch.arange(24).repeat_interleave(5)
IMAGES = TensorDataset(torch.arange(len(LABELS)), LABELS)

Entry = list[Any]  # [epoch, batch_idx, images]


class Diary(pl.LightningModule):
    """Writes down the batches it gets, per rank; the loader comes from its hook where `make` is given."""

    def __init__(self, folder: Path, make: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.folder, self.make = folder, make
        self.entries: list[Entry] = []

    def train_dataloader(self) -> Any:
        assert self.make is not None
        return self.make()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.entries.append([self.current_epoch, batch_idx, batch[0].tolist()])
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self) -> None:
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps(self.entries))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def make_loader(kind: type[DataLoader[Any]] = DataLoader, workers: int = 0, **arguments: Any) -> DataLoader[Any]:
    sampler = PKBatchSampler(LABELS, P, K, **{"seed": 1} | arguments)
    return kind(IMAGES, batch_sampler=sampler, num_workers=workers)


def make_trainer(folder: Path, world_size: int, *callbacks: Callback, epochs: int = 2, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    strategy = "ddp_fork" if world_size > 1 else "auto"
    defaults = {"max_epochs": epochs, "accelerator": "cpu", "devices": world_size, "strategy": strategy}
    return pl.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=saves, **quiet | defaults | arguments
    )


def train(
    folder: Path,
    make: Callable[[], Any],
    *callbacks: Callback,
    world_size: int = 1,
    in_hook: bool = False,
    ckpt: Path | None = None,
    **arguments: Any,
) -> list[list[Entry]]:
    """Fit, and return what each rank wrote down."""
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(folder, world_size, *callbacks, **arguments)
    model = Diary(folder, make if in_hook else None)
    trainer.fit(model, *([] if in_hook else [make()]), ckpt_path=ckpt)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def planned(world_size: int, epochs: int = 2, **arguments: Any) -> list[list[Entry]]:
    """Return what each rank is to write down, from samplers without a Trainer."""
    samplers = [
        PKBatchSampler(LABELS, P, K, **{"seed": 1} | arguments, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    return [[[e, i, b] for e in range(epochs) for i, b in enumerate(s.batches(e))] for s in samplers]


# Whole


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("in_hook", [True, False], ids=["hook", "argument"])
@pytest.mark.parametrize("kind", [DataLoader, ResumableDataLoader])
def test_every_batch_of_every_rank_is_p_times_k_under_lightnings_defaults(
    tmp_path: Path, kind: Any, in_hook: bool, world_size: int
) -> None:
    found = train(tmp_path, lambda: make_loader(kind), world_size=world_size, in_hook=in_hook)
    for step in zip(*found, strict=True):
        for _, _, images in step:
            assert list(Counter(LABELS[images].tolist()).values()) == [K] * P
        assert len({image for _, _, images in step for image in images}) == P * K * world_size
    assert found == planned(world_size)
    first, second = ([images for epoch, _, images in found[0] if epoch == which] for which in (0, 1))
    assert len(first) == len(second) == len(LABELS) // (P * K * world_size)
    assert first != second


@pytest.mark.parametrize("setting", [True, False])
def test_the_setting_that_leaves_samplers_alone_changes_nothing(tmp_path: Path, setting: bool) -> None:
    def run(folder: str) -> list[list[Entry]]:
        return train(tmp_path / folder, make_loader, world_size=2, use_distributed_sampler=setting)

    assert run("one") == run("two") == planned(2)


@pytest.mark.slow
def test_spawned_processes_draw_the_same_as_forked_ones(tmp_path: Path) -> None:
    assert train(tmp_path, make_loader, world_size=2, strategy="ddp_spawn") == planned(2)


def test_what_lightning_rebuilds_stays_at_the_place_of_the_sampler_that_was_given(tmp_path: Path) -> None:
    loader = make_loader()
    given: Any = loader.batch_sampler

    class GoTo(Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            used: Any = trainer.train_dataloader.batch_sampler  # type: ignore[union-attr]
            assert used is not given
            given.load_state_dict({"epoch": 0, "batch": 4, "plan": given.plan()})

    found = train(tmp_path, lambda: loader, GoTo(), world_size=2, epochs=1)
    expected = planned(2, epochs=1)
    assert [[images for *_, images in rank] for rank in found] == [[b for *_, b in rank[4:]] for rank in expected]


def test_where_lightning_cannot_rebuild_the_sampler_it_stops_and_does_not_stride(tmp_path: Path) -> None:
    loader = make_loader()
    for name in [name for name in vars(loader.batch_sampler) if name.startswith("__pl_")]:
        del vars(loader.batch_sampler)[name]
    with pytest.raises(Exception, match="batch_size"):
        train(tmp_path, lambda: loader, world_size=2)
    assert not (tmp_path / "0.json").exists()


# Resumed


def interrupt(folder: Path, make: Callable[[], Any], world_size: int, **arguments: Any) -> list[list[Entry]]:
    """Fit for three epochs with a checkpoint after every step and every epoch, and return what was written down."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    steps = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    epochs = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    try:
        written = train(folder, make, steps, epochs, world_size=world_size, epochs=3, **arguments)
    finally:
        logger.setLevel(level)  # this runs in a fixture of the module, and other modules listen
    assert written == planned(world_size, epochs=3)
    return written


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def interrupted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("interrupted")
    return request.param, folder, interrupt(folder, lambda: make_loader(ResumableDataLoader), request.param)


@pytest.mark.parametrize(("workers", "in_hook"), [(0, True), (2, False)], ids=["hook", "argument with workers"])
@pytest.mark.parametrize("at", ["step 3", "last step", "step in epoch 1", "epoch 0", "epoch 1"])
def test_a_resumed_run_goes_on_with_the_next_batch(
    interrupted: Any, tmp_path: Path, at: str, workers: int, in_hook: bool
) -> None:
    world_size, folder, whole = interrupted
    length = len(whole[0]) // 3
    file, done = {
        "step 3": ("step=3", 3),
        "last step": (f"step={length}", length),
        "step in epoch 1": (f"step={length + 2}", length + 2),
        "epoch 0": ("epoch=0", length),
        "epoch 1": ("epoch=1", 2 * length),
    }[at]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(not resumable|BatchCompositionGuard).*")
        found = train(
            tmp_path,
            lambda: make_loader(ResumableDataLoader, workers),
            BatchCompositionGuard(),
            world_size=world_size,
            in_hook=in_hook,
            ckpt=folder / f"{file}.ckpt",
            epochs=3,
        )
    assert found == [rank[done:] for rank in whole]


def test_under_max_steps_a_checkpoint_of_a_step_resumes_and_one_of_an_epoch_is_warned_of(tmp_path: Path) -> None:
    def make() -> DataLoader[Any]:
        return make_loader(ResumableDataLoader)

    def resume(name: str) -> list[list[Entry]]:
        ckpt = tmp_path / "whole" / f"{name}.ckpt"
        return train(tmp_path, make, BatchCompositionGuard(), ckpt=ckpt, epochs=3, max_steps=100)

    whole = interrupt(tmp_path / "whole", make, 1, max_steps=100)
    assert resume("step=4") == [rank[4:] for rank in whole]
    with pytest.warns(UserWarning, match="under max_steps, puts an epoch of one batch.*Set max_epochs"):
        found = resume("epoch=0")
    assert found != [rank[15:] for rank in whole]  # Lightning 2.6: once it is, the warning can go


@pytest.mark.parametrize(
    ("name", "workers", "message"),
    [
        ("step=4", 0, "middle of an epoch, and the loader begins that epoch anew.*ResumableDataLoader"),
        ("epoch=0", 2, "workers of the loader begin epoch 0 before .*ResumableDataLoader"),
        ("epoch=0", 0, ""),
    ],
)
def test_the_guard_says_when_a_plain_loader_loses_its_place(
    tmp_path: Path, name: str, workers: int, message: str
) -> None:
    whole = interrupt(tmp_path / "whole", make_loader, 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(
            tmp_path,
            lambda: make_loader(DataLoader, workers),
            BatchCompositionGuard(),
            ckpt=tmp_path / "whole" / f"{name}.ckpt",
            epochs=3,
        )
    said = "".join(str(w.message) for w in caught if "BatchCompositionGuard" in str(w.message))
    assert re.search(message, said) if message else not said
    lost = found != [rank[4 if name == "step=4" else 15 :] for rank in whole]
    assert lost == bool(message)


class KeepsCount(DataLoader[Any]):
    """A loader of somebody else that has a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": 3}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("Lightning 2.6 gives it none: once it does, the warning can go")


class Asks(Diary):
    """Wants to know the number of steps, so that Lightning sets its loaders up before it has read the checkpoint."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_the_guard_says_when_lightning_keeps_the_state_of_a_foreign_loader_back(tmp_path: Path) -> None:
    interrupt(tmp_path / "whole", lambda: make_loader(KeepsCount), 1)
    trainer = make_trainer(tmp_path, 1, BatchCompositionGuard(), epochs=3)
    with pytest.warns(UserWarning, match="not given the loader the state .*estimated_stepping_batches"):
        trainer.fit(Asks(tmp_path), make_loader(KeepsCount), ckpt_path=tmp_path / "whole" / "step=4.ckpt")


# Guarded


def guarded(folder: Path, make: Callable[[], Any], world_size: int = 1, **arguments: Any) -> BatchCompositionGuard:
    """Fit for an epoch with a guard, and return it."""
    guard = BatchCompositionGuard(**arguments)
    train(folder, make, guard, world_size=world_size, epochs=1)
    return guard


def m_per_class() -> DataLoader[Any]:
    sampler = MPerClassSampler(LABELS, K, P * K, length_before_new_iter=160)
    return DataLoader(IMAGES, P * K, sampler=sampler)


def test_a_foreign_sampler_of_one_process_passes(tmp_path: Path) -> None:
    guard = guarded(tmp_path, m_per_class, num_labels=P, images_per_label=K)
    assert (guard.checked, guard.mismatches) == (10, 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_sampler_that_lightning_strides_over_ranks_is_caught_with_the_remedy(tmp_path: Path, world_size: int) -> None:
    """peers.md 0.5: DistributedSamplerWrapper tears the batches of MPerClassSampler apart without a word."""
    message = (
        rf"labels with \d+( to \d+)? images each .*4 labels x 2 images.*out to {world_size} processes.*PKBatchSampler"
    )
    with pytest.raises(Exception, match=message):
        guarded(tmp_path, m_per_class, world_size, num_labels=P, images_per_label=K)
    assert not (tmp_path / "0.json").exists()


def test_a_number_of_images_alone_is_enough_to_catch_it(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="allowed: any number of labels x 2 images"):
        guarded(tmp_path, m_per_class, 2, images_per_label=K)


def test_a_warning_is_given_once_and_training_goes_on(tmp_path: Path) -> None:
    def shuffled() -> DataLoader[Any]:
        return DataLoader(IMAGES, P * K, shuffle=True)

    with pytest.warns(UserWarning, match=r"BatchCompositionGuard: training batch: got .*batch 0, rank 0") as caught:
        guard = guarded(tmp_path, shuffled, num_labels=P, images_per_label=K, on_mismatch="warn")
    assert sum("BatchCompositionGuard" in str(warning.message) for warning in caught) == 1
    assert guard.mismatches == guard.checked == 10


def test_labels_in_another_order_than_the_data_set_are_caught(tmp_path: Path) -> None:
    def make() -> DataLoader[Any]:
        shuffled = LABELS[torch.randperm(len(LABELS))]
        return DataLoader(
            TensorDataset(torch.arange(len(LABELS)), shuffled), batch_sampler=PKBatchSampler(LABELS, P, K)
        )

    with pytest.raises(BadData, match=r"labels are not those of the data set in the data set's order"):
        guarded(tmp_path, make)


@pytest.mark.parametrize("order", ["grouped", "interleaved"])
def test_an_order_that_the_collate_function_loses_is_caught(tmp_path: Path, order: Any) -> None:
    def make(lose: bool) -> DataLoader[Any]:
        def collate(items: list[Any]) -> Any:
            items = items[1:] + items[:1] if lose else items
            return torch.utils.data.default_collate(items)

        return DataLoader(IMAGES, batch_sampler=PKBatchSampler(LABELS, P, K, order=order), collate_fn=collate)

    assert guarded(tmp_path, lambda: make(False)).mismatches == 0
    if order == "grouped":
        with pytest.raises(BadData, match="right number of each, but not in grouped order"):
            guarded(tmp_path, lambda: make(True))
    else:  # every rotation of an interleaved batch is one
        assert guarded(tmp_path, lambda: make(True)).mismatches == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0, "world_size": 1}, r"rank, world_size: got \(0, 1\); allowed: \(., 2\), as the Trainer has it"),
        ({"rank": 0, "world_size": 2}, r"rank, world_size: got \(0, 2\); allowed: \(1, 2\)"),
        ({"seed": None}, r"PKBatchSampler: got {'seed': 1}; allowed: {'seed': 0} on rank 1"),
    ],
)
def test_ranks_that_do_not_share_a_plan_are_caught(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    def make() -> DataLoader[Any]:
        if "seed" in arguments:
            return make_loader(seed=torch.distributed.get_rank())
        return make_loader(**arguments)

    model = Diary(tmp_path, make)
    with pytest.raises(Exception, match=message):
        make_trainer(tmp_path, 2, BatchCompositionGuard()).fit(model)


def test_a_guard_counts_anew_in_every_fit_and_looks_at_the_first_batches_only(tmp_path: Path) -> None:
    guard = BatchCompositionGuard(first_batches=3)
    for _ in range(2):
        train(tmp_path, make_loader, guard)
        assert guard.checked == 3

    def spoiled_later() -> DataLoader[Any]:
        batches = list(PKBatchSampler(LABELS, P, K))
        return DataLoader(IMAGES, batch_sampler=[*batches[:3], [0, 1, 2]])

    late = BatchCompositionGuard(P, K, first_batches=3)
    train(tmp_path, spoiled_later, late, epochs=1)
    with pytest.raises(BadData, match=r"got '1 labels with 3 images each \(batch 3"):
        guarded(tmp_path, spoiled_later, num_labels=P, images_per_label=K, first_batches=4)


def test_a_guard_that_knows_no_numbers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match=r"num_labels, images_per_label: got \(None, None\); allowed: a number"):
        guarded(tmp_path, m_per_class)


@pytest.mark.parametrize(("name", "allowed"), [("num_labels", 4), ("images_per_label", 2)])
def test_numbers_that_contradict_the_sampler_are_refused(tmp_path: Path, name: str, allowed: int) -> None:
    with pytest.raises(FinetuneBNError, match=f"{name}: got 3; allowed: {allowed}, the sampler's, or null"):
        guarded(tmp_path, make_loader, **{name: 3})


def test_several_loaders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match="train_dataloader: got '2 loaders'; allowed: one"):
        guarded(tmp_path, lambda: [make_loader(), make_loader()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 0}, "num_labels: got 0"),
        ({"images_per_label": "2"}, "images_per_label: got '2'"),
        ({"first_batches": 0}, "first_batches: got 0; allowed: a whole number from 1 up"),
        ({"on_mismatch": "ignore"}, "on_mismatch: got 'ignore'; allowed: error, warn"),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        BatchCompositionGuard(**arguments)


# The two functions


@pytest.mark.parametrize(
    ("labels", "order", "violation"),
    [
        ([5, 5, 7, 7, 1, 1], None, ""),
        ([5, 7, 1, 5, 7, 1], None, ""),
        ([5, 5, 7, 7, 1, 1], "grouped", ""),
        ([5, 7, 1, 5, 7, 1], "interleaved", ""),
        ([5, 7, 1, 5, 7, 1], "grouped", "the right number of each, but not in grouped order"),
        ([5, 5, 7, 7, 1, 1], "interleaved", "the right number of each, but not in interleaved order"),
        ([5, 5, 7, 7], None, "2 labels with 2 images each"),
        ([5, 5, 5, 7, 7, 1], None, "3 labels with 1 to 3 images each"),
        ([5, 7, 1], None, "3 labels with 1 images each"),
        ([], None, "0 labels with 0 images each"),
    ],
)
def test_a_violation_is_told_in_numbers(labels: list[int], order: Any, violation: str) -> None:
    assert pk_violation(torch.tensor(labels), 3, 2, order) == violation


@pytest.mark.parametrize(
    ("labels", "p", "k", "right"),
    [
        ([1, 1, 2, 2], None, 2, True),
        ([1, 1, 2, 2], 2, None, True),
        ([1, 1, 2], 2, None, False),
        ([1, 2], None, 2, False),
    ],
)
def test_a_number_that_is_not_given_may_be_any(labels: list[int], p: Any, k: Any, right: bool) -> None:
    assert (pk_violation(torch.tensor(labels), p, k) == "") == right


X, Y = torch.zeros(3, 2), torch.tensor([4, 4, 9])


@pytest.mark.parametrize(
    ("batch", "where"),
    [
        ((X, Y), None),
        ([X, Y, X], None),
        ((Y, X), 0),
        ((X, X, Y), -1),
        ({"image": X, "target": Y}, None),
        ({"image": X, "labels": Y}, None),
        ({"image": X, "identity": Y}, "identity"),
    ],
)
def test_labels_are_found_at_the_usual_place_or_where_they_are_said_to_be(batch: Any, where: Any) -> None:
    assert torch.equal(labels_of(batch, where), Y)


def test_labels_that_are_words_are_numbered() -> None:
    assert labels_of((X, ("cat", "cat", "dog")), None).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("batch", "where"), [(X, None), ((X,), None), ((X, X), None), ({"image": X}, None), ((X, Y), 2), ({"y": Y}, "z")]
)
def test_a_batch_without_labels_is_refused(batch: Any, where: Any) -> None:
    with pytest.raises(BadData, match=r"training batch: got .*Say where they are: labels="):
        labels_of(batch, where)


# In a module that was not written for any of this


class Foreign(pl.LightningModule):
    """A plain LightningModule with a loss of pytorch-metric-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.loss = NTXentLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_foreign_module_gains_frozen_layers_and_whole_batches_by_two_callbacks_and_a_sampler(tmp_path: Path) -> None:
    model, guard = Foreign(), BatchCompositionGuard()
    before = model.net[0].weight.detach().clone()
    data = TensorDataset(torch.randn(len(LABELS), 3, 6, 6), LABELS)
    loader = DataLoader(data, batch_sampler=PKBatchSampler(LABELS, P, K))
    make_trainer(tmp_path, 1, BatchNormConversion(fbn.Freeze("shift")), guard, epochs=1).fit(model, loader)
    assert (guard.checked, guard.mismatches) == (10, 0)
    assert not torch.equal(model.net[0].weight, before)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())


# ---- how many images a step sees


class ModelParallelStrategy:
    """By its name one of Lightning's that ignores sync_batchnorm."""


class Several:
    """What is asked of a Trainer with several processes."""

    def __init__(self, batch: int, world_size: int = 8, strategy: object = None) -> None:
        self.world_size, self.strategy = world_size, strategy
        self.train_dataloader = DataLoader(TensorDataset(torch.zeros(64, 1)), batch)


def told(trainer: Several, net: nn.Module, caplog: pytest.LogCaptureFixture) -> tuple[list[str], str]:
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught, caplog.at_level("INFO", logger="lightning.pytorch"):
        warnings.simplefilter("always")
        warn_of_small_batches(trainer, net)  # type: ignore[arg-type]
    return [str(w.message) for w in caught if "BatchNorm" in str(w.message)], caplog.text


def test_a_config_for_one_device_run_on_eight_is_told_and_few_images_under_live_layers_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    live, frozen = nn.Sequential(nn.BatchNorm1d(1)), fbn.convert(nn.Sequential(nn.BatchNorm1d(1)), fbn.Freeze())
    trainer = Several(4)
    (warning,), text = told(trainer, live, caplog)
    assert "normalize by the 4 images of their own process, not by the 32 of all 8" in warning
    assert "set trainer.sync_batchnorm: true" in warning
    assert not text
    assert told(trainer, live, caplog) == ([], "")  # once a Trainer, whoever asks
    (warning,), _ = told(Several(4, strategy=ModelParallelStrategy()), live, caplog)
    assert "sync_batchnorm" not in warning
    for net, batch in ((live, 16), (frozen, 4)):
        warned, text = told(Several(batch), net, caplog)
        # Enough images for a batch statistic; but that of one process is what is saved.
        assert ["running statistics that are saved" in one for one in warned] == [True] * (net is live)
        assert f"8 processes with batches of {batch} images: {8 * batch} images a forward pass" in text
    assert told(Several(4, world_size=1), live, caplog) == ([], "")
