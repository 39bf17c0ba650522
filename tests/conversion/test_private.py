"""Differentially private training: opacus takes every policy that is offered for it, with the right gradients."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.conversion.private import make_private
from finetune_bn.errors import MissingDependency, UnsupportedLayer
from tests.models import settle

opacus = pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore")
POLICIES: dict[str, fbn.Policy] = {
    **{kind: fbn.Freeze(kind) for kind in ("none", "shift", "merged", "original")},  # type: ignore[arg-type]
    "group norm": fbn.ToGroupNorm(),
}
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
Y = torch.arange(4) % 3


class InPlace(nn.Module):
    """Residuals and activations in place, behind layers that are trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1, self.act = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.act(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(shortcut))
        x += shortcut
        return self.head(F.relu(x, inplace=True).mean((2, 3)))


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = InPlace() if name == "in place" else timm.create_model(name, num_classes=3)
    return settle(model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["in place", "test_resnet", "test_efficientnet"])
def test_per_sample_gradients_are_those_of_one_image_at_a_time(name: str, policy: str) -> None:
    """meta-pytorch/opacus#472: layers with trained gamma were refused, folded ones were off by 58 %."""
    model = fbn.convert(net(name), POLICIES[policy], example_input=X).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    alone = copy.deepcopy(model)
    expected: dict[str, list[Tensor]] = {}
    for i in range(len(X)):
        alone.zero_grad()
        F.cross_entropy(alone(X[i : i + 1]), Y[i : i + 1]).backward()
        for key, p in alone.named_parameters():
            expected.setdefault(key, []).append(p.grad.clone())  # type: ignore[union-attr]
    state, output = copy.deepcopy(model.state_dict()), model(X).detach()
    make_private(model)
    torch.testing.assert_close(model(X), output)
    assert model.state_dict().keys() == state.keys()
    assert opacus.validators.ModuleValidator.validate(model, strict=False) == []
    wrapped: Any = opacus.GradSampleModule(model, strict=True, loss_reduction="sum")
    F.cross_entropy(wrapped(X), Y, reduction="sum").backward()
    for key, p in wrapped._module.named_parameters():
        reference = torch.stack(expected[key])
        scale = reference.abs().max().clamp_min(1e-6)
        assert ((p.grad_sample - reference).abs().max() / scale) < 1e-4, key


@pytest.mark.parametrize("policy", POLICIES)
def test_the_engine_trains_a_step(policy: str) -> None:
    model = make_private(fbn.convert(net("test_resnet"), POLICIES[policy], example_input=X).train())
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=4)
    private, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(private(x), y).backward()
        optimizer.step()
    assert all(not torch.equal(p, before[key]) for key, p in model.named_parameters())


def test_layers_that_mix_images_are_refused_by_name() -> None:
    for policy in (fbn.Keep(), fbn.Ghost(2), fbn.Renorm(), fbn.Freeze(noise=4)):
        model = fbn.convert(net("in place"), policy, verify=False)
        with pytest.raises(UnsupportedLayer, match=r"in 2 layers an image depends on others.*bn1, bn2"):
            make_private(model)


def test_dropout_within_a_layer_is_refused_by_name_and_without_opacus_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm = timm.layers.BatchNormAct2d(4, drop_layer=nn.Dropout)
    frozen = fbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), norm), fbn.Freeze("original"), verify=False)
    with pytest.raises(UnsupportedLayer, match=r"make_private: Dropout within FrozenBatchNormAct2d"):
        make_private(frozen)
    monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    with pytest.raises(MissingDependency, match="pip install opacus"):
        make_private(fbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), fbn.Freeze("original")))


def test_an_error_within_forward_leaves_no_mode_behind() -> None:
    model = make_private(fbn.convert(net("in place"), fbn.Freeze("original"), example_input=X))
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 5, 8, 8))
    x = y = torch.zeros(2)
    x += 1
    assert y.tolist() == [1.0, 1.0]  # in place again
    make_private(model)  # twice is once
    assert len(model._forward_pre_hooks) == 1
    assert model(X).shape == (4, 3)


def test_a_private_layer_still_lists_its_buffers_to_the_network() -> None:
    model = make_private(fbn.convert(net("in place"), fbn.Freeze("shift"), example_input=X))
    assert list(model.bn1.buffers()) == []  # type: ignore[operator, union-attr]
    assert "bn1.running_mean" in dict(model.named_buffers())
