"""finetuning-scheduler beside the callbacks; where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, StepLimit
from finetune_bn.errors import FinetuneBNError
from tests.callbacks.test_conversion import Foreign, loader, same, statistics, trainer

fts = pytest.importorskip("finetuning_scheduler")


class Scheduled(Foreign):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]


def scheduler(folder: Path) -> pl.Callback:
    """The head, then each convolution, an epoch after the other."""
    parts = ("head", "backbone.3", "backbone.0")
    phases = {
        i: {"params": [f"{part}.weight", f"{part}.bias"], "max_transition_epoch": i + 1} for i, part in enumerate(parts)
    }
    (folder / "phases.yaml").write_text(yaml.safe_dump(phases), encoding="utf-8")
    made: pl.Callback = fts.FinetuningScheduler(ft_schedule=str(folder / "phases.yaml"), epoch_transitions_only=True)
    return made


@pytest.mark.parametrize("policy", [fbn.Freeze("none"), fbn.Freeze("original")], ids=str)
def test_its_later_phases_are_limited_and_move_no_statistics(policy: fbn.Policy, tmp_path: Path) -> None:
    model, limit = Scheduled(), StepLimit(1e-3)
    before = statistics(model)
    seen: list[tuple[str, ...]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append(limit.limits[0].limited)

    callbacks = [BatchNormConversion(policy), scheduler(tmp_path), limit, Look()]
    trainer(tmp_path, *callbacks, epochs=4, enable_checkpointing=True).fit(model, loader(), loader())
    assert list(dict.fromkeys(seen)) == [(), ("backbone.3",), ("backbone.0", "backbone.3")]
    assert same(statistics(model), before)


def test_in_front_of_the_conversion_it_is_an_error(tmp_path: Path) -> None:
    callbacks = [scheduler(tmp_path), BatchNormConversion()]
    with pytest.raises(FinetuneBNError, match="BatchNormConversion before FinetuningScheduler"):
        trainer(tmp_path, *callbacks, enable_checkpointing=True).fit(Scheduled(), loader(), loader())
