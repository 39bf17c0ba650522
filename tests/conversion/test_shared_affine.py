"""Gamma and beta that layers with statistics of their own share: domain-specific BatchNorm."""

# After pytorch/pytorch#1738 and CVMI-Lab/ST3D#50: a BN for each domain (or time step), gamma and beta shared.

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import UnsupportedLayer
from tests.models import settle


class Domains(nn.Module):
    def __init__(self, shared: str = "weight bias") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bns = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.own = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 3)
        for name in shared.split():
            setattr(self.bns[1], name, getattr(self.bns[0], name))

    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.fc(F.relu(self.own(self.bns[domain](self.conv(x)))).mean((2, 3)))


def net(shared: str = "weight bias") -> nn.Module:
    return settle(Domains(shared)).eval()


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shared", ["weight bias", "weight", "bias"])
def test_merged_is_refused_for_layers_that_share_gamma_or_beta_and_says_which_and_what_to_do(shared: str) -> None:
    model = net(shared)
    before = [(name, parameter) for name, parameter in model.named_parameters(remove_duplicate=False)]
    why = r"bns.0: shares gamma or beta with bns.1.*\n +bns.1: shares gamma or beta with bns.0.*affine='original' and"
    with pytest.raises(UnsupportedLayer, match=why) as caught:
        fbn.convert(model, fbn.Freeze("merged"), example_input=X)
    assert "own:" not in str(caught.value)
    after = list(model.named_parameters(remove_duplicate=False))
    assert [(a[0], id(a[1])) for a in after] == [(b[0], id(b[1])) for b in before]
    refused = [row.names[0] for row in fbn.plan(model, fbn.Freeze("merged"), X).rows if row.refused]
    assert refused == ["bns.0", "bns.1"]


@pytest.mark.parametrize("affine", ["shift", "original"])
def test_what_is_shared_stays_shared_through_training_a_checkpoint_and_revert(affine: Any) -> None:
    model = net()
    numbers = sum(p.numel() for p in model.parameters())
    fbn.convert(model, fbn.Rules([("own", fbn.Freeze("merged")), ("*", fbn.Freeze(affine))]), example_input=X)
    constant = 8 if affine == "shift" else 0
    assert sum(p.numel() for p in model.parameters()) == numbers - constant
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(X, 0) + model(X, 1)).square().sum().backward()
    optimizer.step()
    expected = [model(X, domain) for domain in (0, 1)]
    plain = Domains().eval()
    plain.load_state_dict(model.state_dict())
    reverted = fbn.revert(model, example_input=X)
    for other in (plain, reverted):
        for domain in (0, 1):
            torch.testing.assert_close(other(X, domain), expected[domain], rtol=1e-5, atol=1e-5)
        assert other.bns[0].weight is other.bns[1].weight  # type: ignore[union-attr, index]
        assert other.bns[0].bias is other.bns[1].bias  # type: ignore[union-attr, index]


@pytest.mark.parametrize(
    ("policy", "note"),
    [
        (fbn.Freeze("none"), "shares gamma and beta with bns.1: it gets a copy"),
        (fbn.Freeze("shift"), "shares gamma with bns.1: it gets a copy"),
        (fbn.ToGroupNorm(), "shares gamma and beta with bns.1: it gets a copy"),
        (fbn.FreezeAffine(), "shared with bns.1, where they are held constant as well"),
        (fbn.Freeze("original"), ""),
        (fbn.Ghost(2), ""),
    ],
    ids=lambda value: value.describe() if isinstance(value, fbn.conversion.policies.Policy) else "",
)
def test_the_plan_says_what_a_policy_does_to_shared_gamma_and_beta(policy: Any, note: str) -> None:
    rows = {row.names[0]: row.reason for row in fbn.plan(net(), policy, X).rows}
    assert (note in rows["bns.0"]) if note else ("share" not in rows["bns.0"])
    assert "share" not in rows["own"]


def test_one_layer_under_two_names_shares_with_itself_alone_and_can_be_merged() -> None:
    model = net("")
    model.bns[1] = model.bns[0]  # type: ignore[index, union-attr]
    expected = model(X, 1)
    fbn.convert(model, fbn.Freeze("merged"), example_input=X)
    torch.testing.assert_close(model(X, 1), expected, rtol=1e-5, atol=1e-5)
    assert model.bns[0] is model.bns[1]  # type: ignore[index, union-attr]
