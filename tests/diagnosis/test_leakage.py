"""What leaks between images of a batch: nothing through frozen layers, everything through live ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.diagnosis.leakage import measure_leakage
from finetune_bn.errors import BadData, FinetuneBNError
from tests.models import Plain, settle
from tests.tools import untouched


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return settle(Plain()).train()


def batch(seed: int, n: int = 8) -> Tensor:
    return torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) + seed


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_through_frozen_layers_nothing_leaks_to_the_last_bit(affine: Any) -> None:
    model = fbn.convert(net(), fbn.Freeze(affine))
    with untouched(model):
        found = measure_leakage(model, batch(0), batch(1))
    assert found.total == 0.0
    assert [row.leakage for row in found.rows] == [0.0, 0.0]
    assert "nothing leaks" in str(found)


def test_through_live_layers_it_leaks_also_where_the_model_is_in_eval_mode_and_the_model_is_as_before() -> None:
    for model in (net(), net().eval()):
        with untouched(model):
            found = measure_leakage(model, batch(0), batch(1))
        assert found.total > 0.05
        assert [row.names for row in found.rows] == [("bn1",), ("bn2",)]
        assert all(row.leakage > 0.05 for row in found.rows)
        assert found.images == 2


def test_the_same_peers_twice_are_no_leak_and_dropout_is_none() -> None:
    model = nn.Sequential(net(), nn.Dropout(0.5)).train()
    assert measure_leakage(model, batch(0), batch(0)).total == 0.0
    frozen = fbn.convert(model, fbn.Freeze())
    assert measure_leakage(frozen, batch(0), batch(1)).total == 0.0


def test_leakage_of_one_layer_is_what_numpy_says() -> None:
    layer = nn.BatchNorm1d(3).train()
    one, two = torch.randn(6, 3), torch.randn(6, 3) * 2 + 1
    mixed = torch.cat([one[:3], two[3:]])
    x, y = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (one, mixed))
    between = 2 * (x[:3] - x[:3].mean(0)).square().sum(1).mean()
    expected = ((x[:3] - y[:3]).square().sum(1).mean() / between).sqrt()
    found = measure_leakage(layer, one, two, images=3)
    assert found.total == pytest.approx(float(expected), rel=1e-5)
    assert found.rows[0].leakage == pytest.approx(float(expected), rel=1e-5)


def test_batches_come_as_in_training() -> None:
    pair = measure_leakage(net(), (batch(0), torch.zeros(8)), (batch(1), torch.zeros(8)))
    assert pair.total == measure_leakage(net(), batch(0), batch(1)).total
    own = measure_leakage(net(), [batch(0)], [batch(1)], forward=lambda model, b: {"embedding": model(b[0])})
    assert own.total == pair.total


def test_batches_that_cannot_be_compared_are_named() -> None:
    model = net()
    with untouched(model), pytest.raises(BadData, match="other: got '4 images'; allowed: 8 or more"):
        measure_leakage(model, batch(0), batch(1, 4))
    with untouched(model), pytest.raises(FinetuneBNError, match="images: got 8; allowed: 1 to 7"):
        measure_leakage(model, batch(0), batch(1), images=8)
    with pytest.raises(FinetuneBNError, match="a tensor with a row an image"):
        measure_leakage(model, batch(0), batch(1), forward=lambda m, b: m(b).sum())
