"""Whose steps a learning rate is of, and how curved the loss is that they go down: live layers beside frozen ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune_bn.diagnosis.curvature import adam_scale, lr_bound, top_eigenvalue
from finetune_bn.diagnosis.leakage import as_in_training
from finetune_bn.diagnosis.results import Curvature
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.utilities.batches import Chunk, Feeder
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.module_state import ModuleState
from finetune_bn.utilities.probe import tensors_in

LossFunction = Callable[[nn.Module, Any], Tensor]
# Images whose loss is looked at: more cost more, and move the eigenvalue little.
IMAGES = 16
_PRODUCTS = 16
_ADAM = ("adam", "adamw", "nadam", "radam", "adamax", "lamb", "adamp", "adabelief")


@dataclass(frozen=True)
class Steps:
    """What is known of an optimizer.

    Attributes:
        name: in words.
        lr: its largest learning rate; None where none was given.
        momentum: its momentum, or beta1.
        adam: whether it divides by the root of squared gradients.
        known: whether there is a bound for its kind.
    """

    name: str = "gradient descent"
    lr: float | None = None
    momentum: float = 0.0
    adam: bool = False
    known: bool = True

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer | str | None, lr: float | None) -> Steps:
        """Return what an optimizer, or its name, tells.

        Raises:
            FinetuneBNError: it is neither, or the rate is no positive number.
        """
        lr = number("lr", lr, above=0, none=True)
        if optimizer is None:
            return cls(lr=lr)
        if isinstance(optimizer, str):
            kind = optimizer.lower().rpartition("_")[2]
            adam, sgd = kind in _ADAM, kind in ("sgd", "nesterov", "momentum")
            return cls(optimizer, lr, 0.9 if adam or (sgd and kind != "sgd") else 0.0, adam, adam or sgd)
        if not hasattr(optimizer, "param_groups"):
            raise FinetuneBNError(complaint("optimizer", optimizer, "a torch optimizer, or the name of one"))
        groups = optimizer.param_groups
        rates = [float(g.get("initial_lr", g["lr"])) for g in groups if "lr" in g]
        betas = next((g["betas"] for g in groups if "betas" in g), None)
        momentum = next((float(g["momentum"]) for g in groups if "momentum" in g), 0.0)
        adam = betas is not None and "lion" not in type(optimizer).__name__.lower()
        known = adam or isinstance(optimizer, torch.optim.SGD)
        beta = float(betas[0]) if betas is not None else momentum
        return cls(type(optimizer).__name__, lr or max(rates, default=None), beta, adam, known)


def measure_curvature(
    model: nn.Module,
    feeder: Feeder,
    batches: Sequence[Any],
    chunks: Sequence[Chunk],
    labels: Sequence[int],
    loss: LossFunction | None,
    steps: Steps,
    state: ModuleState,
    until: float,
) -> tuple[Curvature | None, str]:
    """Return the curvature, or None and why it was not measured. The model is in eval mode, and what it holds restored.

    Args:
        model: the model.
        feeder: knows how a chunk becomes a call.
        batches: one or two batches as they came.
        chunks: the same as calls.
        labels: those of the first of them; empty where there are none.
        loss: `(model, batch)` that returns the loss; None: cross-entropy with these labels.
        steps: whose steps bounds are asked for.
        state: what the model held at the beginning.
        until: when to stop, by `time.perf_counter`.
    """
    layers = [site.module for site in find_batch_norms(model) if isinstance(site.module, _BatchNorm)]
    affine = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    trained = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    rest = [p for p in trained if id(p) not in affine]
    if not rest:
        return None, "curvature: nothing is trained but BatchNorm's affine"
    chunk = chunks[0]
    size = min(len(chunk), IMAGES)
    if loss is None and not labels:
        return None, "curvature: batches hold no labels, and no loss= was given"

    def of(number: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            if loss is not None:
                return loss(model, _first(batches[number], len(chunks[number]), size, feeder.device))
            part = chunk[:size] if chunk.shape_key is not None else chunk
            return _cross_entropy(feeder(part), labels[: len(part)])

        return run

    found: dict[bool, float | None] = {}
    bounds: dict[bool, float | None] = {}
    # Half of the time each; with Adam a half of that for its own Hessian.
    passes = [(live, adam) for live in (False, True) for adam in ([False, True] if steps.adam else [False])]
    try:
        for place, (live, adam) in enumerate(passes):
            now = time.perf_counter()
            end = now + (until - now) / (len(passes) - place)
            parameters = trained if live else rest
            with torch.enable_grad(), as_in_training(layers if live else []):
                losses = [of(number) for number in range(len(chunks) if loss else 1)]
                scale = adam_scale(losses, parameters) if adam else None
                value = top_eigenvalue(of(0), parameters, scale=scale, iterations=_PRODUCTS, until=end)
            state.restore()
            if value is None or not math.isfinite(value):
                return None, "curvature: power iteration did not settle in its time, or the loss is not finite"
            if not adam:
                found[live] = value
            if adam == steps.adam:
                bound = lr_bound(value, steps.momentum, adam=adam)
                bounds[live] = bound if steps.known and math.isfinite(bound) else None
    except _NoLoss as error:
        return None, f"curvature: {error}"
    except Exception as error:  # a model that raises in training mode, an operator without a second derivative
        return None, f"curvature: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        state.restore()
    of_frozen = bounds[False]
    proposed = None if of_frozen is None or steps.lr is None else min(steps.lr, of_frozen / 2)
    rates = steps.lr, bounds[True], of_frozen, proposed
    return Curvature(found[True], found[False], size, steps.name, *rates), ""


class _NoLoss(Exception):
    """The outputs are no logits for the labels."""


def _cross_entropy(output: Any, labels: Sequence[int]) -> Tensor:
    tensors = [t for t in tensors_in(output, detach=False) if t.dim() == 2 and t.is_floating_point()]
    logits = next((t for t in tensors if len(t) == len(labels) and t.shape[1] > max(labels)), None)
    if logits is None or min(labels) < 0:
        raise _NoLoss("the outputs are no logits [N, classes] for the labels: pass loss=, a function (model, batch)")
    return F.cross_entropy(logits.float(), torch.tensor(labels, device=logits.device))


def _first(batch: Any, images: int, size: int, device: torch.device) -> Any:
    """Return the first images of a batch as it came, on the device; all of them where it cannot be cut."""
    leaves = tree_leaves(batch)
    cut = all(torch.is_tensor(leaf) and leaf.dim() and len(leaf) == images for leaf in leaves)
    return tree_map_only(Tensor, lambda t: (t[:size] if cut else t).to(device), batch)
