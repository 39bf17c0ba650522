"""The bound on an optimizer's step inside a Trainer."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, BatchNormSchedule, StepLimit
from finetune_bn.errors import FinetuneBNError


class Net(pl.LightningModule):
    """Writes down how far its convolution moved in each optimizer step, relative to its weights."""

    def __init__(self, lr: float = 0.3, fail_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        self.lr, self.fail_at = lr, fail_at
        self.moved: list[float] = []
        self.old: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == self.fail_at:
            raise ZeroDivisionError("in the training step")
        self.note()
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_train_end(self) -> None:
        self.note()

    def note(self) -> None:
        weight = self.net[0].weight.detach().clone().flatten(1)
        if self.old is not None:
            self.moved.append(float(((weight - self.old).norm(dim=1) / self.old.norm(dim=1)).max()))
        self.old = weight

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Two(Net):
    """One optimizer for the convolution, one for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.note()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=self.lr) for i in (0, 4)]


def fit(
    folder: Path,
    net: pl.LightningModule,
    *callbacks: pl.Callback,
    policy: fbn.Policy | None = None,
    ckpt_path: str | None = None,
    example_input: Any = None,
    **arguments: Any,
) -> pl.Trainer:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 3, 8, 8, generator=generator), torch.arange(24) % 2)
    settings: dict[str, Any] = {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder,
    }  # fmt: skip
    trainer = pl.Trainer(
        callbacks=[BatchNormConversion(policy, example_input=example_input), *callbacks], **settings | arguments
    )
    trainer.fit(net, DataLoader(data, 4), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_no_step_goes_further_than_the_limit(tmp_path: Path, arguments: dict[str, Any]) -> None:
    net, free = Net(), Net()
    fit(tmp_path, net, StepLimit(1e-3), **arguments)
    fit(tmp_path, free, **arguments)
    steps = [moved for moved in net.moved if moved]
    assert len(net.moved) == 6
    assert len(steps) == 6 // arguments.get("accumulate_grad_batches", 1)
    assert max(steps) == pytest.approx(1e-3, rel=1e-3)
    assert max(free.moved) > 0.01


def test_at_a_small_rate_the_training_is_that_without_it_to_the_last_bit(tmp_path: Path) -> None:
    nets = Net(1e-3), Net(1e-3)
    fit(tmp_path, nets[0], StepLimit(0.1))
    fit(tmp_path, nets[1])
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_share_of_channels_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = fit(tmp_path, Net(), StepLimit(1e-6), logger=logger, log_every_n_steps=1)
    assert float(trainer.callback_metrics["step_limit/share"]) == 1.0
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert metrics.read_text(encoding="utf-8").startswith("epoch,step,step_limit/share")


def test_behind_the_training_the_optimizer_is_free_again_and_a_second_fit_limits_once(tmp_path: Path) -> None:
    limit, net = StepLimit(1e-3), Net()
    for _ in range(2):
        trainer = fit(tmp_path, net, limit)
        assert limit.limits == []
        (optimizer,) = trainer.optimizers
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert max(net.moved) == pytest.approx(1e-3, rel=1e-3)


def test_an_error_in_the_training_takes_it_off_too(tmp_path: Path) -> None:
    limit = StepLimit()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Net(fail_at=2), limit)
    assert limit.limits == []


def test_of_several_optimizers_those_that_train_convolutions_are_limited(tmp_path: Path) -> None:
    net = Two()
    head = copy.deepcopy(net.net[4].weight.detach())
    fit(tmp_path, net, StepLimit(1e-3))
    assert max(net.moved) == pytest.approx(1e-3, rel=1e-3)
    assert (net.net[4].weight - head).norm() > 0.01 * head.norm()


class Grows(BaseFinetuning):
    """Trains the head first and adds the backbone to the optimizer later, as BackboneFinetuning and its kin do."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.net[:4])

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[:4], optimizer, lr=pl_module.lr)


class HeadFirst(Net):
    """Gives the optimizer what is trained at the start."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@pytest.mark.parametrize("first", [True, False])
def test_a_parameter_group_that_is_added_later_is_limited_and_a_head_alone_is_no_error(
    first: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Lightning-AI/pytorch-lightning#5706 and its kin: groups added by BackboneFinetuning are not what was there before.
    net, limit = HeadFirst(), StepLimit(1e-3)
    order = (limit, Grows()) if first else (Grows(), limit)
    with caplog.at_level("INFO"):
        trainer = fit(tmp_path, net, *order, max_epochs=3)
    assert len(trainer.optimizers[0].param_groups) == 2
    assert [moved > 0 for moved in net.moved] == [False] * 6 + [True] * 12
    assert max(net.moved) == pytest.approx(1e-3, rel=1e-3)
    assert "the optimizer trains no convolution yet" in caplog.text
    assert "steps of 1 of the 1 convolutions that the optimizer trains are bounded" in caplog.text


def test_convolutions_frozen_by_the_schedule_are_limited_from_then_on(tmp_path: Path) -> None:
    net, free = Net(), Net()
    schedule = BatchNormSchedule(0.5, fbn.Freeze("none"), recalibrate=False)
    fit(tmp_path, net, StepLimit(1e-4), schedule, policy=fbn.Keep(), max_epochs=2)
    fit(tmp_path, free, policy=fbn.Keep(), max_epochs=2)
    assert max(net.moved[6:]) == pytest.approx(1e-4, rel=1e-3)
    assert max(net.moved[:6]) > 1e-3  # a live layer takes no notice of the size of the weights before it


def test_the_example_input_of_the_conversion_tells_what_is_behind_a_convolution(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Forward(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    with caplog.at_level("INFO"):
        fit(tmp_path, Forward(), StepLimit(), example_input=[2, 3, 8, 8])
    assert "steps of 1 of the 1 convolutions that the optimizer trains are bounded (by running a probe" in caplog.text


def test_without_frozen_layers_it_warns_that_it_does_nothing_and_not_where_a_schedule_will_freeze_them(
    tmp_path: Path,
) -> None:
    with pytest.warns(
        UserWarning, match=r"StepLimit: no step is bounded: .* 1 convolutions that are trained \(net.0\)"
    ):
        fit(tmp_path, Net(), StepLimit(), policy=fbn.Keep())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule = BatchNormSchedule(0.5, recalibrate=False)
        fit(tmp_path, Net(), StepLimit(), schedule, policy=fbn.Keep())
    assert not any("StepLimit" in str(w.message) for w in caught)


def test_what_started_at_zero_is_free_after_resuming_too(tmp_path: Path) -> None:
    class Zero(Net):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.net[0].weight)

    limit = StepLimit(1e-3)
    trainer = fit(tmp_path, Zero(), limit, enable_checkpointing=True)
    resumed = StepLimit(1e-3)
    seen: list[tuple[str, ...]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(resumed.limits[0].free)

    fit(tmp_path, Zero(), resumed, Look(), max_epochs=2, ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert seen[-1] == ("net.0",)


def test_two_processes_take_the_same_steps(tmp_path: Path) -> None:
    net = Net()
    fit(tmp_path, net, StepLimit(1e-3), devices=2, strategy="ddp_fork", enable_checkpointing=True, max_epochs=2)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]["net.0.weight"].flatten(1)
    start = Net().net[0].weight.detach().flatten(1)
    assert 1e-3 < float(((trained - start).norm(dim=1) / start.norm(dim=1)).max()) < 1e-3 * 6 * 1.1


def test_a_ratio_out_of_range_is_refused_at_once() -> None:
    with pytest.raises(FinetuneBNError, match="ratio: got -1; allowed: a number above 0"):
        StepLimit(-1)
