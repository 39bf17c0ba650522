"""Whatever a checkpoint goes through, the network that is loaded is the network in memory, or loading raises."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, BatchNormRecalibration
from finetune_bn.callbacks.recalibrate_checkpoint import load_into, recalibrate_checkpoint
from finetune_bn.callbacks.saved_plan import replay
from finetune_bn.conversion.policies import Policy
from finetune_bn.layers import EvalBatchNorm, GroupNorm
from tests.models import Plain, settle


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


POLICIES: dict[str, Policy] = {
    "none": fbn.Freeze("none"),
    "shift": fbn.Freeze("shift"),
    "merged": fbn.Freeze("merged"),
    "original": fbn.Freeze("original"),
    "noise": fbn.Freeze("none", noise=8),
    "affine": fbn.FreezeAffine(),
    "normalize": fbn.NormalizeOnly(change_function=True),
    "groups": fbn.ToGroupNorm(groups=2, eps=0.5),
    "calibrated": fbn.ToGroupNorm(init="sequential"),
    "ghost": fbn.Ghost(2),
    "renorm": fbn.Renorm(2.0, 1.0),
    "stochastic": fbn.Stochastic(0.5),
    "eval": fbn.EvalNorm(0.25),
    "rules": fbn.Rules([("bn1", fbn.ToGroupNorm(groups=3)), ("bn2", fbn.Freeze("merged"))]),
}
X = torch.randn(10, 3, 9, 9, generator=torch.Generator().manual_seed(1))


class Net(Plain):
    def __init__(self, seed: int = 5) -> None:
        torch.manual_seed(seed)
        super().__init__()
        settle(self, seed)


def trained(policy: str, net: nn.Module | None = None) -> nn.Module:
    """Return a net that was converted, calibrated where that is asked for, and trained for some steps."""
    net = Net(0) if net is None else net
    fbn.convert(net, POLICIES[policy])
    if policy == "calibrated":
        record = fbn.calibrate_group_norm(net, [X])
        assert any(layer.balance is not None or layer.num_groups > 1 for layer in norms(net, GroupNorm)), record
    train(net)
    return net.eval()


def train(net: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        net.train()(X).square().mean().backward()
        optimizer.step()


def norms(net: nn.Module, kind: Any) -> list[Any]:
    return [module for module in net.modules() if isinstance(module, kind)]


def assert_same_function(loaded: nn.Module, net: nn.Module) -> None:
    with torch.no_grad():
        expected, got = net.eval()(X), loaded.eval()(X)
    assert float((got - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def assert_same_or_raises(loaded: nn.Module, load: Callable[[], Any], net: nn.Module) -> bool:
    """Return whether it was loaded."""
    refusal = ""
    try:
        load()
    except RuntimeError as error:
        refusal = str(error)
    if not refusal:
        assert_same_function(loaded, net)
        return True
    assert "_extra_state" in refusal or "GroupNorm" in refusal
    return False


def saved_and_loaded(state: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)  # type: ignore[no-any-return]


def safetensors_file(state: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    files = pytest.importorskip("safetensors.torch")
    files.save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "net.safetensors")
    return files.load_file(tmp_path / "net.safetensors")  # type: ignore[no-any-return]


def stripped(state: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    with_prefix = {f"module.{name}": value for name, value in state.items()}
    return {name.removeprefix("module."): value for name, value in with_prefix.items()}


WAYS: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "torch.save": saved_and_loaded,
    "dict": lambda state, tmp_path: dict(state),
    "prefix": stripped,
    "safetensors": safetensors_file,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_dict_gives_a_converted_net_the_function_of_the_one_in_memory(
    policy: str, way: str, tmp_path: Path
) -> None:
    net, loaded = trained(policy), fbn.convert(Net(), POLICIES[policy])
    loaded.load_state_dict(WAYS[way](net.state_dict(), tmp_path), strict=True)
    assert_same_function(loaded, net)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_plain_net_takes_it_with_the_same_function_or_refuses_it(policy: str, way: str, tmp_path: Path) -> None:
    net, plain = trained(policy), Net()
    state = WAYS[way](net.state_dict(), tmp_path)
    took = assert_same_or_raises(plain, lambda: plain.load_state_dict(state, strict=True), net)
    assert took == (policy not in ("groups", "calibrated", "eval", "rules"))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_converted_net_of_another_policy_takes_it_with_the_same_function_or_refuses_it(policy: str) -> None:
    net = trained(policy)
    taken = 0
    for other in ("none", "groups", "eval", "ghost"):
        loaded = fbn.convert(Net(), POLICIES[other])
        state = dict(net.state_dict())
        if other == "eval" and policy != "eval":
            continue  # an EvalNorm layer takes a BatchNorm's file on purpose, and computes something else from it
        taken += assert_same_or_raises(loaded, lambda s=state, n=loaded: n.load_state_dict(s, strict=True), net)
    assert taken > 0 or policy == "rules"


@pytest.mark.parametrize("policy", POLICIES)
def test_averages_are_saved_as_they_are_in_memory(policy: str) -> None:
    ema = pytest.importorskip("timm.utils.model_ema")
    net = trained(policy)
    averages = [
        ema.ModelEmaV3(net, decay=0.9),
        ema.ModelEmaV2(net, decay=0.9),
        AveragedModel(net, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
    ]
    train(net)
    for average in averages:
        average.update_parameters(net) if isinstance(average, AveragedModel) else average.update(net)
        state = {name.removeprefix("module."): v for name, v in average.state_dict().items() if name != "n_averaged"}
        loaded = fbn.convert(Net(), POLICIES[policy])
        loaded.load_state_dict(state, strict=True)
        assert_same_function(loaded, average.module)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("policy", ["merged", "calibrated", "eval"])
def test_timms_loader_gives_the_function_of_the_net_in_memory_or_raises(
    policy: str, suffix: str, tmp_path: Path
) -> None:
    models = pytest.importorskip("timm.models")
    net, path = trained(policy), tmp_path / f"net.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(dict(net.state_dict()), path)
    loaded, plain = fbn.convert(Net(), POLICIES[policy]), Net()
    models.load_checkpoint(loaded, str(path))
    assert_same_function(loaded, net)
    assert assert_same_or_raises(plain, lambda: models.load_checkpoint(plain, str(path)), net) == (policy == "merged")


@pytest.mark.parametrize("policy", ["groups", "calibrated", "rules"])
def test_revert_after_loading_gives_the_batch_norms_of_the_pretraining(policy: str, tmp_path: Path) -> None:
    net, loaded = trained(policy), fbn.convert(Net(), POLICIES[policy])
    loaded.load_state_dict(safetensors_file(net.state_dict(), tmp_path), strict=True)
    assert_same_function(fbn.revert(loaded), fbn.revert(net))


# ---- Lightning, the command's export and recalibrate


class Foreign(pl.LightningModule):
    """Knows nothing of this package."""

    def __init__(self, seed: int = 5) -> None:
        super().__init__()
        self.net = Net(seed)
        self.example_input_array = X

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.02)


class Own(Foreign):
    """Replays the plan."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        replay(checkpoint, self)


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(X), 5)


def quiet_trainer(*callbacks: pl.Callback) -> pl.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=1, callbacks=list(callbacks),
        )  # fmt: skip


def checkpoint_of(policy: str, path: Path, weights_only: bool = False, module: Foreign | None = None) -> Foreign:
    """Train a module under the policy, write its checkpoint, and return it."""
    module = Foreign(0) if module is None else module
    conversion = BatchNormConversion(POLICIES[policy], module="net", watch_every_n_steps=0)

    class Calibrate(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if policy == "calibrated":
                fbn.calibrate_group_norm(module.net, [X])

    trainer = quiet_trainer(conversion, Calibrate())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, Data())
    trainer.save_checkpoint(path, weights_only=weights_only)
    return module.eval()  # type: ignore[return-value]


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_load_from_checkpoint_gives_the_function_of_the_net_in_memory_or_raises(
    policy: str, weights_only: bool, tmp_path: Path
) -> None:
    path = tmp_path / "one.ckpt"
    module = checkpoint_of(policy, path, weights_only)
    differs = bool(norms(module, (GroupNorm, EvalBatchNorm)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = Own.load_from_checkpoint(path, weights_only=True, map_location="cpu")
    assert_same_function(loaded, module)
    assert any("The checkpoint holds no plan" in str(w.message) for w in caught) == (weights_only and differs)
    if differs:
        with pytest.raises(RuntimeError, match="_extra_state"):
            Foreign.load_from_checkpoint(path, weights_only=True, map_location="cpu")
    else:
        plain = Foreign.load_from_checkpoint(path, weights_only=True, map_location="cpu")
        assert_same_function(plain, module)


@pytest.mark.parametrize("policy", ["calibrated", "eval", "rules", "merged"])
def test_weights_alone_are_tested_as_the_net_in_memory_under_whatever_policy_the_run_asks_for(
    policy: str, tmp_path: Path
) -> None:
    module, loaded = checkpoint_of(policy, tmp_path / "one.ckpt", weights_only=True), Foreign()
    trainer = quiet_trainer(BatchNormConversion(fbn.Freeze("none"), module="net", watch_every_n_steps=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.predict(loaded, DataLoader(X, 5), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert_same_function(loaded, module)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_network_that_is_exported_from_a_checkpoint_is_the_one_in_memory(
    policy: str, weights_only: bool, tmp_path: Path
) -> None:
    path = tmp_path / "one.ckpt"
    module, loaded = checkpoint_of(policy, path, weights_only), Foreign()
    load_into(loaded, quiet_trainer(), path)
    assert_same_function(loaded, module)
    if policy == "eval":  # no BatchNorm stands for it
        with pytest.raises(fbn.errors.UnsupportedLayer):
            fbn.fold(loaded, X)
    else:
        assert_same_function(fbn.fold(loaded, X), module)
    if weights_only or policy not in ("calibrated", "eval", "merged"):
        return
    exported = torch.export.load(fbn.export(loaded, tmp_path / "net.pt2", X)).module()
    with torch.no_grad():
        expected = module(X)
        assert float((exported(X) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("policy", ["none", "merged", "rules", "eval"])
def test_a_recalibrated_checkpoint_differs_in_its_statistics_alone(policy: str, tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    module = checkpoint_of(policy, path)
    recalibration = BatchNormRecalibration(when="validation", how="preserve", min_samples=2)
    output, _ = recalibrate_checkpoint(quiet_trainer(), Foreign(), Data(), path, None, recalibration)
    loaded = Own.load_from_checkpoint(output, weights_only=True, map_location="cpu")
    if policy == "eval":
        assert [layer.alpha for layer in norms(loaded, EvalBatchNorm)] == [0.25, 0.25]
        for layer in [*norms(loaded, EvalBatchNorm), *norms(module, EvalBatchNorm)]:
            layer.alpha = 0.0
    assert_same_function(loaded, module)


def test_a_checkpoint_of_lightnings_weight_averaging_holds_the_groups_of_the_average(tmp_path: Path) -> None:
    averaging = pytest.importorskip("lightning.pytorch.callbacks").WeightAveraging(use_buffers=True)
    module, path = Foreign(0), tmp_path / "average.ckpt"
    fbn.convert(module.net, POLICIES["groups"])
    fbn.calibrate_group_norm(module.net, [X])
    trainer = quiet_trainer(averaging)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, Data())
    trainer.save_checkpoint(path)
    loaded = Foreign()
    load_into(loaded, quiet_trainer(), path)
    average = copy.deepcopy(averaging._average_model.module)
    assert_same_function(loaded, average)
