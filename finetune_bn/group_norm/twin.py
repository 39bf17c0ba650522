"""The BatchNorm network that a GroupNorm network was converted from, beside it."""

from __future__ import annotations

import copy

from torch import nn

from finetune_bn.conversion.proofs import replace_modules
from finetune_bn.errors import NoBatchNormMatched, complaint
from finetune_bn.layers.balance import unbalance
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.sites import BatchNormSite, find_batch_norms


def group_norm_sites(model: nn.Module) -> list[BatchNormSite]:
    """Return the layers that were converted to GroupNorm.

    Raises:
        NoBatchNormMatched: there are none.
    """
    sites = [site for site in find_batch_norms(model, group_norms=True) if isinstance(site.module, GroupNorm)]
    if not sites:
        allowed = "a model with layers that convert(model, ToGroupNorm(...)) made"
        raise NoBatchNormMatched(complaint("model", type(model).__name__, allowed))
    return sites


def batch_norm_twin(model: nn.Module) -> nn.Module:
    """Return a copy of the model in which each converted GroupNorm is the BatchNorm that it was; in eval mode.

    Maps whose channels were balanced for a GroupNorm are as they were before that.

    All else is as in the model today, its other weights and its hooks too: before any training it is the pretrained
    network. Nothing in it requires a gradient.
    """
    twin = copy.deepcopy(model)
    layers = [(site.names[0], site.module) for site in group_norm_sites(twin) if isinstance(site.module, GroupNorm)]
    for name, layer in layers:
        unbalance(twin, name, layer)
    twin = replace_modules(twin, [(layer, layer.to_batch_norm()) for _, layer in layers])
    for module in twin.modules():  # not by eval(): a model's own train() may do more
        module.training = False
    return twin.requires_grad_(False)
