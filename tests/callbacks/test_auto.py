"""policy auto: compared once, then trained, saved, resumed and loaded as decided; or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, StepLimit, replay
from finetune_bn.callbacks import auto as auto_module
from finetune_bn.callbacks import conversion as conversion_module
from finetune_bn.callbacks.auto import Chosen
from finetune_bn.callbacks.decision import Decision
from finetune_bn.callbacks.short_runs import Squeezed
from finetune_bn.comparison import running
from finetune_bn.comparison.arms import ARMS
from finetune_bn.comparison.budget import BUDGETS, Speed
from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers.frozen import FrozenBatchNorm
from tests.comparison.conftest import pictures
from tests.models import Plain, settle


class Foreign(pl.LightningModule):
    """A LightningModule as somebody else wrote it."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.net = settle(Plain())
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:
        self.steps += 1
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return {"loss": loss}

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Replaying(Foreign):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        replay(checkpoint, self)


def loaders() -> tuple[Any, Any]:
    train, val = (TensorDataset(*pictures(number, seed)) for number, seed in ((24, 0), (18, 1)))
    return DataLoader(train, batch_size=8, shuffle=True), DataLoader(val, batch_size=9)


def fit(folder: Path, module: pl.LightningModule, conversion: BatchNormConversion, *more: Any, **options: Any) -> Any:
    """Train for an epoch and return the Trainer."""
    watch = ModelCheckpoint(monitor="val_accuracy", mode="max", save_last=True)
    given: dict[str, Any] = {"callbacks": [conversion, *more, watch], "max_epochs": 1, **options}
    given |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(default_root_dir=folder, **given)
    trainer.fit(module, *loaders())
    return trainer


def last(trainer: pl.Trainer) -> str:
    return str(trainer.checkpoint_callback.last_model_path)  # type: ignore[union-attr]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a comparison take trainings of two steps."""
    monkeypatch.setattr(running, "measure_speed", lambda *_: Speed(1.0, 0.0))
    budget = dataclasses.replace(BUDGETS["fast"], minutes=0.25, most=2, factors=(1.0,))
    monkeypatch.setitem(BUDGETS, "fast", budget)


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that fixes what is decided, and counts how often it was asked for."""
    asked: list[str] = []

    def fix(arm: str, lr: float | None = 0.02) -> list[str]:
        def decide(*_: Any) -> Chosen:
            asked.append(arm)
            return Chosen(Decision.of(ARMS[arm], lr, "fast", "because"), None, None)  # type: ignore[arg-type]

        monkeypatch.setattr(conversion_module, "decide", decide)
        return asked

    return fix


@pytest.mark.usefixtures("quick")
def test_a_foreign_module_is_diagnosed_compared_then_trained_with_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diagnosed: list[Any] = []
    genuine = auto_module.diagnose
    monkeypatch.setattr(auto_module, "diagnose", lambda *a, **k: diagnosed.append(genuine(*a, **k)) or diagnosed[-1])
    module, conversion = Foreign(), BatchNormConversion("auto")
    start = copy.deepcopy(module.state_dict())
    copies: list[float] = []
    untouched = Foreign.configure_optimizers

    def watched(self: Foreign) -> Any:
        if self is module:
            copies.append(self.steps)
            assert all(
                torch.equal(value, start[name]) for name, value in self.state_dict().items() if "num_b" not in name
            )
        return untouched(self)

    Foreign.configure_optimizers = watched  # type: ignore[method-assign]
    try:
        trainer = fit(tmp_path, module, conversion)
    finally:
        Foreign.configure_optimizers = untouched  # type: ignore[method-assign]
    (diagnosis,) = diagnosed
    assert len(diagnosis.layers) == 2
    assert copies == [0]  # the module itself was not trained before its own training
    assert module.steps == 3
    decision = conversion.decision
    assert decision is not None
    assert decision.lr == module.lr == 0.05
    assert conversion.policy == ARMS[decision.arm].policy
    assert f"{decision.arm} (" in decision.said
    assert len(list((tmp_path / "policy_auto").glob("*/comparison.json"))) == 1
    saved = torch.load(last(trainer), weights_only=True)["finetune_bn"]
    assert saved["decision"]["arm"] == decision.arm
    assert not conversion.undecided


def test_a_machine_that_is_too_slow_for_the_budget_compares_less_and_a_run_that_goes_on_compares_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setitem(BUDGETS, "fast", dataclasses.replace(BUDGETS["fast"], minutes=1, most=3, factors=(1.0, 3.0)))
    # 1.25 times 6 trainings of 3 steps are 90 seconds, of 3 trainings 45.
    monkeypatch.setattr(running, "measure_speed", lambda *_: Speed(4.0, 0.0))
    first, second = BatchNormConversion("auto"), BatchNormConversion("auto")
    fit(tmp_path, Foreign(), first)
    (path,) = (tmp_path / "policy_auto").rglob("comparison.json")
    assert path.parent.name == "one_rate"
    assert len({run["arm"] for run in json.loads(path.read_text())["runs"]}) == 3
    monkeypatch.setattr(running, "measure_speed", lambda *_: Speed(0.01, 0.0))
    monkeypatch.setattr(running, "fine_tune", lambda *_: pytest.fail("it was known"))
    fit(tmp_path, Foreign(), second)
    assert second.decision == first.decision


@pytest.mark.parametrize("arm", ARMS)
def test_each_decision_brings_the_callbacks_that_belong_to_it(tmp_path: Path, arm: str, decided: Any) -> None:
    decided(arm)
    wanted = {
        "limited": "StepLimit",
        "scheduled": "BatchNormSchedule",
        "recalibrated": "BatchNormRecalibration",
        "group_norm": "GroupNormCalibration",
        "affine": "TrainOnly",
    }
    module = Foreign()
    trainer = fit(tmp_path, module, BatchNormConversion("auto"), max_epochs=1 + (arm == "scheduled"))
    names = [type(callback).__name__ for callback in trainer.callbacks]
    assert names[-1] == "ModelCheckpoint"
    assert set(wanted.values()) & set(names) == ({wanted[arm]} if arm in wanted else set())
    assert module.lr == 0.02
    layers = [type(module.net.bn1).__name__, type(module.net.bn2).__name__]
    live = arm in ("live", "recalibrated")
    assert all(
        name.startswith("BatchNorm" if live else "GroupNorm" if arm == "group_norm" else "Frozen") for name in layers
    )
    trained = sum(p.requires_grad for p in module.parameters())
    assert (trained == 6) == (arm == "affine")  # gamma, beta and the head


def test_a_resumed_and_a_loaded_run_replay_the_decision_without_comparing(tmp_path: Path, decided: Any) -> None:
    asked = decided("limited")
    first = BatchNormConversion("auto")
    trainer = fit(tmp_path, Replaying(), first)
    path = last(trainer)
    assert asked == ["limited"]
    decided("live")
    module, conversion = Replaying(), BatchNormConversion("auto")
    again = pl.Trainer(
        default_root_dir=tmp_path / "again", max_epochs=2, callbacks=[conversion], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    again.fit(module, *loaders(), ckpt_path=path, weights_only=True)
    assert asked == ["limited"]
    assert conversion.decision == first.decision
    assert [type(c) for c in again.callbacks if isinstance(c, StepLimit)] == [StepLimit]  # type: ignore[attr-defined]
    assert module.lr == 0.02
    assert isinstance(module.net.bn1, FrozenBatchNorm)
    again.validate(module, loaders()[1], verbose=False)
    assert isinstance(Replaying.load_from_checkpoint(path, weights_only=True).net.bn1, FrozenBatchNorm)
    tested, other = Foreign(), BatchNormConversion("auto")
    trainer = pl.Trainer(default_root_dir=tmp_path, callbacks=[other], logger=False, enable_progress_bar=False)
    trainer.validate(tested, loaders()[1], ckpt_path=path, verbose=False, weights_only=True)
    assert isinstance(tested.net.bn1, FrozenBatchNorm)
    assert asked == ["limited"]


def test_a_validation_before_any_training_leaves_the_layers_and_says_so(tmp_path: Path) -> None:
    module = Foreign()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[BatchNormConversion("auto")], logger=False, enable_progress_bar=False
    )
    with pytest.warns(UserWarning, match="policy auto is decided when a training begins"):
        trainer.validate(module, loaders()[1], verbose=False)
    assert type(module.net.bn1) is torch.nn.BatchNorm2d


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("beside", r"callbacks: got \['StepLimit'\]; .* Take them out, or name a policy"),
        ("no monitor", "policy auto: got 'no ModelCheckpoint or EarlyStopping with a monitor'"),
        ("wrong monitor", "Failed: .*monitor: got 'val_f1'; allowed: what validation_step logs: val_accuracy"),
        ("by hand", r"policy auto: got 'Foreign'; allowed: a module whose optimizer Lightning steps"),
        ("no layers", "model: got .Foreign.; allowed: a model with BatchNorm layers"),
        ("checkpoint", "policy: got 'auto'; allowed: a policy, as the checkpoint that is resumed holds no decision"),
        ("no validation", "policy auto: got 'no validation loader'"),
        ("two loaders", "policy auto: got '2 training loaders'; allowed: one training loader"),
    ],
)
def test_where_it_cannot_be_decided_it_is_refused_by_name(tmp_path: Path, case: str, match: str) -> None:
    module, callbacks, path = Foreign(), [BatchNormConversion("auto")], None
    if case == "beside":
        callbacks.append(StepLimit())  # type: ignore[arg-type]
    if case != "no monitor":
        monitor = "val_f1" if case == "wrong monitor" else "val_accuracy"
        callbacks.append(ModelCheckpoint(monitor=monitor, mode="max"))  # type: ignore[arg-type]
    if case == "by hand":
        module.automatic_optimization = False
    if case == "no layers":
        module.net.bn1 = module.net.bn2 = torch.nn.Identity()  # type: ignore[assignment]
    if case == "checkpoint":
        path = tmp_path / "other.ckpt"
        torch.save(
            {
                "state_dict": module.state_dict(),
                "pytorch-lightning_version": pl.__version__,
                "epoch": 0,
                "global_step": 0,
            },
            path,
        )
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=callbacks, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    train, val = loaders()
    train = {"a": train, "b": train} if case == "two loaders" else train
    with pytest.raises(FinetuneBNError, match=match) as error:
        trainer.fit(module, train, None if case == "no validation" else val, ckpt_path=path, weights_only=True)
    assert "\n" not in str(error.value)


def test_several_processes_are_refused() -> None:
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", logger=False, enable_checkpointing=False)
    with pytest.raises(FinetuneBNError, match=r"policy: got .*'auto' with 2 processes.* allowed: one process"):
        auto_module.decide(trainer, Foreign(), None, "fast")


def test_trainings_are_kept_in_the_runs_folder_or_where_it_is_said_and_not_at_an_address() -> None:
    def place(root: str, folder: str | None = None, dry: bool = False) -> Path | None:
        trainer: Any = SimpleNamespace(fast_dev_run=dry, default_root_dir=root)
        return auto_module._place(trainer, Foreign(), folder, ["data"])

    here = place("runs")
    assert here is not None
    assert here.parent == Path("runs/policy_auto")
    assert here == place("runs")
    assert place("runs", "mine") == Path("mine")
    assert place("s3://bucket/runs") is None
    assert place("runs", dry=True) is None


def test_a_validation_loader_without_a_length_counts_no_images() -> None:
    def counted(*loaders: Any) -> int:
        trainer: Any = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(Foreign())
        trainer._data_connector.attach_data(Foreign(), val_dataloaders=list(loaders))
        return auto_module._validation_images(trainer)

    val = loaders()[1]
    assert counted(val) == 18
    assert counted(val, val) == 36
    assert counted(val, [torch.zeros(2, 3, 8, 8)]) == 0


def test_without_a_diagnosis_the_sizes_of_batch_and_set_rank_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise FinetuneBNError("the batch is empty")

    monkeypatch.setattr(auto_module, "diagnose", fails)
    feed: Any = SimpleNamespace(take=lambda first, number: [None] * number)
    said: list[str] = []
    ranked = auto_module._ranked(Foreign(), None, feed, 8, 3, 1.0, said.append)
    assert set(ranked) == set(ARMS)
    (line,) = said
    assert "no diagnosis (the batch is empty) Treatments are ranked by the sizes of batch and set alone" in line


def test_beside_weight_averaging_no_schedule_is_compared() -> None:
    averaging = WeightAveraging(lambda *_: None)  # type: ignore[arg-type]
    for callbacks, there in (([], True), ([averaging], False)):
        trainer: Any = SimpleNamespace(callbacks=callbacks)
        names = auto_module._candidates(trainer, Foreign(), None, list(ARMS))
        assert ("scheduled" in names) == there
        assert names[0] == next(iter(ARMS))


def test_words_that_are_no_budget_or_policy_are_refused() -> None:
    with pytest.raises(FinetuneBNError, match="budget: got 'quick'; allowed: fast, good, best"):
        BatchNormConversion("auto", budget="quick")  # type: ignore[arg-type]
    with pytest.raises(FinetuneBNError, match="policy: got 'automatic'"):
        BatchNormConversion("automatic")  # type: ignore[arg-type]
    for damaged in ({"arm": "live"}, "live", {"arm": "live", "policy": 3, "lr": None, "budget": "fast", "said": ""}):
        with pytest.raises(FinetuneBNError, match="got"):
            Decision.from_dict(damaged)
    with pytest.raises(FinetuneBNError, match="decision: got"):
        Decision.from_dict({"arm": "nothing", "policy": fbn.Keep().to_dict(), "lr": None, "budget": "fast", "said": ""})


def test_the_help_says_how_long_each_budget_takes() -> None:
    words = " ".join((BatchNormConversion.__doc__ or "").split())
    first, *others = BUDGETS.items()
    assert f"{first[0]} takes about {first[1].minutes:g} minutes" in words
    assert all(f"{name} about {budget.minutes:g}" in words for name, budget in others)


def test_a_schedule_is_run_through_whole_in_a_short_training() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    short = Squeezed(schedule, 100, 7)
    rates = []
    for _ in range(7):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        short.step()
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
