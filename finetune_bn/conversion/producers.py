"""What feeds each BatchNorm (BN) layer, and whether its affine can go into the weight of what does.

Found by running a probe input under hooks and a dispatch mode, without tracing: the model's code runs as it is. The
affine of a layer can be merged for good into a convolution or linear map where the layer receives what the map
returned, unchanged or as a view of it with the same channels, each of the two runs once, and no other operation reads
that result. Sharing the backward pass of a step asks for less, see `functional.shared_backward`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune_bn.functional.shared_backward import fewest
from finetune_bn.layers.norm_act import is_conv_same
from finetune_bn.layers.sites import BatchNormSite, is_leaf
from finetune_bn.utilities.batch_size import count_in_call
from finetune_bn.utilities.probe import Probe, quietly, storage_of, tensors_in


@dataclass(frozen=True)
class Feed:
    """What feeds a BN layer.

    Attributes:
        position: what computed the layer's input, in words.
        producer: name of the convolution or linear map whose weight can take the layer's affine; "" where none can.
        why_not: why none can.
        shares_with: name of the convolution with which a layer with a trained scale can share its backward pass.
        why_not_shared: why there is none.
        shares_from: from how many images of the probe's size on that pays.
    """

    position: str
    producer: str = ""
    why_not: str = ""
    shares_with: str = ""
    why_not_shared: str = ""
    shares_from: int = 0


_KNOWN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


def is_producer(module: nn.Module) -> bool:
    """Tell whether the module is a convolution or linear map, of whatever class."""
    return isinstance(module, (_ConvNd, nn.Linear))


def why_not_merged(producer: nn.Module) -> str | None:
    """Return why the affine of a layer behind `producer` cannot go into its weight, or None where it can."""
    kind = type(producer)
    if parametrize.is_parametrized(producer):
        return "has parametrized tensors (torch.nn.utils.parametrize)"
    if kind not in _KNOWN and not is_conv_same(kind):
        return f"is a {kind.__module__}.{kind.__qualname__}, whose forward is not known"
    if "forward" in vars(producer):
        return "has a forward patched in"
    if any(getattr(producer, f"_{name}") for name in ("forward_pre_hooks", "forward_hooks", "backward_hooks")):
        return "has hooks, which would see what the BatchNorm makes of its output"
    return None


def find_feeds(model: nn.Module, sites: Sequence[BatchNormSite], probes: Sequence[Probe]) -> dict[str, Feed]:
    """Tell, by running the probes, what feeds each site, keyed by the site's first name; the model is not changed.

    A tensor that a leaf module returned and that arrives at a BN unchanged tells the position; any other input comes
    from an operation between modules (add, concat, view). A site that no probe reaches is left out.

    Raises:
        FinetuneBNError: the model refuses the user's input. One that was guessed may fail: nothing is found then.
    """
    watch = _Watch(model, sites)
    handles = [m.register_forward_hook(watch.left(n)) for n, m in model.named_modules() if is_leaf(m) or is_producer(m)]
    handles += [site.module.register_forward_pre_hook(watch.arrive) for site in sites]
    handles += [site.module.register_forward_hook(watch.depart, always_call=True) for site in sites]
    try:
        for probe in probes:
            with quietly(model), watch:
                watch.images = max(count_in_call(probe.args, probe.kwargs).images, 1)
                output = probe.call(model)
            watch.returned(output)
    except Exception:
        watch.arrivals.clear()
        if any(probe.given for probe in probes):
            probe.run(model)  # raises with the input named
    finally:
        for handle in handles:
            handle.remove()
    return {site.names[0]: watch.feed(site) for site in sites if id(site.module) in watch.arrivals}


@dataclass
class _Result:
    """What a convolution or linear map returned, who received it and what else read it."""

    tensor: Tensor  # held, so that no other tensor gets its place in memory
    producer: str
    readers: set[str]


@dataclass(frozen=True)
class _Arrival:
    """What arrived at a BN layer: what made it, the result it is, or is a view of, and whether channels are kept."""

    position: str
    result: _Result | None
    same_channels: bool
    is_result: bool
    activations: float


class _Watch(TorchDispatchMode):
    """Sees every operation, every result of a leaf module and every arrival at a BN layer."""

    def __init__(self, model: nn.Module, sites: Sequence[BatchNormSite]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.names = {id(site.module): site.names[0] for site in sites}
        self.holders = Counter(id(p) for m in self.modules.values() for p in m._parameters.values() if p is not None)
        self.images = 1
        self.running = ""  # the BN layer that runs now
        self.calls: Counter[str] = Counter()
        self.results: dict[int, _Result] = {}
        self.made: dict[int, tuple[Tensor, int, str]] = {}
        self.arrivals: dict[int, list[_Arrival]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:  # what is read through a view is read when an operation takes the view
            for tensor in tree_leaves((args, kwargs)):
                result = self.results.get(storage_of(tensor)) if torch.is_tensor(tensor) else None
                if result is not None:
                    result.readers.add(self.running or f"{func.overloadpacket.__name__} between modules")
        return func(*args, **kwargs)

    def left(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.calls[name] += 1
            if torch.is_tensor(output):
                # The tensor is held as long as its id is, and its version tells in-place changes.
                self.made[id(output)] = (output, output._version, f"{_role(module)} {name}")
                if is_producer(module):
                    self.results[storage_of(output)] = _Result(output, name, set())

        return hook

    def arrive(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.running = self.names[id(module)]
        x = args[0] if args else None
        tensor, version, maker = self.made.get(id(x), (None, 0, ""))
        fresh = tensor is not None and tensor._version == version
        here = f"behind {maker}" if fresh else "behind an operation between modules"
        result = self.results.get(storage_of(x)) if torch.is_tensor(x) else None
        same, size = False, 0.0
        if torch.is_tensor(x):
            size = x.numel() / self.images
            same = result is not None and _same_channels(result.tensor, x, isinstance(self._producer(result), _ConvNd))
        is_result = fresh and result is not None and result.tensor is x
        self.arrivals.setdefault(id(module), []).append(_Arrival(here, result, same, is_result, size))

    def depart(self, module: nn.Module, args: Any, output: Any) -> None:
        self.running = ""

    def returned(self, output: Any) -> None:
        for tensor in tensors_in(output):
            result = self.results.get(storage_of(tensor))
            if result is not None:
                result.readers.add("the model returns it")
        self.made.clear()
        for result in self.results.values():
            result.tensor = result.tensor.new_empty(0)
        self.results = {}

    def feed(self, site: BatchNormSite) -> Feed:
        arrivals = self.arrivals[id(site.module)]
        positions = {arrival.position for arrival in arrivals}
        position = positions.pop() if len(positions) == 1 else "behind several"
        result = arrivals[0].result
        why_not = self._why_not(site, arrivals)
        feed = Feed(position, why_not=why_not, why_not_shared=self._why_not_shared(site, arrivals))
        if result is not None and not why_not:
            feed = dataclasses.replace(feed, producer=result.producer)
        if result is not None and not feed.why_not_shared:
            weights = self._producer(result).weight.numel()  # type: ignore[operator]
            least = min(arrival.activations for arrival in arrivals)
            feed = dataclasses.replace(feed, shares_with=result.producer, shares_from=fewest(least, weights))
        return feed

    def _why_not_shared(self, site: BatchNormSite, arrivals: Sequence[_Arrival]) -> str:
        result = arrivals[0].result
        if result is None or not all(arrival.is_result for arrival in arrivals):
            return "no convolution directly in front"
        producer, name = self._producer(result), result.producer
        if not isinstance(producer, _ConvNd) or isinstance(producer, _ConvTransposeNd):
            return f"{name} is a {type(producer).__name__}, no convolution"
        return ""

    def _why_not(self, site: BatchNormSite, arrivals: Sequence[_Arrival]) -> str:
        result = arrivals[0].result
        if len(arrivals) > 1:
            return f"runs {len(arrivals)} times"
        if result is None:
            return "no convolution or linear map directly in front"
        producer, name = self._producer(result), result.producer
        problem = why_not_merged(producer)
        if problem:
            return f"{name} {problem}"
        if self.calls[name] > 1:
            return f"{name} runs {self.calls[name]} times"
        if any(self.holders[id(p)] > 1 for p in producer.parameters(False)):
            return f"{name} shares its weight with another module"
        others = sorted(result.readers - {site.names[0]})
        if others:
            return f"the output of {name} is also used elsewhere ({others[0]})"
        if not arrivals[0].same_channels:
            return f"its channels are not those of {name}"
        return ""

    def _producer(self, result: _Result) -> nn.Module:
        return self.modules[result.producer]


def _same_channels(y: Tensor, x: Tensor, of_conv: bool) -> bool:
    """Tell whether `x`, which lies in the memory of `y`, holds the same elements, its dim 1 being y's channels."""
    dim = 1 if of_conv else y.dim() - 1
    if x.dim() < 2 or x.numel() != y.numel() or x.shape[1] != y.shape[dim]:
        return False
    if x is y and dim == 1:
        return True
    # Each element's channel, written where the element lies, must be what x reads there.
    channels = torch.arange(y.shape[dim]).view([-1 if d == dim else 1 for d in range(y.dim())])
    lies = torch.empty_strided(y.shape, y.stride(), dtype=torch.long).copy_(channels)
    if x.storage_offset() != y.storage_offset():
        return False
    read = lies.as_strided(x.shape, x.stride())
    return torch.equal(read, torch.arange(x.shape[1]).view(1, -1, *[1] * (x.dim() - 2)).expand(x.shape))


def _role(module: nn.Module) -> str:
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    kind = type(module).__name__
    return "pool" if "Pool" in kind else kind
