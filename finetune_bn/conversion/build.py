"""Make the layer that a policy puts in another's place, without touching the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.conversion.policies import (
    EvalNorm,
    Freeze,
    FreezeAffine,
    Ghost,
    Keep,
    NormalizeOnly,
    Policy,
    Renorm,
    Stochastic,
    ToGroupNorm,
)
from finetune_bn.conversion.proofs import (
    CONVERTED,
)
from finetune_bn.errors import (
    UnsupportedLayer,
)
from finetune_bn.layers.families import EVAL, GHOST, GROUP, NOISY, RENORM, STOCHASTIC, Family, class_for, frozen_class
from finetune_bn.layers.foreign import foreign_layer, is_foreign_frozen, laid_to_rest, revived
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.hold_affine import hold_affine, is_held, release_affine, train_again
from finetune_bn.layers.noise import NoisyFrozenBatchNorm


def undo(layer: nn.Module) -> tuple[nn.Module, Callable[[], None] | None]:
    """Return what the layer was before any conversion: a BatchNorm, or a frozen layer of another package."""
    foreign = foreign_layer(layer)
    bn, then = _keep(layer, Keep())
    if foreign is None:
        return bn, then
    assert isinstance(bn, _BatchNorm)
    if then is not None:
        then()
    return laid_to_rest(bn), None


def _keep(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    bn = _as_batch_norm(layer)
    return bn, _releaser(bn) if is_held(bn) else None


def stays(layer: nn.Module, policy: Policy | None) -> bool:
    """Tell whether a layer is what `Freeze` would make of it already."""
    if not isinstance(layer, FrozenBatchNorm) or not isinstance(policy, Freeze):
        return False
    noise = layer.noise if isinstance(layer, NoisyFrozenBatchNorm) else None
    return (layer.affine_kind, noise) == (policy.affine, policy.noise)


def check_solved_back(layers: Sequence[tuple[str, nn.Module]]) -> None:
    """Raise where a trained `merged` layer cannot turn back into a BatchNorm, before any tensor is written."""
    why = {name or "(root)": m.why_not_solved_back() for name, m in layers if isinstance(m, FrozenBatchNorm)}
    refused = "\n".join(f"  {name}: {reason}" for name, reason in why.items() if reason)
    if refused:
        raise UnsupportedLayer(
            f"affine='merged': these layers cannot turn back into BatchNorm. Nothing was changed.\n{refused}"
        )


def _freeze(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    assert isinstance(policy, Freeze)
    if stays(layer, policy):
        same = layer.fold == policy.fold
        return layer, None if same else lambda: setattr(layer, "fold", policy.fold)
    bn = _as_batch_norm(layer)
    if policy.noise is None:
        frozen = frozen_class(bn).from_batch_norm(bn, policy.affine)
    else:
        frozen = class_for(bn, NOISY).from_batch_norm(bn, policy.affine, policy.noise)
    frozen.fold = policy.fold
    # What an earlier policy held constant is trained again where this one says so.
    return frozen, (lambda: train_again(bn, frozen)) if is_held(bn) else None


_FAMILIES: dict[type[Policy], Family[Any]] = {Ghost: GHOST, Renorm: RENORM, Stochastic: STOCHASTIC, EvalNorm: EVAL}


def _track(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    family = _FAMILIES[type(policy)]
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}  # type: ignore[arg-type]
    if isinstance(layer, family[0]) and layer.settings == settings:
        return layer, None
    bn = _as_batch_norm(layer)
    new = class_for(bn, family).from_batch_norm(bn, **settings)
    if isinstance(policy, EvalNorm):
        new.alpha = 0.0  # but for this it is a BatchNorm, and is proven as one

    def then() -> None:
        train_again(bn, new)
        if isinstance(policy, EvalNorm):
            new.alpha = policy.alpha

    return new, then if is_held(bn) or isinstance(policy, EvalNorm) else None


def _group(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    assert isinstance(policy, ToGroupNorm)
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    if isinstance(layer, GroupNorm) and layer.settings == settings:
        return layer, None
    bn = _as_batch_norm(layer)
    new = class_for(bn, GROUP).from_batch_norm(bn, **settings)
    return new, (lambda: train_again(bn, new)) if is_held(bn) else None


def _hold(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    bn = _as_batch_norm(layer)
    return bn, lambda: hold_affine(bn, reset=isinstance(policy, NormalizeOnly))


_BUILDERS: dict[type[Policy], Callable[[nn.Module, Policy], tuple[nn.Module, Callable[[], None] | None]]] = {
    Keep: _keep,
    Freeze: _freeze,
    FreezeAffine: _hold,
    NormalizeOnly: _hold,
    ToGroupNorm: _group,
    **dict.fromkeys(_FAMILIES, _track),
}


def build_layer(layer: nn.Module, policy: Policy) -> tuple[nn.Module, Callable[[], None] | None]:
    """Return the layer that stands in the place of `layer` under `policy`, and what is done to it once all is proven.

    Args:
        layer: of any kind that can be converted; it may be returned itself.
        policy: what happens to it, see `refusals.refusal`.
    """
    return _BUILDERS[type(policy)](layer, policy)


def _as_batch_norm(layer: nn.Module) -> _BatchNorm:
    if isinstance(layer, CONVERTED):
        return layer.to_batch_norm()
    if is_foreign_frozen(layer):
        return revived(layer)
    assert isinstance(layer, _BatchNorm)
    return layer


def _releaser(module: nn.Module) -> Callable[[], None]:
    def release() -> None:
        assert isinstance(module, _BatchNorm)
        release_affine(module)

    return release
