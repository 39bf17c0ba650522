"""Beside weight averaging: constants stay exact in the average, and one that has not begun is not taken for one.

Private names of Lightning (seen in 2.6): `WeightAveraging._average_model` is torch's `AveragedModel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from finetune_bn.callbacks.lightning_names import is_a
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.sites import find_batch_norms

_OF_LIGHTNING = frozenset({"WeightAveraging"})
_KEEPS = "_finetune_bn_keeps_constants"


def keep_constants(callbacks: Sequence[Callback], pl_module: pl.LightningModule) -> None:
    """Let the average of a module have its constants to the last bit: what is frozen, and what is not trained.

    `decay * x + (1 - decay) * x` is not x: with a decay of 0.999 constants are off by hundreds of roundings in the end,
    and counters by a half. Where average and network hold the same number, it stays. Called again, it does nothing;
    called behind a new copy, it looks after that.

    Args:
        callbacks: of the Trainer, those that average weights among them.
        pl_module: the module, its layers converted.
    """
    for _, average in _averages(callbacks):
        if getattr(average, _KEEPS, False):
            continue

        def updated(model: nn.Module, average: Any = average, update: Any = average.update_parameters) -> None:
            held = dict(average.module.named_parameters()) | dict(average.module.named_buffers())
            with torch.no_grad():
                pairs = [(held[name], value) for name, value in _constants(model).items() if name in held]
                before = [mine.clone() for mine, _ in pairs]
                update(model)
                for (mine, theirs), old in zip(pairs, before, strict=True):
                    mine.copy_(torch.where(old == theirs.to(old.device), old, mine))

        average.update_parameters = updated
        setattr(average, _KEEPS, True)


def check_average_begins(trainer: pl.Trainer) -> None:
    """Raise where a moving average will not have begun when the training ends, which then loses what it learned.

    Lightning puts the average in the place of the network when the training ends, begun or not, and saves it: of an
    average that has not begun that is the network from before the training (Lightning issue 21724).

    Args:
        trainer: about to train.

    Raises:
        FinetuneBNError: the average begins at a step or an epoch that the training does not reach.
    """
    for callback, average in _averages(trainer.callbacks):  # type: ignore[attr-defined]
        step, epoch = (getattr(callback, f"update_starting_at_{what}", None) for what in ("step", "epoch"))
        by_rule = type(callback).__name__ == "EMAWeightAveraging"  # and not by a `should_update` of a subclass
        if not by_rule or step is None or int(average.n_averaged) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            continue
        steps, last = trainer.estimated_stepping_batches, trainer.max_epochs
        if step >= steps and (epoch is None or (last not in (None, -1) and epoch >= last)):
            why = (
                "When the training ends, Lightning puts the average in the network's place, begun or not: all that "
                "was learned would be lost."
            )
            raise FinetuneBNError(complaint("update_starting_at_step", step, f"a step before the last of {steps}", why))


def warn_of_idle_average(trainer: pl.Trainer) -> None:
    """Warn where what is validated is an average that has not begun: the network from before the training.

    Args:
        trainer: in a training, at the start of a validation.
    """
    if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not trainer.global_step:
        return
    for callback, average in _averages(trainer.callbacks):  # type: ignore[attr-defined]
        if not int(average.n_averaged):
            rank_zero_warn(
                f"{type(callback).__name__} has not begun to average. What is validated and saved until then is the "
                "network from before the training, whatever was learned: metrics of it may look like chance. Let it "
                "begin earlier (update_starting_at_step), or begin to validate and save later."
            )


def _averages(callbacks: Sequence[Callback]) -> Iterator[tuple[Callback, Any]]:
    for callback in callbacks:
        average = getattr(callback, "_average_model", None) if is_a(callback, _OF_LIGHTNING) else None
        if average is not None:
            yield callback, average


def _constants(model: nn.Module) -> dict[str, Tensor]:
    """Return what no step of an optimizer changes: parameters that are not trained, and buffers of frozen layers."""
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    for site in find_batch_norms(model):
        if isinstance(site.module, FrozenBatchNorm):
            buffers = site.module.named_buffers(prefix=site.names[0], recurse=False)
            found |= dict(buffers)
    return found
