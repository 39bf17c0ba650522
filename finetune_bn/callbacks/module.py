"""What a callback asks of a module and its Trainer: which part takes images, its statistics back, the whole network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from finetune_bn.callbacks.lightning_names import SHARDED, is_a, overrides
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.recalibration.bank import StatisticsBank


class OwnStatistics:
    """The statistics of a network, to be given back to it after others were used for a while.

    Attributes:
        by_name: the tensors of its BatchNorm layers, by their names in the state dict, while others are in use.
    """

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._undo = contextlib.ExitStack()

    def keep(self, pl_module: pl.LightningModule) -> None:
        """Remember those that the module has now."""
        self.put_back()
        own = {name for site in find_batch_norms(pl_module) for name in site.names}
        entries = pl_module.state_dict().items()
        self.by_name = {name: value.clone() for name, value in entries if name.rpartition(".")[0] in own}
        self._undo.enter_context(StatisticsBank.restoring(pl_module))

    def put_back(self) -> None:
        """Give the module back what was kept, bit for bit; nothing happens where nothing is kept."""
        self._undo.close()
        self.by_name = {}

    @contextlib.contextmanager
    def back_on_error(self) -> Iterator[None]:
        """Give it back if the block raises."""
        try:
            yield
        except BaseException:
            self.put_back()
            raise


def part_of(pl_module: pl.LightningModule, path: str | None) -> nn.Module:
    """Return the part of a module at an attribute path; the module itself for None.

    Raises:
        FinetuneBNError: there is no such part.
    """
    try:
        return pl_module.get_submodule(path or "")
    except AttributeError as error:
        allowed = f"a submodule of {type(pl_module).__name__}; BatchNorm layers are in {_parts(pl_module)}"
        raise FinetuneBNError(complaint("module", path, allowed)) from error


def target_of(pl_module: pl.LightningModule, path: str | None) -> nn.Module:
    """Return the part of a module that takes images.

    Raises:
        FinetuneBNError: there is no such part, or it has no `forward`.
    """
    target = part_of(pl_module, path)
    if target is pl_module and not overrides(pl_module, "forward"):
        allowed = f"the part whose forward takes images; BatchNorm layers are in {_parts(pl_module)}"
        why = f"{type(pl_module).__name__} has no forward of its own."
        raise FinetuneBNError(complaint("module", path, allowed, why))
    return target


def frozen_layers(model: nn.Module) -> int:
    """Return how many frozen layers a model has."""
    return sum(isinstance(site.module, FrozenBatchNorm) for site in find_batch_norms(model))


def _parts(pl_module: pl.LightningModule) -> list[str]:
    return [name for name, part in pl_module.named_children() if find_batch_norms(part)]


def broadcast_statistics(model: nn.Module) -> None:
    """Give all processes the statistics of the first, as DDP does before each forward pass and the checkpoint has."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        for site in find_batch_norms(model):
            for buffer in site.module.buffers(recurse=False):
                distributed.broadcast(buffer, 0)


def sources_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return, by name, what `merged` layers remember of the BatchNorm they were: no state dict holds it."""
    return {
        site.names[0]: {name: value.detach().clone() for name, value in site.module.source.state_dict().items()}
        for site in find_batch_norms(model)
        if isinstance(site.module, FrozenBatchNorm)
        and site.module.affine_kind == "merged"
        and site.module.has_source_statistics
        and site.module.source is not None
    }


def load_sources(model: nn.Module, sources: dict[str, dict[str, Tensor]]) -> None:
    """Let `merged` layers remember again what `sources_of` returned."""
    for name, values in sources.items():
        layer = model.get_submodule(name)
        if isinstance(layer, FrozenBatchNorm) and layer.affine_kind == "merged":
            source = layer.source or layer.new_batch_norm()
            layer.remember(source)
            source.load_state_dict(values, strict=False)


def check_whole_network(trainer: pl.Trainer) -> None:
    """Raise unless each process has the whole network.

    Raises:
        FinetuneBNError: the strategy shards the parameters over the processes.
    """
    if is_a(trainer.strategy, SHARDED):
        allowed = "a strategy in which each process has the whole network, such as ddp"
        raise FinetuneBNError(complaint("strategy", type(trainer.strategy).__name__, allowed))


def loader_names(trainer: pl.Trainer, loaders: int, alone: str = "0") -> list[str]:
    """Return one name for each evaluation loader: that of its domain where the data module has one for each.

    Args:
        trainer: with the data module.
        loaders: how many there are.
        alone: name of a single loader without a domain.
    """
    domains = getattr(getattr(trainer, "datamodule", None), "domains", None)
    if isinstance(domains, (list, tuple)) and len(domains) == loaders == len(set(domains)):
        return [str(name) for name in domains]
    return [alone] if loaders == 1 else [str(i) for i in range(loaders)]
