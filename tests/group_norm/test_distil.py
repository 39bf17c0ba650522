"""The warm-up of a GroupNorm network: nearer to its BatchNorm network, without labels, and all or nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import finetune_bn as fbn
from finetune_bn.errors import BadData, FinetuneBNError, NoBatchNormMatched
from finetune_bn.layers import GroupNorm
from tests.models import NETS, build, settle


def converted(net: str = "plain", **arguments: Any) -> tuple[nn.Module, Tensor, nn.Module]:
    """Return a network with GroupNorm, images, and the BatchNorm network."""
    model, x = build(net)
    before = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(24, *x.shape[1:], generator=generator)
    images = images + torch.randn(24, *[1] * (x.dim() - 1), generator=generator)
    return fbn.convert(model, fbn.ToGroupNorm(groups=1, **arguments), example_input=x).eval(), images, before


@pytest.mark.parametrize("net", NETS)
def test_the_network_comes_nearer_to_its_batch_norm_network(net: str) -> None:
    model, x, before = converted(net)
    with torch.no_grad():
        y, far = before(x), model(x)
    record = fbn.distil(model, [x], epochs=4, lr=1e-2)
    assert (record.images, record.steps) == (24, 48)
    assert record.loss_after < record.loss_before
    with torch.no_grad():
        assert (model(x) - y).square().mean() < (far - y).square().mean()


def test_the_loss_is_the_error_of_each_layer_and_of_the_output_relative_to_their_variance() -> None:
    model, x, before = converted("root")
    with torch.no_grad():
        y, far = before(x), model(x)
        expected = 2 * float((far - y).square().mean() / y.var(correction=0))  # the only layer is the output too
    assert fbn.distil(model, [x], lr=1e-9).loss_before == pytest.approx(expected, rel=1e-4)


def test_first_weight_and_bias_of_the_converted_layers_alone_then_everything_is_trained() -> None:
    for share, moved in ((1.0, False), (0.5, True)):
        model, x, _ = converted()
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        layer = next(m for m in model.modules() if isinstance(m, GroupNorm))
        before = conv.weight.clone(), layer.weight.clone()
        fbn.distil(model, [x], affine_only=share, lr=1e-2)
        assert torch.equal(conv.weight, before[0]) is not moved
        assert not torch.equal(layer.weight, before[1])


def test_what_requires_no_gradient_is_not_trained() -> None:
    model, x, _ = converted()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).requires_grad_(False)
    before = frozen.weight.clone()
    fbn.distil(model, [x], affine_only=0.0, lr=1e-2)
    assert torch.equal(frozen.weight, before)


def test_a_run_is_repeated_bit_for_bit_however_the_images_come_in_batches() -> None:
    results = []
    for size in (24, 7):
        model, x, _ = converted()
        fbn.distil(model, x.split(size), lr=1e-3)
        results.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_hand_over_begins_as_batch_norm_and_ends_as_plain_group_norm() -> None:
    model, x, _ = converted()
    layer = next(m for m in model.modules() if isinstance(m, GroupNorm))
    seen: list[float] = []
    # The hook is called in the BatchNorm network as well.
    layer.register_forward_hook(lambda m, args, y: seen.append(m.alpha) if isinstance(m, GroupNorm) else None)
    fbn.distil(model, [x], blend=0.5, lr=1e-3)
    steps = seen[1:-1]  # the first and the last are the distances before and after
    assert seen[0] == seen[-1] == layer.alpha == 0.0
    assert steps[0] == 1.0
    assert steps == sorted(steps, reverse=True)
    assert sum(alpha == 0 for alpha in steps) == len(steps) // 2


def test_modes_gradients_random_state_and_statistics_are_left_as_they_were() -> None:
    model, x, _ = converted()
    model.train()
    state = torch.get_rng_state()
    source = copy.deepcopy(next(m for m in model.modules() if isinstance(m, GroupNorm)).source)
    fbn.distil(model, [x], lr=1e-2)
    assert all(m.training for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    now = next(m for m in model.modules() if isinstance(m, GroupNorm)).source
    assert source is not None
    assert now is not None
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), now.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs: got 0"),
        ({"batch_size": 1.5}, "batch_size: got 1.5"),
        ({"lr": 0}, "lr: got 0"),
        ({"affine_only": 2}, "affine_only: got 2"),
        ({"blend": -0.1}, "blend: got -0.1"),
        ({"max_samples": 0}, "max_samples: got 0"),
    ],
)
def test_a_wrong_argument_is_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    model, x, _ = converted()
    with pytest.raises(FinetuneBNError, match=message):
        fbn.distil(model, [x], **arguments)


def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing() -> None:
    model, x, _ = converted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x[20:] = float("inf")
    with pytest.raises(FinetuneBNError, match="stays finite"):
        fbn.distil(model, [x], lr=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_no_images_and_no_converted_layers_are_named() -> None:
    model, _, _ = converted()
    with pytest.raises(BadData, match="no images"):
        fbn.distil(model, [])
    with pytest.raises(NoBatchNormMatched):
        fbn.distil(build("plain")[0], [torch.randn(8, 3, 9, 9)])


class Checkpointed(nn.Module):
    """Two blocks, each under gradient checkpointing where that is asked for."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()) for c in (3, 4)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def checkpointed(reentrant: bool | None) -> nn.Module:
    torch.manual_seed(0)
    model = settle(Checkpointed(reentrant))
    return fbn.convert(model, fbn.ToGroupNorm(groups=1), example_input=torch.randn(2, 3, 8, 8)).eval()


def test_under_gradient_checkpointing_it_is_the_same_training() -> None:
    # Layers run once more in the backward pass, and their hooks with them: a KeyError before.
    x = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain, other = checkpointed(None), checkpointed(False)
    records = [fbn.distil(model, [x], lr=1e-2, epochs=2) for model in (plain, other)]
    assert records[0] == records[1]
    for a, b in zip(plain.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a[1], b[1]), a[0]


def test_checkpointing_that_hides_layers_from_the_loss_is_refused_and_changes_nothing() -> None:
    model, x = checkpointed(True), torch.randn(12, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FinetuneBNError, match="use_reentrant=False"):
        fbn.distil(model, [x.requires_grad_()], lr=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batches_that_cannot_be_cut_are_a_step_each() -> None:
    model, x, _ = converted()
    batches = [{"x": part, "scale": torch.tensor(1.0)} for part in x.split(6)]
    record = fbn.distil(model, batches, forward=lambda net, batch: net(batch["x"] * batch["scale"]), lr=1e-3, epochs=3)
    assert (record.images, record.steps) == (24, 12)
