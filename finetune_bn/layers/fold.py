"""The tie between a convolution or linear map and the frozen BatchNorm (BN) whose affine it computes in its weight.

While autograd records a step, the producer returns what the frozen layer would return, and the layer passes that on
(and applies its activation, where it has one): the scaling costs no activation-sized operation and no memory, see
`fold_functional`. Else each does its own part, so that evaluation is bit for bit that of BN, and so is what
`torch.export` and `torch.jit` capture.

Parameters and state-dict names stay where they are. The pair holds as long as both stand where they stood: where one
is replaced by something else, the one that is left does its own part again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional import scale_shift
from finetune_bn.layers.frozen import FrozenBatchNorm


@dataclass
class _Sent:
    """A folded result on its way.

    Attributes:
        place: where its numbers lie; it does not keep them alive.
        version: how often they had been written to.
        arrived: whether the frozen layer has seen it.
    """

    place: StorageWeakRef
    version: int
    arrived: bool = False


@dataclass(eq=False)
class Fold:
    """The tie between a producer and the frozen layer whose affine it computes.

    Attributes:
        producer: the convolution or linear map.
        norm: the frozen layer.
        producer_at: the module that holds the producer, and under which name.
        norm_at: the same of the frozen layer.
        plain: class of the producer before.
        folded: its class while they are tied.
        active: False lets each do its own part.
    """

    producer: nn.Module | None
    norm: FrozenBatchNorm | None
    producer_at: tuple[nn.Module, str]
    norm_at: tuple[nn.Module, str]
    plain: type[nn.Module]
    folded: type[nn.Module]
    active: bool = True

    def __post_init__(self) -> None:
        self._sent: list[_Sent] = []

    @property
    def intact(self) -> bool:
        """Whether both still stand where they stood, so that what the one computes arrives at the other."""
        if not self.active or self.producer is None or self.norm is None:
            return False
        (holder, name), (norm_holder, norm_name) = self.producer_at, self.norm_at
        in_place = holder._modules.get(name) is self.producer
        return in_place and norm_holder._modules.get(norm_name) is self.norm and self.norm._fold is self

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return (gamma', beta') for the producer to fold in; None where it is to compute its own part of `x` alone.

        Raises:
            FinetuneBNError: the frozen layer's parameters are sharded, and not gathered while the producer runs.
        """
        norm, producer = self.norm, self.producer
        compiling = torch.compiler.is_compiling()
        if norm is None or producer is None or not self._records(x, *producer._parameters.values()):
            if not compiling:
                self._sent = [sent for sent in self._sent if sent.arrived]
            return None
        if not compiling and type(norm.weight).__name__ == "DTensor":
            raise FinetuneBNError(
                f"fold: {self._who()} are in different FSDP units, so the layer's parameters are not at hand when the "
                "producer runs. Shard a module that holds both, or convert with Freeze(fold='never')."
            )
        return scale_shift(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)

    def _records(self, *tensors: Tensor | None) -> bool:
        """Tell whether the two work together: a step is recorded for backward, and not captured to be deployed."""
        if not self.intact or not torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            return False
        assert self.norm is not None
        # The same at both ends: the result of the one, which the other gets, requires grad if this holds there.
        return any(t is not None and t.requires_grad for t in (*tensors, self.norm.weight, self.norm.bias))

    def send(self, y: Tensor) -> None:
        """Note that `y` holds the affine already. Compiled code needs no note: it was traced through both."""
        if torch.compiler.is_compiling():
            return
        place = _place(y)
        self._sent = [sent for sent in self._sent if sent.arrived and not sent.place.expired()]  # type: ignore[no-untyped-call]
        if place is None:
            return
        sent = _Sent(place, y._version)
        self._sent.append(sent)
        who = self._who()

        def check(grad: Tensor) -> None:
            if not sent.arrived:
                raise FinetuneBNError(
                    f"fold: backward came to the result of the first of {who}, which never went through the second (a "
                    "reentrant checkpoint between the two, or a call of the first alone), so that its affine would be "
                    "applied twice. Convert with Freeze(fold='never')."
                )

        if y.requires_grad:
            y.register_hook(check)  # type: ignore[no-untyped-call]

    def has(self, x: Tensor) -> bool:
        """Tell whether `x`, which arrived at the frozen layer, holds the affine already.

        Raises:
            FinetuneBNError: the producer computed the affine into a tensor, and another one arrived.
        """
        if torch.compiler.is_compiling():
            return self._records(x)
        place = _place(x)
        if place is None:  # inference mode, or a tensor of torch.func: traced through both as well
            return self._records(x)
        for sent in self._sent:
            if sent.place == place:
                if sent.version != x._version:
                    raise FinetuneBNError(
                        f"fold: between {self._who()} the tensor was changed in place. Leave it as it is there, or "
                        "convert with Freeze(fold='never')."
                    )
                sent.arrived = True
                return True
        if any(not sent.arrived for sent in self._sent):
            raise FinetuneBNError(
                f"fold: between {self._who()} the tensor became another one, so that the affine would be applied "
                "twice. Leave nothing in between (a hook that returns another tensor, a call of the producer alone), "
                "or convert with Freeze(fold='never')."
            )
        return False

    def undo(self) -> None:
        """Give the producer its class back, and untie the two."""
        if self.producer is not None:
            self.producer.__class__ = self.plain
            self.producer.__dict__.pop("_fold", None)
        if self.norm is not None and self.norm._fold is self:
            self.norm.__dict__.pop("_fold")

    def redo(self) -> None:
        """Tie the two again."""
        assert self.producer is not None
        assert self.norm is not None
        self.producer.__class__ = self.folded
        self.producer.__dict__["_fold"] = self
        self.norm._fold = self

    def _who(self) -> str:
        (_, producer), (_, norm) = self.producer_at, self.norm_at
        return f"the {self.plain.__name__} '...{producer}' and the layer '...{norm}' that is folded into it"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_sent": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(self.__getstate__())
        if not {id(self.producer_at[0]), id(self.norm_at[0])} & memo.keys():
            # A copy of one of the two alone, without what holds it: it is on its own.
            twin.__dict__.update(producer=None, norm=None, producer_at=(nn.Module(), ""), norm_at=(nn.Module(), ""))
            return twin
        for name in ("producer", "norm", "producer_at", "norm_at"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        return twin


def _place(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return None if tensor.is_inference() else StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # tensors of torch.func have no storage
        return None
