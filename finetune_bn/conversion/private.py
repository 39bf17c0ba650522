"""Make a converted network fit for differentially private training, as opacus does it (DP-SGD).

Frozen statistics are constants: no image depends on another, so each image has a gradient of its own, which is what
privacy needs. What stands in the way is how the network is written: opacus hooks each layer that is trained, and what a
hooked layer returned must not be changed in place.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from finetune_bn.conversion.new_layers import patterns_for
from finetune_bn.conversion.plan import check_model
from finetune_bn.errors import MissingDependency, UnsupportedLayer
from finetune_bn.layers.families import FROZEN
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.noise import NoisyFrozenBatchNorm
from finetune_bn.layers.norm_act import behind_norm, modules_behind

_OUT_OF_PLACE: dict[Any, Any] = {
    Tensor.add_: torch.add,
    Tensor.sub_: torch.sub,
    Tensor.mul_: torch.mul,
    Tensor.div_: torch.div,
    Tensor.__iadd__: torch.add,
    Tensor.__isub__: torch.sub,
    Tensor.__imul__: torch.mul,
    Tensor.__itruediv__: torch.div,
}
_AUGMENTED = range(13, 26)  # the arguments of BINARY_OP that stand for +=, -= and their kin


def make_private(model: nn.Module) -> nn.Module:
    """Prepare a converted network for opacus' `PrivacyEngine`, in place, and return it.

    Activations in place are switched off, `x += shortcut` within the network's forward computes `x + shortcut`, layers
    with trained gamma or beta declare their constants as such, and opacus learns their per-sample gradients. What the
    network computes stays, and so does its state dict. Call it after `convert` and before the engine.

    Args:
        model: a network whose BatchNorm layers are frozen (any affine, without noise) or converted to GroupNorm.

    Raises:
        UnsupportedLayer: layers are left in which an image depends on others.
        MissingDependency: opacus is not installed.
    """
    check_model(model)
    mixing = [name for name, m in model.named_modules() if isinstance(m, (_BatchNorm, NoisyFrozenBatchNorm))]
    if mixing:
        every = [name for name, _ in model.named_modules()]
        named = ", ".join(name or "(root)" for name in patterns_for(mixing, every)[:4])
        raise UnsupportedLayer(
            f"make_private: in {len(mixing)} layers an image depends on others of its batch, so none has a gradient "
            f"of its own: {named}. Convert them first: Freeze() or ToGroupNorm()."
        )
    _teach_opacus()
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
        if isinstance(module, FrozenBatchNorm):
            _check_behind(module)
            # opacus takes the buffers of a trained layer for statistics of private data, and asks the layer itself.
            module.buffers = _no_buffers  # type: ignore[method-assign]
    if not any(isinstance(getattr(hook, "__self__", None), _Rewritten) for hook in model._forward_pre_hooks.values()):
        rewritten = _Rewritten()
        model.register_forward_pre_hook(rewritten.enter)
        model.register_forward_hook(rewritten.leave, always_call=True)
    return model


def _check_behind(layer: FrozenBatchNorm) -> None:
    for module in modules_behind(layer):
        if any(True for _ in module.parameters()) or "Drop" in type(module).__name__:
            raise UnsupportedLayer(
                f"make_private: {type(module).__name__} within {type(layer).__name__}: the gradients of an image are "
                "found by running what is behind the norm again, which neither dropout nor trained activations allow. "
                "Take layers without them."
            )


def _no_buffers(recurse: bool = True) -> Iterator[Tensor]:
    return iter(())


def _constants(layer: FrozenBatchNorm) -> tuple[Any, ...]:
    weight, bias = (None if t is None else t.detach() for t in (layer.weight, layer.bias))
    return layer.running_mean, layer.running_var, weight, bias, False, 0.0, layer.eps


class _OutOfPlace(TorchFunctionMode):
    """Computes `x += y` as `x = x + y`, and functional activations not in place."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("inplace") is True:
            kwargs["inplace"] = False
        if func in _OUT_OF_PLACE and _is_augmented_assignment(sys._getframe(1)):
            func = _OUT_OF_PLACE[func]
        return func(*args, **kwargs)


def _is_augmented_assignment(frame: FrameType) -> bool:
    """Tell whether the code is at an `x += y`, which takes what it gets for x; of an `x.add_(y)` the result is lost."""
    code, at = frame.f_code.co_code, frame.f_lasti
    return 0 <= at < len(code) - 1 and code[at] == dis.opmap.get("BINARY_OP") and code[at + 1] in _AUGMENTED


class _Rewritten:
    """Hooks of a network that run its forward pass under `_OutOfPlace`."""

    def __init__(self) -> None:
        self._modes: list[_OutOfPlace] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self._modes.append(_OutOfPlace())
        self._modes[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._modes:
            self._modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _teach_opacus() -> None:
    try:
        from opacus.grad_sample import register_grad_sampler
    except ImportError as error:
        raise MissingDependency("make_private prepares for opacus: pip install opacus") from error
    register_grad_sampler(list(FROZEN))(frozen_gradients)  # for our GroupNorm opacus takes torch.func


def frozen_gradients(
    layer: FrozenBatchNorm, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Return the gradients of each image for the gamma and beta of a frozen layer, [N, C] each; for opacus.

    Args:
        layer: the frozen layer.
        activations: its inputs: one, [N, C, ...].
        backprops: gradients of its output, [N, C, ...].
    """
    if modules_behind(layer):  # `backprops` are those of the activation's output
        with torch.enable_grad():
            z = F.batch_norm(activations[0].detach(), *_constants(layer)).requires_grad_()
            (backprops,) = torch.autograd.grad(behind_norm(layer, z), z, backprops)
    found: dict[nn.Parameter, Tensor] = {}
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is not None and weight.requires_grad:
        xhat = F.batch_norm(activations[0], layer.running_mean, layer.running_var, eps=layer.eps)
        found[weight] = (xhat * backprops).flatten(2).sum(2) if backprops.dim() > 2 else xhat * backprops
    if bias is not None and bias.requires_grad:
        found[bias] = backprops.flatten(2).sum(2) if backprops.dim() > 2 else backprops
    return found
