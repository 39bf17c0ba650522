"""Talk to the other processes of a distributed run; alone, every answer is one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune_bn.errors import FinetuneBNError

_FAILED = -2.0


class OtherProcessFailed(FinetuneBNError):
    """Another process of the run raised; this one stopped with it."""


class Ranks:
    """The processes that work on one result.

    Args:
        group: the process group; None is the default one, where there is one.
        device: where tensors lie that are sent.
    """

    def __init__(self, group: torch.distributed.ProcessGroup | None, device: torch.device) -> None:
        on = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.group = group
        self.device = device
        self.world = torch.distributed.get_world_size(group) if on else 1

    def gather(self, numbers: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, in the order of their ranks; all have the same shape."""
        if self.world == 1:
            return [numbers]
        numbers = numbers.contiguous()
        gathered = [torch.empty_like(numbers) for _ in range(self.world)]
        torch.distributed.all_gather(gathered, numbers, self.group)
        return gathered

    def agree(self, *numbers: float) -> list[list[float]]:
        """Return what each process says, one row a process.

        Raises:
            OtherProcessFailed: one of them called `fail` instead.
        """
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        rows: list[list[float]] = [row.tolist() for row in self.gather(own)]
        failed = [rank for rank, row in enumerate(rows) if row[0] == _FAILED]
        if failed:
            raise OtherProcessFailed(f"rank {failed[0]} failed, see its own error; nothing was changed on this one")
        return rows

    def fail(self, width: int) -> None:
        """Tell the others, who call `agree` with so many numbers now, that this process goes no further."""
        self.gather(torch.full((width,), _FAILED, dtype=torch.float64, device=self.device))
