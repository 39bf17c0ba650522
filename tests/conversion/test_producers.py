"""What feeds each BatchNorm layer, and which of its feeders can take its affine into their weight."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from finetune_bn.conversion.folding import as_carried_out
from finetune_bn.layers.folds import folds_in, unfolded
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import finetune_bn as fbn
from finetune_bn.conversion.producers import Feed, find_feeds, worth_folding
from finetune_bn.errors import FinetuneBNError, UnsupportedLayer
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.utilities.probe import Probe
from tests.models import Plain, PreActivation, build, settle
from tests.tools import untouched

IMAGES = (2, 3, 8, 8)


def feeds(model: nn.Module, *inputs: Tensor) -> dict[str, Feed]:
    with untouched(model):
        return find_feeds(model, find_batch_norms(model), [Probe("", inputs)])


def positions(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    return {name: feed.position for name, feed in feeds(model, *inputs).items()}


# Positions


def test_a_conv_or_linear_in_front_is_named() -> None:
    assert positions(*build("plain")) == {"bn1": "behind conv conv1", "bn2": "behind conv conv2"}
    assert positions(*build("head1d")) == {"neck": "behind linear linear"}
    assert positions(*build("volume")) == {"bn": "behind conv conv"}


def test_what_happens_between_modules_and_pools_are_told_apart() -> None:
    model = PreActivation()
    assert positions(model, torch.randn(2, 3, 8, 8)) == {
        "after_concat": "behind an operation between modules",
        "after_add": "behind an operation between modules",
        "after_pool": "behind pool pool",
    }


def test_a_shared_layer_stands_behind_several() -> None:
    assert positions(*build("tied"))["first.bn"] == "behind several"


def test_a_conv_that_is_called_twice_is_named_both_times() -> None:
    assert positions(*build("conv_twice")) == {"bn1": "behind conv conv", "bn2": "behind conv conv"}


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.ReLU(), nn.SiLU(inplace=True)])
def test_an_activation_in_between_is_named_also_where_it_works_in_place(act: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), act, nn.BatchNorm2d(4))
    assert positions(model, torch.randn(1, 3, 4, 4)) == {"2": f"behind {type(act).__name__} 1"}


def test_a_change_in_place_by_a_function_is_an_operation_between_modules() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.relu_(self.conv(x)))

    assert positions(InPlace(), torch.randn(1, 3, 4, 4)) == {"bn": "behind an operation between modules"}


def test_a_module_with_nothing_but_an_empty_child_is_no_leaf() -> None:
    class EmptyChild(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.shortcut = nn.Conv2d(3, 4, 1), nn.Sequential()

        def forward(self, x: Tensor) -> Tensor:
            return self.shortcut(self.conv(x)) * 2

    model = nn.Sequential(EmptyChild(), nn.BatchNorm2d(4))
    assert positions(model, torch.randn(1, 3, 4, 4)) == {"1": "behind an operation between modules"}


# Pairs


class Net(nn.Module):
    """conv - BN with something special; `call` is its forward."""

    def __init__(self, call: Callable[..., Tensor], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1) if conv is None else conv
        self.bn, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def in_place(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    y.mul_(2)
    return net.bn(y)


def in_place_behind(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = net.bn(y)
    y.add_(1)
    return z


def through_a_view(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.bn(y) + y[:, :1].exp()


WRONG: dict[str, tuple[Callable[[Net, Tensor], Tensor], str]] = {
    "conv runs twice": (lambda n, x: n.bn(n.conv(n.conv(x))), "conv runs 2 times"),
    "norm runs twice": (lambda n, x: n.bn(n.bn(n.conv(x))), "runs 2 times"),
    "both run twice": (lambda n, x: n.bn(n.conv(n.bn(n.conv(x)))), "runs 2 times"),
    "two norms read it": (lambda n, x: n.bn(y := n.conv(x)) + n.other(y), "also used elsewhere (other)"),
    "a sum reads it": (lambda n, x: n.bn(y := n.conv(x)) + y, "also used elsewhere (add between modules)"),
    "read before": (lambda n, x: (y := n.conv(x)).mean() + n.bn(y), "also used elsewhere (mean between modules)"),
    "read through a view": (through_a_view, "also used elsewhere (exp between modules)"),
    "written to": (in_place, "also used elsewhere (mul_ between modules)"),
    "written to behind": (in_place_behind, "also used elsewhere (add_ between modules)"),
    "returned": (lambda n, x: (n.bn(y := n.conv(x)), y), "also used elsewhere (the model returns it)"),
    "returned in a dict": (lambda n, x: {"a": n.bn(y := n.conv(x)), "b": y[0]}, "the model returns it"),
    "sum": (lambda n, x: n.bn(n.conv(x) + x), "no convolution or linear map directly in front"),
    "activation": (lambda n, x: n.bn(F.relu(n.conv(x))), "no convolution"),
    "activation in place": (lambda n, x: n.bn(F.relu_(n.conv(x))), "also used elsewhere (relu_ between modules)"),
    "norm before conv": (lambda n, x: n.conv(n.bn(x)), "no convolution"),
    "channels mixed": (lambda n, x: n.bn(n.conv(x).transpose(1, 2).reshape(2, 3, 8, 8)), "no convolution"),
    "channels turned": (lambda n, x: n.bn(n.conv(x[:, :, :3, :3]).transpose(1, 2)), "its channels are not those of"),
    "part of it": (lambda n, x: n.bn(n.conv(x)[:, :, 1:]), "its channels are not those of conv"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_pair_is_told_with_the_reason(case: str) -> None:
    call, reason = WRONG[case]
    feed = feeds(Net(call), torch.randn(IMAGES))["bn"]
    assert feed.producer == ""
    assert reason in feed.why_not


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


def hooked() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    conv.register_forward_hook(lambda m, a, y: None)
    return conv


def patched() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    conv.forward = lambda x: F.conv2d(x, conv.weight, padding=1)  # type: ignore[method-assign]
    return conv


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (lambda: Standardized(3, 3, 3), "Standardized, whose forward is not known"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(3, 3, 3, padding=1)), "parametrized tensors"),
        (hooked, "has hooks"),
        (patched, "has a forward patched in"),
        (lambda: pytest.importorskip("timm.layers").StdConv2d(3, 3, 3, padding=1), "StdConv2d, whose forward"),
    ],
)
def test_producers_that_compute_something_of_their_own_are_left(conv: Callable[[], nn.Module], reason: str) -> None:
    feed = feeds(Net(lambda n, x: n.bn(n.conv(x)), conv()), torch.randn(IMAGES))["bn"]
    assert not feed.producer
    assert reason in feed.why_not


def test_producers_that_share_their_weight_are_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, bias=False))
    model[2].weight = model[0].weight
    assert "shares its weight" in feeds(model, torch.randn(IMAGES))["1"].why_not


def test_pairs_are_found_with_their_sizes() -> None:
    model, x = build("plain")
    assert feeds(model, x) == {
        "bn1": Feed("behind conv conv1", "conv1", "", 3 * 6 * 9, 6 * 7 * 7),
        "bn2": Feed("behind conv conv2", "conv2", "", 6 * 8 * 9, 8 * 5 * 5),
    }


@pytest.mark.parametrize("view", ["flatten", "transpose"])
def test_a_view_between_linear_and_norm_that_keeps_the_channels_is_seen_through(view: str) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = nn.Linear(5, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if view == "flatten":
                return self.bn(y.flatten(0, 1)).reshape_as(y)
            return self.bn(y.transpose(1, 2))

    x = torch.randn(3, 6, 5, dtype=torch.float64)
    model = fbn.convert(settle(Tokens().double()), fbn.Freeze("original", fold="always"), example_input=x)
    assert len(folds_in(model)) == 1
    actual = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with unfolded(model):
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_tokens_that_are_normalized_as_channels_are_no_pair() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    assert "its channels are not those of 0" in feeds(model, torch.randn(3, 6, 5))["1"].why_not


def test_a_converted_and_folded_model_gives_the_same_pairs() -> None:
    model, x = build("plain")
    before = feeds(model, x)
    fbn.convert(model, fbn.Freeze("merged", fold="always"), example_input=x)
    assert len(folds_in(model)) == 2
    assert feeds(model, x) == before


@pytest.mark.parametrize(
    ("net", "pairs", "layers"), [("test_resnet", 15, 15), ("levit_128s", 50, 52), ("tf_efficientnet_lite0", 49, 49)]
)
def test_timm_nets_are_paired_without_an_example_input(net: str, pairs: int, layers: int) -> None:
    timm = pytest.importorskip("timm")
    plan = fbn.plan(timm.create_model(net), fbn.Freeze("original", fold="always"))
    assert len(plan.rows) == layers
    assert sum(bool(row.folded_into) for row in plan.rows) == pairs
    assert all(bool(row.folded_into) != bool(row.not_folded) for row in plan.rows)


# The plan and its execution


def test_auto_folds_a_learnable_scale_always_and_a_constant_one_where_the_activation_is_large() -> None:
    small, large = Feed("", "conv", "", 1000, 100), Feed("", "conv", "", 1000, 1000)
    assert [worth_folding(feed, learnable=True) for feed in (small, large)] == [True, True]
    assert [worth_folding(feed, learnable=False) for feed in (small, large)] == [False, True]
    model, x = build("plain")
    folded = {a: [bool(r.folded_into) for r in fbn.plan(model, fbn.Freeze(a), x).rows] for a in ("none", "original")}
    assert folded == {"none": [True, True], "original": [True, True]}
    plan = fbn.plan(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)), fbn.Freeze("none"), torch.randn(2, 64))
    assert plan.rows[0].not_folded == "its activation is small beside the weight"


def test_never_and_noise_are_not_folded_and_only_the_second_is_told() -> None:
    model, x = build("plain")
    assert [r.not_folded for r in fbn.plan(model, fbn.Freeze(fold="never"), x).rows] == ["", ""]
    rows = fbn.plan(model, fbn.Freeze(noise=8), x).rows
    assert [(r.folded_into, r.not_folded) for r in rows] == [("", "it draws its noise anew for each batch")] * 2
    fbn.convert(model, fbn.Freeze(noise=8), example_input=x)
    assert not folds_in(model)


def test_without_a_probe_input_nothing_is_folded_and_the_plan_says_so() -> None:
    model = Plain()
    plan = fbn.plan(model, fbn.Freeze("original"))
    assert [(r.folded_into, r.not_folded) for r in plan.rows] == [("", "no probe input reached it")] * 2
    assert "- (no probe input reached it)" in str(plan)
    assert not folds_in(fbn.convert(model, plan))


def test_always_is_an_error_only_where_not_one_layer_can_be_folded() -> None:
    model, x = PreActivation(), torch.randn(2, 3, 8, 8)
    with untouched(model), pytest.raises(UnsupportedLayer, match=r"fold: got 'always'.*3 x no convolution"):
        fbn.convert(model, fbn.Freeze(fold="always"), example_input=x)
    with pytest.raises(UnsupportedLayer, match="no probe input"):
        fbn.plan(Plain(), fbn.Freeze(fold="always"))
    both = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), model)
    plan = fbn.plan(both, fbn.Freeze(fold="always"), x)
    assert [r.folded_into for r in plan.rows] == ["0", "", "", ""]


def test_the_table_shows_what_is_folded_into_what_and_why_not() -> None:
    both = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), PreActivation())
    lines = str(fbn.plan(both, fbn.Freeze("merged"), torch.randn(2, 3, 8, 8))).splitlines()
    assert lines[0].endswith("; 1 folded")
    assert "folded into" in lines[1]
    assert "- (no convolution or linear map directly in front)" in lines[-1]


def test_a_word_that_is_none_of_the_three_is_refused() -> None:
    with pytest.raises(FinetuneBNError, match=r"fold: got 'yes'; allowed: 'auto', 'always', 'never'"):
        fbn.Freeze(fold="yes")  # type: ignore[arg-type]


def test_a_stored_plan_is_replayed_on_a_new_model_without_a_probe() -> None:
    model, x = build("plain")
    stored = fbn.plan(model, fbn.Freeze("original"), x).to_dict()
    fresh = fbn.convert(settle(Plain()), fbn.Plan.from_dict(stored))
    assert len(folds_in(fresh)) == 2
    for row in stored["rows"]:  # as written before there was folding
        del row["folded_into"], row["not_folded"], row["action"]["fold"]
    fresh = fbn.convert(settle(Plain()), fbn.Plan.from_dict(stored))
    assert not folds_in(fresh)


def test_a_stored_pair_that_no_longer_fits_is_named_and_left(caplog: pytest.LogCaptureFixture) -> None:
    model, x = build("plain")
    plan = fbn.plan(model, fbn.Freeze("original"), x)
    model.conv1.register_forward_hook(lambda m, a, y: None)
    with caplog.at_level(logging.WARNING, "finetune_bn"):
        fbn.convert(model, plan, example_input=x)
    assert "bn1 is not folded into conv1: that has hooks" in caplog.text
    assert [fold.norm_name for fold in folds_in(model)] == ["bn2"]
    assert [r.folded_into for r in as_carried_out(plan, model).rows] == ["", "conv2"]


class TrainsOtherwise(nn.Module):
    """Reads the result of `conv1` where gradients are on, which a probe without them does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.bn2(self.conv2(self.bn1(y)))
        return z + y.mean() if torch.is_grad_enabled() else z


@pytest.mark.parametrize("double", [False, True])
def test_a_pair_that_changes_outputs_or_gradients_is_undone_and_named(
    caplog: pytest.LogCaptureFixture, double: bool
) -> None:
    x = torch.randn(IMAGES).to(torch.float64 if double else torch.float32)
    model = settle(TrainsOtherwise()).to(x.dtype)
    vanilla = copy.deepcopy(model).eval()
    plan = fbn.plan(model, fbn.Freeze("original"), x)
    assert [row.folded_into for row in plan.rows] == ["conv1", "conv2"]
    with caplog.at_level(logging.WARNING, "finetune_bn"):
        fbn.convert(model, plan, example_input=x)
    assert "not folded, as outputs or gradients would change: bn1 into conv1" in caplog.text
    assert [fold.norm_name for fold in folds_in(model)] == ["bn2"]
    carried_out = as_carried_out(plan, model)
    assert [row.folded_into for row in carried_out.rows] == ["", "conv2"]
    assert "would change with conv1" in carried_out.rows[0].not_folded
    torch.testing.assert_close(model(x), vanilla(x), rtol=1e-4, atol=1e-4)
