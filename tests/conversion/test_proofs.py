"""What counts as rounding in the proof of a layer, and what does not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import finetune_bn as fbn
from finetune_bn.conversion.proofs import prove_layer
from finetune_bn.errors import ConversionMismatch


def far_out() -> nn.BatchNorm2d:
    """Return a layer whose mean is 3,000 standard deviations from 0: scale and shift cancel nearly all of its input."""
    bn = nn.BatchNorm2d(4)
    nn.init.constant_(bn.running_mean, 3e3)
    return bn.eval()


def test_a_merged_layer_that_cancels_may_be_off_by_the_rounding_of_its_own_tensors_and_by_no_more() -> None:
    """Merged, the shift is rounded once at the size of the mean: that is far above the tolerance of the outputs."""
    bn = far_out()
    merged = fbn.convert(nn.Sequential(copy.deepcopy(bn)), fbn.Freeze("merged"), verify=False)[0]
    with torch.no_grad():
        merged.bias += 1e-4
        prove_layer("bn", merged, bn)
        merged.bias += 1e-2
    with pytest.raises(ConversionMismatch, match="layer bn"):
        prove_layer("bn", merged, bn)


def test_another_layer_is_not_given_that_much() -> None:
    bn, other = far_out(), far_out()
    prove_layer("bn", bn, other)
    with torch.no_grad():
        other.bias += 1e-2
    with pytest.raises(ConversionMismatch, match="layer bn"):
        prove_layer("bn", bn, other)
