"""Convert the BatchNorm layers of any LightningModule before its optimizer exists, and keep them converted."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from finetune_bn.callbacks.auto import BudgetName, decide
from finetune_bn.callbacks.averaging import check_average_begins, keep_constants, warn_of_idle_average
from finetune_bn.callbacks.batch_composition import warn_of_small_batches
from finetune_bn.callbacks.conversion_checks import (
    check_order,
    check_resumed,
    check_sharing,
    copy_again,
    example_for,
    gone,
    pending,
    unheld,
)
from finetune_bn.callbacks.decision import Decision
from finetune_bn.callbacks.intercept import intercept
from finetune_bn.callbacks.lightning_names import SHARDED, ignores_sync_batchnorm, is_a, overrides
from finetune_bn.callbacks.saved_plan import CHECKPOINT_KEY, carry_out, replay_weights
from finetune_bn.comparison.budget import BUDGETS
from finetune_bn.conversion.convert import convert, revert
from finetune_bn.conversion.plan import Plan, may_fold, plan
from finetune_bn.conversion.policies import Freeze, FreezeAffine, Keep, NormalizeOnly, Policy, ToGroupNorm, check_policy
from finetune_bn.conversion.remedies import about_kept, about_new
from finetune_bn.diagnosis.collapse import CollapseWatch
from finetune_bn.diagnosis.status import status
from finetune_bn.errors import FinetuneBNError, NoBatchNormMatched, complaint
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.utilities.checks import choice


class BatchNormConversion(Callback):
    """Convert the BatchNorm layers of the model when the Trainer starts, and keep them that way.

    Works with any LightningModule, also with one that builds its network in `setup` or `configure_model`. The layers
    are converted before the optimizer is made and before the network is wrapped or compiled; weight averaging copies
    the converted network wherever it stands in the list of callbacks. When the training starts, layers that are not as
    the plan says, because they were made later, are an error that names them. The plan goes into the checkpoint; a
    resumed run replays the plan of its checkpoint. Frozen layers cannot be brought back to life by `train()`,
    `requires_grad_(True)`, `BackboneFinetuning`, weight averaging or `sync_batchnorm`.

    It also watches for a network that has collapsed, which happens silently when the learning rate is too high for
    frozen layers, and says so once, with the remedy.

    Attributes:
        decision: with policy auto, what was decided; None before that.

    Args:
        policy: What happens to the BatchNorm layers: Freeze (the default), Keep, FreezeAffine, NormalizeOnly,
            ToGroupNorm, Ghost, Renorm, Stochastic, EvalNorm, or Rules that pick among them by layer name, timm stage
            and layer type. auto: several treatments are compared by short trainings before the training, which is then
            done with the best one, at its learning rate; a resumed or loaded run replays the decision.
        module: Attribute path of the part to convert, such as `net` or `model.backbone`. Names in rules are relative
            to it. By default the whole LightningModule.
        verify: Prove on a sample input that the outputs are the same after the conversion.
        watch_every_n_steps: How often a training batch is looked at for signs of collapse; 0 never looks.
        example_input: What the part's `forward` takes, as a tensor, tuple or dict, or the shape of one image batch such
            as [1, 3, 224, 224], to find out what can be folded and to prove the conversion. Not needed for timm models,
            nor where the LightningModule has an `example_input_array`.
        budget: With policy auto, how long is compared before the training: fast takes about 2 minutes, good about 8,
            best about 30; less where the training itself is short.
    """

    def __init__(
        self,
        policy: Policy | Literal["auto"] | None = None,
        module: str | None = None,
        verify: bool = True,
        watch_every_n_steps: int = 50,
        example_input: Any = None,
        budget: BudgetName = "fast",
    ) -> None:
        super().__init__()
        self.auto = policy == "auto"
        self.policy = Keep() if self.auto else check_policy(Freeze() if policy is None else policy)
        choice("budget", budget, BUDGETS)
        self.budget: BudgetName = budget
        self.decision: Decision | None = None
        self._decided_for: Any = None
        self.module = module
        self.example_input = example_input
        self.verify = verify
        self.plan: Plan | None = None
        self.watch = CollapseWatch(watch_every_n_steps, rank_zero_warn)
        self._replayed = False
        self._intercepted: list[Callable[[], None]] = []

    @property
    def collapsed(self) -> bool:
        """Whether signs of collapse were seen in this run."""
        return self.watch.collapsed

    @property
    def undecided(self) -> bool:
        """Whether the policy is auto, and nothing was decided yet."""
        return self.auto and self.decision is None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        check_order(trainer.callbacks, self)  # type: ignore[attr-defined]
        self._release()
        self.plan, self._replayed = None, False  # the callback may have served another module before
        if self.auto and stage == "fit" and (self._decided_for is None or self._decided_for() is not pl_module):
            self.decision = None
        if self.auto and stage == "fit":
            # When layers, weights and data are there, and what a checkpoint says is known; the optimizer comes next.
            decide_late = intercept(pl_module, "configure_optimizers", lambda: self._decide(trainer, pl_module))
            self._intercepted.append(decide_late)
        if not self.undecided and find_batch_norms(self._target(pl_module) or nn.Module(), group_norms=True):
            self._convert(pl_module)
            copy_again(trainer, pl_module, before=self)
        for name in ("setup", "configure_model"):  # what these build, or build anew
            if overrides(pl_module, name):
                end = intercept(pl_module, name, after=lambda: self._convert_new(trainer, pl_module))
                self._intercepted.append(end)
        # Called with the checkpoint just before its weights are loaded, in every stage and for every module.
        load = intercept(pl_module, "on_load_checkpoint", lambda c: self._replay(c, trainer, pl_module, stage))
        self._intercepted.append(load)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch.reset()
        self._started(pl_module)
        self._check_layers(pl_module)
        keep_constants(trainer.callbacks, pl_module)  # type: ignore[attr-defined]
        policies = [row.policy for row in self.plan.rows] if self.plan is not None else []
        if self.plan is not None:  # the weights are loaded by now
            for line in about_new(self.target(pl_module), self.plan, self.policy):
                rank_zero_warn(f"BatchNormConversion: {line}")
        wanted = any(isinstance(policy, ToGroupNorm) and policy.init == "sequential" for policy in policies)
        names = {type(callback).__name__ for callback in trainer.callbacks}  # type: ignore[attr-defined]
        if wanted and "GroupNormCalibration" not in names:
            rank_zero_warn(
                "BatchNormConversion: init=sequential starts as the closed form, and nothing fits it to images: add "
                "the callback GroupNormCalibration, or ask for init=closed_form."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_average_begins(trainer)
        self._check_layers(pl_module)
        assert self.plan is not None
        missing = gone(self.target(pl_module), self.plan)
        if missing:
            rank_zero_warn(
                f"BatchNormConversion: {_some(missing)} of the plan are no longer in the network: layers were taken "
                "out after they were converted."
            )
        live = [m for m in self.target(pl_module).modules() if isinstance(m, _BatchNorm) and m.training]
        if live and ignores_sync_batchnorm(trainer):
            rank_zero_warn(
                f"BatchNormConversion: sync_batchnorm=True does nothing under {type(trainer.strategy).__name__}: "
                f"{len(live)} live BatchNorm layers normalize by the images of their own process. Freeze them, or make "
                "them SyncBatchNorm in your module (torch.nn.SyncBatchNorm.convert_sync_batchnorm)."
            )
        warn_of_small_batches(trainer, pl_module)
        # Strategies that shard hand the optimizer tensors of their own.
        optimizers = [] if is_a(trainer.strategy, SHARDED) else trainer.optimizers
        forgotten = unheld(self.target(pl_module), self.plan, optimizers)
        if forgotten:
            rank_zero_warn(
                f"BatchNormConversion: {len(forgotten)} trainable tensors of converted layers are in no optimizer and "
                f"stay as they are: {_some(forgotten)}. Make the optimizer in configure_optimizers, which is called "
                "after the conversion."
            )
        # Only now is everything as it will be trained: all callbacks have had their turn, and the weights are loaded.
        rank_zero_info(f"BatchNormConversion: {status(pl_module)}")

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        warn_of_idle_average(trainer)
        self._started(pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started(pl_module)

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._hold_again(pl_module)
        self.watch.before_batch(self._target(pl_module), batch_idx, batch)

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Any) -> None:
        self.watch.detach()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.watch.after_batch()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.watch.detach()
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.watch.detach()
        self._release()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CHECKPOINT_KEY] = self.saved_plan()

    def saved_plan(self) -> dict[str, Any]:
        """Return what a checkpoint keeps for `replay`; empty where nothing was converted yet."""
        decision = {} if self.decision is None else {"decision": self.decision.to_dict()}
        return {} if self.plan is None else {"plan": self.plan.to_dict(), "module": self.module, **decision}

    def target(self, pl_module: pl.LightningModule) -> nn.Module:
        """Return the part of the module that is converted.

        Raises:
            FinetuneBNError: there is no part of that name.
        """
        target = self._target(pl_module)
        if target is None:
            parts = [name for name, _ in pl_module.named_children()]
            raise FinetuneBNError(
                complaint("module", self.module, f"a submodule of {type(pl_module).__name__}: {parts}")
            )
        return target

    def _target(self, pl_module: pl.LightningModule) -> nn.Module | None:
        try:
            return pl_module.get_submodule(self.module or "")
        except AttributeError:
            return None

    def _convert(self, pl_module: pl.LightningModule) -> None:
        target, example = self.target(pl_module), example_for(pl_module, self.module, self.example_input)
        probe = may_fold(self.policy) or example is not None
        self._apply(pl_module, plan(target, self.policy, example, probe=probe), example)

    def _convert_new(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Convert what the module has built, or built anew, since its layers were converted, if it has."""
        target = self._target(pl_module)
        if self.undecided or target is None or not find_batch_norms(target, group_norms=True):
            return
        if self.plan is None or pending(target, self.plan, self.policy) or gone(target, self.plan):
            self._convert(pl_module)
            copy_again(trainer, pl_module)

    def _check_layers(self, pl_module: pl.LightningModule) -> None:
        """Raise where layers that will be trained are not what the plan says."""
        assert self.plan is not None
        late = pending(self.target(pl_module), self.plan, None if self._replayed else self.policy)
        if late:
            allowed = "layers that are there before the optimizer is made"
            remedy = (
                "They were made, or put in place, after that: build the network in __init__, setup or configure_model."
            )
            given = f"{len(late)} BatchNorm layers that are not converted: {_some(late)}"
            raise FinetuneBNError(complaint(type(pl_module).__name__, given, allowed, remedy))

    def _apply(self, pl_module: pl.LightningModule, the_plan: Plan, example_input: Any = None) -> None:
        check_sharing(pl_module, self.module or "")
        carry_out(
            pl_module,
            self.module or "",
            lambda target: convert(target, the_plan, example_input=example_input, verify=self.verify),
        )
        self.plan = the_plan
        rank_zero_info(f"BatchNormConversion: {str(the_plan).splitlines()[0]}")
        for row in the_plan.rows:
            if row.policy is None:
                rank_zero_warn(f"BatchNormConversion: {' = '.join(row.names)} ({row.kind}) {row.reason}.")
        for line in about_kept(self.target(pl_module), the_plan, self.policy):
            rank_zero_warn(f"BatchNormConversion: {line}")

    def _replay(
        self, checkpoint: dict[str, Any], trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str
    ) -> None:
        state = checkpoint.get(CHECKPOINT_KEY)
        if not state and stage == "fit":
            check_resumed(checkpoint, self.plan, self.policy.describe())
        if not state:
            replay_weights(checkpoint, pl_module)
        if not state or state == self.saved_plan():
            return
        saved = Plan.from_dict(state["plan"])
        if self.plan is not None and [r.policy for r in saved.rows] != [r.policy for r in self.plan.rows]:
            rank_zero_warn(
                "BatchNormConversion: the checkpoint was made under another policy than this run asks for "
                f"({self.policy.describe()}); the checkpoint's is replayed:\n{str(saved).splitlines()[0]}\n"
                "To train from its weights under a new policy, load the weights and do not pass ckpt_path."
            )
        with contextlib.suppress(NoBatchNormMatched):  # what the checkpoint did not convert is not to stay converted
            carry_out(pl_module, self.module or "", lambda target: revert(target, verify=False))
        self.module, self._replayed = state["module"], True
        if self.auto and "decision" in state:
            self._adopt(Decision.from_dict(state["decision"]), trainer, pl_module, stage)
        if self._target(pl_module) is None:
            raise NoBatchNormMatched(complaint("ckpt_path", self.module, "a checkpoint of the same LightningModule"))
        self._apply(pl_module, saved)
        copy_again(trainer, pl_module)

    def _started(self, pl_module: pl.LightningModule) -> None:
        """The network stands and is loaded: a conversion that never happened must not go unnoticed."""
        self._release()
        if self.plan is None and self.undecided:
            rank_zero_warn(
                "BatchNormConversion: policy auto is decided when a training begins; layers are as they came."
            )
        elif self.plan is None:
            self._convert(pl_module)

    def _decide(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.plan is not None:  # of a checkpoint, or of an earlier decision
            return
        if self.decision is None:
            chosen = decide(trainer, pl_module, self.module, self.budget)
            self._adopt(chosen.decision, trainer, pl_module, "fit")
            place = "" if chosen.folder is None else f" All trainings: {chosen.folder}."
            rank_zero_info(f"{chosen.comparison}\npolicy auto: {chosen.decision.said}.{place}")
        self._convert(pl_module)
        copy_again(trainer, pl_module)

    def _adopt(self, decision: Decision, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.decision, self.policy = decision, decision.layers()
        self._decided_for = weakref.ref(pl_module)
        decision.apply(trainer, pl_module, self.module, stage=stage)

    def _hold_again(self, pl_module: pl.LightningModule) -> None:
        """Hold what another callback has set free: gamma and beta of a live BN stay Parameters, so it can."""
        rows = self.plan.rows if self.plan is not None else ()
        # By name: SyncBatchNorm conversion has made other modules of them.
        held = [row.names[0] for row in rows if isinstance(row.policy, (FreezeAffine, NormalizeOnly))]
        freed = []
        for name in held:
            parameters = list(self.target(pl_module).get_submodule(name).parameters(recurse=False))
            if any(parameter.requires_grad for parameter in parameters):
                for parameter in parameters:
                    parameter.requires_grad_(False)
                    parameter.grad = None
                freed.append(name)
        if freed:
            rank_zero_warn(
                f"BatchNormConversion: something set requires_grad=True on the constant gamma and beta of {len(freed)} "
                f"layers ({', '.join(freed[:3])}...); they are held again."
            )

    def _release(self) -> None:
        while self._intercepted:
            self._intercepted.pop()()


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
