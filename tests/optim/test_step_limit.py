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
from finetune_bn.optim.step_limit import LimitedSteps, limit_steps, share_of_peak, step_factors


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
    net = nn.ModuleDict({"one": up, "two": up, "head": nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(net.parameters(), lr=10.0)
    limit_steps(optimizer, net, 0.01)
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


@pytest.mark.parametrize("case", ["head alone", "another net"])
def test_an_optimizer_without_a_convolution_of_the_net_is_refused(case: str) -> None:
    net, _ = net_and_data()
    held = net[6].parameters() if case == "head alone" else net_and_data()[0].parameters()
    with pytest.raises(FinetuneBNError, match="optimizer: got 'SGD'; allowed: an optimizer that trains convolutions"):
        limit_steps(torch.optim.SGD(held, lr=0.1), net)


def test_it_is_one_object_for_one_optimizer() -> None:
    net, _ = net_and_data()
    limit = limit_steps(torch.optim.SGD(net.parameters(), lr=0.1), net, 0.01)
    assert isinstance(limit, LimitedSteps)
    assert limit.ratio == 0.01
