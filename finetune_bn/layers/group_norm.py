"""GroupNorm made from a BatchNorm, with the pretrained function kept as far as it goes."""

from __future__ import annotations

import math
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.frozen import frozen_batch_norm, scale_shift
from finetune_bn.functional.group_norm import closed_form, group_norm, group_statistics
from finetune_bn.layers.extra_state import EXTRA_STATE, pack, unpack
from finetune_bn.layers.frozen import why_not_frozen
from finetune_bn.layers.leaf import as_leaf
from finetune_bn.layers.stand_in import share_hooks, store
from finetune_bn.layers.tracking import ASIDE

Init = Literal["reset", "copy", "closed_form", "sequential"]
INITS: tuple[Init, ...] = get_args(Init)
Eps = Literal["auto", "own", "normalize", "center"]
EPS: tuple[Eps, ...] = get_args(Eps)
AUTO_EPS: Eps = "normalize"
# In variances of a group: of ten times an image's contrast, GroupNorm then takes back less than a percent.
CENTERED = 1e4
_FIVE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` that stands for a BatchNorm: each image is normalized by itself, for inputs [N, C, ...].

    Forward pass and gradients are those of `torch.nn.GroupNorm`; dtype and memory format of activations are kept, also
    under autocast. Channels have a weight and a bias even where the BatchNorm had none (they are constants then,
    buffers), because they carry its statistics. The BatchNorm itself is kept aside, outside of the module tree, for
    `to_batch_norm`. Its tensors, the number of groups, eps, `alpha` and `balance` are in the state dict, as one tensor
    of bytes named `_extra_state`, so that they come along wherever weights do; a state dict without them is refused.

    Attributes:
        alpha: share of the BatchNorm's output in this one's, from 1 (the BatchNorm, frozen) to 0 (plain GroupNorm).
        balance: what the channels of the map in front were multiplied by, [C], and where that map is, see
            `finetune_bn.layers.balance`; None: by nothing. What the BatchNorm stands for is the map without that.
        settings: what `from_batch_norm` was given besides the BatchNorm.

    Args:
        num_groups: number of groups; 1 is LayerNorm over channels and positions, `num_channels` InstanceNorm.
        num_channels: number of channels C.
        eps: added to the variances.
        device: where the tensors are made.
        dtype: dtype of the tensors.
    """

    __jit_unused_properties__ = ["num_features", "settings", "eps_mode", "source"]  # noqa: RUF012 (torch.jit looks for a list)

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, True, device, dtype)
        self._begin((), (num_groups, None, "reset", eps))

    @classmethod
    def from_batch_norm(
        cls,
        bn: _BatchNorm,
        groups: int | Literal["auto"] = "auto",
        channels_per_group: int | None = None,
        init: Init = "closed_form",
        eps: float | Eps = "auto",
    ) -> Self:
        """Return the GroupNorm that stands for `bn`, which is not changed; ask `why_not_group_norm` first.

        See `ToGroupNorm` for the arguments. Hooks and `requires_grad` come along; the Parameters are new ones.
        """
        check_grouping(groups, channels_per_group, init, eps)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.num_channels, layer.affine = bn.num_features, True
        layer.num_groups = number_of_groups(bn.num_features, groups, channels_per_group)
        if eps == "center" and not _is_meta(bn):
            layer.eps = bn.eps + CENTERED * group_variance(bn, layer.num_groups)
        else:
            layer.eps = bn.eps if isinstance(eps, str) else eps
        for name, value in zip(("weight", "bias"), _initial(bn, layer.num_groups, init, layer.eps), strict=True):
            own = getattr(bn, name)
            if own is None:
                layer.register_buffer(name, value)
            else:
                layer.register_parameter(name, nn.Parameter(value, requires_grad=own.requires_grad))
        layer._begin((bn,), (groups, channels_per_group, init, eps))
        layer.training = bn.training
        share_hooks(bn, layer)
        return layer

    def _begin(self, source: tuple[_BatchNorm, ...], settings: tuple[Any, Any, Any, Any]) -> None:
        self._source = source
        self._settings = settings
        self.balance: tuple[str, Tensor] | None = None
        self.alpha = 0.0

    @property
    def num_features(self) -> int:
        """Number of channels C, as BatchNorm calls it."""
        return self.num_channels

    @property
    def settings(self) -> dict[str, Any]:
        """What `from_batch_norm` takes besides the BatchNorm."""
        return dict(zip(("groups", "channels_per_group", "init", "eps"), self._settings, strict=True))

    @property
    def eps_mode(self) -> float | Eps:
        """What was asked for as eps, with what `auto` stands for."""
        asked: float | Eps = self._settings[3]
        return AUTO_EPS if asked == "auto" else asked

    @property
    def source(self) -> _BatchNorm | None:
        """The BatchNorm that this layer stands for, with the values it had; None for a GroupNorm made as such."""
        return self._source[0] if self._source else None

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` [N, C, ...] normalized, in its dtype and memory format."""
        if not torch.jit.is_scripting() and not isinstance(input, Tensor):
            return as_leaf(self, input)
        return self.normalize(input)

    def normalize(self, x: Tensor) -> Tensor:
        """Return `x` [N, C, ...] normalized, without what a norm+act layer has behind it."""
        y = group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if not torch.jit.is_scripting() and self.alpha:
            y = torch.lerp(y, self.source_output(x), self.alpha)
        return y

    def source_output(self, x: Tensor) -> Tensor:
        """Return what the BatchNorm makes of `x` in eval mode."""
        return eval_batch_norm(self._source[0], x, None if self.balance is None else self.balance[1])

    def to_batch_norm(self) -> _BatchNorm:
        """Return the BatchNorm that this was made from, as it was: what GroupNorm has learned since is not in it.

        It belongs behind a map without the factors of `balance`: `finetune_bn.layers.balance.unbalance` takes them out.
        """
        bn = self._source[0]
        if bn.running_mean is not None and not bn.running_mean.is_meta:
            bn.to(self.weight.device, self.weight.dtype)
        bn.training = self.training
        share_hooks(self, bn)
        return bn

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._source:
            destination[prefix + EXTRA_STATE] = self._packed()

    def _packed(self) -> Tensor:
        """Return what the layer computes by besides weight and bias, and the BatchNorm that it stands for."""
        name, factors = self.balance or (None, torch.ones(self.num_channels))
        facts = {"num_groups": self.num_groups, "eps": self.eps, "alpha": self.alpha, "balanced": name}
        facts["source_eps"] = self._source[0].eps
        tensors = {"factors": factors.double()}
        for name in _FIVE:
            value = getattr(self._source[0], name)
            if value is not None and not value.is_meta:
                tensors[name] = value
        return pack(facts, tensors)

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
        packed = state_dict.pop(prefix + EXTRA_STATE, None)
        given = {name: state_dict[prefix + name] for name in ("weight", "bias") if prefix + name in state_dict}
        try:
            if prefix + "running_mean" in state_dict:
                raise ValueError(
                    "the state dict holds a BatchNorm's tensors, and this layer was converted to GroupNorm. Load the "
                    "weights before the conversion, or convert back by `revert` first"
                )
            aside = _read(packed, local_metadata.get(ASIDE))
            # One of the two by itself is put in by tools that go tensor by tensor, which come with the rest later.
            if aside is None and self._source and len(given) == 2:
                raise ValueError(
                    "the state dict holds a GroupNorm's weight and bias without the number of groups, eps and the "
                    f"BatchNorm that they were made for ({EXTRA_STATE}): it is of torch.nn.GroupNorm, or of an older "
                    "version of finetune_bn and was copied without its metadata. Load the file as it was saved"
                )
            self._check(given, aside)
        except ValueError as error:
            error_msgs.append(f"{prefix[:-1] or '(root)'}: {error}.")
            return  # as it was, not half loaded
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if aside is not None:
            self.num_groups, self.alpha = aside["num_groups"], aside["alpha"]
            self.eps = aside.get("eps", self.eps)  # files from before it could be chosen have none
            self.balance = aside["balance"]
            if self._source:
                self._source[0].eps = aside.get("source_eps", self._source[0].eps)
            with torch.no_grad():
                for name, value in aside["source"].items() if self._source else ():
                    store(self._source[0], name, value)

    def _check(self, given: dict[str, Tensor], aside: dict[str, Any] | None) -> None:
        """Raise unless this layer can take the weight, the bias and the facts of a state dict."""
        own = {name: getattr(self, name) for name in ("weight", "bias")}
        shapes = [(name, value, own[name].shape) for name, value in given.items()]
        if aside is not None:
            groups, eps, alpha = aside["num_groups"], aside.get("eps", self.eps), aside["alpha"]
            factors = {} if aside["balance"] is None else {"factors": aside["balance"][1]}
            if type(groups) is not int or groups < 1 or self.num_channels % groups:
                raise ValueError(f"its state has {groups!r} groups, and the layer {self.num_channels} channels")
            source_eps = aside.get("source_eps", eps)
            if any(not (_is_number(value) and 0 < value < math.inf) for value in (eps, source_eps)):
                raise ValueError(f"its state has eps={eps!r}, that of its BatchNorm {source_eps!r}")
            if not (_is_number(alpha) and 0 <= alpha <= 1):
                raise ValueError(f"its state has alpha={alpha!r}")
            if alpha and not self._source:
                raise ValueError("its state blends in a BatchNorm, which a GroupNorm that was made as such has not")
            shapes += [(name, value, own["weight"].shape) for name, value in factors.items()]
            if self._source:
                kept = [(name, value, getattr(self._source[0], name)) for name, value in aside["source"].items()]
                shapes += [(f"BatchNorm {name}", value, t.shape) for name, value, t in kept if t is not None]
        for name, value, shape in shapes:
            if not isinstance(value, Tensor):
                raise ValueError(f"its {name} is a {type(value).__name__}, and no tensor")
            if value.shape != shape:
                raise ValueError(
                    f"size mismatch for {name}: {tuple(value.shape)} in the checkpoint, {tuple(shape)} in this model"
                )

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        alpha = f", alpha={self.alpha:g}" if self.alpha else ""
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}{alpha}"


def _read(packed: object, metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what a state dict says of a layer, as old files have it in their metadata; None where it says nothing."""
    if packed is None:
        return None if metadata is None else {"balance": None, **metadata}
    facts, tensors = unpack(packed)
    try:
        factors, name = tensors.pop("factors"), facts["balanced"]
        known = {key: facts[key] for key in ("num_groups", "eps", "alpha", "source_eps")}
    except KeyError as error:
        raise ValueError(f"its state has no {error}") from error
    return {**known, "balance": None if name is None else (str(name), factors), "source": tensors}


def _is_meta(bn: _BatchNorm) -> bool:
    return bn.running_mean is not None and bn.running_mean.is_meta


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def eval_batch_norm(bn: _BatchNorm, x: Tensor, factors: Tensor | None = None) -> Tensor:
    """Return what a BatchNorm, on whatever device, makes of `x` in eval mode; of `x / factors` where there are some.

    Args:
        bn: the BatchNorm.
        x: its input, [N, C, ...].
        factors: powers of two by which the channels of `x` are multiplied, [C]: it is undone exactly.
    """
    mean, var, weight, bias = (
        None if t is None else t.detach().to(x.device) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    )
    assert mean is not None
    assert var is not None
    if factors is not None:
        factors = factors.to(mean)
        mean, weight = mean * factors, (1 if weight is None else weight) / factors
    return frozen_batch_norm(x, mean, var, weight, bias, bn.eps)


def _initial(bn: _BatchNorm, groups: int, init: Init, eps: float) -> tuple[Tensor, Tensor]:
    """Return weight and bias to begin with, in the dtype of the BatchNorm's."""
    tensors = [t for t in (bn.weight, bn.running_mean) if t is not None]
    like = tensors[0].detach() if tensors else torch.empty(bn.num_features)
    weight, bias = torch.ones_like(like), torch.zeros_like(like)
    if init == "copy":
        weight, bias = (new if t is None else t.detach().clone() for t, new in ((bn.weight, weight), (bn.bias, bias)))
    if init in ("closed_form", "sequential"):
        mean, var = bn.running_mean, bn.running_var
        assert mean is not None
        assert var is not None
        scale, shift = scale_shift(bn.weight, bn.bias, mean, var, bn.eps)
        new = closed_form(scale.detach(), shift.detach(), mean, var, groups, eps)
        weight, bias = new[0].to(like.dtype), new[1].to(like.dtype)
    return weight, bias


def group_variance(bn: _BatchNorm, groups: int, factors: Tensor | None = None) -> float:
    """Return the variance that the running statistics predict for a group of channels, in the mean over groups.

    Args:
        bn: has running statistics.
        groups: a divisor of its channels.
        factors: what the channels are multiplied by, [C]; None for nothing.
    """
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = torch.ones_like(bn.running_mean) if factors is None else factors.to(bn.running_mean)
    _, variance = group_statistics(bn.running_mean * scale, bn.running_var * scale.square(), groups)
    return float(variance.mean())


def number_of_groups(channels: int, groups: int | Literal["auto"], channels_per_group: int | None) -> int:
    """Return how many groups a layer gets: as asked, or the greatest common divisor where that does not divide C.

    Without data `auto` is 1, the closest to BatchNorm: a large group's statistics hardly differ between images.
    """
    if channels_per_group is not None:
        return channels // math.gcd(channels_per_group, channels)
    return 1 if groups == "auto" else math.gcd(groups, channels)


def check_grouping(groups: object, channels_per_group: object, init: object, eps: object) -> None:
    """Raise unless these are arguments of `ToGroupNorm`."""

    def is_number(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    if groups != "auto" and not is_number(groups):
        raise FinetuneBNError(
            complaint("groups", groups, '"auto", or a whole number from 1 on', "1 is closest to BatchNorm.")
        )
    if channels_per_group is not None and not is_number(channels_per_group):
        raise FinetuneBNError(complaint("channels_per_group", channels_per_group, "a whole number from 1 on, or None"))
    if channels_per_group is not None and groups != "auto":
        raise FinetuneBNError(complaint("groups", groups, '"auto" where channels_per_group is given', "Give one."))
    if init not in INITS:
        raise FinetuneBNError(complaint("init", init, ", ".join(map(repr, INITS))))
    if eps not in EPS and not (_is_number(eps) and 0 < eps < math.inf):  # type: ignore[operator]
        raise FinetuneBNError(complaint("eps", eps, f"{', '.join(map(repr, EPS))}, or a number above 0"))
    if eps == "center" and init in ("reset", "copy"):
        allowed = "'closed_form' or 'sequential' where eps is 'center'"
        raise FinetuneBNError(complaint("init", init, allowed, "With another the output would be next to nothing."))


def why_not_group_norm(bn: _BatchNorm, init: Init) -> str | None:
    """Return why no GroupNorm can stand for `bn`, or None where one can."""
    if init in ("reset", "copy"):
        return None
    if bn.running_mean is None or bn.running_var is None:
        return (
            f"has no running statistics (track_running_stats=False), which init={init!r} starts from; 'reset' and "
            "'copy' do without"
        )
    return why_not_frozen(bn, "none")
