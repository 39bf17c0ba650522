"""BatchNormConversion in Trainers and with LightningModules that know nothing of it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, replay
from finetune_bn.errors import FinetuneBNError, NoBatchNormMatched
from finetune_bn.layers import FrozenBatchNorm
from finetune_bn.layers.frozen import Affine


def make_net() -> nn.Module:
    """Return a small convolutional net whose statistics and affine are not those of a fresh layer."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    for layer in (net[1], net[4]):
        nn.init.normal_(layer.running_mean, 0.0, 0.3)
        nn.init.uniform_(layer.running_var, 0.5, 2.0)
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, 0.0, 0.3)
    return net


class Foreign(pl.LightningModule):
    """A LightningModule as somebody else wrote it; `where` says when it builds its network."""

    def __init__(self, where: str = "init", lr: float = 0.05) -> None:
        super().__init__()
        self.where, self.lr = where, lr
        self.built = 0
        if where == "init":
            self._build()

    def _build(self) -> None:
        if not self.built:
            self.backbone = make_net()
            self.head = nn.Linear(6, 3)
            self.built += 1

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self._build()

    def configure_model(self) -> None:
        if self.where == "configure_model":
            self._build()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def loader(n: int = 16, batch: int = 4) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(3 + torch.randn(n, 3, 8, 8, generator=g), torch.arange(n) % 3), batch)


def trainer(tmp_path: Path, *callbacks: Callback, epochs: int = 2, **kwargs: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if not any(isinstance(c, ModelCheckpoint) for c in callbacks):
        quiet["enable_checkpointing"] = False
    return pl.Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=list(callbacks), **quiet | kwargs)


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items() if "running" in k or "num_batches" in k}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def frozen(module: nn.Module) -> list[FrozenBatchNorm]:
    return [m for m in module.modules() if isinstance(m, FrozenBatchNorm)]


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_any_module_is_converted_before_its_optimizer_whenever_it_builds_its_net(where: str, tmp_path: Path) -> None:
    model = Foreign(where)
    callback = BatchNormConversion(fbn.Freeze("merged"))
    run = trainer(tmp_path, callback)
    run.fit(model, loader(), loader())
    assert len(frozen(model)) == 2
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert all(id(m.weight) in optimized and id(m.bias) in optimized for m in frozen(model))
    assert model.built == 1
    assert callback.plan is not None
    assert len(callback.plan.rows) == 2
    # The module's hooks are its own again: a copy or a pickle of it carries nothing of ours.
    assert not {"configure_model", "on_load_checkpoint"} & model.__dict__.keys()


def test_statistics_do_not_move_in_fit_and_do_move_without_the_callback(tmp_path: Path) -> None:
    model, control = Foreign(), Foreign()
    before = statistics(model)
    trainer(tmp_path, BatchNormConversion()).fit(model, loader(), loader())
    assert same(before, statistics(model))
    trainer(tmp_path).fit(control, loader(), loader())
    assert not same(before, statistics(control))


def test_module_argument_limits_the_conversion_and_names_are_relative_to_it(tmp_path: Path) -> None:
    model = Foreign()
    rules = fbn.Rules([("1", fbn.Keep()), ("*", fbn.Freeze())])
    trainer(tmp_path, BatchNormConversion(rules, module="backbone")).fit(model, loader())
    assert isinstance(model.backbone[1], nn.BatchNorm2d)
    assert isinstance(model.backbone[4], FrozenBatchNorm)


def test_unknown_module_is_an_error_that_lists_the_parts(tmp_path: Path) -> None:
    with pytest.raises(FinetuneBNError, match=r"module: got 'net'.*\['backbone', 'head'\]"):
        trainer(tmp_path, BatchNormConversion(module="net")).fit(Foreign(), loader())


def test_a_model_without_batch_norm_is_an_error(tmp_path: Path) -> None:
    model = Foreign()
    model.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NoBatchNormMatched, match="a model with BatchNorm layers"):
        trainer(tmp_path, BatchNormConversion()).fit(model, loader())


def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(FinetuneBNError, match=r"policy: got .*Freeze.*parentheses"):
        BatchNormConversion(fbn.Freeze)  # type: ignore[arg-type]
    with pytest.raises(FinetuneBNError, match="watch_every_n_steps: got -1"):
        BatchNormConversion(watch_every_n_steps=-1)


def test_a_second_run_with_the_same_trainer_converts_nothing_twice(tmp_path: Path) -> None:
    model = Foreign()
    callback = BatchNormConversion()
    run = trainer(tmp_path, callback)
    run.fit(model, loader(), loader())
    layers = frozen(model)
    run.test(model, loader(), verbose=False)
    run.predict(model, loader())
    assert [id(m) for m in frozen(model)] == [id(m) for m in layers]


def test_an_exception_leaves_no_hook_behind(tmp_path: Path) -> None:
    class Breaks(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise RuntimeError("third party")

    model = Breaks()
    with pytest.raises(RuntimeError, match="third party"):
        trainer(tmp_path, BatchNormConversion(watch_every_n_steps=1)).fit(model, loader())
    assert not {"configure_model", "on_load_checkpoint"} & model.__dict__.keys()
    assert not any(layer._forward_hooks for layer in frozen(model))


# ---- checkpoints


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_crash_and_resume_ends_where_the_uninterrupted_run_ends(affine: Any, tmp_path: Path) -> None:
    whole = Foreign()
    trainer(tmp_path, BatchNormConversion(fbn.Freeze(affine)), epochs=3).fit(whole, loader())
    first = Foreign()
    keep = ModelCheckpoint(tmp_path, filename="first")
    trainer(tmp_path, BatchNormConversion(fbn.Freeze(affine)), keep, epochs=1).fit(first, loader())
    resumed = Foreign()
    run = trainer(tmp_path, BatchNormConversion(fbn.Freeze(affine)), epochs=3)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "first.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    assert not same(first.state_dict(), resumed.state_dict())


def saved(tmp_path: Path, policy: fbn.Policy, module: str | None = None) -> tuple[Path, Foreign]:
    model = Foreign()
    keep = ModelCheckpoint(tmp_path, filename="saved")
    trainer(tmp_path, BatchNormConversion(policy, module=module), keep, epochs=1).fit(model, loader())
    return tmp_path / "saved.ckpt", model


@pytest.mark.parametrize("module", [None, "backbone"])
def test_resuming_under_another_policy_replays_the_checkpoints_and_warns(module: str | None, tmp_path: Path) -> None:
    path, _ = saved(tmp_path, fbn.Freeze("merged"), module)
    resumed = Foreign()
    run = trainer(tmp_path, BatchNormConversion(fbn.Freeze("none")), epochs=2)
    with pytest.warns(UserWarning, match="another policy than this run asks for"):
        run.fit(resumed, loader(), ckpt_path=path)
    assert {layer.affine_kind for layer in frozen(resumed)} == {"merged"}


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_the_plan_is_replayed_in_every_verb_that_loads_a_checkpoint(verb: str, tmp_path: Path) -> None:
    path, model = saved(tmp_path, fbn.Freeze("merged"))
    loaded = Foreign()
    run = trainer(tmp_path, BatchNormConversion(fbn.Freeze("merged")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(run, verb)(loaded, loader(), ckpt_path=path)
    assert not any("another policy" in str(w.message) for w in caught)
    assert {layer.affine_kind for layer in frozen(loaded)} == {"merged"}
    assert same(loaded.state_dict(), model.state_dict())


@pytest.mark.parametrize("affine", ["none", "merged"])
def test_a_checkpoint_loads_into_the_module_without_the_callback_and_computes_the_same(
    affine: Any, tmp_path: Path
) -> None:
    path, model = saved(tmp_path, fbn.Freeze(affine))
    plain = Foreign.load_from_checkpoint(path, weights_only=True)
    assert isinstance(plain.backbone[1], nn.BatchNorm2d)
    x = next(iter(loader()))[0]
    torch.testing.assert_close(plain.eval()(x), model.eval()(x))


def test_replay_in_on_load_checkpoint_gives_back_the_converted_module(tmp_path: Path) -> None:
    class Own(Foreign):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            assert replay(checkpoint, self)

    path, model = saved(tmp_path, fbn.Freeze("merged"), module="backbone")
    loaded = Own.load_from_checkpoint(path, weights_only=True)
    assert {layer.affine_kind for layer in frozen(loaded)} == {"merged"}
    assert same(loaded.state_dict(), model.state_dict())
    assert not replay({"state_dict": {}}, Foreign())


def test_a_checkpoint_of_another_module_is_an_error_that_says_so(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, fbn.Freeze())
    other = Foreign()
    other.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NoBatchNormMatched, match="It was made for another model"):
        trainer(tmp_path, BatchNormConversion()).test(other, loader(), ckpt_path=path, verbose=False)


def test_a_checkpoint_of_a_part_that_the_module_does_not_have_is_an_error_that_says_so(tmp_path: Path) -> None:
    class Renamed(Foreign):
        def _build(self) -> None:
            self.net, self.head = make_net(), nn.Linear(6, 3)

    path, _ = saved(tmp_path, fbn.Freeze(), module="backbone")
    with pytest.raises(NoBatchNormMatched, match="ckpt_path: got 'backbone'; allowed: a checkpoint of the same"):
        trainer(tmp_path, BatchNormConversion()).test(Renamed(), loader(), ckpt_path=path, verbose=False)


def test_a_part_that_is_a_batch_norm_itself_is_replaced_in_its_parent_and_replayed(tmp_path: Path) -> None:
    path, model = saved(tmp_path, fbn.Freeze("shift"), module="backbone.1")
    assert [type(layer).__name__ for layer in (model.backbone[1], model.backbone[4])] == [
        "FrozenBatchNorm2d", "BatchNorm2d"
    ]  # fmt: skip
    loaded = Foreign()
    assert replay(torch.load(path, weights_only=True), loaded)
    assert isinstance(loaded.backbone[1], FrozenBatchNorm)
    assert isinstance(loaded.backbone[4], nn.BatchNorm2d)


# ---- beside Lightning's own callbacks (each of these moves or resets live BatchNorm)


class FinetuningScheduler(Callback):
    """By its name finetuning-scheduler's, which lists the parameters when it is set up."""


def test_a_schedule_of_phases_in_front_of_the_conversion_is_an_error(tmp_path: Path) -> None:
    # finetuning-scheduler: 20 of 31 phases held parameters that were gone.
    with pytest.raises(FinetuneBNError, match="BatchNormConversion before FinetuningScheduler"):
        trainer(tmp_path, FinetuningScheduler(), BatchNormConversion()).fit(Foreign(), loader())


@pytest.mark.parametrize("affine", ["none", "shift", "merged"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_weight_averaging_averages_the_converted_net_wherever_it_stands(
    where: str, first: bool, affine: Affine, tmp_path: Path
) -> None:
    model, average = Foreign(where), WeightAveraging()
    before = statistics(Foreign())
    order: list[Callback] = [average, BatchNormConversion(fbn.Freeze(affine))]
    trainer(tmp_path, *(order if first else order[::-1])).fit(model, loader())
    assert len(frozen(model)) == 2
    if affine != "merged":
        assert same(statistics(model), before)
    start = make_net()
    assert not torch.equal(model.backbone[0].weight, start[0].weight)  # the average of what was trained


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_may_stand_in_front_too(first: bool, tmp_path: Path) -> None:
    models = []
    for order in (True, False) if first else (False, True):
        model = Foreign()
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        both: list[Callback] = [swa, BatchNormConversion()]
        trainer(tmp_path, *(both if order else both[::-1]), epochs=3).fit(model, loader())
        models.append(model)
    assert same(models[0].state_dict(), models[1].state_dict())
    assert len(frozen(models[0])) == 2


def test_stochastic_weight_averaging_leaves_frozen_statistics_alone_and_resets_live_ones(tmp_path: Path) -> None:
    model, control = Foreign(), Foreign()
    before = statistics(model)
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, BatchNormConversion(), swa, epochs=4).fit(model, loader())
    assert same(before, statistics(model))
    for layer in (control.backbone[1], control.backbone[4]):
        layer.eval()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, swa, epochs=4).fit(control, loader())
    assert not same(before, statistics(control))


@pytest.mark.parametrize("first", [True, False])
def test_backbone_finetuning_cannot_move_frozen_statistics(first: bool, tmp_path: Path) -> None:
    model, control = Foreign(), Foreign()
    before = statistics(model)
    # With BackboneFinetuning alone the statistics move, already while the backbone counts as frozen.
    trainer(tmp_path, BackboneFinetuning(1, verbose=False), epochs=3).fit(control, loader())
    assert not same(before, statistics(control))
    order: list[Callback] = [BatchNormConversion(fbn.Freeze("none")), BackboneFinetuning(1, verbose=False)]
    trainer(tmp_path, *(order if first else order[::-1]), epochs=3).fit(model, loader())
    assert same(before, statistics(model))
    assert not any(p.requires_grad for layer in frozen(model) for p in layer.parameters())
    weight = make_net()[0].weight
    assert not torch.equal(model.backbone[0].weight, weight)  # the convolutions were trained after the unfreezing


class ThreeStages(BaseFinetuning):
    """The stages of Lightning's example computer_vision_fine_tuning.py: the head, the last layers too, then all."""

    def __init__(self, train_bn: bool) -> None:
        super().__init__()
        self.train_bn = train_bn

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        self.freeze(pl_module.backbone, train_bn=self.train_bn)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch in (1, 2):
            part = pl_module.backbone[-5:] if epoch == 1 else pl_module.backbone[:-5]
            self.unfreeze_and_add_param_group(part, optimizer, train_bn=self.train_bn)


@pytest.mark.parametrize("affine", ["none", "original"])
@pytest.mark.parametrize("train_bn", [False, True])
def test_the_three_stages_of_lightnings_fine_tuning_example_move_no_frozen_statistics(
    train_bn: bool, affine: Affine, tmp_path: Path
) -> None:
    model, control = Foreign(), Foreign()
    before = statistics(model)
    trainer(tmp_path, ThreeStages(train_bn), epochs=4).fit(control, loader())
    assert not same(before, statistics(control))  # without the conversion they move, asked to stay or not
    trainer(tmp_path, BatchNormConversion(fbn.Freeze(affine)), ThreeStages(train_bn), epochs=4).fit(model, loader())
    assert same(before, statistics(model))
    x = next(iter(loader()))[0]
    assert torch.equal(model.train()(x), model.eval()(x))
    start = make_net()
    assert not torch.equal(model.backbone[0].weight, start[0].weight)  # trained in the third stage
    assert not torch.equal(model.backbone[3].weight, start[3].weight)  # and in the second


def test_lightning_freeze_without_train_bn_normalizes_by_the_batch_and_the_conversion_ends_that() -> None:
    # style.md trap 1: BaseFinetuning.freeze(train_bn=False) sets track_running_stats=False and nothing else.
    x = next(iter(loader()))[0]
    net = make_net().train()
    BaseFinetuning.freeze(net, train_bn=False)
    lightning_train, lightning_eval = net(x), copy.deepcopy(net).eval()(x)
    assert not torch.allclose(lightning_train, lightning_eval, atol=0.1)
    net = fbn.convert(net, fbn.Freeze(), example_input=x).train()
    assert torch.equal(net(x), lightning_eval)


def test_affine_that_another_callback_sets_free_is_held_again(tmp_path: Path) -> None:
    class Meddles(Callback):
        def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.requires_grad_(True)

    model = Foreign()
    gamma = model.backbone[1].weight.detach().clone()
    with pytest.warns(UserWarning, match="they are held again"):
        trainer(tmp_path, BatchNormConversion(fbn.FreezeAffine()), Meddles()).fit(model, loader())
    assert torch.equal(model.backbone[1].weight, gamma)


def test_meddling_cannot_bring_frozen_constants_to_life(tmp_path: Path) -> None:
    class Meddles(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            pl_module.requires_grad_(True)
            pl_module.train()

    model = Foreign()
    before = {k: v.clone() for k, v in model.backbone[1].state_dict().items()}
    trainer(tmp_path, BatchNormConversion(), Meddles()).fit(model, loader(), loader())
    assert same(before, dict(model.backbone[1].state_dict()))


def test_no_warning_of_modules_in_eval_mode_as_bn_eval_gives_on_every_run(tmp_path: Path) -> None:
    model = Foreign()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, BatchNormConversion()).fit(model, loader(), loader())
    assert not any("eval mode" in str(w.message) for w in caught)


def test_sync_batchnorm_leaves_frozen_layers_alone(tmp_path: Path) -> None:
    model = Foreign()
    before = statistics(model)
    run = trainer(tmp_path, BatchNormConversion(), strategy="ddp", devices=1, sync_batchnorm=True, epochs=1)
    run.fit(model, loader())
    assert len(frozen(model)) == 2
    assert same(before, statistics(model))


def test_mixed_precision_keeps_the_activations_in_bfloat16(tmp_path: Path) -> None:
    seen: list[torch.dtype] = []
    model = Foreign()
    model.backbone[4].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    trainer(tmp_path, BatchNormConversion(), precision="bf16-mixed", epochs=1).fit(model, loader())
    # The first entries are the proof, run without autocast; hooks move along with the layer.
    assert seen[-1] == torch.bfloat16


# ---- collapse


class Collapsed(Foreign):
    """A network that has gone into saturation: the last layer returns the same for every image."""

    def on_fit_start(self) -> None:
        with torch.no_grad():
            self.backbone[3].weight.zero_()


def test_a_collapsed_net_is_reported_once_with_the_remedy(tmp_path: Path) -> None:
    callback = BatchNormConversion(watch_every_n_steps=1)
    with pytest.warns(
        UserWarning, match=r"has collapsed.*same for all images.*learning rate about 5 times smaller"
    ) as w:
        trainer(tmp_path, callback).fit(Collapsed(lr=1e-12), loader(), loader())
    assert callback.collapsed
    assert sum("has collapsed" in str(x.message) for x in w) == 1


def test_nan_features_are_reported(tmp_path: Path) -> None:
    callback = BatchNormConversion(watch_every_n_steps=1)
    with pytest.warns(UserWarning, match="NaN or infinite"):
        trainer(tmp_path, callback).fit(Foreign(lr=float("inf")), loader())
    assert callback.collapsed


@pytest.mark.parametrize("batch", [1, 4])
def test_a_healthy_net_is_not_reported_at_any_batch_size(batch: int, tmp_path: Path) -> None:
    callback = BatchNormConversion(watch_every_n_steps=1)
    trainer(tmp_path, callback).fit(Foreign(), loader(batch=batch), loader(batch=batch))
    assert callback.watch.spread is not None
    assert callback.watch.spread > 0.01
    assert not callback.collapsed


def test_zero_never_looks(tmp_path: Path) -> None:
    callback = BatchNormConversion(watch_every_n_steps=0)
    trainer(tmp_path, callback).fit(Collapsed(lr=1e-12), loader())
    assert callback.watch.spread is None


# ---- the callback and several runs


def test_a_callback_that_served_another_module_converts_the_next_one(tmp_path: Path) -> None:
    callback = BatchNormConversion()
    for where in ("configure_model", "configure_model", "setup", "init"):
        model = Foreign(where)
        trainer(tmp_path, callback, epochs=1).fit(model, loader())
        assert len(frozen(model)) == 2


def test_collapse_is_judged_anew_in_each_run(tmp_path: Path) -> None:
    callback = BatchNormConversion(watch_every_n_steps=1)
    for _ in range(2):
        with pytest.warns(UserWarning, match="has collapsed"):
            trainer(tmp_path, callback).fit(Collapsed(lr=1e-12), loader())
        trainer(tmp_path, callback).fit(Foreign(), loader())
        assert not callback.collapsed


@pytest.mark.parametrize(
    ("saved_policy", "own_policy"),
    [(fbn.Keep(), fbn.Freeze("original")), (fbn.Keep(), fbn.Freeze()), (fbn.Freeze(), fbn.Keep())],
    ids=str,
)
def test_a_resumed_run_has_the_layers_of_its_checkpoint_whatever_it_asks_for(
    saved_policy: fbn.Policy, own_policy: fbn.Policy, tmp_path: Path
) -> None:
    path, model = saved(tmp_path, saved_policy)
    resumed = Foreign()
    with pytest.warns(UserWarning, match="another policy than this run asks for"):
        trainer(tmp_path, BatchNormConversion(own_policy), epochs=2).fit(resumed, loader(), ckpt_path=path)
    assert [type(m) for m in resumed.modules()] == [type(m) for m in model.modules()]


def test_two_conversions_in_one_trainer_are_one_clear_error(tmp_path: Path) -> None:
    two = (BatchNormConversion(module="backbone"), BatchNormConversion())
    with pytest.raises(FinetuneBNError, match=r"one BatchNormConversion.*Rules treat parts differently"):
        trainer(tmp_path, *two).fit(Foreign(), loader())


def test_a_part_that_shares_a_layer_with_the_rest_is_refused(tmp_path: Path) -> None:
    model = Foreign()
    model.norm = model.backbone[1]
    with pytest.raises(FinetuneBNError, match=r"module: got .*is also norm"):
        trainer(tmp_path, BatchNormConversion(module="backbone")).fit(model, loader())
    assert isinstance(model.norm, nn.BatchNorm2d)
    trainer(tmp_path, BatchNormConversion(), epochs=1).fit(model, loader())
    assert isinstance(model.norm, FrozenBatchNorm)
    assert model.norm is model.backbone[1]


def test_a_hook_that_the_user_set_on_the_module_itself_is_there_afterwards(tmp_path: Path) -> None:
    model, calls = Foreign(), []
    own = calls.append
    model.on_load_checkpoint = own
    trainer(tmp_path, BatchNormConversion(), epochs=1).fit(model, loader())
    assert model.__dict__["on_load_checkpoint"] is own


def test_an_example_input_array_of_the_wrong_size_does_not_stop_the_training(tmp_path: Path) -> None:
    model = Foreign()
    model.example_input_array = torch.zeros(1, 1, 4, 4)
    trainer(tmp_path, BatchNormConversion(), epochs=1).fit(model, loader())
    assert len(frozen(model)) == 2


def test_what_is_about_to_be_trained_is_told_once_when_everything_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class PutsToSleep(Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module.backbone.eval()  # Lightning leaves modes as it finds them

    model = Foreign("configure_model")
    policy = fbn.Rules([("backbone.1", fbn.Freeze("shift")), ("*", fbn.Keep())])
    with caplog.at_level("INFO"):
        trainer(tmp_path, BatchNormConversion(policy), PutsToSleep()).fit(model, loader())
    (told,) = [record.getMessage() for record in caplog.records if "irregular" in record.getMessage()]
    assert told.startswith("BatchNormConversion: Foreign: 1 frozen, 1 live; 1 irregular")
    assert "irregular: backbone.4: in eval mode while the model is in training mode" in told
