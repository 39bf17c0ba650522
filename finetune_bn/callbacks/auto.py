"""`policy: auto`: compare treatments by short trainings inside a Trainer, before its own, and take the winner."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from finetune_bn.callbacks.batches import ModuleBatches, flattened, iid_loader
from finetune_bn.callbacks.decision import Decision, check_beside, rate_of
from finetune_bn.callbacks.lightning_names import AVERAGING, is_a, own_loader
from finetune_bn.callbacks.module import check_whole_network, part_of, target_of
from finetune_bn.callbacks.short_runs import (
    monitored,
    optimizer_maker,
    settings_of,
    training_loss,
    validation_score,
    whole_steps,
)
from finetune_bn.comparison.arms import ARMS, applicable, check_layers
from finetune_bn.comparison.budget import BUDGETS, OverBudget, Speed
from finetune_bn.comparison.feed import Feed, count
from finetune_bn.comparison.result import Comparison
from finetune_bn.comparison.running import MOST_STEPS, run_comparison
from finetune_bn.comparison.store import FILE, fingerprint, fingerprint_of
from finetune_bn.comparison.training import Workbench
from finetune_bn.diagnosis.diagnose import diagnose
from finetune_bn.diagnosis.overrules import mend_first, overrules, setting_of
from finetune_bn.diagnosis.rule import Setting, recommend
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.batch_size import count_images
from finetune_bn.utilities.checks import choice
from finetune_bn.utilities.randomness import RandomStates

BudgetName = Literal["fast", "good", "best"]
FOLDER = "policy_auto"  # in the Trainer's default_root_dir
DIAGNOSED = 128  # images that a diagnosis looks at before a comparison
_NO_RATE = 1e-3  # for modules without a learning rate that could be set; it is not used


@dataclass(frozen=True)
class Chosen:
    """What `decide` returns.

    Attributes:
        decision: what the training is to be.
        comparison: what it rests on.
        folder: where that is kept; None where it is not.
    """

    decision: Decision
    comparison: Comparison
    folder: Path | None


def decide(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    module: str | None,
    budget: BudgetName,
    *,
    folder: str | Path | None = None,
    progress: bool | None = None,
    say: Callable[[str], object] = rank_zero_info,
) -> Chosen:
    """Compare treatments of a module's BatchNorm layers by short trainings, and choose one; the module stays as it is.

    Trained are copies, by the module's own `training_step`, optimizer and schedule (run through in the short time), on
    the training loader; scored by what ModelCheckpoint or EarlyStopping monitor, over the validation loaders.

    Args:
        trainer: with module and data attached, its optimizer not yet made.
        pl_module: the module.
        module: attribute path of the part whose layers are treated; None: the whole.
        budget: fast, good or best.
        folder: where finished trainings are kept; None: in the Trainer's default_root_dir.
        progress: show a table as it fills; None: on a terminal.
        say: takes sentences about what is done.

    Raises:
        FinetuneBNError: there are several processes, no loaders, no metric to go by, an optimizer that the module steps
            itself, or no treatment could be trained.
    """
    plan = BUDGETS[choice("budget", budget, BUDGETS)]
    _check(trainer, pl_module, module)
    states = RandomStates(trainer.strategy.root_device)
    with contextlib.ExitStack() as stack:
        stack.callback(states.restore)
        bench, feed = _workbench(trainer, pl_module, module)
        stack.callback(feed.leave)
        first = next(feed.take(0, 1))
        images = count_images(first).images
        batches = count(feed.batches, MOST_STEPS)
        whole = whole_steps(trainer, batches)
        rate = rate_of(pl_module)
        bench.optimizer = optimizer_maker(trainer, whole, rate is not None)
        ranked = _ranked(pl_module, module, feed, images, batches, 6 * plan.minutes, say)
        names = _candidates(trainer, pl_module, module, ranked)[: plan.most]
        base = _NO_RATE if rate is None else rate
        rates = sorted({float(f"{base * factor:.3g}") for factor in (plan.factors if rate is not None else (1.0,))})
        monitor, larger = monitored(trainer)
        at = f" at lr {', '.join(f'{lr:g}' for lr in rates)}" if rate is not None else ", at the module's own rate"
        words = f"about {plan.minutes:g} minutes at most; compared by {monitor} are {', '.join(names)}{at}"
        say(f"policy auto, budget {budget}: {words}.")
        data = fingerprint([first, batches])
        settings = [*settings_of(trainer, pl_module), budget]
        place = _place(trainer, pl_module, folder, [data, *settings, *names])
        dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        # On a machine that is too slow for the budget, fewer are compared rather than none.
        sizes = ((names, rates, place), (names, [base], _in(place, "one_rate")), (names[:2], [base], _in(place, "two")))
        # One that was begun goes on, whatever the machine is like today.
        tries = [each for each in sizes if each[2] is not None and (each[2] / FILE).exists()][-1:] or sizes
        speed: Speed | None = None
        for i, (arms, grid, used) in enumerate(tries):
            try:
                comparison = run_comparison(
                    bench,
                    {name: ARMS[name] for name in arms},
                    dict.fromkeys(arms, grid),
                    range(plan.seeds),
                    steps=1 if dry else None,
                    seconds=None if dry else 60 * plan.minutes,
                    metric=monitor if larger else f"-{monitor}",
                    sizes=(images, _validation_images(trainer)),
                    data=data,
                    functions=settings,
                    most_steps=min(MOST_STEPS, whole or MOST_STEPS),
                    extend=rate is not None and not dry,
                    folder=used,
                    progress=progress,
                    say=say,
                    speed=speed,
                )
                break
            except OverBudget as error:
                speed = error.speed
                if i + 1 == len(tries):
                    raise
                say(f"policy auto: {error} Fewer are compared.")
    best = comparison.best
    if best is None:
        reasons = "; ".join(f"{row.arm}: {row.failed}" for row in comparison.table)
        raise FinetuneBNError(
            complaint("policy", "auto", "a module of which a copy can be trained", f"Failed: {reasons}")
        )
    said = f"{best.arm} ({best.what})" + (f" at lr {best.lr:g}" if rate is not None else "")
    said += f", {comparison.metric} {best.score:.4g} after {best.steps} steps"
    for note in comparison.notes:
        said += f"; {note}"
    decision = Decision.of(ARMS[best.arm], best.lr if rate is not None else None, budget, said)
    return Chosen(decision, comparison, used)


def _check(trainer: pl.Trainer, pl_module: pl.LightningModule, module: str | None) -> None:
    if trainer.world_size > 1:
        remedy = "Find it on one device first (finetune-bn compare --config ... writes it as a config), then name it."
        raise FinetuneBNError(complaint("policy", f"'auto' with {trainer.world_size} processes", "one process", remedy))
    if trainer.ckpt_path:
        allowed = "a policy, as the checkpoint that is resumed holds no decision"
        raise FinetuneBNError(complaint("policy", "auto", allowed, "Name the policy that it was trained under."))
    check_whole_network(trainer)
    check_beside(trainer.callbacks)  # type: ignore[attr-defined]
    check_layers(part_of(pl_module, module))


def _workbench(trainer: pl.Trainer, pl_module: pl.LightningModule, module: str | None) -> tuple[Workbench, Feed]:
    """Return what the trainings share, but for the optimizer, and the training batches."""
    loaders = flattened(own_loader(trainer, "train"))
    if len(loaders) != 1:
        allowed = "one training loader, from a data module, from fit or from the module"
        raise FinetuneBNError(complaint("policy auto", f"{len(loaders)} training loaders", allowed, "Name a policy."))
    val = flattened(own_loader(trainer, "val"))
    if not val:
        allowed = "validation images, which decide"
        raise FinetuneBNError(complaint("policy auto", "no validation loader", allowed, "Name a policy."))
    loader = loaders[0]
    monitor, larger = monitored(trainer)

    def prepared(batch: Any) -> Any:
        return next(iter(ModuleBatches(trainer, pl_module, [batch])))

    feed = Feed(loader, "train", prepared)
    iid = getattr(getattr(trainer, "datamodule", None), "iid_dataloader", None)
    shuffled = iid("train") if callable(iid) else iid_loader(loader) if isinstance(loader, DataLoader) else loader
    half = str(trainer.precision) in ("16-mixed", "16-true")  # without a scaler gradients would vanish
    bench = Workbench(
        pl_module,
        feed,
        training_loss(pl_module),
        validation_score(trainer, val, monitor, larger),
        optimizer_maker(trainer, None, False),
        ModuleBatches(trainer, pl_module, shuffled),
        part=module or "",
        accumulate=trainer.accumulate_grad_batches,
        clip=float(trainer.gradient_clip_val) if trainer.gradient_clip_val else None,
        device=trainer.strategy.root_device,
        autocast=contextlib.nullcontext if half else trainer.precision_plugin.forward_context,
    )
    return bench, feed


def _ranked(
    pl_module: pl.LightningModule,
    module: str | None,
    feed: Feed,
    images: int,
    batches: int,
    seconds: float,
    say: Callable[[str], object],
) -> list[str]:
    """Return the treatments in the order in which they are expected to do well, by a diagnosis of model and batches.

    Args:
        pl_module: the module.
        module: attribute path of the part whose layers are treated.
        feed: the training batches.
        images: of a batch.
        batches: of an epoch.
        seconds: about so long the diagnosis may take.
        say: takes what is to be mended first, and why there is no diagnosis.
    """
    setting, out = Setting(images, images * batches), dict[Any, Any]()
    try:
        few = list(feed.take(0, min(batches, -(-DIAGNOSED // images))))
        target = target_of(pl_module, module)
        found = diagnose(target, few, curvature=False, memory=False, seconds=seconds, progress=False)
        setting, out = dataclasses.replace(setting_of(found), images=images * batches), overrules(found)
        for reason in (*mend_first(found), *out.values()):
            say(f"policy auto: {reason.sentence}")
    except FinetuneBNError as error:
        say(f"policy auto: no diagnosis ({error}) Treatments are ranked by the sizes of batch and set alone.")
    return [choice.arm for choice in recommend(setting) if choice.arm not in out] + [
        arm for arm in ARMS if arm not in out
    ]


def _candidates(trainer: pl.Trainer, pl_module: pl.LightningModule, module: str | None, ranked: list[str]) -> list[str]:
    """Return the treatments that can be compared, the likely ones first."""
    names = applicable(part_of(pl_module, module), list(dict.fromkeys(ranked)))
    if any(is_a(callback, AVERAGING) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        names = [name for name in names if name != "scheduled"]
    return names


def _place(
    trainer: pl.Trainer, pl_module: pl.LightningModule, folder: str | Path | None, parts: list[str]
) -> Path | None:
    """Return the folder of this comparison: one for each, so that no other can stand in it."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if folder is not None:
        return Path(folder)
    root = str(trainer.default_root_dir)
    if "://" in root:
        return None
    return Path(root) / FOLDER / fingerprint([fingerprint_of(pl_module), *parts])


def _in(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / name


def _validation_images(trainer: pl.Trainer) -> int:
    """Return how many validation images there are; 0 where loaders do not tell."""
    total = 0
    for loader in flattened(own_loader(trainer, "val")):
        try:
            total += len(loader.dataset)
        except (AttributeError, TypeError):
            return 0
    return total
