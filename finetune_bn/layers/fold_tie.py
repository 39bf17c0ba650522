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
import weakref
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional.fold import FixedNorm
from finetune_bn.functional.frozen import at_least_float32
from finetune_bn.layers.frozen import FrozenBatchNorm

# What `pays` weighs, in elements. Scaling and recomputing take time in proportion to the weight, and each fold some
# more whatever its size; activation space takes time, and for a learnable scale memory, in proportion to the result.
_FEWEST_CONSTANT, _FEWEST_LEARNABLE = 1 << 18, 1 << 17
_LARGER_THAN_WEIGHT, _OF_WEIGHT = 4, 1 / 8


@dataclass
class _Sent:
    """A folded result on its way.

    Attributes:
        who: producer and frozen layer, in words.
        place: where its numbers lie; it does not keep them alive.
        version: how often they had been written to.
        arrived: whether the frozen layer has seen it.
    """

    who: str
    place: StorageWeakRef | None = None
    version: int = 0
    arrived: bool = False

    def check(self) -> None:
        """Raise if backward comes to a result that the frozen layer has not seen."""
        if not self.arrived:
            raise FinetuneBNError(
                f"fold: backward came to the result of the first of {self.who}, which never went through the second (a "
                "reentrant checkpoint between the two, or a call of the first alone), so that its affine would be "
                "applied twice. Convert with Freeze(fold='never')."
            )


class Fold:
    """The tie between a producer and the frozen layer whose affine it computes.

    The two hold it, and it holds neither them nor what holds them, so that a model without users is freed at once.

    Attributes:
        plain: class of the producer before.
        folded: its class while they are tied.
        producer_name: under which name its holder has the producer.
        norm_name: under which name its holder has the frozen layer.
        active: False lets each do its own part.
        always: whether they work together also where it does not pay, see `pays`.
    """

    def __init__(
        self,
        producer: nn.Module,
        norm: FrozenBatchNorm,
        producer_at: tuple[nn.Module, str],
        norm_at: tuple[nn.Module, str],
        folded: type[nn.Module],
        always: bool = True,
    ) -> None:
        self.plain, self.folded, self.active, self.always = type(producer), folded, True, always
        self.producer_name, self.norm_name = producer_at[1], norm_at[1]
        self._sent: list[_Sent] = []
        self._refer(producer, norm, producer_at[0], norm_at[0])

    def _refer(self, *modules: nn.Module | None) -> None:
        refs = [None if module is None else weakref.ref(module) for module in modules]
        self._producer, self._norm, self._producer_holder, self._norm_holder = refs

    @property
    def producer(self) -> nn.Module | None:
        """The convolution or linear map; None where it is gone."""
        return None if self._producer is None else self._producer()

    @property
    def norm(self) -> FrozenBatchNorm | None:
        """The frozen layer; None where it is gone."""
        return None if self._norm is None else self._norm()  # type: ignore[return-value]

    @property
    def intact(self) -> bool:
        """Whether both still stand where they stood, so that what the one computes arrives at the other."""
        producer, norm = self.producer, self.norm
        if not self.active or producer is None or norm is None:
            return False
        if self._producer_holder is None or self._norm_holder is None:
            return False
        holder, norm_holder = self._producer_holder(), self._norm_holder()
        if holder is None or norm_holder is None:
            return False
        in_place = holder._modules.get(self.producer_name) is producer
        return in_place and norm_holder._modules.get(self.norm_name) is norm and norm._fold is self

    def pays(self, size: int) -> bool:
        """Tell whether folding is worth its while for a result of `size` elements.

        A constant scale keeps nothing in activation space: there it is time alone. A learnable one would have to keep
        the result there; that is given up for time where it is next to nothing, beside the weight (by which the memory
        of a step stays in all within an eighth of the weights') or by itself, and where the weight is not trained, as
        folding would then keep as much and compute the weight's gradient for the scale alone.
        """
        norm, producer = self.norm, self.producer
        if self.always or norm is None or producer is None:
            return True
        weight, gamma = producer._parameters.get("weight"), norm.weight
        if weight is None:
            return True  # it was parametrized since, and asking for it would compute it
        if gamma is None or not gamma.requires_grad:
            return size >= _FEWEST_CONSTANT and size >= _LARGER_THAN_WEIGHT * weight.numel()
        return size >= _FEWEST_LEARNABLE and size >= _OF_WEIGHT * weight.numel() and weight.requires_grad

    def norm_for(self, x: Tensor, size: int) -> FixedNorm | None:
        """Return what the producer is to fold in; None where it is to compute its own part of `x` alone.

        Args:
            x: its input.
            size: how many elements it returns.

        Raises:
            FinetuneBNError: the frozen layer's parameters are sharded, and not gathered while the producer runs.
        """
        norm, producer = self.norm, self.producer
        compiling = torch.compiler.is_compiling()
        if norm is None or producer is None or not self._records(size, x, *producer._parameters.values()):
            if self._sent and not compiling:
                self._sent = [sent for sent in self._sent if sent.arrived]
            return None
        mean, var = norm.running_mean, norm.running_var
        gamma: Tensor | None = norm.weight
        if not compiling and type(gamma).__name__ == "DTensor":
            raise FinetuneBNError(
                f"fold: {self._who()} are in different FSDP units, so the layer's parameters are not at hand when the "
                "producer runs. Shard a module that holds both, or convert with Freeze(fold='never')."
            )
        # New tensors: in-place writes to the buffers before backward (DDP broadcasts them) do no harm then.
        mean = mean.clone() if mean.dtype.itemsize >= 4 else mean.float()
        rsigma = torch.rsqrt(at_least_float32(var) + norm.eps)
        if gamma is not None and not gamma.requires_grad:
            gamma, rsigma = None, at_least_float32(norm.weight) * rsigma
        return FixedNorm(gamma, norm.bias, mean, rsigma)

    def _records(self, size: int, *tensors: Tensor | None) -> bool:
        """Tell whether the two work together: a step is recorded for backward, and not captured to be deployed."""
        if not torch.is_grad_enabled() or not self.pays(size) or not self.intact:
            return False
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            return False
        norm = self.norm
        assert norm is not None
        # The same at both ends: the result of the one, which the other gets, requires grad if this holds there.
        return any(t is not None and t.requires_grad for t in (*tensors, norm.weight, norm.bias))

    def announce(self) -> _Sent | None:
        """Return the note of a result that is to be sent. Compiled code needs none: it was traced through both."""
        return None if torch.compiler.is_compiling() else _Sent(self._who())

    def send(self, y: Tensor, sent: _Sent | None) -> Tensor:
        """Note that `y`, which is returned, holds the affine already."""
        if sent is not None:
            self._sent = [old for old in self._sent if old.arrived and old.place and not old.place.expired()]  # type: ignore[no-untyped-call]
            sent.place, sent.version = _place(y), y._version
            if sent.place is None:
                sent.arrived = True  # where it arrives it is not known by its place
            else:
                self._sent.append(sent)
        return y

    def has(self, x: Tensor) -> bool:
        """Tell whether `x`, which arrived at the frozen layer, holds the affine already.

        Raises:
            FinetuneBNError: the producer computed the affine into a tensor, and another one arrived.
        """
        if torch.compiler.is_compiling():
            return self._records(x.numel(), x)
        place = _place(x)
        if place is None:  # inference mode, or a tensor of torch.func: traced through both as well
            return self._records(x.numel(), x)
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
        producer, norm = self.producer, self.norm
        if producer is not None:
            producer.__class__ = self.plain
            producer.__dict__.pop("_fold", None)
        if norm is not None and norm._fold is self:
            norm.__dict__.pop("_fold")

    def redo(self) -> None:
        """Tie the two again."""
        producer, norm = self.producer, self.norm
        assert producer is not None
        assert norm is not None
        producer.__class__ = self.folded
        producer.__dict__["_fold"] = self
        norm._fold = self

    def _who(self) -> str:
        return (
            f"the {self.plain.__name__} '...{self.producer_name}' and the layer '...{self.norm_name}' that is folded "
            "into it"
        )

    def _modules(self) -> list[nn.Module | None]:
        refs = (self._producer, self._norm, self._producer_holder, self._norm_holder)
        return [None if ref is None else ref() for ref in refs]

    def __getstate__(self) -> dict[str, Any]:
        kept = {
            name: getattr(self, name) for name in ("plain", "folded", "active", "always", "producer_name", "norm_name")
        }
        return kept | {"modules": self._modules()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = state.pop("modules")
        self.__dict__.update(state, _sent=[])
        self._refer(*modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = object.__new__(type(self))
        state = self.__getstate__()
        modules = state["modules"]
        if not {id(modules[2]), id(modules[3])} & memo.keys():
            modules = [None] * 4  # a copy of one of the two alone, without what holds it: it is on its own
        twin.__setstate__(state | {"modules": copy.deepcopy(modules, memo)})
        return twin


def _place(tensor: Tensor) -> StorageWeakRef | None:
    try:
        return None if tensor.is_inference() else StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):  # tensors of torch.func have no storage
        return None
