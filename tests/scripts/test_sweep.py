"""A sample of the timm sweep (`make sweep` runs all of it), and faults that its checks must catch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers.frozen import FrozenBatchNorm, FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import checks
import sweep_timm
from checks import CHECKS, check

pytest.importorskip("timm")

# One net a timm module, small ones, and among them every kind of BN and of place that timm puts it in.
SAMPLE = {
    "byobnet": "test_byobnet",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "dla": "dla46x_c",
    "efficientnet": "test_efficientnet",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "fasternet": "fasternet_t0",
    "ghostnet": "ghostnet_050",
    "hgnet": "hgnetv2_b0",
    "inception_next": "inception_next_atto",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "maxxvit": "test_coatnet",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit": "mobilevit_xxs",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "senet": "legacy_seresnet18",
    "shvit": "shvit_s1",
    "starnet": "starnet_s050",
    "vovnet": "ese_vovnet19b_slim_dw",
}
FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {}


def fault(caught_by: str) -> Callable[[Callable[[pytest.MonkeyPatch], None]], Callable[[pytest.MonkeyPatch], None]]:
    def register(plant: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
        FAULTS[plant.__name__] = (caught_by, plant)
        return plant

    return register


def replace_forward(patch: pytest.MonkeyPatch, change: Callable[[FrozenBatchNorm, Tensor], Tensor]) -> None:
    right = FrozenBatchNorm.forward
    patch.setattr(FrozenBatchNorm, "forward", lambda self, x: change(self, right(self, x)))


@fault("found")
def a_layer_is_overlooked(patch: pytest.MonkeyPatch) -> None:
    find = fbn.conversion.plan.find_batch_norms
    patch.setattr(fbn.conversion.plan, "find_batch_norms", lambda *args, **kwargs: find(*args, **kwargs)[:-1])


@fault("converted")
def a_layer_is_planned_and_not_swapped(patch: pytest.MonkeyPatch) -> None:
    build = fbn.convert.__globals__["_build"]
    patch.setitem(fbn.convert.__globals__, "_build", lambda *args: build(*args)[:-1])


@fault("eval_equal")
def the_output_is_off_by_one_bit_or_so(patch: pytest.MonkeyPatch) -> None:
    replace_forward(patch, lambda layer, y: y * (1 + 1e-6))


@fault("train_equal")
def training_mode_computes_something_else(patch: pytest.MonkeyPatch) -> None:
    replace_forward(patch, lambda layer, y: y * 1.01 if layer.training else y)


@fault("still")
def the_statistics_move_in_training(patch: pytest.MonkeyPatch) -> None:
    def change(layer: FrozenBatchNorm, y: Tensor) -> Tensor:
        if layer.training and torch.is_grad_enabled():  # else convert itself would refuse
            layer.running_mean.add_(1e-7)
        return y

    replace_forward(patch, change)


@fault("gradients")
def the_gradient_is_that_of_another_function(patch: pytest.MonkeyPatch) -> None:
    replace_forward(patch, lambda layer, y: y.detach() + (y - y.detach()) * 1.001)


@fault("loads")
def a_checkpoint_is_not_taken_over(patch: pytest.MonkeyPatch) -> None:
    load = FrozenBatchNorm._load_from_state_dict

    def skip_bias(self: FrozenBatchNorm, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        load(self, state_dict | {prefix + "bias": self.bias.clone()}, prefix, *rest)

    patch.setattr(FrozenBatchNorm, "_load_from_state_dict", skip_bias)


@fault("reverts")
def revert_forgets_the_momentum(patch: pytest.MonkeyPatch) -> None:
    back = FrozenBatchNorm2d.to_batch_norm

    def forget(self: FrozenBatchNorm2d) -> nn.Module:
        bn = back(self)
        bn.momentum = 0.25
        return bn

    patch.setattr(FrozenBatchNorm2d, "to_batch_norm", forget)


@fault("reverts")
def revert_loses_the_count_of_batches(patch: pytest.MonkeyPatch) -> None:
    back = FrozenBatchNorm2d.to_batch_norm

    def forget(self: FrozenBatchNorm2d) -> nn.Module:
        bn = back(self)
        bn.num_batches_tracked.zero_()
        return bn

    patch.setattr(FrozenBatchNorm2d, "to_batch_norm", forget)


@pytest.mark.parametrize("name", SAMPLE.values(), ids=SAMPLE)
def test_the_family_is_converted_exactly_and_back(name: str) -> None:
    row = check(name)
    assert row["error"] == ""
    assert row["checks"] == dict.fromkeys(CHECKS, True)
    assert row["ok"]
    assert row["layers"] == sum(row["kinds"].values()) > 0


def test_the_sample_has_25_families_and_every_kind_of_batch_norm_in_timm() -> None:
    import timm

    kinds = set()
    for module, name in SAMPLE.items():
        assert name in timm.list_models(module=module)
        with torch.device("meta"):
            net = timm.create_model(name)
        kinds |= {type(m).__name__ for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert len(SAMPLE) >= 25
    assert kinds == {"BatchNorm1d", "BatchNorm2d", "BatchNormAct2d"}


def test_a_net_without_a_fault_passes_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "AFFINE_KINDS", ("none",))
    assert check("test_resnet")["checks"] == dict.fromkeys(CHECKS, True)


@pytest.mark.parametrize(("caught_by", "plant"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_caught_by_the_check_of_that_name(
    monkeypatch: pytest.MonkeyPatch, caught_by: str, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    monkeypatch.setattr(checks, "AFFINE_KINDS", ("none",))
    plant(monkeypatch)
    row = check("test_resnet")
    assert row["error"] == ""
    assert row["checks"][caught_by] is False
    assert not row["ok"]


def test_what_convert_itself_refuses_is_a_failed_row_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_forward(monkeypatch, lambda layer, y: y * 1.1)
    row = check("test_resnet")
    assert "outputs before and after differ by 0.1 of the largest value" in row["error"]
    assert not row["ok"]


def test_other_randomness_than_dropout_is_named_and_not_taken_for_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x) if self.training else x

    right = checks.build

    def build(name: str, seed: int) -> nn.Module:
        net = right(name, seed)
        net.act1 = Noise()
        return net

    monkeypatch.setattr(checks, "build", build)
    monkeypatch.setattr(checks, "AFFINE_KINDS", ("none",))
    row = check("test_resnet")
    assert row["random"] == ["act1 (Noise)"]
    assert row["checks"]["train_equal"] == row["checks"]["gradients"] == "other randomness"
    assert row["ok"]


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Three families of made-up sizes; the value tells whether a check of it succeeds."""
    import timm

    nets = {
        "a": [(20, "a_large", 3), (10, "a_small", 2)],
        "b": [(5, "b", 0)],
        "c": [(30, "c_large", 4), (8, "c_no", 0)],
    }
    good = {"a": True, "b": True, "c": True}

    def fake_check(name: str) -> dict[str, Any]:
        row = {"model": name, "parameters_million": 1.0, "layers": 2, "kinds": {"BatchNorm2d": 2}, "seconds": 0.1}
        return row | {"checks": {"loads": good[name[0]]}, "ok": good[name[0]], "error": ""}

    monkeypatch.setattr(timm, "list_modules", lambda: list(nets))
    monkeypatch.setattr(sweep_timm, "inventory", lambda module: iter(nets[module]))
    monkeypatch.setattr(sweep_timm, "check", fake_check)
    return good


def sweep(path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = sweep_timm.main(["--output", str(path), *more])
    return code, json.loads(path.read_text(encoding="utf-8"))


def test_the_sweep_takes_each_familys_smallest_net_with_bn_and_counts_those_without(
    tmp_path: Path, families: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = sweep(tmp_path / "sweep.json")
    assert code == 0
    assert [row["model"] for row in found["rows"]] == ["a_small", None, "c_large"]
    assert found["summary"]["without_bn"] == ["b"]
    assert "2 of 2 families with BN converted exactly, 4 layers" in capsys.readouterr().out
    assert "| c | c_large |" in (tmp_path / "sweep.md").read_text(encoding="utf-8")


def test_all_nets_but_those_over_the_limit_which_are_named(tmp_path: Path, families: dict[str, bool]) -> None:
    code, found = sweep(tmp_path / "sweep.json", "--all", "--max-parameters", "0.000025")
    assert code == 0
    assert [row["model"] for row in found["rows"]] == ["a_small", "a_large", None, "c_large"]
    assert found["summary"]["skipped"] == ["c_large"]
    assert found["summary"]["families"] == 1


def test_a_failed_family_makes_the_exit_code_1_and_is_checked_again_the_next_time(
    tmp_path: Path, families: dict[str, bool]
) -> None:
    families["c"] = False
    code, found = sweep(tmp_path / "sweep.json")
    assert code == 1
    assert found["summary"]["families_failed"] == ["c"]
    families["c"] = True
    code, found = sweep(tmp_path / "sweep.json", "--modules", "c")
    assert code == 0
    assert found["summary"]["line"] == "2 of 2 families with BN converted exactly, 4 layers"


def test_a_sweep_that_was_cut_off_goes_on_where_it_was(
    tmp_path: Path, families: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, asked = sweep_timm.check, []

    def cut_off(name: str) -> dict[str, Any]:
        asked.append(name)
        if asked.count("c_large") == 1 and name == "c_large":
            raise KeyboardInterrupt
        return right(name)

    monkeypatch.setattr(sweep_timm, "check", cut_off)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "sweep.json")
    sweep(tmp_path / "sweep.json")
    assert asked == ["a_small", "c_large", "c_large"]
    sweep(tmp_path / "sweep.json")  # a finished file is measured anew
    assert asked == ["a_small", "c_large", "c_large", "a_small", "c_large"]


def test_a_module_that_timm_does_not_have_is_an_error_that_lists_those_it_has(
    tmp_path: Path, families: dict[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep(tmp_path / "sweep.json", "--modules", "resent")
    assert "has no module resent; it has a, b, c" in capsys.readouterr().err
