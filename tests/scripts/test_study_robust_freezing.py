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


def stepped(way: str, scale: float, lr: float = 0.5, steps: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Train a small net as a way says, its gradients times `scale` in the last step; return that step's weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)).double()
    about = study.WAYS[way]
    optimizer, x = about.optimizer(study.cells.groups(net), lr), torch.randn(5, 3, 6, 6).double()
    for step in range(steps):
        net(x).square().sum().backward()
        for p in net.parameters():
            p.grad.mul_(scale if step == steps - 1 else 1.0)
        about.gradient(net)
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return list(zip(before, [p.detach() for p in net.parameters()], strict=True))


def test_lamb_and_larc_do_not_step_further_than_their_trust_ratio_lets_them() -> None:
    for way, most in (("lamb", 0.5), ("larc", 0.5 * 1e-3 * 10)):  # momentum 0.9 sums ten steps
        for old, new in stepped(way, 1e6):
            if old.dim() > 1:
                assert (new - old).norm() <= 1.01 * most * max(1.0, float(old.norm()))


def test_an_update_is_shortened_where_gradients_are_larger_than_expected_and_else_is_adamws() -> None:
    sizes = {
        way: sum(float((new - old).norm()) for old, new in stepped(way, 1e3, 1e-6)) for way in ("none", "update_rms")
    }
    assert sizes["update_rms"] == pytest.approx(0.5 * sizes["none"], rel=0.02)  # root of 1e6 in 4 means
    for (_, adamw), (_, shortened) in zip(stepped("none", 1, 1e-6), stepped("update_rms", 1, 1e-6), strict=True):
        torch.testing.assert_close(shortened, adamw, rtol=1e-9, atol=1e-9)


def test_every_way_has_the_same_rates_and_the_seed_that_chooses_does_not_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "missing", lambda setting: None)
    monkeypatch.setattr(study, "WAYS", dict(list(study.WAYS.items())[:4]))
    store = Store(tmp_path / "x.json", "python x.py", device="cpu")
    order = []
    while (key := next(study.next_cells(store), None)) and len(order) < 1000:
        order.append(key)
        value = 60.0 - 10 * abs(study.LADDER.index(key["lr"]) - 4)
        store.add(key | {"val": value, "test": value + 5 + key["seed"], "drift": 1.0})
    ways = len(study.WAYS)
    assert [key["way"] for key in order[:ways]] == list(study.WAYS)
    assert {(key["network"], key["lr"]) for key in order[:ways]} == {("lite0", 3e-3)}
    assert [key["network"] for key in order] == ["lite0"] * (len(order) // 2) + ["mobilenetv2"] * (len(order) // 2)
    rates = {
        (key["network"], key["way"]): {row["lr"] for row in store.rows if row["way"] == key["way"]} for key in order
    }
    assert set(map(frozenset, rates.values())) == {frozenset({1e-4, 3e-4, 1e-3, 3e-3})}
    for line in study.summarize(store):
        assert (line["lr"], line["values"]) == (1e-3, {0: 65.0, 1: 66.0, 2: 67.0})
    told = "| lite0 | AdamW | 40.0 (1.0) | 50.0 (1.0) | 60.0 (1.0) | 50.0 (1.0) | 0.001 | 66.0 |  | 3 |"
    assert told in study.markdown(store)


def test_a_way_is_compared_with_adamw_seed_by_seed_and_a_drift_that_is_no_number_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.json", "python x.py", device="cpu")
    for way, tests in (("none", (50.0, 60.0, 70.0)), ("clip", (54.0, 65.0, 74.5))):
        for lr in study.FIRST_RUNGS:
            drift = float("nan") if lr == 3e-3 else 1.0
            val = 60.0 if lr == 3e-4 else 14.7
            store.add({"network": "lite0", "way": way, "lr": lr, "seed": 100, "val": val, "test": 0.0, "drift": drift})
        for seed, test in enumerate(tests):
            store.add(
                {"network": "lite0", "way": way, "lr": 3e-4, "seed": seed, "val": 0.0, "test": test, "drift": 1.0}
            )
    told = "| 14.7 (1.0) | 60.0 (1.0) | 14.7 (1.0) | 14.7 (no number) | 0.0003 | 64.5 | **+4.5 (+3.3 to +5.7)** | 3 |"
    assert f"| lite0 | AdamW, gradient clipped at 1 {told}" in study.markdown(store)


def test_a_decay_that_is_not_decoupled_leaves_the_weights_as_large_as_adamws_does() -> None:
    def left(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> float:
        p.data.fill_(1.0)
        for _ in range(400):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        return float(p.detach().mean())

    p = nn.Parameter(torch.ones(4, 4))
    groups = [{"params": [p], "weight_decay": study.cells.WEIGHT_DECAY}]
    for name in ("sgd", "larc", "none"):
        assert left(study.WAYS[name].optimizer([dict(group) for group in groups], 1e-2), p) > 0.8
    assert left(torch.optim.SGD(groups, lr=1e-2, momentum=0.9), p) < 0.2  # as it was


def test_the_table_has_the_ways_that_were_measured(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.json", "python x.py", device="cpu")
    store.add({"network": "lite0", "way": "clip", "lr": 1e-3, "seed": 100, "val": 20.04, "test": 21.0, "drift": 9.96})
    lines = study.markdown(store).splitlines()
    assert lines[2:] == ["| lite0 | AdamW, gradient clipped at 1 |  |  | 20.0 (10.0) |  | search not over |  |  |  |"]
