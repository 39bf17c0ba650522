"""Find out whether the batches of a loader are i.i.d.: whether images of one batch are more alike than others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from finetune_bn.functional.image_spread import batch_membership_p_value
from finetune_bn.utilities.batches import Chunk, join
from finetune_bn.utilities.hooks import hooked

# Images of one batch that are kept, and batches, spread over all that came; one forward pass of so many is the price
# where the run that measures tells nothing of them.
_OF_A_BATCH, _BATCHES = 2, 12


class Membership:
    """Keeps a few images of batches at growing intervals, to compare them in the end."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Chunk]] = []
        self._every = 1
        self._watched: dict[int, tuple[list[int], list[Tensor]]] = {}

    def see(self, chunk: Chunk) -> None:
        """Keep the first images of a batch, if it is one of those that are compared."""
        number = chunk.batch[0]
        if number % self._every or chunk.position[0] or len(chunk) < _OF_A_BATCH or chunk.shape_key is None:
            return
        self._kept.append((number, chunk[list(range(_OF_A_BATCH))]))
        if len(self._kept) >= 2 * _BATCHES:
            self._every *= 2
            self._kept = [(n, c) for n, c in self._kept if n % self._every == 0]

    @contextlib.contextmanager
    def watching(self, layers: Sequence[nn.Module], current: Callable[[], Chunk]) -> Iterator[None]:
        """Take the images to compare from a run in which one normalization is that of all of them.

        It does not tell their batches apart then, and no further pass is needed. A later run takes the place.

        Args:
            layers: layers whose inputs are compared.
            current: returns the chunk that is passing a layer.
        """
        self._watched = {}
        compared = {number for number, _ in self._compared()}
        rows: dict[int, list[int]] = {}

        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            chunk, x = current(), args[0]
            if id(chunk) not in rows:
                places = enumerate(zip(chunk.batch, chunk.position, strict=True))
                rows[id(chunk)] = [i for i, (n, place) in places if n in compared and place < _OF_A_BATCH]
            chosen = rows[id(chunk)]
            if chosen and len(x) == len(chunk):
                numbers = [chunk.batch[i] for i in chosen]
                self._watched.setdefault(id(chunk), (numbers, []))[1].append(_means(x[chosen]))

        with hooked(layers, pre=look):
            yield

    def forget(self) -> None:
        """Forget what was watched: it was not one normalization."""
        self._watched = {}

    def p_value(self, run: Callable[[Chunk], None], layers: Sequence[nn.Module]) -> float | None:
        """Return how likely i.i.d. batches would differ as much as these; None where too few can be compared.

        Args:
            run: passes a chunk through the model, in eval mode; called where nothing was watched.
            layers: layers whose inputs are compared, by their means over positions.
        """
        compared = self._compared()
        if len(compared) < 4:
            return None
        if self._watched:
            numbers = [number for of_chunk, _ in self._watched.values() for number in of_chunk]
            rows = [torch.cat(found, 1) for _, found in self._watched.values()]
        else:
            chunks = [chunk for _, chunk in compared]
            alike = len({chunk.shape_key for chunk in chunks}) == 1
            rows = [self._features(run, layers, chunk) for chunk in ([join(chunks)] if alike else chunks)]
            numbers = [number for chunk in chunks for number in chunk.batch]
        if len({row.shape[1] for row in rows}) != 1:
            return None
        features = torch.cat(rows)
        features = features[:, features.isfinite().all(0)]
        return batch_membership_p_value(features, numbers) if features.shape[1] else None

    def _compared(self) -> list[tuple[int, Chunk]]:
        number = min(len(self._kept), _BATCHES)
        return [self._kept[i * len(self._kept) // number] for i in range(number)]

    def _features(self, run: Callable[[Chunk], None], layers: Sequence[nn.Module], chunk: Chunk) -> Tensor:
        found: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if len(args[0]) == len(chunk):
                found.append(_means(args[0]))

        with hooked(layers, pre=look):
            run(chunk)
        return torch.cat(found, 1) if found else torch.empty(len(chunk), 0)


def _means(x: Tensor) -> Tensor:
    """Return the means of the images over positions, [N, C]."""
    return (x.flatten(2).mean(2) if x.dim() > 2 else x).double()
