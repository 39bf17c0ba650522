"""Convert a freshly built module as the one was that a checkpoint was saved of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from finetune_bn.conversion.convert import convert
from finetune_bn.conversion.from_state import policy_in_state
from finetune_bn.conversion.plan import Plan
from finetune_bn.errors import FinetuneBNError, NoBatchNormMatched, complaint

CHECKPOINT_KEY = "finetune_bn"


def replay(checkpoint: dict[str, Any], pl_module: pl.LightningModule) -> bool:
    """Convert a freshly built module by the plan in a checkpoint, before its weights are loaded.

    For the `on_load_checkpoint` of an own LightningModule, so that `load_from_checkpoint` returns the network as it
    was trained. Without it the checkpoint loads all the same, into BatchNorm layers of the same eval-mode function,
    but for GroupNorm and EvalNorm, which no BatchNorm stands for: there loading raises.

    Args:
        checkpoint: the dictionary that Lightning passes to `on_load_checkpoint`.
        pl_module: the LightningModule, its network built.

    Returns:
        Whether the checkpoint held a plan.

    Raises:
        FinetuneBNError: the plan is none, or of another module.
    """
    saved = _saved_plan(checkpoint)
    if saved is not None:
        the_plan, path = saved
        if not _has_part(pl_module, path):
            raise NoBatchNormMatched(complaint("ckpt_path", path, f"a checkpoint of {type(pl_module).__name__}"))
        carry_out(pl_module, path, lambda target: convert(target, the_plan, verify=False))
        return True
    replay_weights(checkpoint, pl_module)
    return False


def replay_weights(checkpoint: dict[str, Any], pl_module: pl.LightningModule) -> None:
    """Make the layers that weights without a plan are of, as far as they tell: GroupNorm and EvalNorm."""
    needed = policy_in_state(pl_module, checkpoint.get("state_dict", {}))
    if needed is not None:
        rank_zero_warn(
            "The checkpoint holds no plan (ModelCheckpoint with save_weights_only=True keeps none for modules that do "
            f"not save it themselves). Its {len(needed.rules)} GroupNorm and EvalNorm layers are made by what its "
            "weights say of them; all other layers stay as they are: convert them before they are trained."
        )
        carry_out(pl_module, "", lambda target: convert(target, needed, verify=False))


def _saved_plan(checkpoint: dict[str, Any]) -> tuple[Plan, str] | None:
    """Return the plan in a checkpoint and the path of the part that it is of; None where there is no plan."""
    state = checkpoint.get(CHECKPOINT_KEY)
    if state is None or state == {}:
        return None
    if not isinstance(state, dict) or "plan" not in state or not isinstance(state.get("module"), str | None):
        raise FinetuneBNError(complaint(CHECKPOINT_KEY, state, "what BatchNormConversion keeps in a checkpoint"))
    return Plan.from_dict(state["plan"]), state.get("module") or ""


def _has_part(pl_module: pl.LightningModule, path: str) -> bool:
    try:
        pl_module.get_submodule(path)
    except AttributeError:
        return False
    return True


def carry_out(pl_module: pl.LightningModule, path: str, change: Callable[[nn.Module], nn.Module]) -> None:
    """Change the part at `path`; where that replaces it (it is a BatchNorm itself), put the new one in its place."""
    target = pl_module.get_submodule(path)
    changed = change(target)
    if changed is not target:
        parent, _, name = path.rpartition(".")
        setattr(pl_module.get_submodule(parent), name, changed)
