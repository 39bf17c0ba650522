"""Convolutions and linear maps that compute the frozen BatchNorm (BN) behind them within their own weight.

`fold_pair` gives a producer one of these classes in place of its own, and `Fold.undo` takes it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from finetune_bn.functional.fold import folded_convolution, folded_linear, result_size
from finetune_bn.layers.fold_tie import Fold


class Folding(nn.Module):
    """What all folded producers share: a `Fold`, kept outside of the module tree."""

    if TYPE_CHECKING:
        _fold: Fold

    def __prepare_scriptable__(self) -> nn.Module:
        """Return what `torch.jit.script` is to see: the producer as it was, on the same tensors."""
        plain = self._fold.plain.__new__(self._fold.plain)
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name != "_fold"})
        return plain

    def _replicate_for_data_parallel(self) -> Self:
        # The replica's partner is on another device: each does its own part there.
        replica = cast(Self, super()._replicate_for_data_parallel())  # type: ignore[no-untyped-call]
        replica.__class__ = self._fold.plain  # type: ignore[assignment]
        return replica

    def extra_repr(self) -> str:
        """Describe the module in `print(model)`."""
        own = super().extra_repr()
        return f"{own}, computes {self._fold.norm_name!r} within its weight" if self._fold.intact else own


class FoldedConvNd(Folding, _ConvNd):
    """What all folded convolutions share."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the convolution of `input`; what the frozen layer behind makes of it, while autograd records."""
        fold, dims, weight, norm = self._fold, len(self.kernel_size), self.weight, None
        if input.dim() == dims + 2:
            sides, padding = self._sides(input)
            transposed, output_padding = self.transposed, list(self.output_padding)
            if transposed:
                output_padding = self._output_padding(  # type: ignore[operator]
                    input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
                )
            geometry = (self.stride, padding, self.dilation, transposed, output_padding, self.groups)
            size = result_size(input.shape, weight.shape, sides, *geometry)
            norm = fold.norm_for(input, size)
        if norm is None:
            plain = fold.plain.forward
            return plain(self, input) if output_size is None else plain(self, input, output_size)  # type: ignore[no-any-return]
        if sides:
            input = F.pad(input, sides, "constant" if self.padding_mode == "zeros" else self.padding_mode)
        sent = fold.announce()
        check = None if sent is None else sent.check
        y = folded_convolution(input, weight, self.bias, norm, size < weight.numel(), geometry, check)
        return fold.send(y, sent)

    def _sides(self, x: Tensor) -> tuple[list[int], list[int]]:
        """Return how `x` is to be padded where a convolution cannot do it, and how many zeros the convolution adds."""
        if self.padding_mode == "zeros" and not isinstance(self.padding, str):
            return [], list(self.padding)
        sides = list(self._reversed_padding_repeated_twice)
        if self.padding_mode == "zeros" and sides[0::2] == sides[1::2]:
            return [], sides[0::2][::-1]
        return sides, [0] * len(self.kernel_size)


class FoldedConv1d(FoldedConvNd, nn.Conv1d):
    """`Conv1d` with the frozen layer behind it in its weight."""


class FoldedConv2d(FoldedConvNd, nn.Conv2d):
    """`Conv2d` with the frozen layer behind it in its weight."""


class FoldedConv3d(FoldedConvNd, nn.Conv3d):
    """`Conv3d` with the frozen layer behind it in its weight."""


class FoldedConvTranspose1d(FoldedConvNd, nn.ConvTranspose1d):
    """`ConvTranspose1d` with the frozen layer behind it in its weight."""


class FoldedConvTranspose2d(FoldedConvNd, nn.ConvTranspose2d):
    """`ConvTranspose2d` with the frozen layer behind it in its weight."""


class FoldedConvTranspose3d(FoldedConvNd, nn.ConvTranspose3d):
    """`ConvTranspose3d` with the frozen layer behind it in its weight."""


class FoldedLinear(Folding, nn.Linear):
    """`Linear` with the frozen layer behind it in its weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the map of `input`; what the frozen layer behind makes of it, while autograd records."""
        fold, weight = self._fold, self.weight
        size = input.numel() // self.in_features * self.out_features
        norm = fold.norm_for(input, size)
        if norm is None:
            return super().forward(input)
        sent = fold.announce()
        check = None if sent is None else sent.check
        return fold.send(folded_linear(input, weight, self.bias, norm, size < weight.numel(), check), sent)
