"""The one file that knows timm's layer classes: BatchNorm with an activation and a drop layer, `Conv2dSame`."""

from __future__ import annotations

import sys
from typing import Any, Self

import torch
import torch.nn.modules.module as every_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import MissingDependency
from finetune_bn.functional.frozen import frozen_batch_norm, in_forward_mode, in_transform
from finetune_bn.functional.frozen_act import (
    FEWEST_IN_ONE_STEP,
    frozen_batch_norm_act,
    frozen_batch_norm_relu,
    relu_tells_input,
)
from finetune_bn.functional.shared_backward import producer_of
from finetune_bn.layers.frozen import (
    Affine,
    FrozenBatchNorm2d,
    check_affine,
)
from finetune_bn.layers.ghost import GhostBatchNorm2d
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.leaf import as_leaf
from finetune_bn.layers.noise import (
    NoisyFrozenBatchNorm,
)
from finetune_bn.layers.renorm import BatchRenorm2d
from finetune_bn.layers.stochastic import (
    EvalBatchNorm2d,
    StochasticBatchNorm2d,
)
from finetune_bn.layers.tracking import TrackingBatchNorm


class ActsBehind(nn.Module):
    """What a norm layer does besides, where it stands for timm's norm+act layer: `drop`, then `act`.

    Both are the modules of the source layer, with their own state and their own train and eval behavior.
    """

    def _put_behind(self, drop: nn.Module | None, act: nn.Module | None) -> None:
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    def _take_behind(self, bn: _BatchNorm) -> None:
        # timm's SyncBatchNormAct may carry neither of the two.
        self._put_behind(getattr(bn, "drop", None), getattr(bn, "act", None))

    def to_batch_norm(self) -> _BatchNorm:
        """Return timm's layer that this one stands for, with today's values and modules."""
        bn: _BatchNorm = super().to_batch_norm()  # type: ignore[misc]
        for name in ("drop", "act"):
            if hasattr(bn, name):
                setattr(bn, name, getattr(self, name))
        return bn


class FrozenBatchNormAct2d(ActsBehind, FrozenBatchNorm2d):
    """`FrozenBatchNorm2d`, then `drop`, then `act`: the frozen form of timm's `BatchNormAct2d`.

    `drop` and `act` are the modules of the source layer, with their own state and their own train and eval behavior.

    Args:
        num_features: number of channels C.
        eps: added to `running_var`.
        momentum: kept for the BN that `to_batch_norm` makes; not used here.
        affine: what is trained, see `FrozenBatchNorm`.
        drop: a module applied to the normalized activation; None for none.
        act: a module applied last; None for none.
        device: where the tensors are made.
        dtype: dtype of the tensors.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: Affine = "none",
        drop: nn.Module | None = None,
        act: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype)
        self._put_behind(drop, act)

    @classmethod
    def from_batch_norm(cls, bn: _BatchNorm, affine: Affine = "none") -> FrozenBatchNormAct2d:
        """Return the frozen layer of the same eval-mode function, see `FrozenBatchNorm.from_batch_norm`."""
        check_affine(affine)
        frozen = super().from_batch_norm(bn, affine)
        frozen._take_behind(bn)
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        """Return `act(drop(x * scale + shift))` for `x` of shape [N, C, H, W]."""
        if not torch.jit.is_scripting():
            if not isinstance(x, Tensor):
                return as_leaf(self, x)
            self._check_input_dim(x)
            producer = producer_of(x, self.weight, self.fold)
            # Shared with the convolution in front, backward needs no tensor for the norm at all.
            y = None if producer is not None else self._in_one_step(x)
            return self.act(self.drop(self._normalized(x, producer))) if y is None else y
        self._check_input_dim(x)  # spelled out: torch.jit.script knows no super().forward
        x = frozen_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))  # type: ignore[no-any-return]

    def _in_one_step(self, x: Tensor) -> Tensor | None:
        """Return the output where backward can do with one tensor instead of two, see `frozen_act`; None else."""
        trained = torch.is_grad_enabled() and self.weight is not None and self.weight.requires_grad
        if not trained:
            return None
        captured = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        if captured or in_transform() or in_forward_mode():
            return None
        if self.fold == "auto" and x.numel() < FEWEST_IN_ONE_STEP:  # asked last: of a size a trace warns
            return None
        act = type(self.act)
        known = act is nn.ReLU or act in (nn.SiLU, nn.Hardswish)
        if not known or type(self.drop) is not nn.Identity or not (_unobserved(self.drop) and _unobserved(self.act)):
            return None
        arguments = (self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        if act is not nn.ReLU:
            return frozen_batch_norm_act(x, *arguments, act.__name__)
        return frozen_batch_norm_relu(x, *arguments) if self._relu_tells_input(x) else None

    def _relu_tells_input(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or x.is_cuda:
            return False  # a compiler weighs for itself what to keep; and to read values is to wait for a GPU
        size = None
        if self.affine_kind == "merged":
            if self.source is None or not self.has_source_statistics:
                return False  # how large the input is was lost with the statistics
            mean, var = self.source.get_buffer("running_mean"), self.source.get_buffer("running_var")
            size = (mean.square() + var).sqrt().to(self.weight)
        try:
            return relu_tells_input(self.weight, self.bias, size, x.dtype)
        except RuntimeError:  # tensors without values: on the meta device, or of torch.func
            return False

    def new_batch_norm(self) -> _BatchNorm:
        """Return a new BatchNorm of the kind that this layer stands for."""
        return new_norm_act(type(self).__name__, self.get_buffer("running_mean"), self.eps, self.momentum)


def _unobserved(module: nn.Module) -> bool:
    """Tell whether nobody can notice that a module is not called: no hooks of its own or of all, no forward put on."""
    own = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    everywhere = (
        every_module._global_forward_pre_hooks,
        every_module._global_forward_hooks,
        every_module._global_backward_pre_hooks,
        every_module._global_backward_hooks,
    )
    return "forward" not in vars(module) and not any(everywhere) and not any(getattr(module, name) for name in own)


def is_conv_same(kind: type[nn.Module]) -> bool:
    """Tell whether the class is timm's `Conv2dSame`."""
    timm = sys.modules.get("timm.layers.conv2d_same")
    return timm is not None and kind is timm.Conv2dSame


class NoisyFrozenBatchNormAct2d(NoisyFrozenBatchNorm, FrozenBatchNormAct2d):
    """`NoisyFrozenBatchNorm`, then `drop`, then `act`; see `FrozenBatchNormAct2d`.

    Args:
        num_features: number of channels C.
        drop: a module applied to the normalized activation; None for none.
        act: a module applied last; None for none.
        arguments: what `NoisyFrozenBatchNorm` takes.
    """

    def __init__(
        self, num_features: int, *, drop: nn.Module | None = None, act: nn.Module | None = None, **arguments: Any
    ) -> None:
        super().__init__(num_features, **arguments)
        self._put_behind(drop, act)

    def forward(self, x: Tensor) -> Tensor:
        """Return `act(drop(y))`, y being `x` [N, C, H, W] normalized, in training by noisy statistics."""
        if not isinstance(x, Tensor):
            return as_leaf(self, x)
        self._check_input_dim(x)
        return self.act(self.drop(self._normalize(x)))  # type: ignore[no-any-return]


class TrackingBatchNormAct2d(ActsBehind, TrackingBatchNorm):
    """A `TrackingBatchNorm`, then `drop`, then `act`: the modules of timm's `BatchNormAct2d` that it stands for.

    Args:
        num_features: number of channels C.
        drop: a module applied to the normalized activation; None for none.
        act: a module applied last; None for none.
        arguments: what the layer before `drop` takes.
    """

    def __init__(
        self, num_features: int, *, drop: nn.Module | None = None, act: nn.Module | None = None, **arguments: Any
    ) -> None:
        super().__init__(num_features, **arguments)
        self._put_behind(drop, act)

    @classmethod
    def _standing_for(cls, bn: _BatchNorm) -> Self:
        layer = super()._standing_for(bn)
        layer._take_behind(bn)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Return `act(drop(y))`, y being `input` [N, C, H, W] normalized."""
        if not isinstance(input, Tensor):
            return as_leaf(self, input)
        return self.act(self.drop(super().forward(input)))  # type: ignore[no-any-return]

    def new_batch_norm(self) -> _BatchNorm:
        """Return a new BatchNorm of the kind that this layer stands for."""
        return new_norm_act(type(self).__name__, self.get_buffer("running_mean"), self.eps, self.momentum)


class GhostBatchNormAct2d(TrackingBatchNormAct2d, GhostBatchNorm2d):
    """`GhostBatchNorm2d`, then `drop`, then `act`; see `TrackingBatchNormAct2d`."""


class BatchRenormAct2d(TrackingBatchNormAct2d, BatchRenorm2d):
    """`BatchRenorm2d`, then `drop`, then `act`; see `TrackingBatchNormAct2d`."""


class StochasticBatchNormAct2d(TrackingBatchNormAct2d, StochasticBatchNorm2d):
    """`StochasticBatchNorm2d`, then `drop`, then `act`; see `TrackingBatchNormAct2d`."""


class EvalBatchNormAct2d(TrackingBatchNormAct2d, EvalBatchNorm2d):
    """`EvalBatchNorm2d`, then `drop`, then `act`; see `TrackingBatchNormAct2d`."""


class GroupNormAct2d(ActsBehind, GroupNorm):
    """`GroupNorm`, then `drop`, then `act`: the modules of timm's `BatchNormAct2d` that it stands for.

    Args:
        num_groups: number of groups.
        num_channels: number of channels C.
        drop: a module applied to the normalized activation; None for none.
        act: a module applied last; None for none.
        arguments: what `GroupNorm` takes.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        drop: nn.Module | None = None,
        act: nn.Module | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(num_groups, num_channels, **arguments)
        self._put_behind(drop, act)

    @classmethod
    def from_batch_norm(cls, bn: _BatchNorm, *arguments: Any, **settings: Any) -> Self:
        """Return the GroupNorm that stands for `bn`, see `GroupNorm.from_batch_norm`."""
        layer = super().from_batch_norm(bn, *arguments, **settings)
        layer._take_behind(bn)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        """Return `act(drop(y))`, y being `input` [N, C, H, W] normalized."""
        if not isinstance(input, Tensor):
            return as_leaf(self, input)
        return self.act(self.drop(self.normalize(input)))  # type: ignore[no-any-return]


def is_norm_act(module: nn.Module) -> bool:
    """Tell whether the module is timm's BatchNorm with an activation, synchronized or not."""
    timm = sys.modules.get("timm.layers.norm_act")  # a model can only hold timm's layers if timm was imported
    return timm is not None and isinstance(module, (timm.BatchNormAct2d, timm.SyncBatchNormAct))


def has_known_forward(bn: _BatchNorm) -> bool:
    """Tell whether the layer computes what its base class computes, no subclass having replaced `forward`.

    Base classes are BatchNorm's, live and synchronized, timm's, and those of this package.
    """
    if "forward" in bn.__dict__:  # patched on the instance
        return False
    forward = type(bn).forward
    if forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return True
    if forward in (TrackingBatchNorm.forward, TrackingBatchNormAct2d.forward):
        return True
    timm = sys.modules.get("timm.layers.norm_act")
    return timm is not None and forward in (timm.BatchNormAct2d.forward, timm.SyncBatchNormAct.forward)


def modules_behind(layer: nn.Module) -> list[nn.Module]:
    """Return the modules that a norm+act layer, live or frozen, applies behind its norm, in order; none of others."""
    acting = (FrozenBatchNormAct2d, TrackingBatchNormAct2d, GroupNormAct2d)
    if not isinstance(layer, acting) and not is_norm_act(layer):
        return []
    # timm's SyncBatchNormAct may carry neither of the two.
    modules = (getattr(layer, name, None) for name in ("drop", "act"))
    return [module for module in modules if module is not None]


def behind_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply what a norm+act layer, live or frozen, does to its normalized activation; `x` itself for other layers."""
    for module in modules_behind(layer):
        x = module(x)
    return x


def new_norm_act(kind: str, like: Tensor, eps: float, momentum: float | None) -> _BatchNorm:
    """Return a new BatchNormAct2d of timm without activation, of as many channels as `like`, for a layer of that kind.

    Raises:
        MissingDependency: timm is not installed.
    """
    try:
        from timm.layers.norm_act import BatchNormAct2d
    except ImportError as error:
        raise MissingDependency(f"a {kind} turns back into timm's BatchNormAct2d: pip install timm") from error
    bn: _BatchNorm = BatchNormAct2d(
        like.numel(),
        eps,
        momentum,  # type: ignore[arg-type]  # timm's annotation forgets None
        apply_act=False,
        device=like.device,
        dtype=like.dtype,
    )
    return bn
