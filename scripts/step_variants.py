"""The networks that `bench_step.py` times: one base network, and what this package and its peers make of it.

All start from the same values: timm's random weights, gamma = 1, and the statistics of a batch of noise, so that the
frozen networks compute what a pretrained one would, at activations of ordinary size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import finetune_bn as fbn
from finetune_bn.functional.frozen import scale_shift
from finetune_bn.functional.shared_backward import FoldMode
from finetune_bn.layers.frozen import AFFINE_KINDS, Affine

LIVE, FLOOR = "live BatchNorm", "no norm layers (floor)"
EVAL, INDUCTOR = "bn.eval()", "bn.eval(), Inductor efficient_conv_bn_eval"
TORCHVISION, TIMM = "torchvision FrozenBatchNorm2d", "timm freeze_batch_norm_2d"
TUNE, GROUP = "bn.eval(), mmengine Tune mode", "GroupNorm"
# Options of torch.compile that a variant consists in; it is nothing without them.
COMPILE_OPTIONS: dict[str, dict[str, bool]] = {INDUCTOR: {"efficient_conv_bn_eval_fx_passes": True}}


def ours(affine: Affine, fold: FoldMode) -> str:
    """Return the name of one of our variants."""
    return f"ours, {affine}, fold={fold}"


def base_network(name: str, size: int, narrow: int = 1) -> nn.Module:
    """Return a timm network in training mode whose BatchNorm layers fit its random weights.

    Args:
        name: a name of timm's.
        size: height and width of the images.
        narrow: a ResNet with a fraction of its channels, one by so many.
    """
    torch.manual_seed(0)
    channels = {} if narrow == 1 else {"channels": tuple(c // narrow for c in (64, 128, 256, 512))}
    model = timm.create_model(name, **channels).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [bn.momentum for bn in norms]
    for bn in norms:
        nn.init.ones_(bn.weight)
        bn.momentum = None  # the average over all batches, here of one
    with torch.no_grad():
        model(torch.randn(4, 3, size, size))
    for bn, momentum in zip(norms, momenta, strict=True):
        bn.momentum = momentum
    return model


def replace_norms(model: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    """Replace each norm layer by what `make` returns for it, its activation behind that."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                act = getattr(child, "act", nn.Identity())
                new = make(child)
                setattr(parent, name, new if isinstance(act, nn.Identity) else nn.Sequential(new, act))
    return model


def torchvision_frozen(bn: nn.BatchNorm2d) -> nn.Module:
    """Return torchvision's frozen layer with the values of `bn`."""
    frozen = FrozenBatchNorm2d(bn.num_features, eps=bn.eps)
    names = ("weight", "bias", "running_mean", "running_var")
    frozen.load_state_dict({name: value for name, value in bn.state_dict().items() if name in names})
    return frozen


def eval_mode(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model with its BatchNorm layers in eval mode, gamma and beta trained."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def tune_mode(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model in mmengine's Tune mode."""
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model

    folded: nn.Module = eval_mode(model, x)
    turn_on_efficient_conv_bn_eval_for_single_model(folded)
    return folded


def without_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """Return the model without its norm layers: a conv in front of one has a bias instead, and the weights that fit."""
    made: dict[int, tuple[Tensor, nn.Module]] = {}
    pairs: dict[nn.Module, nn.Module] = {}

    def remember(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        made[id(output)] = (output, module)  # held, so that no other tensor takes its id

    def arrive(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) in made:
            pairs[module] = made[id(args[0])][1]

    handles = [m.register_forward_hook(remember) for m in model.modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(arrive) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model.eval()(x[:2])  # in training mode it would move the statistics
        model.train()
        for handle in handles:
            handle.remove()
        for bn, conv in pairs.items():
            scale, shift = scale_shift(bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps)
            conv.weight.mul_(scale.view(-1, 1, 1, 1))
            conv.bias = nn.Parameter(shift)
    return replace_norms(model, lambda bn: nn.Identity())


def group_norm(bn: nn.BatchNorm2d, groups: int = 32) -> nn.Module:
    """Return PyTorch's GroupNorm of as many groups as divide the channels; only its cost is of interest here."""
    return nn.GroupNorm(math.gcd(groups, bn.num_features), bn.num_features)


def _ours(affine: Affine, fold: FoldMode) -> Callable[[nn.Module, Tensor], nn.Module]:
    return lambda model, x: fbn.convert(model, fbn.Freeze(affine, fold=fold), example_input=x[:2])


def _of_groups(groups: int) -> Callable[[nn.Module, Tensor], nn.Module]:
    return lambda model, x: replace_norms(model, lambda bn: group_norm(bn, groups))


VARIANTS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    LIVE: lambda model, x: model,
    EVAL: eval_mode,
    TUNE: tune_mode,
    INDUCTOR: eval_mode,
    TORCHVISION: lambda model, x: replace_norms(model, torchvision_frozen),
    TIMM: lambda model, x: freeze_batch_norm_2d(model),
    GROUP: lambda model, x: replace_norms(model, group_norm),
    **{ours(affine, fold): _ours(affine, fold) for affine in AFFINE_KINDS for fold in ("never", "always", "auto")},
    FLOOR: without_norms,
}
# GroupNorm by its number of groups, where the channels divide; GROUP is the one of 32.
GROUP_NORMS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    f"GroupNorm, {groups} group{'s' * (groups > 1)}": _of_groups(groups) for groups in (1, 8, 32)
}
# These compute something else than the frozen network, on purpose.
OTHER_FUNCTION = (LIVE, GROUP, FLOOR, *GROUP_NORMS)
# Where not all are timed: of our kinds one without and one with a learnable scale, and each peer.
SHORT = [
    name
    for name in VARIANTS
    if not name.startswith("ours") or any(name.startswith(f"ours, {kind},") for kind in ("none", "original"))
]


def build(variant: str, base: nn.Module, x: Tensor) -> nn.Module:
    """Return a variant of `base`, which stays as it is.

    Raises:
        ValueError: it does not compute what the frozen network does.
    """
    model = (VARIANTS | GROUP_NORMS)[variant](copy.deepcopy(base), x)
    if variant not in OTHER_FUNCTION:
        with torch.no_grad():
            reference = copy.deepcopy(base).eval()(x[:2])
            off = float((model(x[:2]) - reference).abs().max() / reference.abs().max())
        if not off < 1e-3:
            raise ValueError(f"it computes another function: {off:.2g} of the largest output off")
    return model
