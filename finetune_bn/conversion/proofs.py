"""Replace layers of a model, and prove of each new layer, and of the network, that the outputs stay the same."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from finetune_bn.conversion.training_run import buffers_restored, run_in_training
from finetune_bn.errors import ConversionMismatch, FinetuneBNError
from finetune_bn.functional.frozen import TOLERANCE, at_least_float32, in_float64, scale_shift
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.tracking import TrackingBatchNorm
from finetune_bn.utilities.probe import Probe, distance, find_probes, quietly

log = logging.getLogger("finetune_bn")

CONVERTED = (FrozenBatchNorm, TrackingBatchNorm, GroupNorm)
# In float64, above what rounding leaves even of a network that amplifies it ten-million-fold, below any other cause.
_WIDE_TOLERANCE = 1e-6
_ROUNDINGS = 8  # of scale and shift each, when they were made, stored and made again

# Layers and what stands, or is to stand, in their place.
Replacements = Sequence[tuple[nn.Module, nn.Module]]


def replace_modules(model: nn.Module, pairs: Replacements) -> nn.Module:
    """Replace modules by identity under every name they have, and return the (possibly new) root."""
    new_of = {id(old): new for old, new in pairs}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in new_of:
                parent._modules[name] = new_of[id(child)]
    return new_of.get(id(model), model)


@dataclass(frozen=True)
class Proof:
    """What the network returned before the conversion, and which of the layers that go ran for it."""

    probe: Probe
    before: list[Tensor]
    ran: frozenset[int]


def run_probes(model: nn.Module, probes: Sequence[Probe], layers: Sequence[nn.Module]) -> list[Proof]:
    """Return what the model returns for the probes before `layers` are replaced; a guessed probe may fail, said so."""
    results = []
    for probe in probes:
        try:
            outputs, of_layers = _observe(model, probe, layers)
            results.append(Proof(probe, outputs, frozenset(of_layers)))
            if not outputs:
                log.warning("no proof on the whole network, layer by layer only: it returned no tensors that are found")
        except Exception as error:
            if probe.given:
                raise
            log.warning(
                "no proof on the whole network, layer by layer only: its example_input_array, or the input size in its "
                "pretrained_cfg, does not fit (%s). Pass example_input.",
                error.__cause__,
            )
    if not probes:
        log.info("no proof on the whole network, layer by layer only: pass example_input for one")
    return results


def prove_layer(name: str, old: nn.Module, new: nn.Module) -> None:
    """Compare old and new layer, both in eval mode, on an input drawn from the statistics of a BatchNorm's input.

    Where a `merged` layer is left, what its own rounding does is no difference: there they are compared in float64.

    Raises:
        ConversionMismatch: the outputs differ.
    """
    merged = isinstance(old, FrozenBatchNorm) and old.affine_kind == "merged"  # whose own statistics are 0 and 1
    statistics = [(new if merged else old).get_buffer(name) for name in ("running_mean", "running_var")]
    mean, sd = at_least_float32(statistics[0]), at_least_float32(statistics[1]).sqrt()
    dims = next((d for d in (4, 3, 5, 2) if _takes(old, d) and _takes(new, d)), 4)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, mean.numel(), *[2] * (dims - 2), generator=generator).to(mean.device, mean.dtype)
    per_channel = [1, -1] + [1] * (dims - 2)
    x = (noise * sd.view(per_channel) + mean.view(per_channel)).to(statistics[0].dtype)
    outputs = []
    for layer in (old, new):
        with quietly(layer):
            outputs.append([layer.forward(x.clone())])  # past the hooks: they are not part of the function
    off = distance(outputs[1], outputs[0])
    if merged and not off <= TOLERANCE[x.dtype] and _is_rounding_of(old, new, x):
        return
    _check(off, x.dtype, f"layer {name or '(root)'} ({type(old).__name__})")


@torch.no_grad()
def _is_rounding_of(old: nn.Module, new: nn.Module, x: Tensor) -> bool:
    """Tell whether two layers differ by no more than rounding their tensors once makes of `x`, channel by channel."""
    outputs, terms = [], in_float64(x[:0])
    for layer in (old, new):
        tensors = {name: in_float64(t) for name, t in layer.state_dict().items() if t.is_floating_point()}
        values = (tensors.get("weight"), tensors.get("bias"), tensors["running_mean"], tensors["running_var"])
        scale, shift = scale_shift(*values, layer.eps)  # type: ignore[arg-type]
        per_channel = [1, -1] + [1] * (x.dim() - 2)
        product = in_float64(x) * scale.view(per_channel)
        outputs.append(product + shift.view(per_channel))
        terms = product.abs() + shift.abs().view(per_channel)
    allowed = TOLERANCE[x.dtype] * outputs[0].abs().max() + _ROUNDINGS * torch.finfo(x.dtype).eps * terms
    return bool(((outputs[1] - outputs[0]).abs() <= allowed).all())


def in_wide_copy(model: nn.Module, example_input: Any, measure: Callable[[nn.Module, list[Probe]], float]) -> bool:
    """Tell whether what `measure` finds on a float64 copy of the model is rounding alone.

    Args:
        model: the model, which is not changed.
        example_input: what its forward takes, see `convert`.
        measure: takes the copy, which it may change, and the probes; returns by how much outputs differ.
    """
    try:
        wide = copy.deepcopy(model).double()
        double = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example_input)
        return measure(wide, find_probes(wide, double)) <= _WIDE_TOLERANCE
    except Exception:  # a network that cannot be copied, or computes in float32 alone, is left to its first verdict
        return False


@contextlib.contextmanager
def sources_kept(model: nn.Module) -> Iterator[None]:
    """On an error, give the BatchNorm layers that converted ones keep aside the tensors they had before.

    `to_batch_norm` writes today's values into them, before it is certain that they come back into the model.
    """
    kept = []
    for layer in model.modules():
        own = {id(tensor) for tensor in (*layer.parameters(False), *layer.buffers(False))}
        for source in getattr(layer, "_source", ()) if isinstance(layer, CONVERTED) else ():
            tensors = [t for t in (*source.parameters(False), *source.buffers(False)) if id(t) not in own]
            values = [(tensor, tensor.detach().clone()) for tensor in tensors]
            kept.append((source, source._parameters.copy(), source._buffers.copy(), source.training, values))
    try:
        yield
    except BaseException:
        for source, parameters, buffers, training, values in kept:
            source._parameters.update(parameters)
            source._buffers.update(buffers)
            source.training = training
            for tensor, value in values:
                if tensor.dtype == value.dtype and tensor.device == value.device:
                    with torch.no_grad():
                        tensor.copy_(value)
                else:
                    tensor.data = value
        raise


def _takes(layer: nn.Module, dims: int) -> bool:
    try:
        check = getattr(layer, "_check_input_dim", None)
        if check is None:  # a frozen layer of another package
            return dims == 4
        check(torch.empty([1] * dims))
    except ValueError:
        return False
    return True


def prove_network(model: nn.Module, proof: Proof, replacements: Replacements, changed: bool = False) -> None:
    """Compare the network with the new layers to what it returned before.

    Args:
        model: the network, the new layers in place.
        proof: what `run_probes` returned of it before.
        replacements: the layers that were replaced.
        changed: whether the new layers compute something else on purpose: then it is only proven that they run.

    Raises:
        ConversionMismatch: the outputs differ, or layers that ran before do not run.
    """
    probe, before = proof.probe, proof.before
    try:
        after, new_outputs = _observe(model, probe, [new for _, new in replacements])
    except FinetuneBNError as error:
        raise ConversionMismatch(
            f"the network: it took the probe input before, and with the new layers it raises {error.__cause__!r}. "
            "Nothing was changed. Leave the layers it asks about out by a rule with Keep(), or report it."
        ) from error
    names = {id(module): name or "(root)" for name, module in model.named_modules()}
    lost = [names[id(replacements[i][1])] for i in sorted(proof.ran - new_outputs.keys())]
    if lost:
        raise ConversionMismatch(
            f"the network: layers {lost} ran before, and do not run after they were replaced. The model also holds "
            "them outside of its modules (a list, a closure), where the old ones would go on. Nothing was changed."
        )
    if changed:
        return
    # The widest of the dtypes in play: a bfloat16 network may return float32.
    statistics: list[Tensor] = [old.get_buffer("running_mean") for old, _ in replacements]
    dtypes = {t.dtype for t in [*before, *statistics]} & TOLERANCE.keys()
    dtype = max(dtypes, key=lambda dtype: TOLERANCE[dtype], default=torch.float32)
    off = distance(after, before)
    if off <= TOLERANCE[dtype]:
        return
    model = replace_modules(model, [(new, old) for old, new in replacements])
    _, old_outputs = _observe(model, probe, [old for old, _ in replacements])
    replace_modules(model, replacements)
    culprit = "the model's own code behind the last new layer"
    for i, reference in old_outputs.items():
        if distance(new_outputs.get(i, []), reference) > TOLERANCE[dtype]:
            culprit = f"layer {names[id(replacements[i][1])]!r}"
            break
    _check(off, dtype, f"the network, first at {culprit}")


def prove_in_training(
    model: nn.Module, proofs: Sequence[Proof], layers: Sequence[tuple[str, nn.Module]], ran: frozenset[int]
) -> None:
    """Run the converted network in training mode: statistics that no layer of ours lets move must not move.

    Args:
        model: the network, the new layers in place.
        proofs: what `run_probes` returned.
        layers: names and new layers.
        ran: indices of those that ran in eval mode.

    Raises:
        ConversionMismatch: the network also uses the tensors of layers beside them.
    """
    run = run_in_training(model, [proof.probe for proof in proofs], [layer for _, layer in layers])
    # A layer that tracks moves its own; one with fixed statistics never does.
    moved = [i for i in sorted(run.moved) if i not in run.ran or isinstance(layers[i][1], FrozenBatchNorm)]
    if moved:
        names = [layers[i][0] or "(root)" for i in moved]
        rules = ", ".join(f'("{name}", Keep())' for name in names[:3])
        raise ConversionMismatch(
            f"the network in training mode: the running statistics of {len(names)} of {len(layers)} converted layers "
            f"go on moving: {shortened(names)}. The network uses their tensors beside the layers "
            "(torch.nn.functional.batch_norm, as in a graph that torch.fx traced through them), where no policy has a "
            "say. Nothing was changed. Convert before tracing, call the layers themselves, or leave them out by rules: "
            f"Rules([{rules}, ...])."
        )
    idle = [name or "(root)" for i, (name, _) in enumerate(layers) if i not in run.ran and i not in ran]
    if idle:
        given = any(proof.probe.given for proof in proofs)
        modes = "in eval mode" if run.problem else "in eval or training mode"
        log.log(
            logging.WARNING if given else logging.INFO,
            "%d of %d converted layers are proven one by one only, not in the network: %s input reached them %s: %s",
            len(idle),
            len(layers),
            "the example" if given else "no probe",
            modes,
            shortened(idle),
        )
    if run.problem:
        log.info("not looked at in training mode, where the network does not take the probe input: %s", run.problem)


def shortened(names: Sequence[str], most: int = 8) -> str:
    """Return the first names as a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def _observe(
    model: nn.Module, probe: Probe, layers: Sequence[nn.Module]
) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
    """Return what the network returned, and each layer, keyed by its index and in the order of the first calls."""
    outputs: dict[int, list[Tensor]] = {}

    def hook(i: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            if module is layers[i]:  # an old layer and its new one share their hooks
                outputs.setdefault(i, []).append(output.detach().clone())

        return keep

    handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        with buffers_restored(model):
            result = probe.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return result, outputs


def _check(off: float, dtype: torch.dtype, where: str) -> None:
    if not off <= TOLERANCE[dtype]:
        raise ConversionMismatch(
            f"{where}: outputs before and after differ by {off:.2g} of the largest value; allowed for {dtype}: "
            f"{TOLERANCE[dtype]:.0e}. Nothing was changed. Leave the layer out by a rule with Keep(), or report it.",
            in_values=True,
        )
