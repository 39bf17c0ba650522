"""What the layers share that go on tracking running statistics, and normalize by other than the whole batch."""

from __future__ import annotations

import sys
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import UnsupportedLayer
from finetune_bn.functional.batch import Normalized, batch_statistics, values_per_image
from finetune_bn.functional.frozen import at_least_float32, frozen_batch_norm
from finetune_bn.layers.frozen import why_not_frozen
from finetune_bn.layers.leaf import as_leaf
from finetune_bn.layers.recomputed import Passes
from finetune_bn.layers.stand_in import share_hooks, store

ASIDE = "finetune_bn"  # key in a state dict's metadata, which a layer of torch or timm passes over
_PARAMETERS, _BUFFERS = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")


class KeepsAside(nn.Module):
    """Keeps what BatchNorm has no name for in the metadata of the state dict, where torch keeps its versions.

    So the names in the state dict stay BatchNorm's, and `torch.save`, Lightning and copies of the state dict carry
    it along. What drops the metadata (a dict made by hand, safetensors) is answered as a BatchNorm's state dict is.
    """

    def _aside(self) -> dict[str, Any]:
        """Return what to keep."""
        raise NotImplementedError

    def _take_aside(self, aside: dict[str, Any] | None) -> None:
        """Take back what `_aside` returned; None where the state dict is that of a BatchNorm. Its tensors are in."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata.setdefault(prefix[:-1], {})[ASIDE] = self._aside()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        there = prefix + "num_batches_tracked" in state_dict
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if there:
            self._take_aside(local_metadata.get(ASIDE))


class TrackingBatchNorm(_BatchNorm):
    """A BatchNorm that in training normalizes in a way of its own, and in eval mode by its running statistics.

    Its state dict is BatchNorm's, so checkpoints load `strict=True` both ways; statistics are float32 or wider.

    It is a `_BatchNorm`, because its statistics are live: stochastic weight averaging and `update_bn` have to see it,
    and re-estimate it right. It is none of `BatchNorm1d`, `2d`, `3d`, because code that asks for those replaces them
    by what knows nothing of groups, clipping or an activation. Conversion to SyncBatchNorm would do the same, and is
    answered with an error. In a distributed run each process normalizes by images of its own. Under gradient
    checkpointing a batch passes twice, and is tracked and counted once, see `recomputed`.

    A batch (or a ghost group) with a single value a channel has no variance. It is normalized by the running
    statistics, and counted in `num_fallbacks`; it still updates them where the batch has two values or more.
    """

    num_fallbacks: Tensor
    _takes: tuple[int, ...] = ()  # numbers of input dimensions; none given: 2 or more
    _plain: type[_BatchNorm] = nn.SyncBatchNorm  # what `to_batch_norm` makes where there was no BatchNorm before
    __jit_unused_properties__ = ["qconfig", "settings"]  # noqa: RUF012 (torch.jit looks for a list)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self._begin(())

    @classmethod
    def _standing_for(cls, bn: _BatchNorm) -> Self:
        """Return a layer with the values, Parameters and hooks of `bn`, which is kept inside for `to_batch_norm`."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats", "training"):
            setattr(layer, name, getattr(bn, name))
        for name in _PARAMETERS:  # the very ones: an optimizer that holds them goes on training them
            layer.register_parameter(name, getattr(bn, name))
        for name in _BUFFERS:
            layer.register_buffer(name, getattr(bn, name).clone())
        layer._begin((bn,))
        share_hooks(bn, layer)
        return layer

    def _begin(self, source: tuple[_BatchNorm, ...]) -> None:
        self._source = source
        self._passes = Passes()
        device = self.get_buffer("running_mean").device
        self.register_buffer("num_fallbacks", torch.zeros((), dtype=torch.long, device=device), persistent=False)

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_batch_norm` takes besides the BatchNorm."""
        return {}

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` [N, C, ...] normalized; in training mode also update the running statistics."""
        if not isinstance(input, Tensor):
            return as_leaf(self, input)
        self._check_input_dim(input)
        if not self.training:
            return self._evaluate(input)
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return self._train(input)
        try:
            return self._train(input)
        except RuntimeError as error:
            raise UnsupportedLayer(
                f"{type(self).__name__}: in training mode it goes by the batch and changes its running statistics, "
                f"which this transform of torch.func cannot follow ({error}). Call eval() first, or take "
                "torch.autograd.functional.hessian, or pass the buffers through torch.func.functional_call."
            ) from error

    def _train(self, input: Tensor) -> Tensor:
        self._passes.begin(input, {name: self.get_buffer(name) for name in _BUFFERS}, type(self).__name__)
        if self._smallest_group(input) * values_per_image(input) > 1:
            y, mean, var = self._normalize(input)
            self._track(mean, var)
            return y
        y = self._evaluate_fixed(input)
        if self._passes.repeats:
            return y
        self.num_fallbacks.add_(1)
        n = input.shape[0] * values_per_image(input)
        if n > 1:
            mean, var = batch_statistics(input)
            self._track(mean, var * (n / (n - 1)))
        return y

    def _normalize(self, x: Tensor) -> Normalized:
        """Return x as it is normalized in training, and mean and unbiased variance of the batch."""
        raise NotImplementedError

    def _smallest_group(self, x: Tensor) -> int:
        """Return how many images are normalized together, at least."""
        return x.shape[0]

    def _evaluate(self, x: Tensor) -> Tensor:
        return self._evaluate_fixed(x)

    def _evaluate_fixed(self, x: Tensor) -> Tensor:
        """Return x normalized by the running statistics."""
        mean, var = self._statistics()
        return frozen_batch_norm(x, mean, var, self.weight, self.bias, self.eps)

    def _state(self, name: str) -> Tensor:
        """Return a buffer, as it was when a pass that is run again ran first."""
        before = self._passes.state if self.training else None
        return self.get_buffer(name) if before is None else before[name]

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return self._state("running_mean"), self._state("running_var")

    def _is_new(self) -> Tensor:
        """Return, as a scalar, whether the running statistics are those of a layer that has seen nothing.

        `update_bn` and Lightning's StochasticWeightAveraging make a layer new before they re-estimate it.
        """
        mean, var = self._statistics()
        return (self._state("num_batches_tracked") == 0) & (mean == 0).all() & (var == 1).all()

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards those of a batch, as BatchNorm does."""
        if not self.track_running_stats or self._passes.repeats:
            return
        seen = self.get_buffer("num_batches_tracked").add_(1)
        share = 1.0 / seen if self.momentum is None else self.momentum
        if self.momentum == 0:
            return  # they stay; 0 times NaN would not
        for name, new in zip(_BUFFERS, (mean, var), strict=False):
            old = self.get_buffer(name)
            old.copy_((1 - share) * at_least_float32(old) + share * new)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._takes and (self._takes or input.dim() < 2):
            expected = " or ".join(f"{dims}D" for dims in self._takes) or "at least 2D"
            raise ValueError(f"expected {expected} input (got {input.dim()}D input)")

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.num_fallbacks.is_meta and not self.get_buffer("running_mean").is_meta:
            self._begin(self._source)  # filled by assign=True, which knows the state dict's tensors alone

    @property
    def source(self) -> _BatchNorm | None:
        """The BatchNorm that this layer was made from, kept outside of the module tree; None where there was none."""
        return self._source[0] if self._source else None

    def to_batch_norm(self) -> _BatchNorm:
        """Return the BatchNorm of the same eval-mode function: the one this was made from, with today's values."""
        bn = self._source[0] if self._source else self.new_batch_norm()
        with torch.no_grad():
            for name in _PARAMETERS:
                setattr(bn, name, getattr(self, name))
            for name in _BUFFERS:
                store(bn, name, self.get_buffer(name))
        bn.training = self.training
        share_hooks(self, bn)
        return bn

    def new_batch_norm(self) -> _BatchNorm:
        """Return a new BatchNorm of the kind that this layer stands for."""
        like = self.get_buffer("running_mean")
        return self._plain(
            self.num_features, self.eps, self.momentum, self.affine, device=like.device, dtype=like.dtype
        )

    @property
    def qconfig(self) -> Any:
        """Quantization's settings, as other modules have them: none before they are set.

        `convert_sync_batchnorm` of torch and timm takes every `_BatchNorm` and keeps nothing of what a subclass does.
        This is the one thing that it asks of a layer which few others ask, so it is told apart by its name.
        """
        if "qconfig" in vars(self):
            return vars(self)["qconfig"]
        if sys._getframe(1).f_code.co_name == "convert_sync_batchnorm":
            raise UnsupportedLayer(
                f"convert_sync_batchnorm (sync_batchnorm=True in Lightning) would make a plain SyncBatchNorm of this "
                f"{type(self).__name__}({self.extra_repr()}). Leave it off, or synchronize what is to be synchronized "
                "first and convert to other layers afterwards; layers before this one may be synchronized already."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute 'qconfig'")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        vars(self)["qconfig"] = value

    @qconfig.deleter
    def qconfig(self) -> None:
        if vars(self).pop("qconfig", self) is self:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'qconfig'")

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.num_features}, {settings}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"


def why_not_tracking(bn: nn.Module) -> str | None:
    """Return why no layer of this kind can stand for `bn`, or None where one can."""
    if bn.running_mean is None or bn.running_var is None:
        return "has no running statistics (track_running_stats=False), by which it would be evaluated"
    if bn.num_batches_tracked is None:
        return "has no num_batches_tracked, which counts its steps"
    return why_not_frozen(bn, "none")  # type: ignore[arg-type]
