"""What BatchNormConversion looks at in a module and its Trainer, before the training and when it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from finetune_bn.callbacks.lightning_names import AVERAGING, SCHEDULING, is_a
from finetune_bn.conversion.plan import Plan, plan
from finetune_bn.conversion.policies import Freeze, FreezeAffine, Keep, NormalizeOnly, Policy, ToGroupNorm
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.sites import find_batch_norms, is_converted_group_norm
from finetune_bn.layers.tracking import TrackingBatchNorm
from finetune_bn.utilities.probe import quietly


def pending(target: nn.Module, the_plan: Plan, policy: Policy | None) -> list[str]:
    """Return the layers that are not what the plan made of them, as they were put there since it was carried out.

    Args:
        target: the part that was converted.
        the_plan: what was carried out on it.
        policy: decides about layers that the plan does not know; None where these stay as they are.
    """
    known = {name: row.policy for row in the_plan.rows for name in row.names}
    layers = {_plain(site.names[0]): site.module for site in find_batch_norms(target, group_norms=True)}
    found = [name for name, layer in layers.items() if name in known and not _is_carried_out(known[name], layer)]
    new = layers.keys() - known.keys()
    if new and policy is not None:
        rows = plan(target, policy, probe=False).rows
        wanted = {_plain(row.names[0]): row.policy for row in rows}
        found += [name for name in layers if name in new and not _is_carried_out(wanted[name], layers[name])]
    return found


def gone(target: nn.Module, the_plan: Plan) -> list[str]:
    """Return the layers of a plan that are not in the network any more."""
    there = {_plain(name) for site in find_batch_norms(target, group_norms=True) for name in site.names}
    return [row.names[0] for row in the_plan.rows if row.policy is not None and there.isdisjoint(row.names)]


def _plain(name: str) -> str:
    """Return a name without what `torch.compile`, FSDP and checkpoint wrappers put into it."""
    wrappers = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _is_carried_out(policy: Policy | None, layer: nn.Module) -> bool:
    if isinstance(policy, Freeze):
        return isinstance(layer, FrozenBatchNorm) and layer.affine_kind == policy.affine
    if isinstance(policy, ToGroupNorm):  # where it would return zero, the plan has frozen the layer
        return is_converted_group_norm(layer)
    if policy is None or isinstance(policy, (Keep, FreezeAffine, NormalizeOnly)):
        return True  # BatchNorm as it was; SyncBatchNorm conversion makes other modules of these
    settings = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}  # type: ignore[arg-type]
    return isinstance(layer, TrackingBatchNorm) and layer.settings == settings


def check_order(callbacks: Sequence[Callback], own: Callback) -> None:
    """Raise where another callback in front of the conversion has already written down what will be changed."""
    before = callbacks[: callbacks.index(own)]
    given = [type(c).__name__ for c in callbacks]
    if any(type(c).__name__ == type(own).__name__ for c in before):
        allowed = "one BatchNormConversion (on the command line the section `batch_norm` is one)"
        raise FinetuneBNError(complaint("callbacks", given, allowed, "Rules treat parts differently."))
    early = [type(c).__name__ for c in before if is_a(c, SCHEDULING)]
    if early:
        why = f"{early[0]} plans its phases when it is set up, by the names of the parameters that there are then."
        raise FinetuneBNError(complaint("callbacks", given, f"BatchNormConversion before {early[0]}", why))


def copy_again(trainer: pl.Trainer, pl_module: pl.LightningModule, before: Callback | None = None) -> None:
    """Let weight averaging copy the module again: its copy was taken before layers were converted.

    Args:
        trainer: with the callbacks.
        pl_module: the module, its layers converted.
        before: only callbacks in front of this one; those behind are yet to be set up.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks[: callbacks.index(before)] if before is not None else callbacks:
        if is_a(callback, AVERAGING) and trainer.state.fn is not None:
            callback.setup(trainer, pl_module, trainer.state.fn.value)


def check_sharing(pl_module: pl.LightningModule, path: str) -> None:
    """Raise where a layer to be converted is also held outside of the part: there the old one would go on."""
    inside = {
        id(site.module): site.names[0] for site in find_batch_norms(pl_module.get_submodule(path), group_norms=True)
    }
    for site in find_batch_norms(pl_module, group_norms=True):
        outside = [name for name in site.names if path and name != path and not name.startswith(f"{path}.")]
        if outside and id(site.module) in inside:
            given = f"{path!r}, whose layer {inside[id(site.module)]!r} is also {', '.join(outside)}"
            raise FinetuneBNError(
                complaint(
                    "module", given, "a part that shares no BatchNorm with the rest", "Convert the whole by rules."
                )
            )


def check_resumed(checkpoint: dict[str, Any], the_plan: Plan | None, what: str) -> None:
    """Raise where a run without the callback is to go on with layers whose parameters its optimizer does not know."""
    if "optimizer_states" not in checkpoint or the_plan is None:
        return
    other = [row for row in the_plan.rows if _trains_other(row.policy)]
    if other:
        allowed = f"a checkpoint of a run with BatchNormConversion, to go on with {what}"
        remedy = "To train from its weights, load these and do not pass ckpt_path; to go on, use policy Keep."
        raise FinetuneBNError(complaint("ckpt_path", "one of a run without", allowed, remedy))


def _trains_other(policy: Policy | None) -> bool:
    return isinstance(policy, ToGroupNorm) or (isinstance(policy, Freeze) and policy.affine != "original")


def unheld(target: nn.Module, the_plan: Plan, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
    """Return the trainable tensors of converted layers that no optimizer holds, where one holds the layer in front."""
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    converted = {name for row in the_plan.rows if not isinstance(row.policy, Keep | None) for name in row.names}
    found, around = [], False
    for name, parameter in target.named_parameters():
        if name.rpartition(".")[0] not in converted:
            around = id(parameter) in held  # of the layer in front, in the order of definition
        elif around and parameter.requires_grad and id(parameter) not in held:
            found.append(name)
    return found


def example_for(pl_module: pl.LightningModule, path: str | None, given: Any) -> Any:
    """Return an example input for the part at `path`: the user's, or what the module's own example becomes there."""
    like = next((p for p in pl_module.parameters() if p.is_floating_point()), torch.empty(0))

    def beside(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype) if tensor.is_floating_point() else tensor.to(like.device)

    if given is not None:
        if isinstance(given, (list, tuple)) and given and all(isinstance(size, int) for size in given):
            generator = torch.Generator().manual_seed(0)
            given = torch.randn(tuple(given), generator=generator)
        return tree_map_only(Tensor, beside, given)
    example = getattr(pl_module, "example_input_array", None)
    if not path or example is None:
        return None  # the module's own is found where it is needed
    example = tree_map_only(Tensor, beside, example)
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = pl_module.get_submodule(path).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        with quietly(pl_module):
            if isinstance(example, dict):
                pl_module(**example)
            else:
                pl_module(*(example if isinstance(example, tuple) else (example,)))
    except Exception:  # it was meant for a summary, and need not fit
        return None
    finally:
        handle.remove()
    if not seen or (seen[0][0] and seen[0][1]):
        return None
    return seen[0][0] or seen[0][1]
