"""What a training step calls the network with is copied, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finetune_bn.diagnosis.network_call import NetworkCall
from finetune_bn.layers.sites import find_batch_norms
from tests.models import Plain, settle


class Holder(nn.Module):
    """A network in a part of a part, beside a head with a BatchNorm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.net = settle(Plain())
        self.neck = nn.BatchNorm1d(5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.neck(self.inner.net(x * scale))


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) for m in module.modules())


def test_the_outermost_call_is_taken_with_all_its_arguments() -> None:
    holder, call, x = Holder(), NetworkCall(), torch.randn(4, 3, 9, 9)
    call.await_in(holder)
    holder(x, scale=2.0)
    assert call.target is holder
    assert call.chunk is not None
    (image,), kwargs = call.chunk.content
    assert torch.equal(image, x)
    assert kwargs == {"scale": 2.0}
    assert len(call.chunk) == 4


def test_where_the_whole_is_not_called_it_is_the_part_with_most_layers() -> None:
    holder, call, x = Holder(), NetworkCall(), torch.randn(4, 3, 9, 9)
    call.await_in(holder)
    features = holder.inner.net(x)
    holder.neck(features)
    assert call.target is holder.inner.net
    assert call.chunk is not None
    assert torch.equal(call.chunk.content[0][0], x)


def test_the_first_call_of_a_step_counts() -> None:
    model, call = settle(Plain()), NetworkCall()
    call.await_in(model)
    model(torch.zeros(2, 3, 9, 9))
    model(torch.ones(3, 3, 9, 9))
    assert call.chunk is not None
    assert len(call.chunk) == 2


def test_the_copy_is_of_before_the_call_statistics_and_modes_included() -> None:
    model, call, x = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(3), nn.BatchNorm2d(3)), NetworkCall(), None
    model[2].eval()
    x = torch.randn(4, 3, 5, 5)
    before = x.clone()
    call.await_in(model)
    model(x)
    assert not torch.equal(x, before)
    assert call.chunk is not None
    assert torch.equal(call.chunk.content[0][0], before)
    assert call.training == {model[1]: True, model[2]: False}
    assert list(call.buffers) == [model[1]]
    kept = call.buffers[model[1]]["running_mean"]
    assert kept is not None
    assert not kept.any()
    assert model[1].running_mean is not None
    assert model[1].running_mean.any()


def test_hooks_are_gone_when_it_forgets_and_nothing_is_held() -> None:
    holder, call = Holder(), NetworkCall()
    call.await_in(holder)
    assert hooks(holder) > 0
    call.await_in(holder)  # again, as after a step that was skipped
    assert hooks(holder) == len({id(m) for m in (holder, holder.inner, holder.inner.net, holder.inner.net.bn1)})
    holder(torch.randn(4, 3, 9, 9))
    call.forget()
    assert hooks(holder) == 0
    assert call.target is call.chunk is None
    assert not call.training
    assert not call.buffers


def test_calls_without_images_are_passed_over() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor | None = None) -> None:
            if x is not None and len(x):
                self.bn(x)

    model, call = Odd(), NetworkCall()
    call.await_in(model)
    model()
    model(torch.zeros(0, 3))
    assert call.chunk is None
    model(torch.randn(4, 3))
    assert call.chunk is not None


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_parts_are_left_alone(how: str) -> None:
    """A hook that was there when a network is compiled is compiled in; one that comes later is not called."""
    torch.ones((), requires_grad=True).backward()  # before dynamo is there, or tests behind this one could not fork
    holder, call = Holder(), NetworkCall()
    if how == "in place":
        holder.inner.net.compile(backend="eager")
    else:
        holder.inner.net = torch.compile(holder.inner.net, backend="eager")
    call.await_in(holder)
    inside = holder.inner.net if how == "in place" else holder.inner.net._orig_mod
    assert hooks(inside) == 0
    holder(torch.randn(4, 3, 9, 9))
    assert call.target is holder
    assert len(find_batch_norms(holder)) == 3
