"""The conversion looks at what is trained, when it is trained; its example input; other namespaces; resumed runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.batchnorm import _BatchNorm

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, StepLimit
from finetune_bn.callbacks.conversion_checks import gone, pending
from finetune_bn.errors import FinetuneBNError, NoBatchNormMatched
from finetune_bn.layers import FrozenBatchNorm
from finetune_bn.utilities.probe import find_probes
from tests.callbacks.test_conversion import Foreign, frozen, loader, make_net, saved, statistics, trainer


class Rebuilds(Foreign):
    """Makes its network anew after the callback has converted the first one."""

    def __init__(self, when: str, again: bool = True) -> None:
        super().__init__()
        self.when, self.again = when, again

    def _anew(self, when: str) -> None:
        if when == self.when and self.again:
            self.again = False
            self.backbone = make_net()

    def setup(self, stage: str) -> None:
        self._anew("setup")

    def configure_model(self) -> None:
        self._anew("configure_model")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self._anew("configure_optimizers")
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        self._anew("on_fit_start")


class Grows(Foreign):
    """Puts a layer in front of its head."""

    def setup(self, stage: str) -> None:
        if not isinstance(self.head, nn.Sequential):
            self.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))


@pytest.mark.parametrize("when", ["setup", "configure_model"])
@pytest.mark.parametrize("policy", [fbn.Freeze("merged"), fbn.Ghost(2), fbn.ToGroupNorm()], ids=str)
def test_a_network_made_anew_before_the_optimizer_is_converted_too(
    when: str, policy: fbn.Policy, tmp_path: Path
) -> None:
    model, callback = Rebuilds(when), BatchNormConversion(policy)
    run = trainer(tmp_path, callback)
    run.fit(model, loader(), loader())
    kinds = {type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}
    assert kinds.isdisjoint({"BatchNorm2d"})
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert all(id(p) in optimized for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("when", ["configure_optimizers", "on_fit_start"])
def test_a_network_made_anew_later_is_an_error_that_names_its_layers(when: str, tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match=r"Rebuilds: got '2 BatchNorm layers that are not converted: backbone.1"):
        trainer(tmp_path, BatchNormConversion()).fit(Rebuilds(when), loader())


def test_layers_added_in_setup_are_converted_and_in_the_plan(tmp_path: Path) -> None:
    # a policy without rules would keep it live: it is new
    model, callback = Grows(), BatchNormConversion(fbn.Rules([("*", fbn.Freeze())]))
    trainer(tmp_path, callback).fit(model, loader())
    assert isinstance(model.head[0], FrozenBatchNorm)
    assert callback.plan is not None
    assert [row.names for row in callback.plan.rows] == [("backbone.1",), ("backbone.4",), ("head.0",)]


def test_layers_that_a_later_callback_adds_are_an_error_and_those_that_stay_live_are_none(tmp_path: Path) -> None:
    class Adds(Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))

    with pytest.raises(FinetuneBNError, match=r"1 BatchNorm layers that are not converted: head\.0"):
        trainer(tmp_path, BatchNormConversion(fbn.Rules([("*", fbn.Freeze())])), Adds()).fit(Foreign(), loader())
    rules = fbn.Rules([("head*", fbn.Keep()), ("backbone*", fbn.Freeze())])
    with pytest.raises(NoBatchNormMatched):  # a rule for layers that are not there yet
        trainer(tmp_path, BatchNormConversion(rules), Adds()).fit(Foreign(), loader())
    keeps = fbn.Rules([("backbone*", fbn.Freeze())])
    model = Foreign()
    trainer(tmp_path, BatchNormConversion(keeps), Adds()).fit(model, loader())
    assert isinstance(model.head[0], nn.BatchNorm1d)


def test_a_network_that_is_compiled_after_the_conversion_is_the_same_network(tmp_path: Path) -> None:
    class Compiles(Foreign):
        def configure_model(self) -> None:
            if not hasattr(self.backbone, "_orig_mod"):
                self.backbone = torch.compile(self.backbone, backend="eager")

    model = Compiles()
    trainer(tmp_path, BatchNormConversion(), epochs=1).fit(model, loader())
    assert len(frozen(model)) == 2


def test_layers_that_are_taken_out_before_are_not_in_the_plan_and_after_it_they_are_named(tmp_path: Path) -> None:
    class Shrinks(Foreign):
        def setup(self, stage: str) -> None:
            self.backbone[4] = nn.Identity()

    class Late(Foreign):
        def on_fit_start(self) -> None:
            self.backbone[4] = nn.Identity()

    callback = BatchNormConversion()
    trainer(tmp_path, callback, epochs=1).fit(Shrinks(), loader())
    assert callback.plan is not None
    assert [row.names for row in callback.plan.rows] == [("backbone.1",)]
    with pytest.warns(UserWarning, match=r"backbone\.4 of the plan are no longer in the network"):
        trainer(tmp_path, BatchNormConversion(), epochs=1).fit(Late(), loader())


def test_weight_averaging_copies_the_network_that_was_made_anew(tmp_path: Path) -> None:
    model, average = Rebuilds("setup"), WeightAveraging()
    trainer(tmp_path, average, BatchNormConversion(fbn.Freeze("none"))).fit(model, loader())
    assert len(frozen(model)) == 2
    assert average._average_model is not None
    assert not any(isinstance(m, _BatchNorm) for m in average._average_model.modules())


def test_sync_batchnorm_of_live_layers_is_no_change_of_the_plan() -> None:
    policy = fbn.Rules([("1", fbn.FreezeAffine()), ("4", fbn.Freeze())])
    the_plan = fbn.plan(make_net(), policy, probe=False)
    net = fbn.convert(make_net(), the_plan, verify=False)
    assert pending(make_net(), the_plan, policy) == ["4"]
    wrapped = nn.ModuleDict({name: checkpoint_wrapper(layer) for name, layer in net.named_children()})
    assert pending(wrapped, the_plan, policy) == []
    assert gone(wrapped, the_plan) == []
    assert gone(nn.Sequential(net[0]), the_plan) == ["1", "4"]
    assert pending(nn.SyncBatchNorm.convert_sync_batchnorm(net), the_plan, policy) == []


# What the optimizer holds


class Early(Foreign):
    """Makes its optimizer before the Trainer knows of it."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = super().configure_optimizers()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


@pytest.mark.parametrize(("policy", "names"), [(fbn.Freeze("merged"), 4), (fbn.ToGroupNorm(), 4)], ids=str)
def test_new_parameters_that_no_optimizer_holds_are_named(policy: fbn.Policy, names: int, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"{names} trainable tensors of converted.*backbone\.1\.weight, backbone\.1"):
        trainer(tmp_path, BatchNormConversion(policy), epochs=1).fit(Early(), loader())


@pytest.mark.parametrize("policy", [fbn.Freeze("original"), fbn.Freeze("none"), fbn.Keep()], ids=str)
def test_parameters_that_stay_the_same_are_still_held(policy: fbn.Policy, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, BatchNormConversion(policy), epochs=1).fit(Early(), loader())
        # A head that is trained alone is meant so: the convolutions are in no optimizer either.
        model = Foreign()
        model.configure_optimizers = lambda: torch.optim.SGD(model.head.parameters(), lr=0.1)  # type: ignore[method-assign]
        trainer(tmp_path, BatchNormConversion(fbn.Freeze("merged")), epochs=1).fit(model, loader())
    assert not any("in no optimizer" in str(w.message) for w in caught)


# The example input


def folded(callback: BatchNormConversion) -> int:
    assert callback.plan is not None
    return sum(bool(row.folded_into) for row in callback.plan.rows)


def test_the_modules_example_input_array_reaches_the_part_that_is_converted(tmp_path: Path) -> None:
    for module, example in (("backbone", True), (None, True), ("backbone", False)):
        model = Foreign()
        if example:
            model.example_input_array = torch.zeros(2, 3, 8, 8)
        callback = BatchNormConversion(fbn.Freeze("merged"), module=module)
        trainer(tmp_path, callback, epochs=1).fit(model, loader())
        assert folded(callback) == (2 if example else 0)


@pytest.mark.parametrize("given", [torch.zeros(2, 3, 8, 8), (torch.zeros(2, 3, 8, 8),), [2, 3, 8, 8]], ids=type)
def test_an_example_input_may_be_given_also_as_a_shape(given: Any, tmp_path: Path) -> None:
    callback = BatchNormConversion(fbn.Freeze("merged"), module="backbone", example_input=given)
    trainer(tmp_path, callback, epochs=1).fit(Foreign(), loader())
    assert folded(callback) == 2


def test_an_example_input_that_the_part_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match=r"example_input: got \[\(2, 7, 8, 8\)\]"):
        trainer(tmp_path, BatchNormConversion(example_input=[2, 7, 8, 8])).fit(Foreign(), loader())


@pytest.mark.parametrize("channels", [1, 4])
def test_a_timm_model_of_other_input_channels_is_probed_with_these(channels: int) -> None:
    timm = pytest.importorskip("timm")
    net = timm.create_model("test_resnet", in_chans=channels)
    (probe,) = find_probes(net)
    assert probe.args[0].shape[1] == channels
    assert all(row.folded_into for row in fbn.plan(net, fbn.Freeze("original")).rows)


# Resuming


def without(tmp_path: Path) -> Path:
    """Return the checkpoint of a run without the callback."""
    keep = ModelCheckpoint(tmp_path, filename="without")
    trainer(tmp_path, keep, epochs=1).fit(Foreign(), loader())
    return tmp_path / "without.ckpt"


@pytest.mark.parametrize("policy", [fbn.Freeze("none"), fbn.Freeze("merged"), fbn.ToGroupNorm()], ids=str)
def test_a_run_without_the_callback_does_not_go_on_with_other_parameters(policy: fbn.Policy, tmp_path: Path) -> None:
    path = without(tmp_path)
    with pytest.raises(FinetuneBNError, match=r"ckpt_path: got 'one of a run without'.*load these and do not pass"):
        trainer(tmp_path, BatchNormConversion(policy), epochs=2).fit(Foreign(), loader(), ckpt_path=path)


@pytest.mark.parametrize("policy", [fbn.Freeze("original"), fbn.Keep()], ids=str)
def test_it_goes_on_where_the_parameters_are_the_same(policy: fbn.Policy, tmp_path: Path) -> None:
    model = Foreign()
    trainer(tmp_path, BatchNormConversion(policy), epochs=2).fit(model, loader(), ckpt_path=without(tmp_path))
    assert len(frozen(model)) == (2 if isinstance(policy, fbn.Freeze) else 0)


def test_evaluation_of_a_run_without_the_callback_is_free(tmp_path: Path) -> None:
    model = Foreign()
    trainer(tmp_path, BatchNormConversion(fbn.Freeze())).test(
        model, loader(), ckpt_path=without(tmp_path), verbose=False
    )
    assert len(frozen(model)) == 2


def test_a_resumed_run_whose_plan_is_the_checkpoints_may_hold_layers_that_its_own_policy_would_convert(
    tmp_path: Path,
) -> None:
    path, _ = saved(tmp_path, fbn.Freeze("shift"), "backbone")
    model = Grows()
    model.strict_loading = False
    run = trainer(tmp_path, BatchNormConversion(fbn.Freeze("none")))
    with pytest.warns(UserWarning, match="another policy than this run asks for"):
        run.validate(model, loader(), ckpt_path=path, verbose=False)
    assert isinstance(model.head[0], nn.BatchNorm1d)


@pytest.mark.parametrize("first", [True, False])
def test_weight_averaging_goes_on_with_the_layers_of_the_checkpoint(first: bool, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, fbn.Freeze("merged"))
    checkpoint = torch.load(path, weights_only=False)
    average = WeightAveraging()
    both: list[Callback] = [average, BatchNormConversion(fbn.Freeze("none"))]
    run = trainer(tmp_path, *(both if first else both[::-1]), epochs=2)
    model = Foreign()
    with pytest.warns(UserWarning, match="another policy than this run asks for"):
        run.fit(model, loader(), ckpt_path=path)
    assert {layer.affine_kind for layer in frozen(model)} == {"merged"}
    assert average._average_model is None or {m.affine_kind for m in frozen(average._average_model)} == {"merged"}
    assert checkpoint["state_dict"].keys() == model.state_dict().keys()


# Constant gamma and beta


@pytest.mark.parametrize("policy", [fbn.FreezeAffine(), fbn.NormalizeOnly(change_function=True)], ids=str)
def test_an_optimizer_that_holds_them_does_not_move_constant_gamma_and_beta(policy: fbn.Policy) -> None:
    net, x = make_net(), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
    net(x).square().mean().backward()
    optimizer.step()
    fbn.convert(net, policy, verify=False)
    before = [p.detach().clone() for layer in (net[1], net[4]) for p in layer.parameters()]
    for _ in range(3):
        optimizer.zero_grad(set_to_none=False)
        net(x).square().mean().backward()
        optimizer.step()
    after = [p for layer in (net[1], net[4]) for p in layer.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Modules of the other namespace


def test_modules_and_trainers_of_pytorch_lightning_work(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = make_net(), nn.Linear(6, 3)

        def setup(self, stage: str) -> None:
            self.backbone = make_net()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    model = Module()
    before = statistics(model)
    run = other.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[other.callbacks.WeightAveraging(), BatchNormConversion(), StepLimit()],
    )  # fmt: skip
    run.fit(model, loader())
    assert len(frozen(model)) == 2
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
