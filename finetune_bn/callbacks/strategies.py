"""Which Lightning strategies a callback can work in that reads or changes the network as a whole."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from finetune_bn.errors import FinetuneBNError, complaint


def check_whole_network(trainer: pl.Trainer) -> None:
    """Raise unless each process has the whole network.

    Raises:
        FinetuneBNError: the strategy shards the parameters over the processes.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        allowed = "a strategy in which each process has the whole network, such as ddp"
        raise FinetuneBNError(complaint("strategy", type(trainer.strategy).__name__, allowed))
