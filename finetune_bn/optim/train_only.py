"""Train the norm layers and the head alone: what that is, what of it goes into a file, and onto a backbone again."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.hold_affine import is_held
from finetune_bn.optim.parameter_groups import is_norm
from finetune_bn.utilities.results import Result, Shown

log = logging.getLogger("finetune_bn")


@dataclass(frozen=True)
class Trained(Result):
    """What `train_only` has left to train; `print` it.

    Attributes:
        names: names of the parameters, in the model's order.
        parameters: how many numbers they hold.
        of: how many the parameters of the whole model hold.
    """

    names: tuple[str, ...]
    parameters: int
    of: int

    def to_dict(self) -> dict[str, Any]:
        """Return the names and the two numbers as plain data."""
        return asdict(self) | {"names": list(self.names)}

    def shown(self) -> Shown:
        """Return one sentence."""
        share = 100 * self.parameters / max(self.of, 1)
        return Shown(
            f"{len(self.names)} parameters are trained, {self.parameters:,} of {self.of:,} numbers ({share:.2f} %)"
        )


def train_only(model: nn.Module, what: str | Sequence[str] = "norm") -> Trained:
    """Let only a part of `model` be trained: sets `requires_grad` of each parameter, and forgets gradients of the rest.

    Call it after `convert` and before the optimizer is made. `norm` and `affine` train gamma and beta of all norm
    layers that have them as parameters: not those of frozen layers with `affine="none"`, which are constants (take
    `original`), nor what `FreezeAffine` holds. Statistics of live BatchNorm layers move in training all the same; to
    keep them, freeze first: `convert(model, Freeze("original"))`. `save_trained` writes what was trained to a file.

    Args:
        model: any module, its layers converted already.
        what: `norm` for the norm layers' gamma and beta and the head; `affine` for gamma and beta alone; or patterns of
            names, of parameters or of modules that hold them: `"layer4"`, `"*.bias"`, or a list of such.

    Returns:
        What is trained now.

    Raises:
        FinetuneBNError: nothing would be trained, or a pattern matches nothing; the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise FinetuneBNError(complaint("model", model, "a torch.nn.Module"))
    chosen = {id(p) for p in _chosen(model, what)}
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen)
        if id(parameter) in chosen:
            trained.append((name, parameter))
        else:
            parameter.grad = None  # an optimizer moves what has a gradient, by weight decay even where that is zero
    every = sum(p.numel() for p in model.parameters())
    return Trained(tuple(name for name, _ in trained), sum(p.numel() for _, p in trained), every)


def heads(model: nn.Module) -> list[nn.Module]:
    """Return the modules that make up the head of `model`; none where there is none.

    What timm's `get_classifier()` names, of `model` or of a part of it, and the linear layers beside the parts that
    hold norm layers.
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        get = getattr(module, "get_classifier", None)
        named = get() if callable(get) else ()
        for part in named if isinstance(named, (tuple, list)) else (named,):
            if isinstance(part, nn.Module) and next(part.parameters(), None) is not None:
                found[id(part)] = part
    inner = model
    while True:  # into wrappers, which have one part alone
        parts = [part for part in inner.children() if next(part.parameters(), None) is not None]
        if len(parts) != 1 or is_norm(parts[0]) or not list(parts[0].children()):
            break
        inner = parts[0]
    for part in parts:
        if not any(is_norm(module) for module in part.modules()):
            found |= {id(module): module for module in part.modules() if isinstance(module, nn.Linear)}
    return list(found.values())


def _chosen(model: nn.Module, what: str | Sequence[str]) -> list[nn.Parameter]:
    if what in ("norm", "affine"):
        layers = [module for module in model.modules() if is_norm(module)]
        chosen = [p for layer in layers if not is_held(layer) for p in layer.parameters(recurse=False)]
        if not chosen:
            kinds = sorted({type(layer).__name__ for layer in layers})
            allowed = "a model with norm layers whose gamma and beta are parameters"
            remedy = "Those that are frozen with affine='none' or held are constants: convert with Freeze('original')."
            raise FinetuneBNError(complaint("model", f"{type(model).__name__} with {kinds}", allowed, remedy))
        if what == "norm":
            head = [p for module in heads(model) for p in module.parameters()]
            if not head:
                log.warning("train_only: no head was found in %s: its norm layers alone train", type(model).__name__)
            chosen += head
        return chosen
    patterns = [what] if isinstance(what, str) else what
    allowed = "'norm', 'affine', or patterns of names of parameters or modules"
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise FinetuneBNError(complaint("what", what, allowed))
    names = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            every = {part for name in names for part in (name, *_holders(name))}
            close = difflib.get_close_matches(pattern, ["norm", "affine", *every], n=3, cutoff=0.3)
            remedy = f"Close names: {close}." if close else f"There are: {list(names)[:5]}..."
            raise FinetuneBNError(complaint("what", pattern, allowed, remedy))
    return [parameter for name, parameter in names.items() if any(_matches(name, pattern) for pattern in patterns)]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or any(fnmatchcase(holder, pattern) for holder in _holders(name))


def _holders(name: str) -> Iterator[str]:
    """Yield the names of the modules that hold a parameter, from the inside."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
