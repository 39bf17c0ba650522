"""How many bytes of activations a model holds at its BatchNorm layers, and how many the device has free."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune_bn.utilities.hooks import hooked

# Of control groups, version 2 and version 1.
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers, without holding them, the storages of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if torch.is_tensor(leaf):
                storage = leaf.untyped_storage()
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        return out

    def look(self) -> None:
        alive = {key: entry for key, entry in self.known.items() if not entry[0].expired()}  # type: ignore[no-untyped-call]
        self.known = alive
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))


def bytes_alive_at(layers: Sequence[nn.Module], run: Callable[[], None]) -> int:
    """Return the most bytes that the operations of `run` had alive whenever one of the layers was reached.

    Args:
        layers: the layers.
        run: runs the model they belong to, once, without gradients.
    """
    storages = _Storages()
    with hooked(layers, pre=lambda module, args: storages.look()), storages:
        run()
    return storages.peak


def available_memory(device: torch.device) -> int:
    """Return how many bytes could be allocated on the device now, as far as it tells; 4 GiB where it does not."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    limits = [_meminfo(), _cgroup()]
    return min([limit for limit in limits if limit is not None], default=4 * 2**30)


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _cgroup() -> int | None:
    """Return what a container may still use: its limit does not show in what the machine has free."""
    for limit_file, used_file in _CGROUP_FILES:
        try:
            limit = Path(limit_file).read_text(encoding="ascii").strip()
            used = Path(used_file).read_text(encoding="ascii").strip()
            # Version 2 says "max" where there is no limit, version 1 a number that no machine has.
            return None if limit == "max" else max(int(limit) - int(used), 0)
        except (OSError, ValueError):
            continue
    return None
