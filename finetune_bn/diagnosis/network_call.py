"""Take a copy of what a training step calls the network with, whatever LightningModule makes that step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.utilities.batch_size import count_in_call
from finetune_bn.utilities.batches import Chunk


class NetworkCall:
    """Takes a copy of what the network is called with in a training step, by hooks that are there for this step alone.

    Attributes:
        target: the outermost module that was called, on the way to where most BatchNorm layers are.
        chunk: what it was called with first.
        training: whether each BatchNorm layer was in training mode.
        buffers: the buffers of those that were, as they were before the call.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self.forget()

    def await_in(self, module: nn.Module) -> None:
        """Wait for the next call."""
        self.forget()
        inside: nn.Module | None = module
        # Not in compiled modules: their hooks would be compiled in, or not be called.
        while inside is not None and inside._compiled_call_impl is None and "_orig_mod" not in inside._modules:
            self._handles.append(inside.register_forward_pre_hook(self._take, with_kwargs=True))
            parts = [part for part in inside.children() if find_batch_norms(part)]
            inside = max(parts, key=lambda part: len(find_batch_norms(part)), default=None)

    def forget(self) -> None:
        """Remove the hooks, and let go of what they took."""
        while self._handles:
            self._handles.pop().remove()
        self.target: nn.Module | None = None
        self.chunk: Chunk | None = None
        self.training: dict[nn.Module, bool] = {}
        self.buffers: dict[nn.Module, dict[str, Tensor | None]] = {}

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count = count_in_call(args, kwargs)
        if self.chunk is not None or not count.known or not count.images or _is_redirected(module):
            return
        # A copy: networks may change their input in place.
        content = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        images = range(count.images)
        self.target = module
        self.chunk = Chunk(content, (0,) * count.images, tuple(images), whole=not count.first)
        for site in find_batch_norms(module):
            layer = site.module
            self.training[layer] = layer.training
            if layer.training:
                named = layer._buffers.items()
                self.buffers[layer] = {name: None if b is None else b.clone() for name, b in named}


def _is_redirected(module: nn.Module) -> bool:
    """Whether this call of a module is none: in DDP, Lightning puts the training step in the place of `forward`."""
    return "_ForwardRedirection" in getattr(vars(module).get("forward"), "__qualname__", "")
