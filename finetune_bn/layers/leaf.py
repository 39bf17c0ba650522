"""Let torch.fx record a layer of ours as one call, as it records those of torch."""

from __future__ import annotations

from typing import Any

from torch import nn


def as_leaf(layer: nn.Module, x: Any) -> Any:
    """Return the Proxy of a call of `layer`, for a `forward` that got something else than a tensor.

    torch.fx traces through every layer that is not torch's own. Ours look at shapes, modes and gradients, which a
    Proxy does not have; and a layer that stays a layer can still be recalibrated, reverted and folded in the graph.

    Args:
        layer: the layer that is called.
        x: its input, a `torch.fx.Proxy`.

    Raises:
        TypeError: it is none.
    """
    from torch.fx import Proxy

    if not isinstance(x, Proxy):
        raise TypeError(f"{type(layer).__name__}: expected a tensor, got {type(x).__name__}")
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), {})
