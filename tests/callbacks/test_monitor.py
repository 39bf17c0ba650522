"""BatchNormMonitor with LightningModules that know nothing of it: it sees, it says, and it changes nothing."""

from __future__ import annotations

import csv
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks.batch_composition import BatchCompositionGuard
from finetune_bn.callbacks.conversion import BatchNormConversion
from finetune_bn.callbacks.monitor import BatchNormMonitor
from finetune_bn.errors import FinetuneBNError
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler
from tests.tools import assert_same_state

# What the monitor says is asked for where it matters.
pytestmark = pytest.mark.filterwarnings("ignore:BatchNormMonitor", "ignore:.*does not have many workers")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def images(labels: int = 40, each: int = 8, rho: float = 0.5, seed: int = 0, channels: int = 12) -> TensorDataset:
    """Return images whose channel means have this share of their variance between labels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    means = rho**0.5 * normal(labels, 1, channels) + (1 - rho) ** 0.5 * normal(labels, each, channels)
    x = means.flatten(0, 1)[..., None, None] + 0.5 * normal(labels * each, channels, 4, 4)
    return TensorDataset(x, torch.arange(labels).repeat_interleave(each))


def at_random(data: Dataset[Any] | None = None, batch: int = 16, seed: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data or images(), batch, shuffle=True, generator=generator, drop_last=True)


def grouped(p: int = 8, k: int = 4, **arguments: Any) -> DataLoader[Any]:
    data = images(**arguments)
    return DataLoader(data, batch_sampler=PKBatchSampler(data.tensors[1], p, k, seed=0))


class Foreign(pl.LightningModule):
    """A LightningModule as somebody else wrote it, with dropout."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True), nn.Conv2d(12, 8, 3), nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2),
        )  # fmt: skip
        self.head = nn.Linear(8, 300)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


def trainer(folder: Path, *callbacks: Callback, steps: int = 24, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    length = {"max_steps": steps, "enable_checkpointing": False}
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **quiet | length | kwargs)


def fit(
    folder: Path,
    monitor: BatchNormMonitor | None,
    loader: DataLoader[Any] | None = None,
    model: pl.LightningModule | None = None,
    policy: fbn.Policy | None = None,
    **kwargs: Any,
) -> pl.LightningModule:
    """Train, with this policy and this monitor, and return the module."""
    callbacks: list[Callback] = [BatchNormConversion(policy, watch_every_n_steps=0)] if policy else []
    model = model or Foreign()
    torch.manual_seed(1)
    trainer(folder, *callbacks, *([monitor] if monitor else []), **kwargs).fit(model, loader or at_random())
    return model


def said(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if str(w.message).startswith("BatchNormMonitor: ")]


# ---- it changes nothing


POLICIES: dict[str, fbn.Policy] = {
    "live": fbn.Keep(),
    "frozen": fbn.Freeze("merged"),
    "frozen with noise": fbn.Freeze("original", noise=16),
    "ghost": fbn.Ghost(2),
    "renorm": fbn.Renorm(bn_steps=4, ramp_steps=10),
    "stochastic": fbn.Stochastic(),
    "eval norm": fbn.EvalNorm(0.1),
}


@pytest.mark.parametrize("policy", list(POLICIES))
def test_weights_statistics_and_random_numbers_are_those_without_the_monitor_to_the_last_bit(
    tmp_path: Path, policy: str
) -> None:
    monitor = BatchNormMonitor(every_n_steps=3, leakage_every_n_looks=1)
    without = fit(tmp_path, None, policy=POLICIES[policy])
    drawn = torch.rand(3)
    watched = fit(tmp_path, monitor, policy=POLICIES[policy])
    assert torch.equal(torch.rand(3), drawn)
    assert_same_state(watched.state_dict(), without.state_dict())
    assert monitor.look is not None
    assert monitor.look.leakage is not None
    for module in watched.modules():
        assert not module._forward_pre_hooks
        assert "log" not in vars(module)


@pytest.mark.parametrize(
    "arguments",
    [{"accumulate_grad_batches": 3, "steps": 8}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}],
    ids=["accumulation", "autocast", "bfloat16"],
)
def test_nothing_changes_with_accumulated_gradients_and_in_any_precision(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    monitor = BatchNormMonitor(every_n_steps=3, leakage_every_n_looks=1)
    without, watched = (fit(tmp_path, m, **arguments) for m in (None, monitor))
    assert_same_state(watched.state_dict(), without.state_dict())
    assert monitor.look is not None
    assert monitor.look.train_eval_gap is not None
    assert monitor.causes.count("error") == 0


def test_nothing_changes_for_a_compiled_network(tmp_path: Path) -> None:
    def compiled() -> Foreign:
        model = Foreign()
        model.net.compile(backend="eager")
        return model

    torch.ones((), requires_grad=True).backward()  # before dynamo is there, or tests behind this one could not fork
    monitor = BatchNormMonitor(every_n_steps=3, leakage_every_n_looks=1)
    without, watched = (fit(tmp_path, m, model=compiled()) for m in (None, monitor))
    assert_same_state(watched.state_dict(), without.state_dict())
    assert monitor.look is not None
    assert [layer.name for layer in monitor.look.layers] == ["net.1", "net.4"]


def test_running_statistics_are_compared_as_they_were_before_the_training_step(tmp_path: Path) -> None:
    """With momentum 1 they are those of the batch itself behind it, and nothing would ever drift."""
    model, seen = Foreign(lr=0.0), []
    model.net[1].momentum = 1.0
    monitor = BatchNormMonitor(every_n_steps=1)

    class Watch(Callback):
        def on_train_batch_start(self, _: Any, __: Any, batch: Any, *args: Any) -> None:
            mean, var = model.net[1].running_mean.clone(), model.net[1].running_var.clone()
            x = model.net[0](batch[0]).detach()
            seen.append((x.mean((0, 2, 3)) - mean) / (var + 1e-5).sqrt())

    torch.manual_seed(1)
    trainer(tmp_path, Watch(), monitor, steps=5).fit(model, at_random())
    assert monitor.look is not None
    assert monitor.look.layers[0].drift == pytest.approx(float(seen[-1].square().mean().sqrt()), rel=1e-4)
    assert monitor.look.layers[0].drift > 0.05


# ---- when it looks


def steps_looked_at(folder: Path) -> list[int]:
    with (folder / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("bn/drift")]


def test_looks_are_logged_at_their_steps_to_every_logger_whatever_its_own_interval(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / name) for name in ("one", "two")]
    fit(tmp_path, BatchNormMonitor(every_n_steps=7), steps=40, logger=loggers, log_every_n_steps=10)
    for name in ("one", "two"):
        assert steps_looked_at(tmp_path / name) == [6, 13, 20, 27, 34]
    with (tmp_path / "one" / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row["loss"]) for row in rows) == 4  # what the module logs is logged as it was
    assert {"bn/drift_z", "bn/p_value", "bn/train_eval_gap", "bn_layers/drift/net.1"} <= rows[0].keys()


def test_the_first_look_is_early_and_steps_count_batches_when_gradients_are_accumulated(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(every_n_steps=24, leakage_every_n_looks=0)
    fit(tmp_path, monitor, steps=18, accumulate_grad_batches=2, logger=CSVLogger(tmp_path))
    assert steps_looked_at(tmp_path) == [5, 17]  # batches 12 and 36
    assert monitor.look is not None
    assert monitor.look.leakage is None


def test_leakage_is_tested_at_every_so_manyth_look(tmp_path: Path) -> None:
    monitor, found = BatchNormMonitor(every_n_steps=4, leakage_every_n_looks=2), []

    class Watch(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if monitor.look is not None and (not found or found[-1] is not monitor.look):
                found.append(monitor.look)

    trainer(tmp_path, monitor, Watch(), steps=20).fit(Foreign(), at_random())
    assert [look.leakage is not None for look in found] == [True, False, True, False, True]


@pytest.mark.parametrize(("batch", "tested"), [(24, [1, 2, 3, 4, 5, 6, 7]), (8, [1, 4, 7]), (5, [1, 6])])
def test_p_values_cost_no_more_than_a_pass_of_a_batch_a_look(tmp_path: Path, batch: int, tested: list[int]) -> None:
    monitor, found = BatchNormMonitor(every_n_steps=6, leakage_every_n_looks=0), {}

    class Watch(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            found[monitor._looks] = "bn/p_value" in monitor.metrics

    trainer(tmp_path, monitor, Watch(), steps=42).fit(Foreign(), at_random(batch=batch))
    assert [look for look, there in found.items() if there] == tested


def test_a_second_fit_begins_anew(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(every_n_steps=5)
    for _ in range(2):
        texts = said(lambda: fit(tmp_path, monitor, at_random(batch=4)))
        assert sum("fewer than 16" in text for text in texts) == 1
    assert monitor.causes.count("n_eff") == 1


# ---- what it finds


def test_batches_of_p_labels_times_k_images_are_found_and_each_cause_is_named_once(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(every_n_steps=12)
    texts = said(lambda: fit(tmp_path, monitor, grouped(8, 4, rho=0.6), steps=60, model=Foreign(lr=0.0)))
    assert {"n_eff", "p_value"} <= set(monitor.causes)
    assert len(texts) == len(set(monitor.causes)) == len(monitor.causes)
    assert any("DEFF" in text and "Freeze" in text for text in texts)
    assert not any("Ghost" in text for text in texts)  # ghost groups were no better than live layers in the study
    assert any("not i.i.d." in text for text in texts)
    first = monitor.look.layers[0] if monitor.look else None
    assert first is not None
    assert first.deff == pytest.approx(1 + (4 * 32 / 39 - 1) * 0.6, abs=0.35)
    assert monitor.metrics["bn/n_eff"] < 16


def test_the_same_images_in_random_batches_are_worth_their_number_and_nothing_is_said(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(every_n_steps=12)
    texts = said(lambda: fit(tmp_path, monitor, at_random(images(rho=0.6), 32), steps=60, model=Foreign(lr=0.0)))
    assert texts == []
    assert monitor.metrics["bn/deff"] == pytest.approx(1.0, abs=0.15)
    assert monitor.metrics["bn/n_eff"] == pytest.approx(32, rel=0.15)
    assert abs(monitor.metrics["bn/running_var_bias"]) < 0.05


def test_p_values_are_uniform_when_batches_are_drawn_at_random(tmp_path: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    monitor = BatchNormMonitor(every_n_steps=12, leakage_every_n_looks=0, per_layer=False)
    data = images(labels=300, each=4, rho=0.5)
    fit(tmp_path, monitor, at_random(data, 24), steps=12 * 100, model=Foreign(lr=1e-3))
    assert len(monitor._p_values) == 100
    assert stats.kstest(monitor._p_values, "uniform").pvalue > 0.05
    assert "p_value" not in monitor.causes


def test_p_values_are_below_a_hundredth_for_8_labels_times_4_images_with_rho_3_tenths(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(every_n_steps=12, leakage_every_n_looks=0)
    fit(tmp_path, monitor, grouped(8, 4, labels=200, rho=0.3, channels=12), steps=60, model=Foreign(lr=1e-3))
    assert len(monitor._p_values) == 5
    assert np.median(monitor._p_values) < 0.01
    assert monitor.look is not None
    assert monitor.look.p_value_so_far is not None
    assert monitor.look.p_value_so_far < 0.001
    assert "p_value" in monitor.causes


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_nothing_leaks_through_frozen_layers_to_the_last_bit_and_nothing_is_said(tmp_path: Path, affine: Any) -> None:
    monitor = BatchNormMonitor(every_n_steps=4, leakage_every_n_looks=1)
    policy = fbn.Freeze(affine)
    texts = said(lambda: fit(tmp_path, monitor, grouped(4, 2), policy=policy, model=Foreign(lr=1e-3)))
    assert texts == []
    assert monitor.metrics["bn/leakage"] == monitor.metrics["bn/train_eval_gap"] == 0.0
    assert "bn/p_value" not in monitor.metrics
    assert monitor.metrics["bn/drift"] > 0


def test_layers_in_eval_mode_leak_nothing_either(tmp_path: Path) -> None:
    class NormEval(Foreign):
        def on_train_epoch_start(self) -> None:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    monitor = BatchNormMonitor(every_n_steps=4, leakage_every_n_looks=1)
    assert said(lambda: fit(tmp_path, monitor, grouped(4, 2), NormEval(lr=1e-3))) == []
    assert monitor.metrics["bn/leakage"] == monitor.metrics["bn/train_eval_gap"] == 0.0


def test_leakage_of_live_layers_is_found(tmp_path: Path) -> None:
    monitor = BatchNormMonitor(every_n_steps=4, leakage_every_n_looks=1)
    texts = said(lambda: fit(tmp_path, monitor, at_random(batch=4), Foreign(lr=0.0)))
    assert monitor.metrics["bn/leakage"] > 0.1
    assert any("worth fewer than 16" in text and "larger batches" in text for text in texts)


def test_channels_that_die_are_found(tmp_path: Path) -> None:
    class Dying(Foreign):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:
                with torch.no_grad():
                    self.net[3].weight[:4] = 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.head.parameters(), lr=0.01)

    for interval, expected in ((9, 0), (2, 1)):  # without variance once, after one step, is not yet dead
        monitor = BatchNormMonitor(every_n_steps=interval)
        texts = said(lambda m=monitor: fit(tmp_path, m, at_random(batch=32), Dying(), fbn.Freeze(), steps=10))
        assert len(texts) == expected
        assert monitor.metrics["bn/dead"] == 4
    assert "4 of 8 channels of net.4 have lost their variance" in texts[0]
    assert monitor.metrics["bn/died"] == 4


def test_batches_with_one_value_a_channel_are_counted(tmp_path: Path) -> None:
    class Ones(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.neck = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.neck(self.net(x)))

    data = DataLoader(images(), batch_sampler=[[i, i + 1] if i % 5 else [i] for i in range(20)])
    monitor = BatchNormMonitor(every_n_steps=10)
    texts = said(lambda: fit(tmp_path, monitor, data, Ones(), fbn.Renorm(), steps=20))
    assert monitor.metrics["bn/single_value_batches"] == 4
    assert any("one value a channel" in text for text in texts)


# ---- whatever module it is


class Dictionary(Foreign):
    """Batches are dictionaries."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch["pixels"]), batch["target"])


class Inner(Foreign):
    """Calls a part in its training step, and normalizes the images there."""

    forward = pl.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.net((batch[0] - 3) / 2)), batch[1])


class TwoViews(Foreign):
    """Calls its network with twice as many images as there are labels."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(torch.cat([batch[0], batch[0].flip(3)])), batch[1].repeat(2))


class Manual(Foreign):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Chatty(Foreign):
    """Logs in its forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.log("spread", y.std())
        return y


def dictionaries() -> DataLoader[Any]:
    data = images()
    return DataLoader([{"pixels": x, "target": y} for x, y in data], 16)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [Foreign, Dictionary, Inner, TwoViews, Manual, Chatty])
def test_modules_of_all_kinds_are_watched_and_left_as_they_are(tmp_path: Path, kind: type[Foreign]) -> None:
    def loader() -> DataLoader[Any]:
        return dictionaries() if kind is Dictionary else at_random()

    monitor = BatchNormMonitor(every_n_steps=4, leakage_every_n_looks=1)
    without, watched = (fit(tmp_path, m, loader(), kind()) for m in (None, monitor))
    assert_same_state(watched.state_dict(), without.state_dict())
    assert monitor.look is not None
    assert [layer.name for layer in monitor.look.layers] == ["net.1", "net.4"]
    assert monitor.look.images == (32 if kind is TwoViews else 16)
    assert "error" not in monitor.causes
    assert monitor.look.train_eval_gap is not None
    assert ("bn/deff" in monitor.metrics) == (kind is not TwoViews)


def test_what_the_training_step_does_to_the_images_is_part_of_what_is_seen(tmp_path: Path) -> None:
    """Shown the images of the batch instead, statistics that fit would seem off."""

    class Scaled(Inner):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.head(self.net(100 * batch[0])), batch[1])

    found = {}
    for kind in (Inner, Scaled):
        monitor = BatchNormMonitor(every_n_steps=1)
        fit(tmp_path, monitor, model=kind(lr=0.0), steps=1)
        found[kind] = monitor.metrics["bn_layers/log_var_ratio/net.1"]
    assert found[Scaled] > found[Inner] + 5


def test_names_as_labels_are_numbered_alike_in_all_batches(tmp_path: Path) -> None:
    """Numbered batch by batch, the labels of P x K batches would always be 0 to P - 1."""

    class Named(Dataset[Any]):
        def __init__(self) -> None:
            self.data = images()

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> Any:
            return self.data[index][0], f"label {int(self.data[index][1])}"

    class Names(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

    sampler = PKBatchSampler(images().tensors[1], 8, 4, seed=0)
    monitor = BatchNormMonitor(every_n_steps=12)
    fit(tmp_path, monitor, DataLoader(Named(), batch_sampler=sampler), Names())
    assert monitor.look is not None
    assert monitor.look.labels > 30
    assert monitor.metrics["bn/deff"] > 1.3


def test_without_labels_there_is_no_deff_and_where_they_should_be_and_are_not_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unlabeled(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0]).square().mean()

    data = TensorDataset(images().tensors[0])
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        monitor = BatchNormMonitor(every_n_steps=4)
        fit(tmp_path, monitor, DataLoader(data, 16), Unlabeled())
    assert "bn/deff" not in monitor.metrics
    assert monitor.metrics["bn/drift"] > 0
    told = [record.getMessage() for record in caplog.records if "BatchNormMonitor" in record.getMessage()]
    assert sum("no labels in the batch: tell where they are by labels=" in text for text in told) == 1
    assert sum("looks at 2 BatchNorm layers of Unlabeled every 4 batches" in text for text in told) == 1
    with pytest.raises(FinetuneBNError, match="labels: got 'class'; allowed: where a training batch holds one label"):
        fit(tmp_path, BatchNormMonitor(every_n_steps=4, labels="class"), dictionaries(), Dictionary())


def test_a_model_without_batch_norm_is_said_so_once_and_trained(tmp_path: Path) -> None:
    class Without(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))

    monitor = BatchNormMonitor(every_n_steps=2)
    texts = said(lambda: fit(tmp_path, monitor, model=Without()))
    assert texts == ["BatchNormMonitor: there are no BatchNorm layers in Without, so nothing is monitored."]
    assert monitor.look is None


def test_a_part_is_watched_by_its_path_and_layers_that_are_not_called_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Two(Foreign):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Sequential(nn.Conv2d(12, 4, 1), nn.BatchNorm2d(4), nn.Flatten())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.teacher(batch[0])
            return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    seen = {}
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        for path in (None, "teacher"):
            monitor = BatchNormMonitor(every_n_steps=4, module=path)
            fit(tmp_path, monitor, model=Two())
            assert monitor.look is not None
            seen[path] = [layer.name for layer in monitor.look.layers]
    assert seen == {None: ["net.1", "net.4"], "teacher": ["1"]}
    assert "left alone: teacher.1 (not called with a row an image)" in caplog.text
    with pytest.raises(FinetuneBNError, match="module: got 'backbone'"):
        fit(tmp_path, BatchNormMonitor(module="backbone"))


def test_a_network_that_is_never_called_is_said_so_once(tmp_path: Path) -> None:
    class Idle(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.head(batch[0].mean((2, 3))[:, :8]).square().mean()

    monitor = BatchNormMonitor(every_n_steps=2)
    texts = said(lambda: fit(tmp_path, monitor, model=Idle()))
    assert len(texts) == 1
    assert "did not call the network" in texts[0]
    assert "module=" in texts[0]


def test_a_network_that_fails_in_eval_mode_is_trained_all_the_same(tmp_path: Path) -> None:
    class Picky(Foreign):
        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("needs targets")
            return super().forward(x)

    monitor = BatchNormMonitor(every_n_steps=2)
    texts: list[str] = []
    watched: list[pl.LightningModule] = []
    texts = said(lambda: watched.append(fit(tmp_path, monitor, model=Picky())))
    assert texts == ["BatchNormMonitor: a look failed, and there will be no more: RuntimeError: needs targets."]
    assert_same_state(watched[0].state_dict(), fit(tmp_path, None, model=Picky()).state_dict())
    assert not any(module._forward_pre_hooks for module in watched[0].modules())


def test_an_error_in_the_training_leaves_no_hook(tmp_path: Path) -> None:
    class Fails(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, BatchNormMonitor(every_n_steps=1), model=model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batches_of_one_image_and_a_shorter_last_one_are_looked_at(tmp_path: Path) -> None:
    for batch, steps in ((1, 24), (7, 100)):
        monitor = BatchNormMonitor(every_n_steps=1, leakage_every_n_looks=1)
        fit(tmp_path, monitor, DataLoader(images(), batch), steps=steps)
        assert "error" not in monitor.causes
        assert monitor.look is not None
        assert all(math.isfinite(value) for value in monitor.metrics.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps: got 0; allowed: a whole number from 1 up"),
        ({"every_n_steps": 2.5}, "every_n_steps: got 2.5"),
        ({"leakage_every_n_looks": -1}, "leakage_every_n_looks: got -1; allowed: a whole number from 0 up"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        BatchNormMonitor(**arguments)


# ---- together with others


def test_several_processes_train_as_without_it_and_the_first_one_logs(tmp_path: Path) -> None:
    states = []
    for monitor in (None, BatchNormMonitor(every_n_steps=4, leakage_every_n_looks=1)):
        folder = tmp_path / str(monitor is not None)
        data = images()
        loader = DataLoader(data, batch_sampler=PKBatchSampler(data.tensors[1], 4, 2, seed=0))
        fit(
            folder, monitor, loader, steps=12, devices=2, strategy="ddp_fork", max_epochs=4,
            logger=CSVLogger(folder, flush_logs_every_n_steps=1), enable_checkpointing=True,
        )  # fmt: skip
        (checkpoint,) = (folder / "lightning_logs" / "version_0" / "checkpoints").glob("*.ckpt")
        states.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert_same_state(*states)
    assert steps_looked_at(tmp_path / "True") == [3, 7, 11]


class Plain(pl.LightningModule):
    """Metric learning with pytorch-metric-learning, as its examples write it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Conv2d(12, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
        self.embedder = nn.Sequential(nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8))
        self.loss = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.embedder(self.trunk(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("policy", [fbn.Freeze(), fbn.Keep()], ids=["frozen", "live"])
def test_a_foreign_module_gains_frozen_layers_p_x_k_batches_and_the_monitor(tmp_path: Path, policy: Any) -> None:
    data = images(rho=0.6)
    loader = DataLoader(data, batch_sampler=PKBatchSampler(data.tensors[1], 8, 4, seed=0))
    monitor, guard = BatchNormMonitor(every_n_steps=12, leakage_every_n_looks=1), BatchCompositionGuard()
    texts = said(lambda: trainer(tmp_path, BatchNormConversion(policy), monitor, guard, steps=36).fit(Plain(), loader))
    assert guard.mismatches == 0
    assert monitor.look is not None
    assert [layer.name for layer in monitor.look.layers] == ["trunk.1", "embedder.0"]
    if isinstance(policy, fbn.Freeze):
        assert texts == []
        assert monitor.metrics["bn/leakage"] == 0.0
    else:
        assert {"n_eff", "p_value"} <= set(monitor.causes)
        assert monitor.metrics["bn/leakage"] > 0.1


def test_layers_that_are_frozen_in_the_middle_of_the_training_are_seen_as_such(tmp_path: Path) -> None:
    class Freezes(Callback):
        def on_train_batch_start(self, trainer: Any, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
            if batch_idx == 10:
                fbn.convert(module, fbn.Freeze("original"))

    monitor, live = BatchNormMonitor(every_n_steps=6), []

    class Watch(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if monitor.look is not None:
                live.append(any(layer.by_batch for layer in monitor.look.layers))

    trainer(tmp_path, Freezes(), monitor, Watch(), steps=18).fit(Foreign(), at_random())
    assert live[0]
    assert not live[-1]


class Fails(Foreign):
    """Raises in a pass that is none of the training, in the mode asked for."""

    mode = ""

    def forward(self, x: Tensor) -> Tensor:
        live = any(m.training for m in self.modules() if isinstance(m, nn.BatchNorm2d))
        if not torch.is_grad_enabled() and self.mode and live == (self.mode == "train"):
            raise RuntimeError("on this process alone")
        return super().forward(x)


@pytest.mark.parametrize(("here", "decisions"), [("eval", [True, False]), ("train", [True, True, False])])
def test_beside_synchronized_layers_a_look_that_fails_in_one_process_makes_as_many_decisions_as_the_others(
    here: str, decisions: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What one process says last is what all hear, so none is left waiting in a pass that the other does not make.
    made: list[list[bool]] = []
    for mode in (here, ""):
        said: list[bool] = []
        script = [True] * (len(decisions) - 1) + [False] if mode == "" else None

        class Module(Fails):
            pass

        Module.mode = mode

        class Watched(BatchNormMonitor):
            def on_train_start(self, *args: Any) -> None:
                super().on_train_start(*args)
                self._synchronized = True

        def reduce(self: Any, mine: bool, all: bool = True, said: Any = said, script: Any = script) -> bool:
            said.append(mine)
            return mine if script is None else script[len(said) - 1]

        monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce_boolean_decision", reduce)
        monitor = Watched(every_n_steps=1, leakage_every_n_looks=0)
        with pytest.warns(UserWarning, match="a look failed, and there will be no more"):
            trainer(tmp_path, monitor, steps=4).fit(Module(), at_random())
        made.append(said)
    assert made[0] == decisions
    assert len(made[1]) == len(made[0])
