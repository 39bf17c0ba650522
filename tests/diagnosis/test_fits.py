"""What fits: the model of memory beside bytes that were counted, and the batch that follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import finetune_bn as fbn
from finetune_bn.diagnosis.fits import StepMemory, largest_batches, state_per_weight, step_memory
from finetune_bn.diagnosis.memory import memory_report
from finetune_bn.errors import FinetuneBNError
from tests.models import settle

MIB = 2**20


def net() -> nn.Module:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for channels in (3, 16, 16):
        parts += [nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return settle(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))).train()


def report(batch: int, policy: Any = None, **more: Any) -> Any:
    return memory_report(net(), torch.randn(batch, 3, 24, 24), policy, **more)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "policy", [fbn.Freeze("none"), fbn.Freeze("original", fold="always")], ids=["none", "original"]
)
def test_two_reports_tell_what_any_other_batch_keeps(policy: Any, autocast: Any) -> None:
    reports = [report(batch, policy, autocast=autocast) for batch in (4, 8)]
    for after in (False, True):
        memory = step_memory(net(), reports, after=after)
        counted = report(29, policy, autocast=autocast)
        assert memory.kept_for(29) == pytest.approx(counted.after if after else counted.before, rel=0.01)


def test_the_peak_is_no_less_than_what_a_step_allocates_and_not_far_above_it() -> None:
    model, x = net(), torch.randn(64, 3, 24, 24)
    memory = step_memory(model, [report(4), report(8)])
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    before = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > 64 * 3 * 24 * 24 * 4  # something was counted
    peak = most + before + 2 * memory.gradients
    assert peak <= memory.peak(64) <= 1.25 * peak


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    memory = StepMemory(((1, 10 * MIB), (3, 26 * MIB)), working=2 * MIB, weights=MIB, gradients=MIB, optimizer=2 * MIB)
    assert memory.kept_for(2) == 18 * MIB
    assert memory.kept_for(100) == (2 + 8 * 100) * MIB
    for gib in (0.05, 1.0, 24.0):
        best = memory.largest_batch(gib, headroom=0.2)
        assert memory.peak(best) <= gib * 2**30 * 0.8 < memory.peak(best + 1)
    assert largest_batches(memory, (1, 2)) == ((1.0, memory.largest_batch(1)), (2.0, memory.largest_batch(2)))


def test_what_a_layer_saves_from_some_batch_on_is_not_taken_for_a_part_that_stays() -> None:
    # From 8 images on half of it is kept: by a line through both, no image more would cost anything.
    steep = StepMemory(((4, 40 * MIB), (8, 40 * MIB)), 0, 0, 0, 0, most_fixed=0)
    assert steep.kept_for(6) == 40 * MIB
    assert steep.kept_for(16) == 80 * MIB
    part = StepMemory(((4, 40 * MIB), (8, 40 * MIB)), 0, 0, 0, 0, most_fixed=8 * MIB)
    assert part.kept_for(16) == 72 * MIB
    # Three on no line: what seems to stay may be what a layer began to save.
    bent = StepMemory(((4, 40 * MIB), (8, 70 * MIB), (16, 100 * MIB)), 0, 0, 0, 0, most_fixed=60 * MIB)
    assert bent.kept_for(32) == 200 * MIB
    line = StepMemory(((4, 40 * MIB), (8, 60 * MIB), (16, 100 * MIB)), 0, 0, 0, 0, most_fixed=60 * MIB)
    assert line.kept_for(32) == 180 * MIB
    rising = StepMemory(((4, 40 * MIB), (8, 80 * MIB)), 0, 0, 0, 0, most_fixed=8 * MIB)
    assert rising.kept_for(16) == 160 * MIB


def test_where_not_one_image_fits_the_batch_is_0() -> None:
    assert StepMemory(((1, 2**30),), 0, 0, 0, 0).largest_batch(0.5) == 0
    assert StepMemory(((4, 4),), 0, 2**30, 2**28, 2**29).largest_batch(1.5) == 0


def test_what_needs_no_memory_has_a_largest_batch_too() -> None:
    assert StepMemory(((1, 0),), 0, 0, 0, 0).largest_batch(8) >= 2**19


def test_freezing_lets_more_images_in_and_what_is_not_trained_has_no_gradient() -> None:
    model, reports = net(), [report(4, fbn.Freeze("none")), report(8, fbn.Freeze("none"))]
    live, frozen = (step_memory(model, reports, after=after) for after in (False, True))
    assert frozen.largest_batch(1) > 1.3 * live.largest_batch(1)
    for parameter in model[:-1].parameters():
        parameter.requires_grad_(False)
    head = step_memory(model, reports)
    assert head.gradients == 4 * (16 * 10 + 10)
    assert head.optimizer == 2 * head.gradients
    assert head.weights == live.weights


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3), 2),
        (lambda p: torch.optim.SGD(p, lr=1e-3), 0),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), 1),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True), 3),
    ],
    ids=["AdamW", "SGD", "momentum", "amsgrad"],
)
def test_an_optimizer_tells_what_it_keeps_and_stays_as_it_is(make: Any, expected: float) -> None:
    model = net()
    optimizer = make(model.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps the step
    fbn.limit_steps(optimizer, fbn.convert(model, fbn.Freeze("none"), verify=False))
    groups = [list(group["params"]) for group in optimizer.param_groups]
    assert state_per_weight(optimizer) == pytest.approx(expected)
    assert not optimizer.state
    assert [list(map(id, group["params"])) for group in optimizer.param_groups] == [list(map(id, g)) for g in groups]


@pytest.mark.parametrize(
    "call",
    [
        lambda: StepMemory(((1, 1),), 0, 0, 0, 0).largest_batch(0),
        lambda: StepMemory(((1, 1),), 0, 0, 0, 0).largest_batch(8, headroom=1),
        lambda: step_memory(net(), []),
        lambda: step_memory(net(), [report(2), report(2)]),
        lambda: step_memory(net(), report(2), state=-1),
    ],
    ids=["gib", "headroom", "no report", "one batch twice", "state"],
)
def test_a_wrong_argument_is_named(call: Any) -> None:
    with pytest.raises(FinetuneBNError, match=r"gib|headroom|reports|state"):
        call()
