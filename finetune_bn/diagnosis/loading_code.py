"""Python that brings a trained network back, for the page of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def use_code(model_file: str) -> str:
    """Return a script that uses a model file of this package.

    Args:
        model_file: its path.
    """
    return f"""import finetune_bn

model = finetune_bn.load({model_file!r})
print(model.predict("image.jpg"))
"""


def timm_code(name: str, num_classes: int, checkpoint: str, arguments: Mapping[str, Any], prefix: str = "net.") -> str:
    """Return a script that loads a Lightning checkpoint into `timm.create_model`, without this package.

    Args:
        name: of the timm model.
        num_classes: size of its head.
        checkpoint: path of the file.
        arguments: further ones of `timm.create_model`.
        prefix: what stands before timm's names in the checkpoint.
    """
    call = ", ".join([repr(name), f"{num_classes=}", *(f"{key}={value!r}" for key, value in arguments.items())])
    return f"""import timm
import torch

model = timm.create_model({call})
checkpoint = torch.load({checkpoint!r}, map_location="cpu", weights_only=True)
weights = {{key: value for key, value in checkpoint["state_dict"].items() if key.startswith({prefix!r})}}
model.load_state_dict({{key.removeprefix({prefix!r}): value for key, value in weights.items()}}, strict=True)
model.eval()
"""
