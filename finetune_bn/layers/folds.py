"""Which convolutions and linear maps can compute a frozen layer's affine, and the tying and untying of pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.fold_tie import Fold
from finetune_bn.layers.folded import (
    FoldedConv1d,
    FoldedConv2d,
    FoldedConv3d,
    FoldedConvTranspose1d,
    FoldedConvTranspose2d,
    FoldedConvTranspose3d,
    FoldedLinear,
    Folding,
)
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.norm_act import FoldedConv2dSame, is_conv_same

FoldMode = Literal["auto", "always", "never"]
_FOLDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: FoldedConv1d,
    nn.Conv2d: FoldedConv2d,
    nn.Conv3d: FoldedConv3d,
    nn.ConvTranspose1d: FoldedConvTranspose1d,
    nn.ConvTranspose2d: FoldedConvTranspose2d,
    nn.ConvTranspose3d: FoldedConvTranspose3d,
    nn.Linear: FoldedLinear,
}


def check_fold(fold: str) -> None:
    """Raise unless `fold` is one of the three words."""
    if fold not in get_args(FoldMode):
        raise FinetuneBNError(complaint("fold", fold, ", ".join(map(repr, get_args(FoldMode)))))


def is_producer(module: nn.Module) -> bool:
    """Tell whether the module is a convolution or linear map, of whatever class."""
    return isinstance(module, (_ConvNd, nn.Linear))


def why_not_folded(producer: nn.Module) -> str | None:
    """Return why the affine of a layer behind `producer` cannot go into its weight, or None where it can."""
    plain = _plain_class(producer)
    if parametrize.is_parametrized(producer):
        return "has parametrized tensors (torch.nn.utils.parametrize)"
    if _folded_class(plain) is None:
        return f"is a {plain.__module__}.{plain.__qualname__}, whose forward is not known"
    if "forward" in vars(producer):
        return "has a forward patched in"
    if any(getattr(producer, f"_{name}") for name in ("forward_pre_hooks", "forward_hooks", "backward_hooks")):
        return "has hooks, which would see what the frozen layer makes of its output"
    return None


def fold_pair(producer: nn.Module, norm: FrozenBatchNorm, root: nn.Module, always: bool = True) -> Fold:
    """Let `producer` compute the affine of `norm` from now on; both are modules of `root`. Ask `why_not_folded` first.

    With `always=False` only in steps in which that pays, see `Fold.pays`. A producer or layer that was tied to another
    is untied from that.
    """
    for module in (producer, norm):
        fold = getattr(module, "_fold", None)
        if fold is not None:
            fold.undo()
    holders = {id(child): (parent, name) for parent in root.modules() for name, child in parent._modules.items()}
    folded = _folded_class(type(producer))
    assert folded is not None
    fold = Fold(producer, norm, holders[id(producer)], holders[id(norm)], folded, always)
    fold.redo()
    return fold


def folds_in(model: nn.Module) -> list[Fold]:
    """Return the ties of those producers and frozen layers that are in `model`, one or both."""
    found = [getattr(module, "_fold", None) for module in model.modules()]
    return list({id(fold): fold for fold in found if isinstance(fold, Fold) and fold.producer is not None}.values())


@contextlib.contextmanager
def unfolded(model: nn.Module) -> Iterator[None]:
    """Let each producer and frozen layer do its own part for the time of the block."""
    folds = [fold for fold in folds_in(model) if fold.active]
    for fold in folds:
        fold.active = False
    try:
        yield
    finally:
        for fold in folds:
            fold.active = True


@contextlib.contextmanager
def always_folded(model: nn.Module) -> Iterator[None]:
    """Let each pair work together for the time of the block, whatever the size of the result."""
    folds = [fold for fold in folds_in(model) if not fold.always]
    for fold in folds:
        fold.always = True
    try:
        yield
    finally:
        for fold in folds:
            fold.always = False


def _plain_class(producer: nn.Module) -> type[nn.Module]:
    return producer._fold.plain if isinstance(producer, Folding) else type(producer)


def _folded_class(plain: type[nn.Module]) -> type[nn.Module] | None:
    return FoldedConv2dSame if is_conv_same(plain) else _FOLDED.get(plain)
