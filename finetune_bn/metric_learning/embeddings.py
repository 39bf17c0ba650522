"""The embeddings of an evaluation: gathered over all processes, each image once, in the order of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from finetune_bn.errors import BadData, complaint
from finetune_bn.metric_learning.retrieval import gather_rows

_ENDLESS = 2**62


class Collected:
    """Collects embeddings batch by batch.

    Over several processes a `DistributedSampler` gives image `i` to process `i % world_size`, and repeats images at the
    end so that all processes have equally many. By the place in its loader each image is known, and kept once.

    Args:
        loaders: the evaluation loaders.
        width: length of an embedding.
        device: where embeddings are kept.
        world_size: number of processes.

    Raises:
        BadData: with several processes, a loader without a `DistributedSampler` for as many: each process would see
            all images, and find those of the others at distance 0.
    """

    def __init__(self, loaders: Sequence[Any], width: int, device: torch.device, world_size: int = 1) -> None:
        self.world_size = world_size
        self.device = torch.device("cpu") if device.type == "mps" else device  # mps lacks float64
        self._seen = [0] * len(loaders)
        self._first, self._images = [0] * len(loaders), [_ENDLESS] * len(loaders)
        self._embeddings = [torch.empty(0, width, device=self.device)]
        self._known = [torch.empty(0, 3, dtype=torch.int64, device=self.device)]
        for number, loader in enumerate(loaders if world_size > 1 else ()):
            sampler = getattr(loader, "sampler", None)
            if not isinstance(sampler, DistributedSampler) or sampler.num_replicas != world_size:
                allowed = f"a DistributedSampler for {world_size} processes"
                remedy = "Lightning puts one in with use_distributed_sampler=True, where the loader has a data set."
                raise BadData(complaint(f"sampler of loader {number}", type(sampler).__name__, allowed, remedy))
            self._first[number], self._images[number] = sampler.rank, len(sampler.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        """Return the number of loaders."""
        return len(self._seen)

    def add(self, embeddings: Tensor, labels: Tensor, loader: int) -> None:
        """Add the embeddings [N, D] and labels [N] of the next batch of a loader."""
        places = torch.arange(self._seen[loader], self._seen[loader] + len(labels), device=self.device)
        self._seen[loader] += len(labels)
        places = places * self.world_size + self._first[loader]
        numbers = torch.full_like(places, loader)
        self._embeddings.append(embeddings.detach().to(self.device, torch.float32))
        self._known.append(torch.stack([numbers, places, labels.to(self.device)], dim=1))

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return embeddings [N, D], labels [N] and numbers of their loaders [N]; the same on all processes."""
        embeddings, known = gather_rows(torch.cat(self._embeddings)), gather_rows(torch.cat(self._known))
        loaders, places, _ = known.T
        once = places < torch.tensor(self._images, device=self.device)[loaders]
        # Two stable sorts: by place, then by loader.
        order = places.argsort(stable=True)
        order = order[loaders[order].argsort(stable=True)]
        order = order[once[order]]
        return embeddings[order], known[order, 2], known[order, 0]
