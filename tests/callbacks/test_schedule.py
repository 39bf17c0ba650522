"""BatchNormSchedule: live layers, then frozen ones, in one training, and what is kept across the switch."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, BatchNormSchedule
from finetune_bn.callbacks.schedule import momentum_rule
from finetune_bn.errors import BadData, FinetuneBNError, NoBatchNormMatched, UnsupportedLayer
from finetune_bn.layers import FrozenBatchNorm

STEPS = 6  # of an epoch


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def images(n: int = 24, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return TensorDataset(2 + torch.randn(n, 3, 6, 6, generator=generator) + labels[:, None, None, None], labels)


def loader(n: int = 24, batch: int = 4) -> DataLoader[Any]:
    return DataLoader(images(n), batch)


class Foreign(pl.LightningModule):
    """A LightningModule as somebody else wrote it, with weight decay and a schedule of the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5, momentum=0.2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
        )  # fmt: skip
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)}


class Diary(Callback):
    """Writes down what the layers are at each training batch."""

    def __init__(self) -> None:
        self.frozen: list[bool] = []
        self.statistics: list[dict[str, Tensor]] = []
        self.momenta: list[list[float | None]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.frozen.append(bool(frozen(pl_module)))
        self.statistics.append(statistics(pl_module))
        self.momenta.append([m.momentum for m in pl_module.modules() if isinstance(m, _BatchNorm)])


class Until(Callback):
    """Ends the training behind a step, of which the schedule knows nothing."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def trainer(folder: Path, *callbacks: Callback, epochs: int = 3, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        quiet["enable_checkpointing"] = False
    return pl.Trainer(max_epochs=epochs, default_root_dir=folder, callbacks=list(callbacks), **quiet | kwargs)


def frozen(module: nn.Module) -> list[FrozenBatchNorm]:
    return [m for m in module.modules() if isinstance(m, FrozenBatchNorm)]


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items() if "running" in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def third(policy: Any = None, **kwargs: Any) -> BatchNormSchedule:
    """Return a schedule that freezes for the last of three epochs."""
    return BatchNormSchedule(1 / 3, policy, **kwargs)


# ---- when


@pytest.mark.parametrize(
    ("fraction", "limits", "live"),
    [
        (1 / 3, {"epochs": 3}, 12),
        (0.5, {"epochs": 3}, 9),
        (0.2, {"epochs": 5}, 24),
        (0.2, {"epochs": 2, "limit_train_batches": 5}, 8),
        (0.25, {"epochs": -1, "max_steps": 8}, 6),
        (0.25, {"epochs": 100, "max_steps": 8}, 6),
        (0.5, {"epochs": 1, "max_steps": 100}, 3),
        # Eight batches are four steps; the third batch of a step is none to begin with.
        (0.5, {"epochs": 1, "limit_train_batches": 6, "accumulate_grad_batches": 2}, 4),
    ],
)
def test_the_last_part_of_the_training_has_frozen_layers(
    fraction: float, limits: dict[str, Any], live: int, tmp_path: Path
) -> None:
    diary, schedule = Diary(), BatchNormSchedule(fraction)
    trainer(tmp_path, schedule, diary, **limits).fit(Foreign(), loader())
    assert diary.frozen.count(False) == live
    assert diary.frozen == sorted(diary.frozen)
    assert schedule.frozen


def test_statistics_move_until_the_switch_and_not_behind_it(tmp_path: Path) -> None:
    diary, model = Diary(), Foreign()
    trainer(tmp_path, third(), diary).fit(model, loader(), loader())
    live, behind = diary.statistics[: 2 * STEPS], diary.statistics[2 * STEPS :]
    assert all(not same(a, b) for a, b in pairwise(live))
    assert len(behind) == STEPS
    assert all(same(a, behind[0]) for a in behind)


def test_what_is_frozen_are_the_statistics_of_all_training_images_under_the_weights_of_the_switch(
    tmp_path: Path,
) -> None:
    plain, model, schedule = Foreign(), Foreign(), third()
    trainer(tmp_path, max_steps=2 * STEPS).fit(plain, loader())
    fbn.recalibrate(plain, [images().tensors[0]])
    trainer(tmp_path, schedule).fit(model, loader())
    for name, value in statistics(plain).items():
        torch.testing.assert_close(statistics(model)[name], value, rtol=1e-4, atol=1e-5)
    assert schedule.record is not None
    assert schedule.record.images == 24


def test_without_recalibration_the_running_statistics_are_frozen_as_they_are(tmp_path: Path) -> None:
    plain, model, schedule = Foreign(), Foreign(), third(recalibrate=False)
    trainer(tmp_path, max_steps=2 * STEPS).fit(plain, loader())
    trainer(tmp_path, schedule).fit(model, loader())
    assert same(statistics(model), statistics(plain))
    assert schedule.record is None


def test_other_images_can_be_taken_for_the_statistics(tmp_path: Path) -> None:
    other, plain, model = images(16, seed=8), Foreign(), Foreign()
    trainer(tmp_path, max_steps=2 * STEPS).fit(plain, loader())
    fbn.recalibrate(plain, [other.tensors[0]])
    trainer(tmp_path, third(data=DataLoader(other, 4))).fit(model, loader())
    for name, value in statistics(plain).items():
        torch.testing.assert_close(statistics(model)[name], value, rtol=1e-4, atol=1e-5)


def test_a_decision_of_ones_own_can_be_made_in_a_subclass(tmp_path: Path) -> None:
    class AtFour(BatchNormSchedule):
        def should_freeze(self, trainer: pl.Trainer, batch_idx: int) -> bool:
            return trainer.global_step >= 4

    diary = Diary()
    trainer(tmp_path, AtFour(), diary).fit(Foreign(), loader())
    assert diary.frozen.count(False) == 4


# ---- what is kept


class ZeroGrad(Foreign):
    """Fills gradients with zeros; by a gradient of zero AdamW still decays and follows its momentum."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("kind", [Foreign, ZeroGrad])
@pytest.mark.parametrize("affine", ["original", "shift", "none"])
def test_optimizer_and_learning_rate_go_on_and_what_is_constant_is_decayed_no_more(
    affine: Any, kind: type[Foreign], tmp_path: Path
) -> None:
    class Looks(Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                parameters = dict(pl_module.named_parameters())
                self.before = {k: (p, p.detach().clone()) for k, p in parameters.items()}
                self.optimizer = trainer.optimizers[0]

    model, looks = kind(), Looks()
    run = trainer(tmp_path, third(fbn.Freeze(affine)), looks)
    run.fit(model, loader())
    optimizer = run.optimizers[0]
    assert optimizer is looks.optimizer
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.7**3)
    now = dict(model.named_parameters())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    gone = {"original": (), "shift": ("weight",), "none": ("weight", "bias")}[affine]
    for name, (parameter, value) in looks.before.items():
        layer, _, tensor = name.rpartition(".")
        assert id(parameter) in held
        if layer in ("net.1", "net.4") and tensor in gone:
            assert name not in now
            assert torch.equal(model.state_dict()[name], value)
            assert torch.equal(parameter, value), "neither a step nor weight decay has moved it"
            assert int(optimizer.state[parameter]["step"]) == 2 * STEPS
        else:
            assert now[name] is parameter, "the very parameter that the optimizer knows"
            assert not torch.equal(parameter, value)
            assert int(optimizer.state[parameter]["step"]) == 3 * STEPS


def test_the_first_step_behind_the_switch_is_the_one_that_a_frozen_network_would_make(tmp_path: Path) -> None:
    model = Foreign()
    trainer(tmp_path, third(recalibrate=False), Until(2 * STEPS + 1)).fit(model, loader())
    by_hand = Foreign()
    run = trainer(tmp_path, max_steps=2 * STEPS)
    run.fit(by_hand, loader())
    optimizer = run.optimizers[0]
    fbn.convert(by_hand, fbn.Freeze("original"))
    x, y = next(iter(loader()))
    optimizer.zero_grad()
    F.cross_entropy(by_hand(x), y).backward()
    optimizer.step()
    assert same(dict(model.state_dict()), dict(by_hand.state_dict()))


@pytest.mark.parametrize("affine", ["original", "shift", "none"])
@pytest.mark.parametrize("at", [STEPS + 2, 2 * STEPS, 2 * STEPS + 3], ids=["before", "at", "behind"])
def test_crash_and_resume_on_either_side_of_the_switch_ends_where_the_uninterrupted_run_ends(
    at: int, affine: Any, tmp_path: Path
) -> None:
    def fit(name: str, ckpt: Path | None = None) -> tuple[Foreign, pl.Trainer]:
        model, schedule = Foreign(), third(fbn.Freeze(affine), momentum=0.3)
        keep = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        run = trainer(tmp_path, schedule, keep)
        run.fit(model, Resumable(images(), 4), ckpt_path=ckpt)
        return model, run

    whole, first = fit("whole")
    resumed, second = fit("resumed", tmp_path / "whole" / f"step={at}.ckpt")
    assert len(resumed.losses) == 3 * STEPS - at
    assert resumed.losses == whole.losses[at:]
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert len(frozen(resumed)) == 2
    for a, b in zip(*(run.optimizers[0].state_dict()["state"].values() for run in (first, second)), strict=True):
        assert same(a, b)


class Resumable(DataLoader[Any]):
    """Goes on with the next batch, as Lightning lets loaders do that have a state."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.done = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self.done % len(self)
        for number, batch in enumerate(super().__iter__()):
            if number >= start:
                self.done += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.done = state_dict["done"]


@pytest.mark.parametrize("affine", ["original", "none"])
def test_a_checkpoint_of_frozen_layers_loads_into_the_module_without_the_callback(affine: Any, tmp_path: Path) -> None:
    model = Foreign()
    keep = ModelCheckpoint(tmp_path, filename="saved")
    run = trainer(tmp_path, third(fbn.Freeze(affine)), keep)
    run.fit(model, loader())
    plain = Foreign.load_from_checkpoint(tmp_path / "saved.ckpt", weights_only=True)
    x = images().tensors[0]
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))
    best = Foreign()
    trainer(tmp_path, third(fbn.Freeze(affine))).validate(best, loader(), tmp_path / "saved.ckpt", verbose=False)
    torch.testing.assert_close(best.eval()(x), model.eval()(x))


def test_a_second_fit_in_the_same_process_goes_on_with_frozen_layers(tmp_path: Path) -> None:
    model, schedule = Foreign(), third()
    run = trainer(tmp_path, schedule)
    run.fit(model, loader())
    layers = frozen(model)
    run.fit_loop.max_epochs = 4
    run.fit(model, loader())
    assert run.global_step == 4 * STEPS
    assert schedule.frozen
    assert [id(m) for m in frozen(model)] == [id(m) for m in layers]


def test_a_callback_that_served_another_module_switches_the_next_one(tmp_path: Path) -> None:
    schedule = third()
    for _ in range(2):
        model, diary = Foreign(), Diary()
        trainer(tmp_path, schedule, diary).fit(model, loader())
        assert diary.frozen.count(False) == 2 * STEPS


# ---- which layers


def test_rules_freeze_some_layers_and_keep_others(tmp_path: Path) -> None:
    model = Foreign()
    rules = fbn.Rules([("net.1", fbn.Keep()), ("*", fbn.Freeze("shift"))])
    trainer(tmp_path, third(rules)).fit(model, loader())
    assert isinstance(model.net[1], nn.BatchNorm2d)
    assert model.net[4].affine_kind == "shift"


def test_only_the_layers_that_are_frozen_are_recalibrated(tmp_path: Path) -> None:
    plain, model = Foreign(), Foreign()
    rules = fbn.Rules([("net.1", fbn.Keep()), ("*", fbn.Freeze())])
    trainer(tmp_path, max_steps=2 * STEPS).fit(plain, loader())
    trainer(tmp_path, third(rules), Until(2 * STEPS + 1)).fit(model, loader())
    kept, moved = plain.net[1].running_mean, model.net[1].running_mean
    # One more batch with momentum 0.1, from the same statistics.
    batch = plain.net[0](next(iter(loader()))[0]).mean((0, 2, 3))
    torch.testing.assert_close(moved, 0.9 * kept + 0.1 * batch)


def test_layers_that_were_frozen_before_stay_as_they_are(tmp_path: Path) -> None:
    model = Foreign()
    rules = fbn.Rules([("net.1", fbn.Freeze("none")), ("*", fbn.Keep())])
    before = statistics(model)
    trainer(tmp_path, BatchNormConversion(rules), third(fbn.Freeze("original"))).fit(model, loader())
    assert [layer.affine_kind for layer in frozen(model)] == ["none", "original"]
    assert torch.equal(model.net[1].running_mean, before["net.1.running_mean"])


def test_a_part_can_be_named_for_modules_whose_steps_call_it(tmp_path: Path) -> None:
    class Wrapper(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Foreign()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.inner.training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    model = Wrapper()
    rules = fbn.Rules([("net.1", fbn.Freeze("shift")), ("*", fbn.Freeze())])
    trainer(tmp_path, third(rules, module="inner")).fit(model, loader())
    assert [layer.affine_kind for layer in frozen(model)] == ["shift", "none"]
    with pytest.raises(FinetuneBNError, match=r"module: got None; .*forward"):
        trainer(tmp_path, third()).fit(Wrapper(), loader())


@pytest.mark.parametrize("policy", [fbn.Ghost(2), fbn.FreezeAffine()], ids=str)
def test_layers_of_other_live_policies_are_switched_too(policy: fbn.Policy, tmp_path: Path) -> None:
    model = Foreign()
    trainer(tmp_path, BatchNormConversion(policy), third(fbn.Freeze("none"))).fit(model, loader())
    assert len(frozen(model)) == 2


def test_nothing_to_switch_is_an_error_before_the_training(tmp_path: Path) -> None:
    match = r"policy: got .*; allowed: a policy that applies to live BatchNorm layers .* Give it policy Keep"
    with pytest.raises(NoBatchNormMatched, match=match):
        trainer(tmp_path, BatchNormConversion(), third()).fit(Foreign(), loader())
    model = Foreign()
    model.net[1] = model.net[4] = nn.Identity()
    with pytest.raises(NoBatchNormMatched, match="a model with BatchNorm layers"):
        trainer(tmp_path, third()).fit(model, loader())


def test_a_layer_that_cannot_be_frozen_is_an_error_before_the_training(tmp_path: Path) -> None:
    model = Foreign()
    model.net[4] = nn.BatchNorm2d(5, track_running_stats=False)
    before = dict(copy.deepcopy(model.state_dict()))
    with pytest.raises(UnsupportedLayer, match=r"policy: 1 layers cannot take it: net\.4 has no running statistics"):
        trainer(tmp_path, third()).fit(model, loader())
    assert same(dict(model.state_dict()), before)


# ---- momentum


@pytest.mark.parametrize(("batches", "momentum"), [(1, 0.1), (99, 0.1), (100, 0.1), (200, 0.05), (5000, 0.002)])
def test_the_momentum_rule_is_that_of_kornblith_and_others(batches: int, momentum: float) -> None:
    assert momentum_rule(batches) == pytest.approx(momentum)
    assert 1 - momentum_rule(batches) == pytest.approx(max(1 - 10 / batches, 0.9))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_momentum_is_counted_in_forward_passes_and_given_back_behind_the_switch(
    accumulate: int, tmp_path: Path
) -> None:
    model, diary = Foreign(), Diary()
    schedule = BatchNormSchedule(0.2, fbn.Rules([("net.1", fbn.Freeze()), ("*", fbn.Keep())]), momentum="auto")
    limits = {"epochs": 1, "limit_train_batches": 125, "accumulate_grad_batches": accumulate}
    trainer(tmp_path, schedule, diary, **limits).fit(model, loader(125, batch=1))
    assert diary.momenta[0] == diary.momenta[99] == [0.08, 0.08]
    assert diary.momenta[100] == [0.2]
    assert model.net[1].momentum == 0.1
    assert model.net[4].momentum == 0.2


def test_a_momentum_of_ones_own_is_used_and_none_leaves_the_layers_alone(tmp_path: Path) -> None:
    for momentum, expected in ((0.01, [0.01, 0.01]), (None, [0.1, 0.2])):
        diary = Diary()
        trainer(tmp_path, third(momentum=momentum), diary).fit(Foreign(), loader())
        assert diary.momenta[0] == expected


def test_layers_that_average_cumulatively_keep_doing_so_and_that_is_said(tmp_path: Path) -> None:
    model, diary = Foreign(), Diary()
    model.net[4].momentum = None
    with pytest.warns(UserWarning, match=r"1 layers average cumulatively .*net\.4"):
        trainer(tmp_path, third(momentum="auto"), diary).fit(model, loader())
    assert diary.momenta[0] == [0.1, None]


def test_an_exception_gives_the_momentum_back(tmp_path: Path) -> None:
    class Breaks(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise RuntimeError("third party")

    model = Breaks()
    with pytest.raises(RuntimeError, match="third party"):
        trainer(tmp_path, third(momentum=0.01)).fit(model, loader())
    assert [m.momentum for m in model.modules() if isinstance(m, _BatchNorm)] == [0.1, 0.2]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from images()


def test_the_rule_needs_to_know_how_many_batches_an_epoch_has(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match="momentum: got 'auto'; allowed: a number, where nobody knows"):
        trainer(tmp_path, third(momentum="auto", recalibrate=False)).fit(Foreign(), DataLoader(Stream(), 4))


# ---- failures


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"frozen_fraction": 0}, "frozen_fraction: got 0; allowed: a number above 0, below 1"),
        (
            {"frozen_fraction": 1.0},
            "frozen_fraction: got 1.0; .* use BatchNormConversion|For 1 use BatchNormConversion",
        ),
        ({"policy": fbn.Freeze("merged")}, r"policy: got Freeze\(affine='merged'.*take original"),
        ({"policy": fbn.Rules([("*", fbn.FreezeAffine())])}, r"policy: got FreezeAffine\(\)"),
        ({"policy": fbn.Freeze}, "policy: got .*parentheses"),
        ({"momentum": "kornblith"}, "momentum: got 'kornblith'; allowed: a number above 0, at most 1, auto or None"),
        ({"momentum": 0}, "momentum: got 0"),
        ({"max_samples": 0}, "max_samples: got 0"),
        ({"recalibrate": False, "data": loader()}, "data: got 'DataLoader'; allowed: null with recalibrate=False"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(FinetuneBNError, match=match):
        BatchNormSchedule(**arguments)


def test_a_training_without_an_end_has_no_last_part(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match=r"allowed: a training that ends.*max_epochs or trainer\.max_steps"):
        trainer(tmp_path, third(), epochs=-1).fit(Foreign(), loader())


def test_a_recalibration_that_fails_at_the_switch_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    plain, model = Foreign(), Foreign()
    trainer(tmp_path, max_steps=2 * STEPS).fit(plain, loader())
    with pytest.raises(BadData, match="min_samples"):
        trainer(tmp_path, third(data=DataLoader(images(5), 4))).fit(model, loader())
    assert same(dict(model.state_dict()), dict(plain.state_dict()))
    assert not frozen(model)


def test_a_conversion_that_fails_at_the_switch_takes_the_new_statistics_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("third party")

    plain, model = Foreign(), Foreign()
    trainer(tmp_path, max_steps=2 * STEPS).fit(plain, loader())
    monkeypatch.setattr("finetune_bn.callbacks.schedule.convert", fail)
    with pytest.raises(RuntimeError, match="third party"):
        trainer(tmp_path, third()).fit(model, loader())
    assert same(dict(model.state_dict()), dict(plain.state_dict()))


# ---- beside weight averaging


def test_weight_averaging_pairs_the_parameters_across_the_switch(tmp_path: Path) -> None:
    model, average = Foreign(), WeightAveraging()
    keep = ModelCheckpoint(tmp_path, filename="saved")
    trainer(tmp_path, third(fbn.Freeze("original")), average, keep).fit(model, loader(), loader())
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    current = Foreign()
    current.load_state_dict(saved["current_model_state"])
    averaged = Foreign()
    averaged.load_state_dict(saved["state_dict"])
    by_hand = Foreign()
    trainer(tmp_path, third(fbn.Freeze("original"))).fit(by_hand, loader(), loader())
    assert same(dict(current.state_dict()), dict(by_hand.state_dict()))
    assert same(dict(averaged.state_dict()), dict(model.state_dict()))
    for name in ("net.1.weight", "net.4.running_var"):
        assert (averaged.state_dict()[name] > 0).all()


@pytest.mark.parametrize("average", [WeightAveraging, lambda: StochasticWeightAveraging(0.01)])
@pytest.mark.parametrize("affine", ["none", "shift"])
def test_parameters_that_leave_the_network_are_refused_beside_weight_averaging(
    affine: Any, average: Any, tmp_path: Path
) -> None:
    with pytest.raises(FinetuneBNError, match=r"allowed: Freeze\('original'\) beside weight averaging"):
        trainer(tmp_path, third(fbn.Freeze(affine)), average()).fit(Foreign(), loader())


# ---- several processes


class PerRank(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {name: value.double().sum().item() for name, value in statistics(pl_module).items()}
        state = {"statistics": found, "frozen": len(frozen(pl_module)), "steps": trainer.global_step}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("affine", "recalibrate", "strategy"),
    [
        ("original", True, "ddp_fork"),
        ("original", False, DDPStrategy(start_method="fork", broadcast_buffers=False)),
        ("shift", True, "ddp_fork_find_unused_parameters_true"),
        ("none", True, "ddp_fork_find_unused_parameters_true"),
    ],
)
def test_two_processes_freeze_the_same_statistics_and_train_on(
    affine: Any, recalibrate: bool, strategy: Any, tmp_path: Path
) -> None:
    model, schedule = Foreign(), third(fbn.Freeze(affine), recalibrate=recalibrate)
    trainer(tmp_path, schedule, PerRank(tmp_path), strategy=strategy, devices=2).fit(model, loader())
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["frozen"] == 2
    assert first["steps"] == 3 * STEPS // 2


@pytest.mark.parametrize(("affine", "name"), [("none", "weight|bias"), ("shift", "weight")])
def test_processes_that_wait_for_gradients_of_what_leaves_are_an_error_before_the_training(
    affine: Any, name: str, tmp_path: Path
) -> None:
    match = rf"policy.affine: got '{affine}'; allowed: original, or .*ddp_find_unused_parameters_true.*({name}) gets no"
    # Two processes, also because Lightning's ddp on one device would leave this process with other thread settings.
    with pytest.raises(ProcessRaisedException, match=match):
        trainer(tmp_path, third(fbn.Freeze(affine)), strategy="ddp_fork", devices=2).fit(Foreign(), loader())


# A training that ends before the switch


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("early stop", {"epochs": 5}),
        ("fast_dev_run", {"fast_dev_run": 1}),
        ("few batches", {"epochs": 1, "limit_train_batches": 2}),
    ],
)
def test_a_training_that_ends_before_the_switch_says_that_its_layers_are_live(
    kind: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    callbacks: list[Callback] = [third(recalibrate=False)]
    if kind == "early stop":
        callbacks.append(Until(1))
    with pytest.warns(UserWarning, match=r"ended at step \d+ with live BatchNorm layers.*for its last 33%"):
        trainer(tmp_path, *callbacks, **arguments).fit(Foreign(), loader())


def test_a_training_that_was_frozen_says_nothing_of_the_kind(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, third(recalibrate=False)).fit(Foreign(), loader())
    assert not any("with live BatchNorm" in str(w.message) for w in caught)
