"""Ghost batches: each strided group by its own statistics, the running statistics from all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from tests import batch_references as reference
from tests.models import settle
from tests.references import as_array, values_of

C = 4
DIMENSIONS: dict[str, tuple[type[_BatchNorm], type[GhostBatchNorm], tuple[int, ...]]] = {
    "any": (nn.SyncBatchNorm, GhostBatchNorm, (3, 3)),
    "1d, no length": (nn.BatchNorm1d, GhostBatchNorm1d, ()),
    "1d": (nn.BatchNorm1d, GhostBatchNorm1d, (3,)),
    "2d": (nn.BatchNorm2d, GhostBatchNorm2d, (3, 3)),
    "3d": (nn.BatchNorm3d, GhostBatchNorm3d, (3, 3, 3)),
}


def images(n: int, space: tuple[int, ...] = (3, 3)) -> Tensor:
    return torch.randn((n, C, *space), generator=torch.Generator().manual_seed(2)) * 2 + 1


def pretrained(live: type[_BatchNorm] = nn.BatchNorm2d) -> _BatchNorm:
    bn = live(C)
    settle(bn)
    return bn


@pytest.mark.parametrize("images_in_batch", [12, 11], ids=["even", "uneven"])
@pytest.mark.parametrize("groups", [2, 3, 5])
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_output_is_that_of_batch_norm_on_each_group(dimensions: str, groups: int, images_in_batch: int) -> None:
    live, ghost_class, space = DIMENSIONS[dimensions]
    layer = ghost_class.from_batch_norm(pretrained(live), groups)
    x = images(images_in_batch, space)
    expected = reference.ghost(values_of(layer), as_array(x), groups)
    np.testing.assert_allclose(as_array(layer(x)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [12, 6, 4, 2])
@pytest.mark.parametrize("dimensions", ["1d", "2d", "3d"])
def test_ghost_batches_are_normalized(dimensions: str, groups: int) -> None:
    """composer, TestGhostBatchesNormalized: 12 images, sizes 1, 2, 3 and one that does not fit, with hardly any eps."""
    _, ghost_class, space = DIMENSIONS[dimensions]
    layer = ghost_class(C, groups, eps=1e-12)
    y = layer(images(12, space))
    others = [d for d in range(y.dim()) if d != 1]
    for i in range(groups):
        var, mean = torch.var_mean(y[i::groups], others, correction=0)
        torch.testing.assert_close(mean, torch.zeros(C), rtol=0, atol=1e-5)
        torch.testing.assert_close(var, torch.ones(C))


def test_one_group_is_batch_norm() -> None:
    ghost, bn, x = GhostBatchNorm2d.from_batch_norm(pretrained(), 1), pretrained(), images(6)
    assert torch.equal(ghost(x), bn(x))
    torch.testing.assert_close(ghost.running_mean, bn.running_mean)
    torch.testing.assert_close(ghost.running_var, bn.running_var)


def test_fewer_images_than_groups_are_a_group_each() -> None:
    """composer raises."""
    layer, x = GhostBatchNorm2d.from_batch_norm(pretrained(), 8), images(3)
    torch.testing.assert_close(layer(x), F.instance_norm(x, weight=layer.weight, bias=layer.bias), rtol=1e-5, atol=1e-5)
    assert int(layer.num_fallbacks) == 0


@pytest.mark.parametrize(("n", "counted"), [(16, 0), (9, 1), (8, 1), (5, 1)])
def test_where_one_group_would_hold_a_single_value_all_go_by_the_running_statistics(n: int, counted: int) -> None:
    """On [N, C] with 8 groups; the statistics of the batch are known all the same, and tracked."""
    layer, x = GhostBatchNorm1d.from_batch_norm(pretrained(nn.BatchNorm1d), 8), images(n, ())
    fixed = pretrained(nn.BatchNorm1d).eval()(x)
    live = pretrained(nn.BatchNorm1d)
    live(x)
    assert torch.equal(layer(x), fixed) == bool(counted)
    assert int(layer.num_fallbacks) == counted
    torch.testing.assert_close(layer.running_mean, live.running_mean)
    torch.testing.assert_close(layer.running_var, live.running_var)


def test_running_variance_holds_what_lies_between_the_groups() -> None:
    """The mean of the groups' variances, as others store it, would evaluate by a fraction of the true one."""
    layer, x = GhostBatchNorm2d(C, 4, momentum=1.0), images(16)
    x += 10 * (torch.arange(16) % 4).view(-1, 1, 1, 1)
    layer(x)
    np.testing.assert_allclose(as_array(layer.running_var), reference.unbiased_var(as_array(x)), rtol=1e-5)
    within = np.mean([reference.unbiased_var(as_array(x[i::4])) for i in range(4)], axis=0)
    assert (as_array(layer.running_var) > 10 * within).all()


def test_images_of_a_label_do_not_reach_each_other_and_in_batch_norm_they_do() -> None:
    """4 labels x 3 images, label by label: each group has one image of each label."""
    labels = torch.arange(4).repeat_interleave(3)
    reached = {}
    for layer in (GhostBatchNorm2d(C, 3), nn.BatchNorm2d(C)):
        x = images(12).requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
        peers = [i for i in range(1, 12) if gradient[i].abs().max() > 1e-9]
        reached[type(layer).__name__] = {int(labels[i]) for i in peers}
    assert reached == {"GhostBatchNorm2d": {1, 2, 3}, "BatchNorm2d": {0, 1, 2, 3}}


@pytest.mark.parametrize("groups", [0, -1, 2.0, True, None, "4"])
def test_bad_groups_are_one_clear_error(groups: Any) -> None:
    for make in (lambda: GhostBatchNorm2d(C, groups), lambda: GhostBatchNorm2d.from_batch_norm(pretrained(), groups)):
        with pytest.raises(FinetuneBNError, match=r"groups: got .*; allowed: a whole number from 1 on\. Take K"):
            make()


def test_it_says_what_it_is() -> None:
    assert repr(GhostBatchNorm2d(C, 3)) == "GhostBatchNorm2d(4, groups=3, eps=1e-05, momentum=0.1, affine=True)"
