"""Frozen BatchNorm: gamma' x + beta' with constant or learnable gamma', beta', stored as the BN it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.eager_step import Constants, batch_norm_in_step
from finetune_bn.functional.frozen import (
    canonical_statistics,
    canonicalize,
    frozen_batch_norm,
    in_float64,
    is_canonical,
    scale_shift,
    solve_affine,
)
from finetune_bn.functional.shared_backward import Convolution, FoldMode, producer_of, shared_batch_norm
from finetune_bn.layers.leaf import as_leaf
from finetune_bn.layers.stand_in import share_hooks, store

Affine = Literal["none", "shift", "merged", "original"]
AFFINE_KINDS: tuple[Affine, ...] = get_args(Affine)
LEARNABLE: dict[Affine, tuple[str, ...]] = {
    "none": (),
    "shift": ("bias",),
    "merged": ("weight", "bias"),
    "original": ("weight", "bias"),
}


class FrozenBatchNorm(nn.Module):
    """A BatchNorm in eval mode, for good, for inputs of shape [N, C, ...].

    It computes `y = x * scale + shift` with `scale = weight * rsqrt(running_var + eps)` and
    `shift = bias - running_mean * scale`, bit for bit what `torch.nn.BatchNorm` computes in eval mode, and it ignores
    `train()`. It keeps BN's five state-dict names, so checkpoints load `strict=True` both ways. It is not a
    `_BatchNorm`: stochastic weight averaging, `update_bn`, SyncBatchNorm conversion and Lightning's fine-tuning
    callbacks leave it alone. Constants are buffers, so that no `requires_grad_(True)` brings them back to life.

    | affine | trained | meaning |
    |---|---|---|
    | `none` | nothing | gamma', beta' constant |
    | `shift` | `bias` | beta' learnable; backward still keeps no activation |
    | `merged` | `weight` = gamma', `bias` = beta' | statistics brought to mean 0, variance 1 - eps |
    | `original` | `weight` = gamma, `bias` = beta | BN's own affine learnable over fixed statistics |

    Args:
        num_features: number of channels C.
        eps: added to `running_var`.
        momentum: kept for the BN that `to_batch_norm` makes; not used here.
        affine: what is trained, see the table.
        device: where the tensors are made.
        dtype: dtype of the tensors.

    Raises:
        FinetuneBNError: `affine` is none of the four words.
    """

    _version = 2  # as BatchNorm's: from version 2 on a state dict holds num_batches_tracked
    track_running_stats = True
    _live: type[_BatchNorm] = nn.SyncBatchNorm  # takes inputs of any rank
    __jit_unused_properties__ = ["affine", "has_source_statistics", "source"]  # noqa: RUF012 (torch.jit looks for a list)
    if TYPE_CHECKING:  # torch.jit.script reads a class's annotations, and cannot read them as strings
        weight: Tensor
        bias: Tensor
        running_mean: Tensor
        running_var: Tensor
        num_batches_tracked: Tensor
        fold: FoldMode
    else:
        fold = "auto"  # whether backward is shared with the convolution in front, see shared_backward.py

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: Affine = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_affine(affine)
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine_kind: Affine = affine
        ones, zeros = (fill(num_features, device=device, dtype=dtype) for fill in (torch.ones, torch.zeros))
        mean, var = zeros.clone(), ones.clone()
        if affine == "merged":
            mean, var = canonical_statistics(mean, var, eps)
        tracked = torch.zeros((), dtype=torch.long, device=device)
        self._register({"weight": ones, "bias": zeros}, mean, var, tracked)
        self._source: tuple[_BatchNorm, ...] = ()
        self._constants = Constants()

    @classmethod
    def from_batch_norm(cls, bn: _BatchNorm, affine: Affine = "none") -> Self:
        """Return the frozen layer of the same eval-mode function; `bn` is not changed.

        The learnable tensors of `shift` and `original` are the very Parameters of `bn` (an optimizer that holds them
        goes on training them), everything else is a copy. Hooks come along. `bn` itself is kept inside, outside of
        the module tree, for `to_batch_norm`. Ask `why_not_frozen` first.
        """
        frozen = cls.__new__(cls)
        nn.Module.__init__(frozen)
        frozen.num_features, frozen.eps, frozen.momentum = bn.num_features, bn.eps, bn.momentum
        frozen.affine_kind = affine
        weight, bias = bn.weight, bn.bias
        assert bn.running_mean is not None
        assert bn.running_var is not None
        mean, var = bn.running_mean.detach().clone(), bn.running_var.detach().clone()
        if affine == "merged":
            gamma, beta = weight.detach(), bias.detach()
            if not weight.is_meta:
                gamma, beta, mean, var = canonicalize(gamma, beta, mean, var, bn.eps)
            weight = nn.Parameter(gamma.clone(), requires_grad=weight.requires_grad)
            bias = nn.Parameter(beta.clone(), requires_grad=bias.requires_grad)
        tracked = None if bn.num_batches_tracked is None else bn.num_batches_tracked.clone()
        frozen._register({"weight": weight, "bias": bias}, mean, var, tracked)
        frozen._source = (bn,)
        frozen._constants = Constants()
        frozen.training = bn.training
        share_hooks(bn, frozen)
        return frozen

    def _register(
        self, affine: dict[str, Tensor | None], mean: Tensor, var: Tensor, num_batches_tracked: Tensor | None
    ) -> None:
        for name, tensor in affine.items():
            if tensor is None or name not in LEARNABLE[self.affine_kind]:
                self.register_buffer(name, None if tensor is None else tensor.detach().clone())
            else:
                self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", num_batches_tracked)

    @property
    def affine(self) -> bool:
        """Whether there is a `weight`, torch's meaning of the word; what is trained is `affine_kind`."""
        return self.weight is not None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x * scale + shift` in the dtype and memory format of `x` [N, C, ...]."""
        if not torch.jit.is_scripting():  # by itself: only so does torch.jit.script leave out what it cannot read
            if not isinstance(x, Tensor):
                return as_leaf(self, x)
            self._check_input_dim(x)
            mean, var, weight, bias = self._tensors()
            if weight is None or not weight.requires_grad:
                return batch_norm_in_step(x, mean, var, weight, bias, self.eps, self._constants)
            return self._normalized(x, producer_of(x, weight, self.fold))
        self._check_input_dim(x)
        return frozen_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.eps)

    def _normalized(self, x: Tensor, producer: Convolution | None) -> Tensor:
        mean, var, weight, bias = self._tensors()
        if producer is None or weight is None:
            return batch_norm_in_step(x, mean, var, weight, bias, self.eps, self._constants)
        return shared_batch_norm(x, producer, mean, var, weight, bias, self.eps, self._constants)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        # By attribute each of them takes as long as a small launch.
        buffers = self._buffers
        try:
            mean, var = buffers["running_mean"], buffers["running_var"]
            weight = buffers["weight"] if "weight" in buffers else self._parameters["weight"]
            bias = buffers["bias"] if "bias" in buffers else self._parameters["bias"]
        except KeyError:  # parametrized, pruned or sharded by others
            return self.running_mean, self.running_var, self.weight, self.bias
        return mean, var, weight, bias  # type: ignore[return-value]

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {x.dim()}D input)")

    @property
    def source(self) -> _BatchNorm | None:
        """The BatchNorm that this layer was made from, kept outside of the module tree; None where there was none."""
        return self._source[0] if self._source else None

    def remember(self, source: _BatchNorm | None) -> None:
        """Let `source` be the BatchNorm that this layer turns back into."""
        self._source = () if source is None else (source,)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_constants", Constants())  # pickled before there were any

    def to_batch_norm(self) -> _BatchNorm:
        """Return the BatchNorm of the same eval-mode function: the one this was made from, with today's values.

        Class, hooks, momentum and `requires_grad` are those of the original. An untouched layer comes back bit for
        bit; a trained `merged` layer is solved back for the statistics it had before the conversion.
        """
        bn = self._source[0] if self._source else self.new_batch_norm()
        with torch.no_grad():
            for name, value in self.values_for(bn).items():
                if name in LEARNABLE[self.affine_kind] and self.affine_kind != "merged":
                    setattr(bn, name, value)  # the very Parameter, also where load_state_dict(assign=True) replaced it
                else:
                    store(bn, name, value)
        bn.training = self.training
        share_hooks(self, bn)
        return bn

    def values_for(self, bn: _BatchNorm) -> dict[str, Tensor | None]:
        """Return the five values with which `bn` computes what this layer computes now."""
        names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        now: dict[str, Tensor | None] = {name: getattr(self, name) for name in names}
        if self.affine_kind != "merged" or self.weight.is_meta or not self.has_source_statistics:
            return now
        own = [getattr(self, name).detach() for name in names[:4]]
        old = [getattr(bn, name).detach().to(like) for name, like in zip(names[:4], own, strict=True)]
        # After .to(dtype) the statistics are no longer canonical to the last bit: the layer's own go into the sum.
        scale, shift = scale_shift(*map(in_float64, own), self.eps)  # type: ignore[call-arg, arg-type]
        solved = solve_affine(scale, shift, in_float64(old[2]), in_float64(old[3]), self.eps)
        new = [value.to(like) for value, like in zip(solved, own[:2], strict=True)]
        if bn.weight.dtype == own[0].dtype:
            # Where nothing was trained the old numbers are the exact answer; solving would round them. Only where
            # neither moved: beta' = beta - mean gamma', so a beta' that stayed has another beta under a new gamma'.
            weight, bias, _, _ = canonicalize(*old, self.eps)  # type: ignore[call-arg]
            untouched = (own[0] == weight) & (own[1] == bias)
            new = [torch.where(untouched, before, value) for before, value in zip(old[:2], new, strict=True)]
        return now | {"weight": new[0], "bias": new[1], "running_mean": old[2], "running_var": old[3]}

    def why_not_solved_back(self) -> str | None:
        """Return why no BatchNorm with the statistics from before computes what this layer does; None where one can."""
        if self.affine_kind != "merged" or self.weight.is_meta or not self.has_source_statistics:
            return None
        diverged = [name for name in ("weight", "bias") if not torch.isfinite(getattr(self, name)).all()]
        if diverged:
            return f"its {' and '.join(diverged)} hold values that are NaN or infinite: load weights from before that"
        values = self.values_for(self._source[0])
        lost = [name for name in ("weight", "bias") if not torch.isfinite(values[name]).all()]  # type: ignore[arg-type]
        if lost:
            return (
                f"its {' and '.join(lost)} for the statistics from before the conversion would not fit into "
                f"{self.weight.dtype}: bring the model to a wider dtype first, by model.float() or model.double()"
            )
        return None

    @property
    def has_source_statistics(self) -> bool:
        """Whether the statistics before the conversion are still known (a reloaded `merged` layer has lost them)."""
        if self.affine_kind != "merged":
            return True
        if not self._source:
            return False
        mean, var = self._source[0].running_mean, self._source[0].running_var
        assert mean is not None
        assert var is not None
        return not mean.is_meta and not is_canonical(mean, var, self.eps)

    def new_batch_norm(self) -> _BatchNorm:
        """Return a new BatchNorm of the kind that this layer stands for."""
        like = self.running_mean
        return self._live(self.num_features, self.eps, self.momentum, device=like.device, dtype=like.dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        version = local_metadata.get("version")
        tracked = self.num_batches_tracked
        if (version is None or version < 2) and tracked is not None:
            state_dict.setdefault(
                prefix + "num_batches_tracked", torch.tensor(0, dtype=torch.long) if tracked.is_meta else tracked
            )
        problems = self._bad_entries(state_dict, prefix)
        if problems:
            error_msgs.extend(problems)  # load_state_dict raises them; this layer stays as it is, not half loaded
            return
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        if self.affine_kind == "merged":
            self._canonicalize_entries(state_dict, prefix, assign)
        for name in self._buffers:
            if assign and isinstance(state_dict.get(prefix + name), nn.Parameter):
                state_dict[prefix + name] = state_dict[prefix + name].detach()  # a constant must not become trainable
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _bad_entries(self, state_dict: dict[str, Any], prefix: str) -> list[str]:
        """Return what in a state dict this layer cannot take, one line each."""
        names = ("weight", "bias", "running_mean", "running_var")
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        strange = [name for name, value in given.items() if not isinstance(value, Tensor)]
        if strange:
            return [f"{prefix}{name}: a {type(given[name]).__name__}, and no tensor" for name in strange]
        problems = [
            f"size mismatch for {prefix}{name}: the shape in the checkpoint is {tuple(value.shape)}, "
            f"in this model {tuple(getattr(self, name).shape)}"
            for name, value in given.items()
            if getattr(self, name) is not None and value.shape != getattr(self, name).shape
        ]
        trouble = _bad_statistics(given.get("running_mean"), given.get("running_var"))
        if trouble:
            problems.append(f"{prefix}{trouble}; a frozen layer needs finite statistics with running_var >= 0")
        if self.affine_kind == "merged" and given.keys() & {"running_mean", "running_var"} and len(given) < 4:
            problems.append(
                f"{prefix.rstrip('.')}: a layer with affine='merged' takes weight, bias, running_mean and running_var "
                f"together; missing {[prefix + name for name in names if name not in given]}"
            )
        return problems

    def _canonicalize_entries(self, state_dict: dict[str, Any], prefix: str, assign: bool) -> None:
        """Bring a vanilla BN's four entries to canonical form before they are copied in."""
        names = ("weight", "bias", "running_mean", "running_var")
        if prefix + "running_mean" not in state_dict:
            return
        # assign=True takes the dtype and device of the checkpoint, else they are those of the layer.
        vanilla = {name: state_dict[prefix + name].detach() for name in names}
        if not assign:
            vanilla = {name: value.to(getattr(self, name)) for name, value in vanilla.items()}
        if any(value.is_meta for value in vanilla.values()):
            return
        canonical = canonicalize(*vanilla.values(), self.eps)  # type: ignore[call-arg]
        state_dict.update(zip([prefix + name for name in names], canonical, strict=True))
        source = self._source[0] if self._source else self.new_batch_norm()
        with torch.no_grad():
            for name, value in vanilla.items():
                store(source, name, value)
        self._source = (source,)

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        return f"{self.num_features}, eps={self.eps}, affine={self.affine_kind!r}"


class FrozenBatchNorm1d(FrozenBatchNorm):
    """`FrozenBatchNorm` for [N, C] or [N, C, L]."""

    _live = nn.BatchNorm1d

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() != 2 and x.dim() != 3:
            raise ValueError(f"expected 2D or 3D input (got {x.dim()}D input)")


class FrozenBatchNorm2d(FrozenBatchNorm):
    """`FrozenBatchNorm` for [N, C, H, W]."""

    _live = nn.BatchNorm2d

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise ValueError(f"expected 4D input (got {x.dim()}D input)")


class FrozenBatchNorm3d(FrozenBatchNorm):
    """`FrozenBatchNorm` for [N, C, D, H, W]."""

    _live = nn.BatchNorm3d

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() != 5:
            raise ValueError(f"expected 5D input (got {x.dim()}D input)")


def check_affine(affine: str) -> None:
    """Raise unless `affine` is one of the four kinds."""
    if affine not in AFFINE_KINDS:
        raise FinetuneBNError(
            complaint("affine", affine, ", ".join(map(repr, AFFINE_KINDS)), "Use 'none' to train neither of the two.")
        )


def why_not_frozen(bn: _BatchNorm, affine: Affine) -> str | None:
    """Return why `bn` cannot become a frozen layer of this kind, or None where it can."""
    if bn.running_mean is None or bn.running_var is None:
        return "has no running statistics (track_running_stats=False), so there is nothing to freeze it at"
    trouble = _bad_statistics(bn.running_mean, bn.running_var)
    if trouble:
        return f"its {trouble}"
    missing = [name for name in LEARNABLE[affine] if getattr(bn, name) is None]
    if missing and (affine != "original" or len(missing) == 2):
        return f"has no {' and no '.join(missing)} that affine={affine!r} could train; affine='none' would fit"
    return None


def _bad_statistics(mean: Tensor | None, var: Tensor | None) -> str | None:
    if mean is not None and not mean.is_meta and not torch.isfinite(mean).all():
        return f"running_mean has {int((~torch.isfinite(mean)).sum())} values that are NaN or infinite"
    if var is not None and not var.is_meta and not (torch.isfinite(var) & (var >= 0)).all():
        bad = int((~(torch.isfinite(var) & (var >= 0))).sum())
        return f"running_var has {bad} values that are NaN, infinite or negative"
    return None
