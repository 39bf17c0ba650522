"""What the notes of the interplay matrix say, as assertions on the run that they are of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import finetune_bn as fbn
from finetune_bn.layers.frozen import FrozenBatchNorm
from tests.interplay.treatments import NET, STATISTICS, Net, Ran, images, plain, statistics

Fact = Callable[[Ran], None]


def said(text: str) -> Fact:
    """There was a warning with these words."""

    def fact(ran: Ran) -> None:
        assert any(text in warning for warning in ran.warnings), ran.warnings

    return fact


def measured_anew(ran: Ran) -> None:
    """Statistics were reset, and are those of the batches of one epoch."""
    for name, value in plain(ran.net).items():
        assert not name.endswith("num_batches_tracked") or int(value) == 2, f"{name} = {int(value)}"


def not_of_these_weights(ran: Ran) -> None:
    """The average of statistics is not the statistics of the averaged weights."""
    fresh = copy.deepcopy(ran.net)
    fbn.recalibrate(fresh, [images().tensors[0]], progress=False)
    now = statistics(ran.net)
    assert any(not torch.allclose(value, now[name], rtol=1e-2) for name, value in statistics(fresh).items())


def constants_are_rounded(ran: Ran) -> None:
    """By torch's other function for the average, constants are off by roundings."""
    names = [f"{layer}.{kind}" for layer in NET.layers for kind in STATISTICS]
    rounded = ran.facts["rounded"]
    assert any(not torch.equal(rounded[name], ran.start[name]) for name in names)
    for name in names:
        torch.testing.assert_close(rounded[name], ran.start[name], rtol=1e-5, atol=0)


def average_stays_live(ran: Ran) -> None:
    assert any(isinstance(m, FrozenBatchNorm) for m in ran.facts["trained"].modules())
    assert not any(isinstance(m, FrozenBatchNorm) for m in ran.net.modules())


def statistics_overwritten(ran: Ran) -> None:
    changed = ran.facts["changed"]
    assert changed
    assert all(name.endswith((*STATISTICS, "num_batches_tracked")) for name in changed)


def nothing_overwritten(ran: Ran) -> None:
    assert not ran.facts["changed"]


def moved_from_the_first_step(ran: Ran) -> None:
    assert any(not torch.equal(value, ran.start[name]) for name, value in ran.statistics[0].items())


def gamma_and_beta_are_in_no_optimizer(ran: Ran) -> None:
    assert not ran.moved(*NET.named("weight", "bias"))


def base_stays(ran: Ran) -> None:
    """Convolutions are trained by their adapters alone, which no treatment of norm layers reaches."""
    assert not ran.facts["base moved"]
    assert ran.moved(*NET.convolutions), "merged, the adapters have changed them"
    assert not ran.moved(*NET.named(*STATISTICS))


def as_one_batch(ran: Ran) -> None:
    assert ran.facts["apart"] < 1e-5


def not_as_one_batch(ran: Ran) -> None:
    assert ran.facts.get("apart", 1.0) > 1e-4


def as_without(ran: Ran) -> None:
    """All tensors are those of the run without checkpointing."""
    now = plain(ran.net)
    for name, value in ran.facts["reference"].items():
        torch.testing.assert_close(now[name], value, rtol=1e-4, atol=1e-5, msg=name)


def counted_twice(ran: Ran) -> None:
    now, reference = plain(ran.net), ran.facts["reference"]
    for layer in NET.layers:
        name = f"{layer}.num_batches_tracked"
        start = int(ran.start[name])
        assert int(now[name]) - start == 2 * (int(reference[name]) - start)


def pretrained_affine_is_back(ran: Ran) -> None:
    """Loading has brought gamma and beta back, which the policy had set to 1 and 0."""
    weights, now = Net().state_dict(), plain(ran.net)
    for name in NET.named("weight", "bias"):
        assert torch.equal(now[name], weights[name])


def class_is_lost(ran: Ran) -> None:
    kinds = [type(m) for m in ran.net.modules() if isinstance(m, (_BatchNorm, FrozenBatchNorm))]
    assert len(kinds) == 2
    assert nn.BatchNorm2d not in kinds


def not_the_overfitted_ones(ran: Ran) -> None:
    """The statistics are those of all 16 images (the promise), while 8 were trained on."""
    assert ran.facts["images"] == 16
    assert ran.trainer is not None
    assert ran.trainer.num_training_batches == 2


def live_where_too_short(ran: Ran) -> None:
    assert any("with live BatchNorm layers" in warning for warning in ran.facts["short"])


# ---- of a pair of processes


def own_statistics(found: list[dict[str, Any]]) -> None:
    """Each process has its own statistics, and the same weights."""
    apart = found[0]["apart"]
    assert apart
    assert all(name.endswith(STATISTICS) for name in apart)


def alike(found: list[dict[str, Any]]) -> None:
    """Both processes have the same network, to the last bit."""
    assert not found[0]["apart"]


def both(*facts: Callable[[Any], None]) -> Callable[[Any], None]:
    def fact(found: Any) -> None:
        for one in facts:
            one(found)

    return fact


def first_said(text: str) -> Callable[[list[dict[str, Any]]], None]:
    def fact(found: list[dict[str, Any]]) -> None:
        assert any(text in warning for warning in found[0]["warnings"]), found[0]["warnings"]

    return fact
