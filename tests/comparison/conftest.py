"""A network of two BatchNorm layers, and images that it learns to tell apart in a few steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Plain, settle

Pair = tuple[Tensor, Tensor]


def pictures(number: int, seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % 3
    noise = 0.5 * torch.randn(number, 3, 10, 10, generator=generator)
    return noise + F.one_hot(labels, 3).float()[:, :, None, None], labels


@pytest.fixture(scope="session")
def train() -> Pair:
    return pictures(36, 0)


@pytest.fixture(scope="session")
def val() -> Pair:
    return pictures(30, 1)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return settle(Plain())
