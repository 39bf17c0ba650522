"""The ways of robust freezing that were tried do what their names say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
pytest.importorskip("rich")
import study_robust_freezing as study
from store import Store

import finetune_bn as fbn


def net_with_gradients() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    fbn.convert(net, fbn.Freeze("none"), verify=False)
    net(torch.randn(5, 3, 6, 6)).square().sum().backward()
    return net


def test_gradients_are_clipped_by_channel_or_together_or_centred() -> None:
    net = net_with_gradients()
    study.clip_adaptively(net)
    weight = net[0].weight
    assert (weight.grad.flatten(1).norm(dim=1) <= 0.0101 * weight.flatten(1).norm(dim=1)).all()
    net = net_with_gradients()
    study.clip(net)
    assert sum(p.grad.square().sum() for p in net.parameters()).sqrt() == pytest.approx(1.0, rel=1e-4)
    net = net_with_gradients()
    study.centre(net)
    torch.testing.assert_close(net[0].weight.grad.mean((1, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    assert net[3].weight.grad.mean(1).abs().min() > 1e-4


def test_a_gradient_projected_image_by_image_has_no_mean_and_nothing_along_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 + torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = study.PerImage.apply(x)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad(y, x, upstream)
    centred = x - x.mean((2, 3), keepdim=True)
    torch.testing.assert_close(grad.sum((2, 3)), torch.zeros(2, 3).double(), rtol=0, atol=1e-9)
    assert ((grad * centred).mean((2, 3)).abs() < 0.01 * (upstream * centred).mean((2, 3)).abs().max()).all()


def test_means_follow_in_training_alone_and_variances_do_not() -> None:
    net = fbn.convert(nn.Sequential(nn.BatchNorm2d(3)), fbn.Freeze("none"), verify=False)
    study.follow_means(net)
    x = 4 + torch.randn(8, 3, 5, 5)
    net.eval()(x)
    assert not net[0].running_mean.any()
    net.train()(x)
    torch.testing.assert_close(net[0].running_mean, 0.05 * x.mean((0, 2, 3)))
    assert (net[0].running_var == 1).all()


def test_the_table_has_the_ways_that_were_measured(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.json", "python x.py", device="cpu")
    store.add({"way": "clip", "lr": 1e-3, "val_accuracy": 20.04, "drift": 9.96})
    lines = study.markdown(store).splitlines()
    assert lines[2:] == ["| gradient clipped at 1 |  | 20.0 (10.0) |"]
    assert len(list(study.next_cells(store))) == len(study.WAYS) * len(study.RATES) - 1
