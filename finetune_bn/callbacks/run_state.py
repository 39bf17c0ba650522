"""What Lightning leaves out of a checkpoint and a resumed run needs: random generators, and the epoch's log so far.

Private names of Lightning (seen in 2.6): `fit_loop.epoch_loop._results` holds what `self.log` has gathered.
"""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

KEY = "finetune_bn_run"


class RunState:
    """Takes up the random generators and what was logged in the epoch so far, where a checkpoint left them.

    Args:
        module: the module that is trained.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._loaded: list[dict[str, Any]] | None = None
        self._sums: dict[str, dict[str, Any]] = {}
        self._made: list[str] = []

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the state of every process into a checkpoint; all processes call this, as they do to save one."""
        trainer = self._module.trainer
        own = {"generators": _generators(self._module.device), **_logged(trainer)}
        states: list[Any] = [own]
        if trainer.world_size > 1 and trainer.state.status != TrainerStatus.INTERRUPTED:
            # A process that failed saves alone: the others would not answer it.
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint[KEY] = states

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until training starts."""
        self._loaded = checkpoint.get(KEY)

    def start(self) -> None:
        """Set the generators, and what was logged in the epoch so far, where this is a resumed run."""
        states, self._loaded = self._loaded, None
        trainer = self._module.trainer
        self._sums, self._made = {}, []
        loop = trainer.fit_loop
        if states is None or not trainer.ckpt_path:
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint holds the random generators of {len(states)} processes, this run has "
                f"{trainer.world_size}: dropout and other noise go on with other numbers."
            )
            return
        state = states[trainer.global_rank]
        skip_finished_epoch(trainer)
        if loop.restarted_mid_epoch:  # also behind the validation that ends it: Lightning has its last hooks to call
            for saved in state["sums"].values():
                if "values" in saved:
                    _set_metric(getattr(self._module, saved["log"]["metric_attribute"], None), saved)
            if loop.batch_idx + 1 < trainer.num_training_batches:
                self._sums = {key: saved for key, saved in state["sums"].items() if "value" in saved}
            else:
                self._log_again(state["sums"])
            trainer.callback_metrics.update({name: torch.tensor(v) for name, v in state["last"].items()})
        _set_generators(state["generators"], self._module.device)

    def join_sums(self) -> None:
        """Add what was logged before the checkpoint to what was logged since."""
        if not self._sums:
            return
        results = self._module.trainer.fit_loop.epoch_loop._results
        for key in [key for key in self._sums if key in results]:
            saved, result = self._sums.pop(key), results[key]
            value = saved["value"].to(result.value.device)
            if result.meta.is_max_reduction or result.meta.is_min_reduction:
                result.value = result.meta.reduce_fx(result.value, value)
            else:
                result.value = result.value + value
            if "size" in saved:
                result.cumulated_batch_size = result.cumulated_batch_size + saved["size"].to(result.value.device)

    def begin_epoch(self) -> None:
        """Forget what was logged for the epoch before, which Lightning takes for entries of its own."""
        results = self._module.trainer.fit_loop.epoch_loop._results
        for key in self._made:
            results.pop(key, None)
        self._sums, self._made = {}, []

    def _log_again(self, sums: dict[str, dict[str, Any]]) -> None:
        """Log the means of an epoch whose batches are all done, for the loggers and callbacks at its end."""
        trainer = self._module.trainer
        results = trainer.fit_loop.epoch_loop._results
        for key, saved in sums.items():
            how, attribute = dict(saved["log"]), saved["log"]["metric_attribute"]
            value: Any = torch.zeros((), device=self._module.device) if attribute is None else None
            if attribute is not None:
                value = getattr(self._module, attribute, None)
                if value is None:
                    continue
            reduce = how.pop("reduce")
            results.log(
                **how, value=value, reduce_fx=getattr(torch, reduce), batch_size=0,
                sync_dist_fn=trainer.strategy.reduce,
            )  # fmt: skip
            if attribute is None:
                results[key].value = saved["value"].to(self._module.device)
                if "size" in saved:
                    results[key].cumulated_batch_size = saved["size"].to(self._module.device)
            self._made.append(key)


class ResumeWhole(Callback):
    """Let a resumed run end as the uninterrupted one would: the same random numbers, and the whole log of its epoch.

    Lightning keeps weights, optimizers and its place in the loop, but no random generators, on which dropout depends,
    and nothing of what was logged since the epoch began: after a resume in mid-epoch its means are those of the rest.
    This callback keeps both in the checkpoint, for each process. The tasks of this package do so by themselves. The
    batches are up to the loader: see ResumableDataLoader.
    """

    def __init__(self) -> None:
        super().__init__()
        self._state: RunState | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        keeps_its_own = any(isinstance(value, RunState) for value in vars(pl_module).values())
        self._state = None if keeps_its_own else RunState(pl_module)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._state is not None:
            self._state.save(checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._state is not None:
            self._state.load(checkpoint)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._state is not None:
            self._state.start()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._state is not None:
            self._state.begin_epoch()

    @override
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        if self._state is not None:
            self._state.join_sums()


def skip_finished_epoch(trainer: pl.Trainer) -> None:
    """Let a run go on with the beginning of an epoch where its checkpoint is from the last step of the one before.

    Lightning (seen in 2.6) counts that epoch as done and still takes the next one for the rest of it: it calls no
    `on_train_epoch_start`, and counts one epoch too few begun, so that a second resume in mid-epoch goes astray.
    """
    loop = trainer.fit_loop
    progress: Any = loop.epoch_progress.current
    if loop.restarted_mid_epoch and progress.processed >= progress.ready:
        loop.reset_restart_stage()
        where = f"the last step of epoch {progress.processed - 1}"
        left_out = "the rest of that epoch: its validation, and what callbacks do at its end"
    elif (
        loop.restarted_mid_epoch
        and loop.epoch_loop.restarted_on_train_batch_end
        and trainer.enable_validation
        and (loop.batch_idx + 1) % (trainer.val_check_batch or math.inf) == 0
    ):
        where, left_out = f"step {loop.batch_idx + 1} of epoch {progress.ready - 1}", "the validation that is due there"
    else:
        return
    rank_zero_warn(
        f"The checkpoint is from {where}, in front of a validation, and Lightning leaves out {left_out}. Checkpoints "
        "that are saved behind the validation, or at other steps, lose nothing."
    )


def _logged(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what was logged in the epoch so far: sums by Lightning's key, and what has one value by its name."""
    sums: dict[str, Any] = {}
    last: dict[str, float] = {}
    for key, result in trainer.fit_loop.epoch_loop._results.items():
        meta = result.meta
        if result.has_reset:
            continue
        if not meta.on_epoch:
            if result.is_tensor:
                last[meta.name] = float(result.value)
            continue
        names = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx", "metric_attribute")
        how = {name: getattr(meta, name) for name in names}
        how |= {"reduce": meta.reduce_fx.__name__, "sync_dist": bool(meta.sync.should)}
        if result.is_tensor:
            sums[key] = {"log": how, "value": result.value.detach().cpu().clone()}
            if meta.is_mean_reduction:
                sums[key]["size"] = result.cumulated_batch_size.detach().cpu().clone()
        elif meta.metric_attribute is not None:
            state = result.value.metric_state
            if all(isinstance(value, Tensor) for value in state.values()):
                values = {name: value.detach().cpu().clone() for name, value in state.items()}
                sums[key] = {"log": how, "count": result.value._update_count, "values": values}
    validation = trainer.fit_loop.epoch_loop.val_loop
    if validation.batch_progress.total.ready:  # counted anew in each epoch
        for result in validation._results.values():
            meta = result.meta
            by_loader = meta.add_dataloader_idx and meta.dataloader_idx is not None
            name = f"{meta.name}/dataloader_idx_{meta.dataloader_idx}" if by_loader else meta.name
            if name in trainer.callback_metrics:
                last[name] = float(trainer.callback_metrics[name])
    return {"sums": sums, "last": last}


def _set_metric(metric: Any, saved: dict[str, Any]) -> None:
    if metric is None or metric.metric_state.keys() != saved["values"].keys():
        return
    for name, value in saved["values"].items():
        setattr(metric, name, value.to(metric.device))
    metric._update_count, metric._computed = saved["count"], None


def _generators(device: torch.device) -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    return state


def _set_generators(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"].cpu())
    random.setstate(state["python"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    numpy = sys.modules.get("numpy")
    if "numpy" in state and numpy is not None:
        name, keys, *rest = state["numpy"]
        numpy.random.set_state((name, keys.cpu().numpy().astype("uint32"), *rest))
