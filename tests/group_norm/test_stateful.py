"""Calibration of networks that keep something between their modules, and of batches that cannot be cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import finetune_bn as fbn
from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers import GroupNorm
from finetune_bn.recalibration import collector
from tests.models import settle
from tests.stateful_nets import (
    TSM,
    CountsInBuffer,
    Levels,
    NextAtEachCall,
    SkipsInAttributes,
    SkipsInHooks,
    SkipsOnClosureStack,
    images,
)


def converted(model: nn.Module) -> nn.Module:
    x = images(4) if not isinstance(model, TSM) else images(5)
    return fbn.convert(settle(model), fbn.ToGroupNorm(groups=1), example_input=x)


def tensors(model: nn.Module) -> list[Any]:
    return [value for m in model.modules() if isinstance(m, GroupNorm) for value in (m.weight, m.bias)]


@pytest.mark.parametrize(
    "build",
    [SkipsInAttributes, lambda: Levels(NextAtEachCall), lambda: Levels(CountsInBuffer)],
    ids=["skips in attributes", "a counter", "a counter in a buffer"],
)
def test_a_network_that_keeps_something_is_fitted_in_one_pass_of_all_images(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = converted(build())
    other, x = copy.deepcopy(model), images(32)
    reference = fbn.calibrate_group_norm(other, [x], balance=False)  # one piece
    monkeypatch.setattr(collector, "PIECE", 8)
    record = fbn.calibrate_group_norm(model, x.split(8), balance=False)
    assert record.images == 32
    for a, b in zip(tensors(model), tensors(other), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    assert [row.error for row in record.rows] == pytest.approx([row.error for row in reference.rows], rel=1e-3)


@pytest.mark.parametrize("build", [SkipsInHooks, SkipsOnClosureStack])
def test_what_both_networks_would_share_is_refused_by_name_and_nothing_changes(build: Any) -> None:
    torch.manual_seed(0)
    model = converted(build())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FinetuneBNError, match="keeps something between its layers"):
        fbn.calibrate_group_norm(model, images(32).split(8))
    for name, value in model.state_dict().items():
        assert not torch.is_tensor(value) or torch.equal(value, before[name])


def test_clips_are_kept_whole() -> None:
    torch.manual_seed(0)
    model = converted(TSM(frames=5))
    other, x = copy.deepcopy(model), images(20)
    fbn.calibrate_group_norm(model, x.split(10))
    fbn.calibrate_group_norm(other, x.split(10), keep_batches=True)
    assert all(torch.equal(a, b) for a, b in zip(tensors(model), tensors(other), strict=True))
    with pytest.raises(FinetuneBNError, match="keep_batches: got 2"):
        fbn.calibrate_group_norm(model, [x], keep_batches=2)  # type: ignore[arg-type]
    with pytest.raises(FinetuneBNError, match=r"max_samples: got 16\.5"):
        fbn.calibrate_group_norm(model, [x], max_samples=16.5)  # type: ignore[arg-type]
