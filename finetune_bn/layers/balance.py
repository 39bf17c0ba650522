"""Multiply the output channels of the map in front of a GroupNorm by factors, and take that back.

The factors are powers of two, so both are exact in every floating-point dtype. Which map it was is kept as its name
relative to the layer's, so that it is found again in a copy of the model, in a file, and within another model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from finetune_bn.errors import UnsupportedLayer
from finetune_bn.functional.fold import scaled_weight
from finetune_bn.layers.group_norm import GroupNorm


def multiply_channels(producer: nn.Module, factors: Tensor) -> None:
    """Multiply weight and bias of a convolution or linear map, so that its output channels are multiplied.

    Args:
        producer: a map as `pairs.find_feeds` names it.
        factors: powers of two, with or without a sign, [C].
    """
    weight, bias = producer.get_parameter("weight"), producer._parameters.get("bias")
    with torch.no_grad():
        weight.copy_(
            scaled_weight(
                weight,
                factors.to(weight.device),
                transposed=bool(getattr(producer, "transposed", False)),
                groups=int(getattr(producer, "groups", 1)),
            )
        )
        if bias is not None:
            bias.mul_(factors.to(bias))


def relative_name(name: str, start: str) -> str:
    """Return the name of a module as seen from another: `..conv1` is the `conv1` beside it, `...conv1` a level up."""
    there, here = name.split("."), start.split(".")
    same = 0
    while same < min(len(there), len(here)) - 1 and there[same] == here[same]:
        same += 1
    return "." * (len(here) - same + 1) + ".".join(there[same:])


def absolute_name(relative: str, start: str) -> str:
    """Return the name that `relative_name` was made from."""
    rest = relative.lstrip(".")
    here = start.split(".")
    kept = len(here) - (len(relative) - len(rest) - 1)
    if kept < 0:
        raise ValueError(f"{relative} leads out of the model from {start}")
    return ".".join([*here[:kept], rest])


def balanced_map(model: nn.Module, name: str, layer: GroupNorm) -> nn.Module | None:
    """Return the map whose channels were multiplied for a layer of the model; None where none were.

    Raises:
        UnsupportedLayer: it is not in this model.
    """
    if layer.balance is None:
        return None
    try:
        return model.get_submodule(absolute_name(layer.balance[0], name))
    except (AttributeError, ValueError) as error:
        raise UnsupportedLayer(
            f"{name or '(root)'}: for this GroupNorm the channels of the map in front of it ({layer.balance[0]}) were "
            f"balanced, and that map is not in the {type(model).__name__} given, where it would have to be changed "
            "back. Pass the whole model. Nothing was changed."
        ) from error


def unbalance(model: nn.Module, name: str, layer: GroupNorm) -> None:
    """Give the map in front of a layer the weight it would have without `layer.balance`, and forget that."""
    producer = balanced_map(model, name, layer)
    if producer is not None and layer.balance is not None:
        multiply_channels(producer, 1 / layer.balance[1])
        layer.balance = None
