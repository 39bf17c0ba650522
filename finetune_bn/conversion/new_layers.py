"""Layers that have seen no data: their statistics, mean 0 and variance 1, are nothing to go by in a pretrained network.

A decoder, neck or head that is put behind a pretrained backbone has such layers. Freezing them takes away what
BatchNorm does for weights that start at random: a U-Net with its new decoder frozen reaches a fraction of the accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from finetune_bn.conversion.policies import Freeze, Policy
from finetune_bn.layers.sites import BatchNormSite

NEW_KEPT = "kept instead: it has seen no data"  # how the reason of such a plan row begins
_STATISTICS = ("running_mean", "running_var")


def is_new(layer: nn.Module) -> bool:
    """Tell whether a layer has running statistics, and they are those of a layer that has seen nothing."""
    mean, var = (layer._buffers.get(name) for name in _STATISTICS)
    if not _has_values(layer):
        return False
    assert mean is not None
    assert var is not None
    seen = layer._buffers.get("num_batches_tracked")
    return (seen is None or not seen.any()) and not mean.any() and bool((var == 1).all())


def new_beside_pretrained(sites: Sequence[BatchNormSite]) -> frozenset[str]:
    """Return the first names of the new layers; of none where all are new, as in a network without its weights yet."""
    with_statistics = [site for site in sites if _has_values(site.module)]
    new = [site for site in with_statistics if is_new(site.module)]
    return frozenset(site.names[0] for site in new) if len(new) < len(with_statistics) else frozenset()


def is_kept(layer: nn.Module, policy: Policy) -> bool:
    """Tell whether a new layer beside pretrained ones stays live where a policy without rules would freeze it."""
    return isinstance(policy, Freeze) and isinstance(layer, _BatchNorm)


def patterns_for(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the shortest name patterns, at whole parts of the names, that match `chosen` and no other of `names`.

    Args:
        chosen: the names to be matched.
        names: all names, `chosen` among them.
    """
    wanted, others, patterns = set(chosen), set(names) - set(chosen), []
    for name in chosen:
        if name not in wanted:
            continue
        parts = name.split(".")
        heads = [".".join(parts[:i]) + "." for i in range(1, len(parts))]
        head = next((h for h in heads if not any(other.startswith(h) for other in others)), None)
        matched = {n for n in wanted if n.startswith(head)} if head else {name}
        patterns.append(f"{head}*" if head and len(matched) > 1 else name)
        wanted -= matched
    return patterns


def as_rules(pairs: Sequence[tuple[str, Policy]]) -> str:
    """Return rules as Python, ready to paste: `Rules([("decoder.*", Keep()), ("*", Freeze())])`."""
    entries = ", ".join(f'("{name}", {spelled(policy)})' for name, policy in pairs)
    return f"Rules([{entries}])"


def as_yaml(pairs: Sequence[tuple[str, Policy]]) -> str:
    """Return rules as YAML for a config, in one line: `{class_path: finetune_bn.Rules, init_args: {rules: [...]}}`."""
    rules = []
    for name, policy in pairs:
        given = ", ".join(f"{key}: {'null' if value is None else value}" for key, value in _arguments(policy).items())
        arguments = f", init_args: {{{given}}}" if given else ""
        rules.append(f"{{name: '{name}', policy: {{class_path: finetune_bn.{type(policy).__name__}{arguments}}}}}")
    return f"{{class_path: finetune_bn.Rules, init_args: {{rules: [{', '.join(rules)}]}}}}"


def spelled(policy: Policy) -> str:
    """Return a policy as Python, arguments at their defaults left out: `Freeze(affine='shift')`."""
    given = ", ".join(f"{key}={value!r}" for key, value in _arguments(policy).items())
    return f"{type(policy).__name__}({given})"


def _arguments(policy: Policy) -> dict[str, object]:
    fields = dataclasses.fields(policy)  # type: ignore[arg-type]
    return {f.name: getattr(policy, f.name) for f in fields if getattr(policy, f.name) != f.default}


def _has_values(layer: nn.Module) -> bool:
    tensors = [layer._buffers.get(name) for name in _STATISTICS]
    return not any(t is None or is_lazy(t) or t.is_meta for t in tensors)
