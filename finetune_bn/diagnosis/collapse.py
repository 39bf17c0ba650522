"""Notice a network whose features no longer tell one image from another."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.functional.frozen import between_image_spread
from finetune_bn.layers.frozen import FrozenBatchNorm

# A trained network's channels vary between images by tenths of their size; one that predicts a constant shows 0.
SPREAD_FLOOR = 1e-3
_IMAGES = 16


class CollapseWatch:
    """Looks at what the last frozen layer that ran returns, now and then, and warns once.

    Frozen layers do not rescale what reaches them, so a learning rate that BatchNorm would have absorbed can drive
    the network into saturation: finite loss, constant prediction, no error. The sign is that the per-image channel
    means of the features are the same for all images.

    Args:
        every_n_steps: how many batches lie between two looks; 0 for no looks.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self.collapsed = False
        self.spread: float | None = None
        self._latest: Tensor | None = None
        self._handles: list[Any] = []
        self._stance: Any = None
        self._images: deque[Tensor] = deque(maxlen=_IMAGES)

    def reset(self) -> None:
        """Forget what was seen: a new run begins."""
        self.detach()
        self.collapsed, self.spread, self._latest = False, None, None
        self._images.clear()

    def before_batch(self, model: nn.Module | None, batch_idx: int) -> None:
        """Start looking, if it is this batch's turn."""
        self.detach()
        if model is None or not self.every_n_steps or batch_idx % self.every_n_steps:
            return
        layers = [module for module in model.modules() if isinstance(module, FrozenBatchNorm)]
        self._handles = [layer.register_forward_hook(self._remember) for layer in layers]
        # A compiled network does not notice hooks that come and go.
        self._stance = torch.compiler.set_stance("force_eager")

    def after_batch(self) -> None:
        """Stop looking, and judge what was seen once there are images enough to compare."""
        self.detach()
        if self._latest is None:
            return
        # Small batches are pooled over looks: images that differ in nothing but the step still show a spread.
        self._images.extend(self._latest)
        self._latest = None
        features = torch.stack(tuple(self._images))
        if not torch.isfinite(features).all():
            self._warn("the features of its last frozen layer hold NaN or infinite values")
        elif len(self._images) >= 2:
            self.spread = between_image_spread(features)
            if self.spread < SPREAD_FLOOR:
                self._warn(
                    "the features of its last frozen layer are the same for all images (they differ by "
                    f"{self.spread:.1e} of their size), so its prediction is a constant"
                )

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)  # back to the stance that was there before
            self._stance = None

    def _remember(self, module: nn.Module, args: Any, output: Tensor) -> None:
        per_image = output.detach().flatten(2).mean(2) if output.dim() > 2 else output.detach()
        self._latest = per_image.float()

    def _warn(self, sign: str) -> None:
        if self.collapsed:
            return
        self.collapsed = True
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn

        rank_zero_warn(
            f"The frozen network has collapsed: {sign}. Freezing BatchNorm narrows the range of learning rates that "
            "work, and a run does not recover from this. Start again from the pretrained weights with a learning "
            "rate about 5 times smaller, with a longer warm-up, or with the callback StepLimit."
        )
