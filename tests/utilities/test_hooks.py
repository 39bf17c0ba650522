"""Hooks are there for the time of a block, whatever happens in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from finetune_bn.utilities.hooks import hooked


def test_hooks_are_called_before_and_after_each_module_and_are_gone_behind_the_block() -> None:
    layers, seen = [nn.ReLU(), nn.Tanh()], []

    def pre(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen.append(("before", module))

    def post(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        seen.append(("after", module))

    with hooked(layers, pre=pre, post=post):
        nn.Sequential(*layers)(torch.ones(1))
    assert seen == [("before", layers[0]), ("after", layers[0]), ("before", layers[1]), ("after", layers[1])]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_an_error_in_the_block_or_among_the_modules_leaves_none() -> None:
    layer = nn.ReLU()

    def fail() -> None:
        raise RuntimeError("in the block")

    with pytest.raises(RuntimeError, match="in the block"), hooked([layer], pre=lambda module, args: None):
        fail()
    with pytest.raises(AttributeError), hooked([layer, None], pre=lambda module, args: None):  # type: ignore[list-item]
        fail()
    assert not layer._forward_pre_hooks
