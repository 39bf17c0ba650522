"""Notice a network whose features no longer tell one image from another."""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from finetune_bn.functional.frozen import between_image_spread
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.utilities.checks import number

log = logging.getLogger("finetune_bn")

# A trained network's channels vary between images by tenths of their size; one that predicts a constant shows 0.
SPREAD_FLOOR = 1e-3
_IMAGES = 16
# A layer that is looked at does its own part in that step, which takes memory: not all are, to find the last of them.
_AT_ONCE = 4


def _never_raises(method: Callable[..., None]) -> Callable[..., None]:
    """Let no fault of a watch end the training that it watches."""

    @functools.wraps(method)
    def guarded(self: CollapseWatch, *args: Any, **kwargs: Any) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.every_n_steps = 0
            self.detach()
            log.warning("no more looks for signs of collapse: %s: %s", type(error).__name__, error)

    return guarded


class CollapseWatch:
    """Looks at what one frozen layer returns in training, now and then, and warns once.

    Frozen layers do not rescale what reaches them, so a learning rate that BatchNorm would have absorbed can drive
    the network into saturation: finite loss, constant prediction, no error. The sign is that the per-image channel
    means of the features are the same for all images.

    The layer is the last one defined that is trained through in a training step and whose gamma is not zero, which
    would hide the features from it; once found it stays the same. What a step recomputes in its backward pass is not
    looked at, and of several calls in a step the first is.

    Args:
        every_n_steps: how many batches lie between two looks; 0 for no looks.
        warn: what is called with the warning.

    Attributes:
        collapsed: whether signs of collapse were seen.
        spread: the latest measurement.
        layer: name of the layer that is looked at; None while it is not known.

    Raises:
        FinetuneBNError: `every_n_steps` is no whole number, or negative.
    """

    def __init__(self, every_n_steps: int, warn: Callable[[str], object] = warnings.warn) -> None:
        self.every_n_steps = self._every = number("watch_every_n_steps", every_n_steps, least=0, whole=True)
        self._say = warn
        self._handles: list[Any] = []
        self._stance: Any = None
        self.reset()

    def reset(self) -> None:
        """Forget what was seen: a new run begins."""
        self.detach()
        self.every_n_steps = self._every
        self.collapsed = False
        self.spread: float | None = None
        self.layer: str | None = None
        self._tried = 0  # layers that are none to look at, from the last one on
        self._strict, self._looking = True, False
        self._seen: dict[str, Tensor] = {}
        self._inputs: Tensor | None = None
        self._images: deque[tuple[Tensor, Tensor | None]] = deque(maxlen=_IMAGES)

    @_never_raises
    def before_batch(self, model: nn.Module | None, batch_idx: int, batch: Any = None) -> None:
        """Start looking, if it is this training batch's turn.

        Args:
            model: the network.
            batch_idx: number of the batch.
            batch: the batch, by which images that are one and the same are told from features that are.
        """
        self.detach()
        self._seen = {}
        if model is None or not self.every_n_steps or (self.layer is not None and batch_idx % self.every_n_steps):
            return
        layers = {name: module for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm)}
        if self.layer is None:
            names = self._candidates(list(reversed(layers)))
        else:
            names = [self.layer] if self.layer in layers else []
        self._looking = True
        self._handles = [layers[name].register_forward_hook(self._see(name)) for name in names]
        if names and "torch._dynamo" in sys.modules:  # a compiled network does not notice hooks that come and go
            self._stance = torch.compiler.set_stance("force_eager")
        self._inputs = _per_image(batch)

    @_never_raises
    def after_batch(self) -> None:
        """Stop looking, and judge what was seen once there are images enough to compare."""
        self.detach()
        if not self._looking:
            return
        self._looking = False
        if self.layer is None:
            if not self._seen:
                self._tried += _AT_ONCE
                return
            self.layer = list(self._seen)[-1]  # the last one that ran, of those that are defined last
        features = self._seen.get(self.layer or "")
        self._seen = {}
        if features is not None and len(features):
            self._judge(features)

    def _candidates(self, names: list[str]) -> list[str]:
        """Return the layers to try in this step; where none is left, there will be no more looks."""
        if self._tried >= len(names) and self._strict:
            self._strict, self._tried = False, 0
        if self._tried >= len(names):
            self.every_n_steps = 0
        return names[self._tried : self._tried + _AT_ONCE]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)  # back to the stance that was there before
            self._stance = None

    def _see(self, name: str) -> Callable[..., None]:
        def hook(module: FrozenBatchNorm, args: Any, output: Any) -> None:
            if name in self._seen or not torch.is_tensor(output) or output.dim() < 2 or _in_backward():
                return
            # Without gradients it is a teacher, a part that is not trained yet, or what reentrant checkpointing will
            # recompute: taken where there is no other. With gamma 0 it returns a constant.
            trained = output.requires_grad or not self._strict
            if self.layer is None and not (trained and module.training and _tells(module)):
                return
            per_image = output.detach().flatten(2).mean(2) if output.dim() > 2 else output.detach()
            self._seen[name] = per_image.float()

        def guarded(module: FrozenBatchNorm, args: Any, output: Any) -> None:
            _never_raises(lambda self: hook(module, args, output))(self)

        return guarded

    def _judge(self, features: Tensor) -> None:
        # Small batches are pooled over looks: images that differ in nothing but the step still show a spread.
        inputs = self._inputs if self._inputs is not None and len(self._inputs) == len(features) else None
        if self._images and self._images[-1][0].shape != features.shape[1:]:
            self._images.clear()
        self._images.extend((row, None if inputs is None else inputs[i]) for i, row in enumerate(features))
        together = torch.stack([row for row, _ in self._images])
        if not torch.isfinite(together).all():
            self._warn("the features of its last frozen layer hold NaN or infinite values")
        elif len(self._images) >= 2 and not _all_alike([image for _, image in self._images]):
            self.spread = between_image_spread(together)
            if self.spread < SPREAD_FLOOR:
                self._warn(
                    f"the features of its last frozen layer ({self.layer}) are the same for all images (they differ by "
                    f"{self.spread:.1e} of their size), so its prediction is a constant"
                )

    def _warn(self, sign: str) -> None:
        if self.collapsed:
            return
        self.collapsed = True
        self._say(
            f"The frozen network has collapsed: {sign}. Frozen BatchNorm layers take smaller learning rates than "
            "live ones, and a run does not recover from this. Start again from the pretrained weights with a learning "
            "rate about 5 times smaller, with a longer warm-up, or with the callback StepLimit."
        )


def _in_backward() -> bool:
    """Tell whether the autograd engine is at work, so that a forward pass is a recomputation (seen in torch 2.14)."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def _tells(layer: FrozenBatchNorm) -> bool:
    """Tell whether most channels of a layer let features through."""
    return layer.weight is None or bool((layer.weight.detach() != 0).float().mean() > 0.5)


def _per_image(batch: Any) -> Tensor | None:
    """Return two numbers for each image of a batch; None where nobody knows where its images are."""
    for leaf in tree_leaves(batch):
        if torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.dim() > 1 and leaf.numel():
            rows = leaf.detach().flatten(1).float()
            return torch.stack([rows.mean(1), rows.square().mean(1)], 1)
    return None


def _all_alike(images: list[Tensor | None]) -> bool:
    """Tell whether it is one image over and over, as where a training is to overfit on one."""
    known = [image for image in images if image is not None]
    return len(known) == len(images) and all(torch.equal(image, known[0]) for image in known)
