"""What Lightning's own tests ask of fine-tuning, averaging and mode handling, asked of converted nets; written anew."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.model_helpers import _ModuleMode  # what the trainer restores modes by
from torch import nn

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.layers import FrozenBatchNorm
from finetune_bn.layers.frozen import LEARNABLE, Affine
from tests.callbacks.test_conversion import Foreign, frozen, loader, make_net, same, statistics, trainer
from tests.models import Tied, settle
from tests.tools import assert_same_state

AFFINES: tuple[Affine, ...] = ("none", "original")


def converted(affine: Affine) -> nn.Module:
    return fbn.convert(make_net(), fbn.Freeze(affine), example_input=torch.zeros(2, 3, 8, 8))


# tests_pytorch/callbacks/test_finetuning_callback.py


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_freeze_and_unfreeze_turn_all_that_is_trained_off_and_on(affine: Affine) -> None:
    """Lightning test_finetuning_callback.py::test_freeze_unfreeze_function: a net, its BatchNorm in and out of it."""
    net = converted(affine)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    state = copy.deepcopy(net.state_dict())
    for train_bn in (True, False):
        BaseFinetuning.freeze(net, train_bn=train_bn)
        assert not any(p.requires_grad for p in net.parameters())  # no layer of ours is Lightning's BatchNorm
        net.train()(torch.randn(4, 3, 8, 8))
        assert_same_state(net.state_dict(), state)
        BaseFinetuning.make_trainable(net)
        assert {name for name, p in net.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_unfreezing_adds_a_group_of_what_is_trained_and_nothing_else(affine: Affine) -> None:
    """Lightning test_finetuning_callback.py::test_unfreeze_and_add_param_group_function."""
    net = converted(affine)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    BaseFinetuning.freeze(net)
    BaseFinetuning.unfreeze_and_add_param_group(net[:2], optimizer, initial_denom_lr=10.0)
    BaseFinetuning.unfreeze_and_add_param_group(net[3:], optimizer, lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1, 0.5]
    layers = [net[1], net[4]]
    for group, part, layer in zip(optimizer.param_groups[1:], (net[0], net[3]), layers, strict=True):
        wanted = [*part.parameters(), *(getattr(layer, name) for name in LEARNABLE[affine])]
        assert {id(p) for p in group["params"]} == {id(p) for p in wanted}


class Stages(BaseFinetuning):
    """Frozen at first; a part of the backbone in each of two epochs."""

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch in (1, 2):
            self.unfreeze_and_add_param_group(pl_module.backbone[3 * (epoch - 1) : 3 * epoch], optimizer)


@pytest.mark.parametrize("affine", AFFINES)
def test_its_record_of_groups_names_parameters_that_the_converted_net_has(affine: Affine, tmp_path: Path) -> None:
    """Lightning test_finetuning_callback.py::test_base_finetuning_internal_optimizer_metadata."""
    model, stages = Foreign(), Stages()
    trainer(tmp_path, BatchNormConversion(fbn.Freeze(affine)), stages, epochs=3).fit(model, loader())
    groups = stages._internal_optimizer_metadata[0]
    names = dict(model.named_parameters())
    assert len(groups) == 3
    recorded = [name for group in groups for name in group["params"]]
    assert set(recorded) <= set(names)
    expected = {"head.weight", "head.bias"} | {f"backbone.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")}
    if affine == "original":
        expected |= {f"backbone.{i}.{kind}" for i in (1, 4) for kind in ("weight", "bias")}
    assert {name for name in recorded if names[name].requires_grad} == expected


@pytest.mark.parametrize("affine", AFFINES)
def test_a_nested_net_with_a_shared_layer_is_flattened_frozen_and_freed(affine: Affine) -> None:
    """Lightning test_finetuning_callback.py::test_complex_nested_model, and a layer that two parts share."""
    net = nn.Sequential(settle(Tied()), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(settle(nn.BatchNorm2d(4)))))
    net = fbn.convert(net, fbn.Freeze(affine), example_input=torch.zeros(2, 4, 6, 6))
    flat = BaseFinetuning.flatten_modules(net)
    assert sum(isinstance(module, FrozenBatchNorm) for module in flat) == 3
    trained = {id(p) for p in net.parameters() if p.requires_grad}
    BaseFinetuning.freeze(net)
    assert not any(p.requires_grad for p in net.parameters())
    BaseFinetuning.make_trainable(net)
    assert {id(p) for p in net.parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("kind", ["stages", "backbone"])
def test_a_resumed_run_has_the_groups_and_statistics_of_the_one_that_went_through(kind: str, tmp_path: Path) -> None:
    """Lightning test_finetuning_callback.py::test_callbacks_restore, ::test_callbacks_restore_backbone."""

    def run(folder: Path, epochs: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, Foreign]:
        model = Foreign()
        stages = Stages() if kind == "stages" else BackboneFinetuning(1, verbose=False)
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        callbacks = [BatchNormConversion(fbn.Freeze("original")), stages, keep]
        runs = trainer(folder, *callbacks, epochs=epochs)
        runs.fit(model, loader(), ckpt_path=ckpt_path, weights_only=False)
        return runs, model

    whole, expected = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed, model = run(tmp_path / "resumed", 4, tmp_path / "cut" / "epoch=1.ckpt")
    # Not the weights: Lightning resumes with the groups, and with what it froze at first frozen again.
    names = [
        [[name for name, p in module.named_parameters() if any(p is q for q in group["params"])] for group in groups]
        for module, groups in (
            (expected, whole.optimizers[0].param_groups),
            (model, resumed.optimizers[0].param_groups),
        )
    ]
    assert names[0] == names[1]
    assert len(names[0]) == (3 if kind == "stages" else 2)
    assert same(statistics(model), statistics(Foreign()))
    assert same(statistics(expected), statistics(Foreign()))


def test_strategies_that_lightning_refuses_for_fine_tuning_are_refused_beside_the_conversion(tmp_path: Path) -> None:
    """Lightning test_finetuning_callback.py::test_unsupported_strategies, there DeepSpeed."""
    model = Foreign()
    before = copy.deepcopy(model.state_dict())
    runs = trainer(tmp_path, Stages(), BatchNormConversion())
    with pytest.MonkeyPatch.context() as patch:  # DeepSpeed itself needs a GPU
        patch.setattr("lightning.pytorch.strategies.DeepSpeedStrategy", type(runs.strategy))
        with pytest.raises(NotImplementedError, match="does not support running with the DeepSpeed"):
            runs.fit(model, loader())
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


# tests_pytorch/callbacks/test_weight_averaging.py, test_stochastic_weight_avg.py


@pytest.mark.parametrize("affine", ["none", "shift", "original"])
def test_a_moving_average_keeps_frozen_statistics_exact_through_a_resume(affine: Affine, tmp_path: Path) -> None:
    """Lightning test_weight_averaging.py::test_ema[batch_norm], ::test_ema_resume."""

    def run(folder: Path, epochs: int, ckpt_path: Path | None = None) -> Foreign:
        model = Foreign()
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        average = EMAWeightAveraging(decay=0.9)
        runs = trainer(folder, BatchNormConversion(fbn.Freeze(affine)), average, keep, epochs=epochs)
        runs.fit(model, loader(), ckpt_path=ckpt_path, weights_only=False)
        return model

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "resumed", 3, tmp_path / "cut" / "epoch=1.ckpt")
    assert_same_state(resumed.state_dict(), whole.state_dict())
    assert same(statistics(whole), statistics(Foreign()))
    assert len(frozen(whole)) == 2


@pytest.mark.slow
def test_a_moving_average_keeps_frozen_statistics_exact_in_two_processes(tmp_path: Path) -> None:
    """Lightning test_weight_averaging.py::test_ema_ddp_spawn_cpu."""
    model = Foreign()
    callbacks = [BatchNormConversion(), EMAWeightAveraging(decay=0.9)]
    trainer(tmp_path, *callbacks, strategy="ddp_fork", devices=2).fit(model, loader())
    assert same(statistics(model), statistics(Foreign()))
    assert not torch.equal(model.backbone[0].weight, make_net()[0].weight)


@pytest.mark.parametrize("at", [0, 2])
def test_an_average_of_weights_goes_on_after_a_resume_with_frozen_statistics_untouched(at: int, tmp_path: Path) -> None:
    """Lightning test_stochastic_weight_avg.py::test_swa_resume_training_from_checkpoint, before and in averaging."""

    def run(folder: Path, epochs: int, ckpt_path: Path | None = None) -> Foreign:
        model = Foreign()
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        runs = trainer(folder, BatchNormConversion(), swa, keep, epochs=epochs)
        runs.fit(model, loader(), ckpt_path=ckpt_path, weights_only=False)
        return model

    run(tmp_path / "whole", 5)
    resumed = run(tmp_path / "resumed", 5, tmp_path / "whole" / f"epoch={at}.ckpt")
    assert same(statistics(resumed), statistics(Foreign()))
    assert len(frozen(resumed)) == 2
    assert not torch.equal(resumed.backbone[0].weight, make_net()[0].weight)


# tests_pytorch/utilities/test_model_helpers.py, models/test_hooks.py


def test_modes_that_are_kept_by_name_come_back_to_converted_layers() -> None:
    """Lightning utilities/test_model_helpers.py::test_module_mode_restore, ::test_module_mode_clear."""
    net = converted("original").train()
    net[0].eval()
    modes = _ModuleMode()
    modes.capture(net)
    expected = {name: module.training for name, module in net.named_modules()}
    net.eval()
    modes.restore(net)
    assert {name: module.training for name, module in net.named_modules()} == expected


@pytest.mark.parametrize("affine", AFFINES)
def test_validation_between_steps_leaves_modes_and_frozen_statistics_as_they_were(
    affine: Affine, tmp_path: Path
) -> None:
    """Lightning models/test_hooks.py::test_train_eval_mode_restored: a part in eval mode stays so after validation."""

    class Watched(Foreign):
        modes: list[tuple[bool, ...]]

        def on_train_start(self) -> None:
            self.modes = []
            self.backbone[2].eval()

        def on_train_batch_start(self, *_: Any) -> None:
            self.modes.append(tuple(module.training for module in self.backbone))

    model = Watched()
    runs = trainer(tmp_path, BatchNormConversion(fbn.Freeze(affine)), epochs=2, val_check_interval=2)
    runs.fit(model, loader(), loader())
    assert set(model.modes) == {tuple(i != 2 for i in range(8))}
    assert len(model.modes) == 8
    assert same(statistics(model), statistics(Foreign()))
