"""Find out whether the batches of a loader are i.i.d.: whether images of one batch are more alike than others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from finetune_bn.feeding import Chunk, join
from finetune_bn.sampling_error import batch_membership_p_value

# Images of one batch that are kept, and batches, spread over all that came; one forward pass of so many is the price.
_OF_A_BATCH, _BATCHES = 2, 12


class Membership:
    """Keeps a few images of batches at growing intervals, to compare them in the end."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, Chunk]] = []
        self._every = 1

    def see(self, chunk: Chunk) -> None:
        """Keep the first images of a batch, if it is one of those that are compared."""
        number = chunk.batch[0]
        if number % self._every or chunk.position[0] or len(chunk) < _OF_A_BATCH or chunk.shape_key is None:
            return
        self._kept.append((number, chunk[list(range(_OF_A_BATCH))]))
        if len(self._kept) >= 2 * _BATCHES:
            self._every *= 2
            self._kept = [(n, c) for n, c in self._kept if n % self._every == 0]

    def p_value(self, run: Callable[[Chunk], None], layers: Sequence[nn.Module]) -> float | None:
        """Return how likely i.i.d. batches would differ as much as these; None where too few can be compared.

        Args:
            run: passes a chunk through the model, in eval mode.
            layers: layers whose inputs are compared, by their means over positions.
        """
        number = min(len(self._kept), _BATCHES)
        if number < 4:
            return None
        kept = [self._kept[i * len(self._kept) // number][1] for i in range(number)]
        alike = len({chunk.shape_key for chunk in kept}) == 1
        rows = [self._features(run, layers, chunk) for chunk in ([join(kept)] if alike else kept)]
        if len({row.shape[1] for row in rows}) != 1 or not rows[0].shape[1]:
            return None
        return batch_membership_p_value(torch.cat(rows), [n for chunk in kept for n in chunk.batch])

    def _features(self, run: Callable[[Chunk], None], layers: Sequence[nn.Module], chunk: Chunk) -> Tensor:
        found: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if x.shape[0] == len(chunk):
                found.append(x.flatten(2).mean(2).double().cpu() if x.dim() > 2 else x.double().cpu())

        handles = [layer.register_forward_pre_hook(look) for layer in layers]
        try:
            run(chunk)
        finally:
            for handle in handles:
                handle.remove()
        features = torch.cat(found, 1) if found else torch.empty(len(chunk), 0)
        return features[:, features.isfinite().all(0)]
