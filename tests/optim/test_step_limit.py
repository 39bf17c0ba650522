"""The bound on an optimizer's step: the formula, what it leaves alone, and that training survives a large rate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers import FrozenBatchNorm2d
from finetune_bn.optim.step_limit import LimitedSteps, limit_steps, share_of_peak, step_factors
from tests.models import settle


def net_and_data(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)]
    net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(72, 4)).to(dtype)
    return fbn.convert(net, fbn.Freeze("shift"), verify=False), torch.randn(6, 3, 7, 7, dtype=dtype)


def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


def numpy_limited(old: Tensor, new: Tensor, limit: float, dim: int) -> np.ndarray[Any, Any]:
    """Channel by channel, in float64."""
    before, after = (np.moveaxis(t.detach().double().numpy(), dim, 0) for t in (old, new))
    out = before.copy()
    for c in range(len(before)):
        length, most = np.linalg.norm(after[c] - before[c]), limit * np.linalg.norm(before[c])
        out[c] += (after[c] - before[c]) * (min(1.0, most / length) if length else 0.0)
    return np.moveaxis(out, 0, dim)


# The formula


@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (5, 1, 3)])
@pytest.mark.parametrize("dim", [0, 1])
def test_no_channel_moves_further_than_the_limit_and_in_its_own_direction(shape: tuple[int, ...], dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(shape, generator=generator, dtype=torch.float64)
    size = torch.tensor([1e-6, 0.01, 0.1, 1.0, 9.0]).double().view(-1, *[1] * (len(shape) - 1))
    new = old + size * torch.randn(shape, generator=generator, dtype=torch.float64)
    old, new = old.movedim(0, dim), new.movedim(0, dim)
    factors = step_factors(old, new, 0.05, dim)
    np.testing.assert_allclose((old + factors * (new - old)).numpy(), numpy_limited(old, new, 0.05, dim), rtol=1e-12)
    assert factors.max() == 1.0
    assert factors.min() < 1.0


def test_a_channel_of_zeros_and_one_that_does_not_move_stay() -> None:
    old = torch.stack([torch.zeros(3), torch.ones(3)])
    new = torch.stack([torch.full((3,), 0.1), torch.ones(3)])
    assert step_factors(old, new, 0.5).flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(dtype: torch.dtype) -> None:
    old, new = torch.full((2, 4000), 10.0, dtype=dtype), torch.full((2, 4000), 30.0, dtype=dtype)
    factors = step_factors(old, new, 0.1)  # the sum of squares is beyond float16
    assert factors.dtype == torch.float32
    torch.testing.assert_close(factors, torch.full((2, 1), 0.05))


# On an optimizer


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_convolutions_move_as_far_as_the_bound_says_and_all_else_as_the_optimizer_says(make: Any) -> None:
    net, x = net_and_data()
    free = copy.deepcopy(net)
    limit = limit_steps(optimizer := make(net.parameters()), net, 0.02)
    assert limit.share is None
    before = copy.deepcopy(net)
    step(net, optimizer, x)
    step(free, make(free.parameters()), x)
    for (name, old), new, unbound in zip(before.named_parameters(), net.parameters(), free.parameters(), strict=True):
        if name in ("0.weight", "3.weight"):
            np.testing.assert_allclose(new.detach(), numpy_limited(old, unbound, 0.02, 0), rtol=1e-4, atol=1e-6)
            assert not torch.equal(new, unbound)
        else:
            assert torch.equal(new, unbound), name
    assert limit.share is not None
    assert 0 < limit.share <= 1


@pytest.mark.parametrize("name", ["lookahead_adamw", "lamb", "lion", "muon"])
def test_timms_optimizers_keep_to_the_bound(name: str) -> None:
    optim = pytest.importorskip("timm.optim")
    net, x = net_and_data()
    optimizer = optim.create_optimizer_v2(net, opt=name, lr=0.5)
    limit_steps(optimizer, net, 1e-3)
    for _ in range(7):  # Lookahead goes back to its slow weights in the sixth
        old = net[0].weight.detach().clone().flatten(1)
        step(net, optimizer, x)
        assert ((net[0].weight.detach().flatten(1) - old).norm(dim=1) <= 1.001e-3 * old.norm(dim=1)).all()


def test_steps_within_the_bound_are_the_optimizers_to_the_last_bit() -> None:
    net, x = net_and_data()
    free = copy.deepcopy(net)
    limit = limit_steps(optimizer := torch.optim.AdamW(net.parameters(), lr=1e-4), net, 0.5)
    other = torch.optim.AdamW(free.parameters(), lr=1e-4)
    for _ in range(3):
        step(net, optimizer, x)
        step(free, other, x)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), free.parameters(), strict=True))
    assert limit.share == 0


def test_transposed_convolutions_have_their_channels_in_the_second_place_and_shared_ones_count_once() -> None:
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(3, 5, 2)
    net = nn.ModuleDict({"one": up, "norm": FrozenBatchNorm2d(5), "two": up, "head": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(net.parameters(), lr=10.0)
    limit = limit_steps(optimizer, net, 0.01)
    assert limit.limited == ("one",)
    old = up.weight.detach().clone()
    up(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    moved = torch.linalg.vector_norm(up.weight.detach() - old, dim=(0, 2, 3)) / torch.linalg.vector_norm(
        old, dim=(0, 2, 3)
    )
    torch.testing.assert_close(moved, torch.full((5,), 0.01), rtol=1e-4, atol=0)


def test_the_bound_follows_the_schedule_and_its_peak() -> None:
    net, x = net_and_data()
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: [0.25, 1.0, 0.5][min(s, 2)])
    limit_steps(optimizer, net, 1e-3)
    moved = []
    for _ in range(3):
        old = net[0].weight.detach().clone()
        step(net, optimizer, x)
        schedule.step()
        change = (net[0].weight.detach() - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)
        moved.append(float(change.max()))
    assert moved == pytest.approx([0.25e-3, 1e-3, 0.5e-3], rel=1e-3)


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ({"lr": 0.1}, 1.0),
        ({"lr": 0.1, "initial_lr": 0.4}, 0.25),
        ({"lr": 0.1, "initial_lr": 0.02, "max_lr": 0.5}, 0.2),  # OneCycleLR starts far below its peak
        ({"lr": 0.4, "initial_lr": 0.1}, 1.0),
        ({"lr": 0.0, "initial_lr": 0.0}, 1.0),
    ],
)
def test_the_share_of_the_peak_is_read_from_the_group(group: dict[str, float], expected: float) -> None:
    assert share_of_peak(group) == pytest.approx(expected)


def test_removed_it_no_longer_limits() -> None:
    net, x = net_and_data()
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    limit = limit_steps(optimizer, net, 1e-6)
    limit.remove()
    old = net[0].weight.detach().clone()
    step(net, optimizer, x)
    assert (net[0].weight - old).norm() > 1e-3 * old.norm()


def test_a_training_that_collapses_without_it_goes_on_with_it() -> None:
    """A frozen net at a rate ten times too large: with ReLU6 it saturates, and then every image looks alike."""

    def trained(limited: bool) -> float:
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        blocks = [[nn.Conv2d(c, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU6()] for c in (3, 16, 16, 16)]
        net = nn.Sequential(*[m for block in blocks for m in block], nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.append(nn.Linear(16, 2))
        x = torch.randn(64, 3, 8, 8, generator=generator)
        y = (x.mean((1, 2, 3)) > 0).long()
        fbn.recalibrate(net, [x])
        fbn.convert(net, fbn.Freeze("none"), verify=False)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
        if limited:
            limit_steps(optimizer, net, 5e-3)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        return float((net(x).argmax(1) == y).float().mean())

    assert trained(limited=True) > 0.9
    assert trained(limited=False) < 0.7


# Errors


@pytest.mark.parametrize("ratio", [0, -0.1, float("inf"), float("nan"), True, "1e-3", None])
def test_a_ratio_out_of_range_is_one_clear_error(ratio: Any) -> None:
    net, _ = net_and_data()
    with pytest.raises(FinetuneBNError, match=r"ratio: got .*; allowed: a number above 0"):
        limit_steps(torch.optim.SGD(net.parameters(), lr=0.1), net, ratio)


def test_an_optimizer_of_another_net_is_refused() -> None:
    net, _ = net_and_data()
    with pytest.raises(FinetuneBNError, match="optimizer: got 'SGD'; allowed: an optimizer that holds parameters of"):
        limit_steps(torch.optim.SGD(net_and_data()[0].parameters(), lr=0.1), net)


@pytest.mark.parametrize("floor", [0, -1, "0.1", None])
def test_a_floor_out_of_range_is_one_clear_error(floor: Any) -> None:
    net, _ = net_and_data()
    with pytest.raises(FinetuneBNError, match=r"floor: got .*; allowed: a number above 0"):
        limit_steps(torch.optim.SGD(net.parameters(), lr=0.1), net, floor=floor)


# What is not bounded


class LoRA(nn.Module):
    """A convolution that is not trained, and beside it two small ones, of which the second starts at zero."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.base = conv.requires_grad_(False)
        self.a = nn.Conv2d(conv.in_channels, 4, 3, padding=1, bias=False)
        self.b = nn.Conv2d(4, conv.out_channels, 1, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def backbone(in_channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    net = settle(nn.Sequential(*parts, nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()))
    return fbn.convert(net, fbn.Freeze("none"), example_input=torch.rand(2, in_channels, 16, 16))


def trained(net: nn.Module, x: Tensor, y: Tensor, limited: bool, example: bool) -> LimitedSteps | None:
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    limit = limit_steps(optimizer, net, example_input=x[:2] if example else None) if limited else None
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return limit


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("case", ["lora", "head"])
def test_adapters_and_new_heads_learn_as_without_a_limit(case: str, example: bool) -> None:
    # cybertronai/pytorch-lamb#6: a bound relative to the norm never lets a layer that starts at zero learn.
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0].mean((1, 2)) > 0).long()
    nets = []
    for limited in (True, False):
        net = backbone()
        if case == "lora":
            net[0], net[3] = LoRA(net[0]), LoRA(net[3])
            net = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 2))
        else:
            net = nn.Sequential(net.requires_grad_(False), nn.Conv2d(32, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        limit = trained(net, x, y, limited, example)
        if limit is not None:
            assert limit.limited == ()
            assert limit.free == (("0.0.a", "0.0.b", "0.3.a", "0.3.b") if case == "lora" else ("1",))
            assert limit.share == 0
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    if case == "lora":
        assert nets[0][0][3].b.weight.norm() > 0.1


def test_where_nothing_is_bounded_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))  # live, though not for want of trying
    limit_steps(torch.optim.SGD(net.parameters(), lr=0.1), net)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        "StepLimit: no step is bounded: no frozen layer is behind the 1 convolutions that are trained (0)."
    )


def test_a_convolution_that_starts_at_zero_in_front_of_a_frozen_layer_is_not_bounded() -> None:
    net = backbone()
    nn.init.zeros_(net[3].weight)
    limit = limit_steps(torch.optim.AdamW(net.parameters(), lr=1e-3), net)
    assert (limit.limited, limit.free) == (("0",), ("3",))


def test_a_channel_of_zeros_moves_as_far_as_the_floor_lets_it() -> None:
    net, x = net_and_data()
    with torch.no_grad():
        net[0].weight[2] = 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    limit_steps(optimizer, net, 1e-3, floor=0.5)
    step(net, optimizer, x)
    assert float(net[0].weight[2].detach().norm()) == pytest.approx(0.5e-3, rel=1e-4)


def test_parameter_groups_added_later_are_limited_and_until_then_it_says_that_none_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net, x = net_and_data()
    optimizer = torch.optim.SGD(net[6].parameters(), lr=0.5)
    with caplog.at_level("INFO", "finetune_bn"):
        limit = limit_steps(optimizer, net, 1e-3)
        step(net, optimizer, x)
        assert limit.limited == ()
        optimizer.add_param_group({"params": net[:5].parameters()})
        old = net[0].weight.detach().clone().flatten(1)
        step(net, optimizer, x)
    assert limit.limited == ("0", "3")
    moved = (net[0].weight.detach().flatten(1) - old).norm(dim=1) / old.norm(dim=1)
    assert float(moved.max()) == pytest.approx(1e-3, rel=1e-3)
    told = [r.message.split(" (")[0] for r in caplog.records]
    assert [message for message in told if message.startswith("StepLimit")] == [
        "StepLimit: steps are not bounded: the optimizer trains no convolution yet.",
        "StepLimit: steps of 2 of the 2 convolutions that the optimizer trains are bounded",
    ]


@pytest.mark.parametrize("closure", ["keyword", "position"])
def test_a_step_with_a_closure_is_limited_and_returns_the_loss(closure: str) -> None:
    net, x = net_and_data()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    limit_steps(optimizer, net, 1e-3)
    old = net[0].weight.detach().clone().flatten(1)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    loss = optimizer.step(closure=run) if closure == "keyword" else optimizer.step(run)
    moved = (net[0].weight.detach().flatten(1) - old).norm(dim=1) / old.norm(dim=1)
    assert float(moved.max()) == pytest.approx(1e-3, rel=1e-3)
    assert float(loss) > 0


class Wrapper(torch.optim.Optimizer):
    """As accelerate's: an optimizer by its class, which has set up nothing of it, and passes everything on."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


def test_an_optimizer_inside_of_a_wrapper_is_limited() -> None:
    net, x = net_and_data()
    optimizer = Wrapper(torch.optim.AdamW(net.parameters(), lr=0.1))
    limit_steps(optimizer, net, 1e-3)
    old = net[0].weight.detach().clone().flatten(1)
    step(net, optimizer.optimizer, x)
    net[0].weight.data.copy_(old.view_as(net[0].weight))
    optimizer.step()
    moved = (net[0].weight.detach().flatten(1) - old).norm(dim=1) / old.norm(dim=1)
    assert float(moved.max()) == pytest.approx(1e-3, rel=1e-3)


def test_an_optimizer_without_hooks_is_one_clear_error() -> None:
    net, _ = net_and_data()
    optimizer = Wrapper(torch.optim.AdamW(net.parameters(), lr=0.1))
    groups = optimizer.param_groups

    class Hookless(Wrapper):
        param_groups = groups

        def __init__(self) -> None:
            pass

    with pytest.raises(FinetuneBNError, match="optimizer: got 'Hookless'; allowed: an optimizer with step hooks"):
        limit_steps(Hookless(), net)


def test_a_parametrized_convolution_is_named_among_those_that_are_not_bounded() -> None:
    net, x = net_and_data()
    nn.utils.parametrizations.weight_norm(net[3])
    limit = limit_steps(optimizer := torch.optim.SGD(net.parameters(), lr=0.1), net)
    step(net, optimizer, x)
    assert (limit.limited, limit.free) == (("0",), ("3",))
    assert "computed from others: 3" in limit.summary


def test_opacus_optimizer_is_limited_inside() -> None:
    opacus = pytest.importorskip("opacus")
    net, _ = net_and_data()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = opacus.optimizers.DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)
    limit = limit_steps(optimizer, net, 1e-3)
    for p in net.parameters():
        p.grad_sample = torch.randn(4, *p.shape)
    old = net[0].weight.detach().clone().flatten(1)
    optimizer.step()
    moved = (net[0].weight.detach().flatten(1) - old).norm(dim=1) / old.norm(dim=1)
    assert float(moved.max()) == pytest.approx(1e-3, rel=1e-3)
    assert limit.share is not None


def test_in_lbfgs_whose_closure_runs_between_its_moves_the_whole_step_is_bounded() -> None:
    net, x = net_and_data(torch.float64)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1.0)
    limit_steps(optimizer, net, 1e-3)
    old = net[0].weight.detach().clone().flatten(1)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(run)
    moved = (net[0].weight.detach().flatten(1) - old).norm(dim=1) / old.norm(dim=1)
    assert 0 < float(moved.max()) <= 1.0001e-3


def test_it_is_one_object_for_one_optimizer() -> None:
    net, _ = net_and_data()
    limit = limit_steps(torch.optim.SGD(net.parameters(), lr=0.1), net, 0.01)
    assert isinstance(limit, LimitedSteps)
    assert limit.ratio == 0.01
