"""Remember the weights that statistics were measured with, to tell when a network was trained by frozen ones.

A network that was fine-tuned with frozen layers works by the statistics of its pretraining, which are none of its
activations any more. To put those of other images in their place destroys it, and nothing in a state dict tells.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from finetune_bn.functional.frozen import scale_shift
from finetune_bn.layers.frozen import FrozenBatchNorm

# So many values of each tensor are remembered; and by how much they move, root mean square and relative, where they
# are trained: more than bfloat16 rounds them by.
_VALUES, _MOVED = 64, 3e-3
_NAME = "_weights_seen"


def remember_weights(model: nn.Module, replaced: Iterable[tuple[nn.Module, nn.Module]] = ()) -> None:
    """Let frozen layers remember the weights in front of them, unless they do.

    Args:
        model: the model.
        replaced: (old, new) layers of a conversion: what the old one remembers goes to the new one.
    """
    for old, new in replaced:
        if _NAME in vars(old) and isinstance(new, (FrozenBatchNorm, _BatchNorm)):
            _set(new, vars(old)[_NAME][0])
    for layer, values in _weights_in_front(model):
        if isinstance(layer, FrozenBatchNorm) and _NAME not in vars(layer):
            _set(layer, values)


def renew_weights(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Let layers whose statistics were measured anew remember the weights of today; live ones forget theirs."""
    measured = {id(layer) for layer in layers}
    for layer, values in _weights_in_front(model):
        if id(layer) in measured and vars(layer).pop(_NAME, None) is not None and isinstance(layer, FrozenBatchNorm):
            _set(layer, values)


def trained_since(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose statistics are older than the weights in front of them, as far as they remember."""
    found = []
    for layer, values in _weights_in_front(model):
        seen, tracked = vars(layer).get(_NAME, (None, None))
        if seen is not None and tracked == _tracked(layer) and _moved(seen, values):
            found.append(layer)
    return found


def _set(layer: nn.Module, values: tuple[float, ...]) -> None:
    # No tensor: it would be a part of the state dict, or be missing where tensors are moved.
    vars(layer)[_NAME] = values, _tracked(layer)


def _tracked(layer: nn.Module) -> int:
    """Return how many batches a layer has seen: a live one that went on to train has statistics of its own again."""
    tracked = layer._buffers.get("num_batches_tracked")
    return 0 if tracked is None or tracked.is_meta else int(tracked)


def _weights_in_front(model: nn.Module) -> list[tuple[nn.Module, tuple[float, ...]]]:
    """Return each BatchNorm with some of the weights that are defined between the one before and it.

    Of the one before, what it multiplies by and adds. As the order of definition has it, which need not be that of the
    calls; a head behind the last one is not looked at.
    """
    found: list[tuple[nn.Module, tuple[float, ...]]] = []
    samples: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm, _BatchNorm)):
            values = torch.cat([s.to(samples[-1].device) for s in samples]).tolist() if samples else []
            found.append((module, tuple(values)))
            samples = [_sample(t) for t in _scale_and_shift(module)]
        else:
            samples += [_sample(p) for p in module._parameters.values() if p is not None and _is_real(p)]
    return found


def _scale_and_shift(layer: nn.Module) -> tuple[Tensor, ...]:
    """Return gamma' and beta', which are the same whatever the layer was converted to; nothing where it has none."""
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (getattr(layer, name, None) for name in names)
    if not (_is_real(mean) and _is_real(var)):
        return ()
    return scale_shift(weight, bias, mean, var, float(layer.eps))  # type: ignore[arg-type]


def _is_real(tensor: Tensor | None) -> bool:
    return tensor is not None and not is_lazy(tensor) and not tensor.is_meta


def _sample(parameter: Tensor) -> Tensor:
    flat = parameter.detach().flatten()
    return flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].float()


def _moved(seen: tuple[float, ...], now: tuple[float, ...]) -> bool:
    if len(seen) != len(now):
        return False  # the model was built around, or the policy changed: nothing can be said
    a, b = torch.tensor(seen, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
    return bool((a - b).square().sum() > _MOVED**2 * a.square().sum())
