"""Shorten the steps of many weights at once: few launches, nothing that waits for a value on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from finetune_bn.functional.frozen import at_least_float32

Limit = float | Tensor


def step_factors(old: Tensor, new: Tensor, limit: float, dim: int = 0, floor: float = 0.0) -> Tensor:
    """Return the factor, from 0 to 1, by which the step of each channel has to be shortened.

    With it the norm of a channel's step is at most `limit` times the norm of its weights, or times `floor` where that
    is larger. Without a floor a channel of zeros stays.

    Args:
        old: weights before the step, of any shape.
        new: weights behind it, of the same shape.
        limit: 0 or more.
        dim: where the channels are.
        floor: 0 or more.

    Returns:
        Float32 or wider, of the size of `old` along `dim` and 1 elsewhere.
    """
    before = at_least_float32(old)
    others = [d for d in range(old.dim()) if d != dim]
    allowed = limit * torch.linalg.vector_norm(before, dim=others, keepdim=True).clamp_min(floor)
    step = torch.linalg.vector_norm(at_least_float32(new) - before, dim=others, keepdim=True)
    return torch.where(step > allowed, allowed / step, 1.0)


class Bucket:
    """Weights of one device and dtype, laid out channel by channel in one buffer while a step is made.

    Channels of equally many weights lie side by side, as the rows of a matrix, so that one operator takes all of
    them: a network has far fewer such lengths than convolutions.

    Attributes:
        weights: the weights, in the order of the buffer.
        factors: those of the latest step, one a channel; None before the first.
    """

    def __init__(self, weights: Sequence[tuple[nn.Parameter, int]]) -> None:
        ordered = sorted(weights, key=lambda pair: pair[0].numel() // pair[0].shape[pair[1]])
        self.weights = [weight for weight, _ in ordered]
        self.factors: Tensor | None = None
        self._dims = [dim for _, dim in ordered]
        self._channels = [weight.shape[dim] for weight, dim in ordered]
        self._buffer: Tensor | None = None
        self._counts: Tensor | None = None
        self._flat: list[Tensor] = []
        self._pointers: list[int] = []
        lengths = [weight.numel() // channels for weight, channels in zip(self.weights, self._channels, strict=True)]
        # Where the rows of one length begin, how many they are, and how long.
        self._blocks: list[tuple[int, int, int]] = []
        begin = 0
        for length in dict.fromkeys(lengths):
            rows = sum(c for c, n in zip(self._channels, lengths, strict=True) if n == length)
            self._blocks.append((begin, rows, length))
            begin += rows * length
        self._size = begin

    @classmethod
    def sort(cls, weights: Sequence[tuple[nn.Parameter, int]]) -> list[Self]:
        """Return the buckets for weights, each given with the dimension that its output channels are in."""
        buckets: dict[object, list[tuple[nn.Parameter, int]]] = {}
        for weight, dim in weights:
            buckets.setdefault((weight.device, weight.dtype, _lies_by_channel(weight, dim)), []).append((weight, dim))
        return [cls(some) for some in buckets.values()]

    def remember(self) -> None:
        """Take a copy of the weights, from which the next step is measured."""
        like = self.weights[0]
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self._buffer = torch.empty((2, self._size), device=like.device, dtype=dtype)
        self._find_flat()
        torch._foreach_copy_(self._within(self._buffer[0]), self._flat)

    def shorten(self, limits: Sequence[Limit], floor: float) -> None:
        """Shorten what was moved too far since `remember`; all else stays as it is, to the last bit.

        Args:
            limits: the largest step of each weight's channels, as a share of their norm.
            floor: above 0; the norm that a channel of smaller weights counts with.
        """
        if self._buffer is None:
            return
        buffer, self._buffer = self._buffer, None
        old, new = buffer[0], buffer[1]
        inside = self._within(new)
        torch._foreach_copy_(inside, self._flat)
        new.sub_(old)
        norms = torch.cat(
            [
                torch.linalg.vector_norm(buffer[:, begin : begin + rows * length].view(2, rows, length), dim=2)
                for begin, rows, length in self._blocks
            ],
            dim=1,
        )
        # No NaN where nothing moved: with a floor above 0 that is infinity, and no factor exceeds 1.
        factors = norms[0].clamp_min(floor).mul_(self._by_channel(limits, norms)).div_(norms[1]).clamp_max_(1.0)
        torch._foreach_copy_(inside, self._flat)  # again: what is old + (new - old) is not new to the last bit
        first = 0
        for begin, rows, length in self._blocks:
            block = buffer[:, begin : begin + rows * length].view(2, rows, length)
            block[0].lerp_(block[1], factors[first : first + rows].unsqueeze(1))  # at a factor of 1 exactly the end
            first += rows
        torch._foreach_copy_(self._flat, self._within(old))
        self.factors = factors

    def _by_channel(self, limits: Sequence[Limit], like: Tensor) -> Limit:
        """Return one limit for all channels where they agree, else one for each, without waiting for the device."""
        different = dict.fromkeys(map(id, limits)) if any(map(torch.is_tensor, limits)) else dict.fromkeys(limits)
        if len(different) == 1:
            only = limits[0]
            return only.to(like.device, like.dtype) if torch.is_tensor(only) else only
        if any(map(torch.is_tensor, limits)):
            values = torch.stack([torch.as_tensor(limit, dtype=like.dtype, device=like.device) for limit in limits])
        else:
            values = torch.tensor(limits, dtype=like.dtype, pin_memory=like.device.type == "cuda")
            values = values.to(like.device, non_blocking=True)
        return values.repeat_interleave(self._repeats(like.device), output_size=sum(self._channels))

    def _repeats(self, device: torch.device) -> Tensor:
        if self._counts is None:
            self._counts = torch.tensor(self._channels, device=device)
        return self._counts

    def _find_flat(self) -> None:
        """Find the memory of the weights anew where it is another: after `.to()`, loading, or another memory format."""
        if not torch.compiler.is_compiling():
            pointers = [weight.data_ptr() for weight in self.weights]
            if pointers == self._pointers:
                return
            self._pointers = pointers
        self._flat = []
        for weight, dim in zip(self.weights, self._dims, strict=True):
            tensor = weight.detach()
            if _lies_by_channel(weight, dim):
                tensor = (tensor if tensor.is_contiguous() else tensor.movedim(1, -1)).view(-1)
            self._flat.append(tensor)

    def _within(self, buffer: Tensor) -> list[Tensor]:
        """Return the parts of a buffer that stand for the weights, each of the shape of its entry in `_flat`."""
        parts = torch.split(buffer, [flat.numel() for flat in self._flat])
        if self._flat[0].dim() == 1:
            return list(parts)
        found = []
        for part, weight, dim in zip(parts, self.weights, self._dims, strict=True):
            rest = [size for d, size in enumerate(weight.shape) if d != dim]
            found.append(part.view(weight.shape[dim], *rest).movedim(0, dim))
        return found


def share_of(buckets: Sequence[Bucket]) -> Tensor:
    """Return the share of all channels whose latest step was shortened; 0 where there are none."""
    known = [bucket.factors for bucket in buckets if bucket.factors is not None]
    if not known:
        return torch.zeros(())
    factors = known[0] if len(known) == 1 else torch.cat([factor.to(known[0]) for factor in known])
    return (factors < 1).to(torch.float32).mean()


def _lies_by_channel(weight: Tensor, dim: int) -> bool:
    """Tell whether the weights of a channel lie side by side in memory, channel after channel."""
    if dim or not weight.dim():
        return False
    formats = [torch.contiguous_format]
    formats += {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(weight.dim(), [])
    return any(weight.is_contiguous(memory_format=memory_format) for memory_format in formats)
