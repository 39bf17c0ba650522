"""The one file that knows timm's layer classes: BatchNorm with an activation and a drop layer behind it."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import MissingDependency
from finetune_bn.functional import frozen_batch_norm
from finetune_bn.layers.frozen import (
    Affine,
    FrozenBatchNorm,
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    check_affine,
)


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
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
        self.drop = nn.Identity() if drop is None else drop
        self.act = nn.Identity() if act is None else act

    @classmethod
    def from_batch_norm(cls, bn: _BatchNorm, affine: Affine = "none") -> FrozenBatchNormAct2d:
        """Return the frozen layer of the same eval-mode function, see `FrozenBatchNorm.from_batch_norm`."""
        check_affine(affine)
        frozen = super().from_batch_norm(bn, affine)
        # timm's SyncBatchNormAct may carry neither of the two.
        frozen.drop = getattr(bn, "drop", None) or nn.Identity()
        frozen.act = getattr(bn, "act", None) or nn.Identity()
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        """Return `act(drop(x * scale + shift))` for `x` of shape [N, C, H, W]."""
        self._check_input_dim(x)  # spelled out: torch.jit.script knows no super().forward
        x = frozen_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)
        return self.act(self.drop(x))  # type: ignore[no-any-return]

    def to_batch_norm(self) -> _BatchNorm:
        """Return timm's layer of the same eval-mode function, see `FrozenBatchNorm.to_batch_norm`."""
        bn = super().to_batch_norm()
        for name in ("drop", "act"):
            if hasattr(bn, name):
                setattr(bn, name, getattr(self, name))
        return bn

    def _new_batch_norm(self) -> _BatchNorm:
        try:
            from timm.layers.norm_act import BatchNormAct2d
        except ImportError as error:
            raise MissingDependency(
                "a FrozenBatchNormAct2d turns back into timm's BatchNormAct2d: pip install timm"
            ) from error
        like = self.running_mean
        bn: _BatchNorm = BatchNormAct2d(
            self.num_features,
            self.eps,
            self.momentum,  # type: ignore[arg-type]  # timm's annotation forgets None
            apply_act=False,
            device=like.device,
            dtype=like.dtype,
        )
        return bn


def is_norm_act(module: nn.Module) -> bool:
    """Tell whether the module is timm's BatchNorm with an activation, synchronized or not."""
    timm = sys.modules.get("timm.layers.norm_act")  # a model can only hold timm's layers if timm was imported
    return timm is not None and isinstance(module, (timm.BatchNormAct2d, timm.SyncBatchNormAct))


def has_known_forward(bn: _BatchNorm) -> bool:
    """Tell whether the layer computes what its base class computes, no subclass having replaced `forward`."""
    if "forward" in bn.__dict__:  # patched on the instance
        return False
    forward = type(bn).forward
    if forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return True
    timm = sys.modules.get("timm.layers.norm_act")
    return timm is not None and forward in (timm.BatchNormAct2d.forward, timm.SyncBatchNormAct.forward)


def frozen_class(bn: _BatchNorm) -> type[FrozenBatchNorm]:
    """Return the frozen class for a BatchNorm layer."""
    if is_norm_act(bn):
        return FrozenBatchNormAct2d
    for live, frozen in (
        (nn.BatchNorm1d, FrozenBatchNorm1d),
        (nn.BatchNorm2d, FrozenBatchNorm2d),
        (nn.BatchNorm3d, FrozenBatchNorm3d),
    ):
        if isinstance(bn, live):
            return frozen
    return FrozenBatchNorm  # SyncBatchNorm and the `_BatchNormXd` that reverting it leaves take any input rank


def behind_norm(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply what a norm+act layer, live or frozen, does to its normalized activation; `x` itself for other layers."""
    if not isinstance(layer, FrozenBatchNormAct2d) and not is_norm_act(layer):
        return x
    for name in ("drop", "act"):
        module = getattr(layer, name, None)  # timm's SyncBatchNormAct may carry neither of the two
        if module is not None:
            x = module(x)
    return x
