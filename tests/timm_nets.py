"""timm nets as they are after a pretraining, and files of their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")

TINY = "test_resnet"
LITE = "tf_efficientnet_lite0"


def randomized(name: str = TINY, **kwargs: Any) -> nn.Module:
    """A timm net in eval mode whose BatchNorms have statistics of their own, as after a pretraining."""
    net: nn.Module = timm.create_model(name, **kwargs)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval()


def images(n: int = 2, size: int = 64, chans: int = 3) -> Tensor:
    return torch.randn(n, chans, size, size)


def same_logits(one: nn.Module, other: nn.Module) -> bool:
    x = images()
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))


def saved(tmp_path: Path, content: Any, name: str = "weights.pth") -> Path:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    return path
