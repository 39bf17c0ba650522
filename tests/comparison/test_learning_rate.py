"""The range test reads a rate off a curve that tells one, and refuses by name where it does not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from finetune_bn.comparison.learning_rate import find_learning_rate, read_off
from finetune_bn.conversion.policies import Freeze
from finetune_bn.errors import FinetuneBNError
from tests.comparison.conftest import Pair

RATES = [10 ** (-6 + 6 * i / 119) for i in range(120)]


def curve(noise: float = 0.0, center: float = -3.0, rise: float = -1.0, fall: float = 2.0) -> list[float]:
    """Return losses that fall by `fall` around 10**center and rise from 10**rise on."""
    generator = torch.Generator().manual_seed(0)
    jitter = noise * torch.randn(len(RATES), generator=generator)
    logs = [math.log10(rate) for rate in RATES]
    return [
        3 - fall / (1 + math.exp(-6 * (x - center))) + 10 * max(0.0, x - rise) ** 2 + float(e)
        for x, e in zip(logs, jitter, strict=True)
    ]


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_the_rate_is_where_a_known_curve_falls_most_steeply(noise: float) -> None:
    found = read_off("none", RATES, curve(noise), 1e-6, 1.0)
    assert abs(math.log10(found.steepest) + 3) < 0.25
    assert found.lr == pytest.approx(min(found.steepest, found.lowest / 10), rel=0.05)


def test_a_tenth_of_the_lowest_is_taken_where_the_loss_falls_right_up_to_the_edge() -> None:
    found = read_off("none", RATES, curve(center=-1.4, rise=-1.2), 1e-6, 1.0)
    assert found.lr == pytest.approx(found.lowest / 10, rel=0.05)
    assert found.lr < found.steepest


@pytest.mark.parametrize(
    ("losses", "match"),
    [
        (curve(0.2, fall=0.0, rise=9), "steps: got 120; allowed: a range in which the loss falls clearly"),
        (curve(0.05, center=-0.3, rise=9), r"high: got 1\.0; .* no longer falls\. Raise `high`"),
        ([1 + 2 * i / 119 for i in range(120)], "low: got 1e-06; .* The loss only rises"),
        ([1.0] * 4, "low: got 1e-06; .* The loss was not finite at step 5"),
    ],
)
def test_a_curve_that_does_not_tell_is_refused_with_what_to_do(losses: list[float], match: str) -> None:
    with pytest.raises(FinetuneBNError, match=match):
        read_off("none", RATES[: len(losses)], losses, 1e-6, 1.0)


def test_a_set_that_is_learned_before_anything_diverges_tells_a_rate_too() -> None:
    found = read_off("none", RATES, curve(0.01, center=-3, rise=9, fall=3.0), 1e-6, 1.0)
    assert found.lr == pytest.approx(found.lowest / 10, rel=0.05)
    assert 1e-3 < found.lowest < 1e-2


def test_a_network_is_measured_under_its_treatment_and_stays_as_it_is(model: nn.Module, train: Pair) -> None:
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    found = find_learning_rate(model, "none", train, batch_size=18, steps=80, high=10.0, low=1e-5, progress=False)
    assert torch.equal(torch.rand(1), expected)
    assert 1e-3 < found.lr < 1e-1
    assert "none: lr " in str(found)
    assert found.plot().get_axes()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = find_learning_rate(model, "none", train, batch_size=18, steps=80, high=10.0, low=1e-5, progress=False)
    assert again == found
    policy = find_learning_rate(
        model, Freeze("none"), train, batch_size=18, steps=80, high=10.0, low=1e-5, progress=False
    )
    assert policy.losses == found.losses


def test_the_rates_are_those_that_the_optimizer_steps_with(model: nn.Module, train: Pair) -> None:
    used: list[float] = []

    def sgd(net: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, object]:
        optimizer = torch.optim.SGD([{"params": net.head.parameters(), "lr": 3 * lr}], lr=lr)  # type: ignore[union-attr]
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps)  # starts at a tenth
        optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
        return optimizer, schedule

    options = {"batch_size": 18, "steps": 20, "high": 1e-2, "low": 1e-6, "progress": False}
    with pytest.raises(FinetuneBNError):  # it does nothing
        find_learning_rate(model, "none", train, optimizer=sgd, **options)  # type: ignore[arg-type]
    assert used[0] == pytest.approx(3e-6)
    assert used[-1] == pytest.approx(3e-2)


def test_steps_that_are_bounded_never_diverge_which_is_said(model: nn.Module, train: Pair) -> None:
    with pytest.raises(FinetuneBNError, match=r"Raise `high`|falls clearly"):
        find_learning_rate(model, "limited", train, batch_size=12, steps=40, high=0.1, progress=False)
    with pytest.raises(FinetuneBNError, match="high: got 1e-07"):
        find_learning_rate(model, "none", train, batch_size=12, high=1e-7, progress=False)
    with pytest.raises(FinetuneBNError, match="steps: got 5"):
        find_learning_rate(model, "none", train, batch_size=12, steps=5, progress=False)
