"""What callbacks ask of a foreign module: its part, what `merged` layers remember, whole networks, names of loaders."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import finetune_bn as fbn
from finetune_bn.callbacks import module as module_file
from finetune_bn.callbacks.module import (
    broadcast_statistics,
    check_whole_network,
    frozen_layers,
    load_sources,
    loader_names,
    sources_of,
)  # fmt: skip
from finetune_bn.errors import FinetuneBNError
from tests.models import settle


def net() -> nn.Module:
    torch.manual_seed(0)
    return settle(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))


def test_what_merged_layers_remember_is_carried_to_another_copy_and_other_layers_are_left_alone() -> None:
    merged = fbn.convert(net(), fbn.Freeze("merged"))
    sources = sources_of(merged)
    assert set(sources) == {"1", "3"}
    assert sources_of(fbn.convert(net(), fbn.Freeze("none"))) == {}
    other = copy.deepcopy(merged)
    for name in sources:
        other.get_submodule(name).remember(None)  # type: ignore[operator]
    assert sources_of(other) == {}
    load_sources(other, sources)
    again = sources_of(other)
    assert all(torch.equal(again[name][key], value) for name in sources for key, value in sources[name].items())
    live = net()
    before = copy.deepcopy(live.state_dict())
    load_sources(live, sources)
    assert all(torch.equal(value, before[key]) for key, value in live.state_dict().items())
    assert (frozen_layers(merged), frozen_layers(live)) == (2, 0)


def test_the_statistics_of_the_first_process_are_given_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    model = net()
    broadcast_statistics(model)  # one process: there is nobody to ask
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(module_file.torch.distributed, "broadcast", lambda tensor, rank: sent.append((tensor, rank)))
    broadcast_statistics(model)
    assert {rank for _, rank in sent} == {0}
    assert {id(tensor) for tensor, _ in sent} == {id(buffer) for buffer in model.buffers()}


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_a_strategy_that_shards_the_network_is_refused_by_name_also_where_it_is_a_subclass(strategy: str) -> None:
    sharded = type(strategy, (), {})
    for kind in (sharded, type("Own", (sharded,), {})):
        with pytest.raises(
            FinetuneBNError, match=f"strategy: got '{kind.__name__}'; allowed: a strategy in which each"
        ):
            check_whole_network(SimpleNamespace(strategy=kind()))  # type: ignore[arg-type]
    check_whole_network(SimpleNamespace(strategy=type("DDPStrategy", (), {})()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("domains", "loaders", "names"),
    [
        (["photo", "sketch"], 2, ["photo", "sketch"]),
        (["photo", "photo"], 2, ["0", "1"]),
        (["photo"], 2, ["0", "1"]),
        (None, 1, ["all"]),
        (None, 3, ["0", "1", "2"]),
    ],
)
def test_loaders_are_called_after_their_domains_where_each_has_its_own(
    domains: Any, loaders: int, names: list[str]
) -> None:
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(domains=domains))
    assert loader_names(trainer, loaders, alone="all") == names
