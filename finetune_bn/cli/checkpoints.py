"""The checkpoint behind `--ckpt_path`: it is read before anything is built, and compared with what was typed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from finetune_bn.callbacks.saved_plan import CHECKPOINT_KEY
from finetune_bn.conversion.policies import CLASSES
from finetune_bn.errors import FinetuneBNError, complaint

ALLOWED = "a checkpoint that Lightning saved"

# They decide which weights there are: those of a checkpoint fit no other network.
_NETWORK = ("backbone", "backbone_args", "dimension")
# They are in the state of the optimizer, which a resumed training takes from the checkpoint.
_OPTIMIZER = ("optimizer", "lr", "weight_decay", "head_lr_factor", "affine_lr_factor", "loss_lr_factor")
# Known from the data, or in the weights already.
_NOT_COMPARED = ("weights", "num_classes", "class_names", "_class_path", "_instantiator")

# Policies as hyperparameters of somebody's module are plain data: a checkpoint with them needs no unpickling of others.
torch.serialization.add_safe_globals([*CLASSES, *((cls, f"finetune_bn.policies.{cls.__name__}") for cls in CLASSES)])


def is_local(path: str) -> bool:
    """Tell whether a checkpoint is named by its path, not by an address or one of Lightning's words (best, last)."""
    return path not in ("best", "last", "hpc") and not path.startswith("registry") and "://" not in path


def read_checkpoint(path: str, weights_only: bool) -> dict[str, Any]:
    """Return what a checkpoint file holds; nothing foreign in it is imported or run, unless weights_only is false.

    Raises:
        FinetuneBNError: there is no such file, or it is no checkpoint.
    """
    if not Path(path).is_file():
        why = "It is a folder." if Path(path).is_dir() else "There is no such file."
        raise FinetuneBNError(complaint("ckpt_path", path, ALLOWED, why))
    if Path(path).stat().st_size == 0:
        raise FinetuneBNError(complaint("ckpt_path", path, ALLOWED, "The file is empty."))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # torch.load raises whatever broken bytes lead it to
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if "nsupported global" in str(error) or "nsupported class" in str(error):
            why = "It holds Python objects. --weights_only false loads and runs them: only if the file is yours."
        raise FinetuneBNError(complaint("ckpt_path", path, ALLOWED, why)) from error
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        keys = list(checkpoint)[:4] if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        remedy = f"It holds {keys}. Weights alone are given as --model.weights."
        raise FinetuneBNError(complaint("ckpt_path", path, ALLOWED, remedy))
    return dict(checkpoint)


def compare(path: str, checkpoint: Mapping[str, Any], class_path: str, typed: Mapping[str, Any], verb: str) -> None:
    """Compare the hyperparameters of a checkpoint with those of the config and the command line, which count.

    What differs is printed; what cannot be had with these weights, or not in a resumed training, is refused.

    Args:
        path: the checkpoint file, for messages.
        checkpoint: what it holds.
        class_path: the class of the model, as it is configured.
        typed: the arguments of the model, as they are configured.
        verb: the command.

    Raises:
        FinetuneBNError: the checkpoint is of another class or network, of weights alone where training is to go on, or
            was trained by an optimizer with other settings, which a resumed training would take over.
    """
    if verb == "fit" and not checkpoint.get("optimizer_states"):
        allowed = "a checkpoint with the state of the optimizer, to go on from"
        raise FinetuneBNError(complaint("ckpt_path", path, allowed, f"Begin anew: --model.weights {path}"))
    saved = checkpoint.get("hyper_parameters")
    saved = saved if isinstance(saved, Mapping) else {}
    trained = str(saved.get("_class_path", class_path))
    if trained.rpartition(".")[2] != class_path.rpartition(".")[2]:
        allowed = f"a checkpoint of {class_path.rpartition('.')[2]}, as it is configured"
        raise FinetuneBNError(complaint("ckpt_path", path, allowed, f"It is one of {trained}."))
    other = {k: saved[k] for k in typed if k in saved and k not in _NOT_COMPARED and not _same(saved[k], typed[k])}
    for name in _NETWORK:
        if name in other:
            remedy = "Say so, or give the run_config.yaml beside the checkpoint as --config."
            raise FinetuneBNError(complaint(f"model.{name}", typed[name], f"{other[name]!r}, as in {path}", remedy))
    for name in _OPTIMIZER if verb == "fit" else ():
        if name in other:
            remedy = (
                "The optimizer goes on with what it has. Say the same, give the run_config.yaml beside the checkpoint "
                f"as --config, or begin anew from the weights: --model.weights {path}"
            )
            raise FinetuneBNError(complaint(f"model.{name}", typed[name], f"{other[name]!r}, as in {path}", remedy))
    if other:
        words = ", ".join(f"{name}={typed[name]!r} (checkpoint: {old!r})" for name, old in other.items())
        rank_zero_warn(f"ckpt_path: config and command line differ from {path} and count: {words}")


def check_class_names(path: str, checkpoint: Mapping[str, Any], names: object) -> None:
    """Raise where the classes of the data are not those that the checkpoint was trained on, in their order.

    Raises:
        FinetuneBNError: there are others, or they come in another order.
    """
    saved = checkpoint.get("hyper_parameters")
    trained = saved.get("class_names") if isinstance(saved, Mapping) else None
    if not isinstance(trained, list) or not isinstance(names, list) or trained == names:
        return
    missing, new = [name for name in trained if name not in names], [name for name in names if name not in trained]
    parts = [f"Missing in the data: {_short(missing)}."] if missing else []
    parts += [f"Not in the checkpoint: {_short(new)}."] if new else []
    if not parts:
        i = next(i for i, (a, b) in enumerate(zip(trained, names, strict=True)) if a != b)
        parts = [f"They are the same in another order: {i} is {trained[i]!r} there and {names[i]!r} in the data."]
    allowed = f"the classes that {path} was trained on, in their order: {_short(trained)}"
    raise FinetuneBNError(complaint("data.class_names", names, allowed, " ".join(parts)))


def decided_rate(checkpoint: Mapping[str, Any]) -> float | None:
    """Return the learning rate that policy auto had decided on in the training of a checkpoint; None without one."""
    state = checkpoint.get(CHECKPOINT_KEY)
    decision = state.get("decision") if isinstance(state, Mapping) else None
    lr = decision.get("lr") if isinstance(decision, Mapping) else None
    return lr if isinstance(lr, float) else None


def _short(names: list[Any]) -> str:
    return ", ".join(map(str, names[:6])) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other) or str(one) == str(other)
