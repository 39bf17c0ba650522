"""What feeds each BatchNorm layer, and which of its feeders can take its affine into their weight."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import finetune_bn as fbn
from finetune_bn.conversion.producers import Feed, find_feeds
from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers.frozen import FrozenBatchNorm
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


def test_pairs_are_found_with_the_number_of_images_from_which_sharing_backward_pays() -> None:
    model, x = build("plain")
    assert feeds(model, x) == {
        "bn1": Feed("behind conv conv1", "conv1", shares_with="conv1", shares_from=-(-(2**18) // (6 * 7 * 7))),
        "bn2": Feed("behind conv conv2", "conv2", shares_with="conv2", shares_from=-(-(2**18) // (8 * 5 * 5))),
    }


SHARED = {
    "a convolution called twice": (lambda n, x: n.bn(n.conv(x)) + n.conv(x), ""),
    "another reader": (lambda n, x: n.bn(y := n.conv(x)) + y, ""),
    "a view": (lambda n, x: n.bn(n.conv(x)[:, :, 1:]), "no convolution directly in front"),
    "an activation": (lambda n, x: n.bn(F.relu(n.conv(x))), "no convolution directly in front"),
    "changed in place": (lambda n, x: n.bn(F.relu_(n.conv(x))), "no convolution directly in front"),
    "a sum": (lambda n, x: n.bn(n.conv(x) + x), "no convolution directly in front"),
}


@pytest.mark.parametrize("case", SHARED)
def test_sharing_backward_asks_for_less_than_merging_and_says_why_it_cannot_be(case: str) -> None:
    call, reason = SHARED[case]
    feed = feeds(Net(call), torch.randn(IMAGES))["bn"]
    assert feed.producer == ""
    assert (feed.shares_with, feed.why_not_shared) == ("" if reason else "conv", reason)


@pytest.mark.parametrize("conv", [nn.Linear(8, 3), nn.ConvTranspose2d(3, 3, 3, padding=1)])
def test_linear_maps_and_transposed_convolutions_are_merged_and_do_not_share(conv: nn.Module) -> None:
    x = torch.randn(4, 8) if isinstance(conv, nn.Linear) else torch.randn(IMAGES)
    net = Net(lambda n, x: n.bn(n.conv(x)), conv)
    if isinstance(conv, nn.Linear):
        net.bn = nn.BatchNorm1d(3)
    feed = feeds(net, x)["bn"]
    assert feed.producer == "conv"
    assert feed.why_not_shared == f"conv is a {type(conv).__name__}, no convolution"


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
    model = settle(Tokens().double()).eval()
    assert feeds(model, x)["bn"].producer == "linear"
    expected = model(x)
    torch.testing.assert_close(fbn.fold(model, x)(x), expected, rtol=1e-10, atol=1e-10)


def test_tokens_that_are_normalized_as_channels_are_no_pair() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    assert "its channels are not those of 0" in feeds(model, torch.randn(3, 6, 5))["1"].why_not


def test_a_converted_model_gives_the_same_pairs() -> None:
    model, x = build("plain")
    before = feeds(model, x)
    fbn.convert(model, fbn.Freeze("merged", fold="always"), example_input=x)
    assert feeds(model, x) == before


@pytest.mark.parametrize(
    ("net", "pairs", "layers"), [("test_resnet", 15, 15), ("levit_128s", 4, 52), ("tf_efficientnet_lite0", 49, 49)]
)
def test_timm_nets_are_paired_without_an_example_input(net: str, pairs: int, layers: int) -> None:
    timm = pytest.importorskip("timm")
    plan = fbn.plan(timm.create_model(net), fbn.Freeze("original", fold="always"))
    assert len(plan.rows) == layers
    assert sum(bool(row.folded_into) for row in plan.rows) == pairs
    assert all(bool(row.folded_into) != bool(row.not_folded) for row in plan.rows)


# The plan and its execution


def test_only_a_trained_scale_has_something_to_share() -> None:
    model, x = build("plain")
    for policy in (fbn.Freeze("none"), fbn.Freeze("shift"), fbn.Freeze("original", fold="never"), fbn.Freeze(noise=8)):
        assert [(r.folded_into, r.not_folded) for r in fbn.plan(model, policy, x).rows] == [("", "")] * 2
    for affine in ("merged", "original"):
        assert [r.folded_into for r in fbn.plan(model, fbn.Freeze(affine), x).rows] == ["conv1", "conv2"]  # type: ignore[arg-type]


def test_the_plan_says_what_a_step_of_so_many_images_will_do_and_the_step_agrees() -> None:
    model = settle(pytest.importorskip("timm").create_model("test_resnet"))
    plan = fbn.plan(model, fbn.Freeze("original"), torch.randn(1, 3, 96, 96))
    fbn.convert(model, plan)
    counts = []
    for images in (1, 4, 8, 32):
        shared: list[bool] = []
        hooks = [
            module.register_forward_hook(lambda m, a, z, shared=shared: shared.append("_Shared" in str(z.grad_fn)))
            for module in model.modules()
            if isinstance(module, FrozenBatchNorm)
        ]
        model(torch.randn(images, 3, 96, 96))
        for hook in hooks:
            hook.remove()
        counts.append(plan.folded_in(images))
        assert sum(shared) == counts[-1]
    assert len(set(counts)) > 2


def test_without_a_probe_input_the_plan_says_that_it_cannot_tell() -> None:
    plan = fbn.plan(Plain(), fbn.Freeze("original"))
    assert [(r.folded_into, r.not_folded) for r in plan.rows] == [("", "no probe input reached it")] * 2
    assert "- (no probe input reached it)" in str(plan)


def test_always_is_warned_of_only_where_not_one_layer_can_share(caplog: pytest.LogCaptureFixture) -> None:
    model, x = PreActivation(), torch.randn(2, 3, 8, 8)
    with caplog.at_level(logging.WARNING, "finetune_bn"):
        fbn.plan(model, fbn.Freeze("none", fold="always"), x)  # keeps nothing, and has nothing to share
        assert not caplog.text
        fbn.plan(model, fbn.Freeze("original", fold="always"), x)
    assert "fold='always' changes nothing" in caplog.text
    assert "3 x no convolution directly in front" in caplog.text
    both = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), model)
    plan = fbn.plan(both, fbn.Freeze("merged", fold="always"), x)
    assert [r.folded_into for r in plan.rows] == ["0", "", "", ""]
    assert [r.folded_from for r in plan.rows] == [1, 0, 0, 0]


def test_the_table_shows_what_shares_with_what_and_why_not() -> None:
    both = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), PreActivation())
    lines = str(fbn.plan(both, fbn.Freeze("merged"), torch.randn(2, 3, 8, 8))).splitlines()
    assert lines[0].endswith("; 1 can share the backward pass of the convolution in front")
    assert "shares backward with" in lines[1]
    assert "0 (from 1366 images on)" in lines[3]
    assert "- (no convolution directly in front)" in lines[-1]


def test_a_word_that_is_none_of_the_three_is_refused() -> None:
    with pytest.raises(FinetuneBNError, match=r"fold: got 'yes'; allowed: auto, always, never"):
        fbn.Freeze(fold="yes")  # type: ignore[arg-type]


def test_a_stored_plan_is_replayed_on_a_new_model_without_a_probe() -> None:
    model, x = build("plain")
    stored = fbn.plan(model, fbn.Freeze("original", fold="never"), x).to_dict()
    fresh = fbn.convert(settle(Plain()), fbn.Plan.from_dict(stored))
    assert [m.fold for m in fresh.modules() if isinstance(m, FrozenBatchNorm)] == ["never"] * 2
    for row in stored["rows"]:  # as written before there was folding
        del row["folded_into"], row["not_folded"], row["folded_from"], row["action"]["fold"]
    fresh = fbn.convert(settle(Plain()), fbn.Plan.from_dict(stored))
    assert [m.fold for m in fresh.modules() if isinstance(m, FrozenBatchNorm)] == ["auto"] * 2


def test_another_mode_of_sharing_alone_is_a_change_of_the_policy() -> None:
    model, x = build("plain")
    for mode in ("never", "always", "auto"):
        fbn.convert(model, fbn.Freeze("original", fold=mode), example_input=x)  # type: ignore[arg-type]
        assert [m.fold for m in model.modules() if isinstance(m, FrozenBatchNorm)] == [mode] * 2
