"""What several test files measure or compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from finetune_bn.diagnosis import memory


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps of one forward pass: each storage once, tensors of the model left out."""

    def checked() -> Any:
        output = run()
        assert output.requires_grad, "nothing was recorded for backward"
        return output

    return memory.saved_bytes(model, checked)


def without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without what layers that are no BatchNorm in evaluation keep beside its five tensors."""
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def assert_same_state(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Assert that two state dicts have the same keys, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Assert that the block leaves the model the identical objects, bits, modes, flags, hooks and random state."""
    modules = dict(model.named_modules(remove_duplicate=False))
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    hooks = {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in modules.items()}
    modes = {name: module.training for name, module in modules.items()}
    tensors = dict(model.state_dict(keep_vars=True))
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    flags = {name: tensor.requires_grad for name, tensor in tensors.items()}
    random_state = torch.get_rng_state()
    yield
    now = dict(model.named_modules(remove_duplicate=False))
    assert list(now) == list(modules)
    for name, module in modules.items():
        assert now[name] is module, f"{name} was replaced"
        assert set(vars(module)) == attributes[name], name
        assert module.training == modes[name], name
        assert len(module._forward_hooks) + len(module._forward_pre_hooks) == hooks[name], name
    tensors_now = dict(model.state_dict(keep_vars=True))
    assert list(tensors_now) == list(tensors)
    for name, tensor in tensors.items():
        packed = name.endswith("_extra_state")  # which is made anew whenever it is asked for
        assert packed or tensors_now[name] is tensor, f"{name} was rebound"
        assert tensor.requires_grad == flags[name], name
        assert torch.equal(tensor.detach(), values[name]), name
    assert torch.equal(torch.get_rng_state(), random_state)
