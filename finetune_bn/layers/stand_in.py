"""What a layer needs that stands in for another module: its hooks, and values written back into it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Let both modules hold the same hook tables, so that the handles users keep still remove their hooks."""
    for name in _HOOKS:
        if name in source.__dict__:
            target.__dict__[name] = source.__dict__[name]


def store(bn: _BatchNorm, name: str, value: Tensor | None) -> None:
    """Write `value` into a tensor of `bn`, in place where device and dtype allow it."""
    tensor = getattr(bn, name)
    if tensor is None or value is None or tensor is value:
        return
    if tensor.device == value.device and tensor.dtype == value.dtype:
        tensor.copy_(value)
    elif not isinstance(tensor, nn.Parameter):
        setattr(bn, name, value.detach().clone())
    elif tensor.is_meta or value.is_meta:
        setattr(bn, name, nn.Parameter(value.detach().clone(), requires_grad=tensor.requires_grad))
    else:
        tensor.data = value.detach().clone()
