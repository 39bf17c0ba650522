"""Random networks for hypothesis: a network is drawn as plain data, which a failure prints, and built from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.models import Named, OwnForward, settle

CHANNELS = (4, 6, 8)
SIDES = {1: (8,), 2: (6, 6), 3: (4, 4, 4)}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

Step = tuple[Any, ...]


@dataclass(frozen=True)
class Spec:
    """A network as data.

    Attributes:
        dimensions: of a map: 1, 2 or 3.
        steps: what is done to the input, one after the other; see `steps`.
        head: behind the mean over positions: `none`, `linear`, `neck` (BatchNorm1d) or `dict` (a dict output).
        dtype: name of a key of `DTYPES`.
        channels_last: memory format of weights and input; maps of two dimensions only.
        settled: whether the statistics are those of a trained network.
        training: the mode it is handed over in.
        seed: of weights and input.
    """

    dimensions: int
    steps: tuple[Step, ...]
    head: str = "linear"
    dtype: str = "float32"
    channels_last: bool = False
    settled: bool = True
    training: bool = True
    seed: int = 0

    @property
    def is_picky(self) -> bool:
        """Whether the network looks at what its layers are, or uses their tensors, and so resists a conversion."""
        return any(f"'{word}'" in repr(self.steps) for word in ("picky", "beside"))

    def build(self) -> nn.Module:
        """Return the network; the same values each time."""
        torch.manual_seed(self.seed)
        net: nn.Module = Net(self)
        if self.settled:
            settle(net, self.seed)
        net.to(DTYPES[self.dtype])
        if self.channels_last:
            net.to(memory_format=torch.channels_last)
        net.train(self.training)
        for layer in net.modules():
            if hasattr(layer, "stays_in_eval"):
                layer.eval()
        return net

    def images(self, count: int = 5, seed: int = 0) -> Tensor:
        """Return an input: [count, 3, positions...]."""
        generator = torch.Generator().manual_seed(self.seed + 1000 * (seed + 1))
        x = torch.randn(count, 3, *SIDES[self.dimensions], generator=generator).to(DTYPES[self.dtype])
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


class Net(nn.Module):
    """The steps, then the head."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        maker = _Maker(spec.dimensions)
        self.body = nn.Sequential(*[maker.make(step) for step in spec.steps])
        self.kind = spec.head
        self.head = nn.Identity() if spec.head == "none" else nn.Linear(maker.channels, 6)
        self.neck = nn.BatchNorm1d(6) if spec.head == "neck" else nn.Identity()

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        if self.kind != "none":
            x = self.neck(self.head(x.flatten(2).mean(2)))
        return {"logits": x, "size": len(x)} if self.kind == "dict" else x


class Branch(nn.Module):
    """The input beside what the body makes of it: added, or put behind it."""

    def __init__(self, body: nn.Module, concat: bool) -> None:
        super().__init__()
        self.body, self.concat = body, concat

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return torch.cat([x, y], 1) if self.concat else x + y


class Shelf(nn.Module):
    """Keeps a map for a later layer, in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.kept[:] = [x]
        return x


class FromShelf(nn.Module):
    """Adds what a `Shelf` kept; the shelf is no child of it."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__()
        self.kept = shelf.kept

    def forward(self, x: Tensor) -> Tensor:
        return x + self.kept.pop()


class Pool(nn.Module):
    """Halves each side, while there is something to halve."""

    def forward(self, x: Tensor) -> Tensor:
        return POOLS[x.dim() - 2](x, 2) if min(x.shape[2:]) >= 4 else x


class Recomputed(nn.Module):
    """A body that is run again in the backward pass."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)


class TrainingOnly(nn.Module):
    """A layer that evaluation does without."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.training else x


class Idle(nn.Module):
    """A layer that is never called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x


class Beside(nn.Module):
    """Uses the tensors of a BatchNorm by itself, as a graph does that was traced through it."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        bn = self.layer
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.1, bn.eps)


class Picky(nn.Module):
    """Doubles what comes out of anything but a BatchNorm, so that a conversion changes the network."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if isinstance(self.layer, _BatchNorm) else 2 * self.layer(x)


def _add_one(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output + 1


def _halve(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] / 2, *args[1:])


def _look(_module: nn.Module, _args: Any, _output: Tensor) -> None:
    return None


class _Maker:
    """Makes the modules of steps, and knows the channels and which layers there are to share."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions, self.channels, self.before = dimensions, 3, ""
        self.norms: dict[int, nn.Module] = {}
        self.convolutions: dict[tuple[int, int], nn.Module] = {}
        self.shelves: list[tuple[Shelf, int]] = []

    def make(self, step: Step) -> nn.Module:
        module: nn.Module = getattr(self, f"_{step[0]}")(*step[1:])
        self.before = step[0]
        return module

    def _all(self, steps: tuple[Step, ...]) -> nn.Sequential:
        return nn.Sequential(*[self.make(step) for step in steps])

    def _conv(self, out: int, kernel: int, bias: bool, extra: str) -> nn.Module:
        key = (self.channels, out)
        if extra == "twice" and key in self.convolutions:
            self.channels = out
            return self.convolutions[key]
        groups = 2 if extra == "groups" and self.channels % 2 == 0 else 1
        layer = CONVOLUTIONS[self.dimensions](self.channels, out, kernel, padding=kernel // 2, bias=bias, groups=groups)
        self.convolutions[key] = layer
        self.channels = out
        return parametrizations.weight_norm(layer) if extra == "weight_norm" else layer

    def _norm(self, kind: str, settings: tuple[tuple[str, Any], ...], extra: str) -> nn.Module:
        c, d = self.channels, self.dimensions
        if extra == "shared" and c in self.norms:
            return self.norms[c]
        if kind == "group":
            return nn.GroupNorm(2 if c % 2 == 0 else 1, c)
        if kind == "layer":
            return nn.GroupNorm(1, c)
        if kind == "instance":
            return INSTANCE_NORMS[d](c, affine=True, track_running_stats=True)
        layer = self._batch_norm(kind, dict(settings))
        if extra == "constant":
            layer.requires_grad_(False)
        if extra == "eval":
            layer.stays_in_eval = True
        if extra in ("pre_hook", "hook", "looked_at"):
            _hook(layer, extra)
        self.norms[c] = layer
        wrap = {"recomputed": Recomputed, "training_only": TrainingOnly, "idle": Idle, "picky": Picky, "beside": Beside}
        if extra == "beside" and (layer.running_mean is None or type(layer) is not BATCH_NORMS[d]):
            return layer
        return wrap[extra](layer) if extra in wrap else layer

    def _batch_norm(self, kind: str, settings: dict[str, Any]) -> nn.Module:
        c, d = self.channels, self.dimensions
        if kind == "sync":
            return nn.SyncBatchNorm(c, **settings)
        if d == 2 and kind == "act":
            from timm.layers import BatchNormAct2d

            settings.pop("track_running_stats", None)
            return BatchNormAct2d(c, act_layer=nn.SiLU, inplace=False, **settings)
        if d == 2 and kind == "act_drop":
            from timm.layers import BatchNormAct2d

            return BatchNormAct2d(c, act_layer=nn.PReLU, drop_layer=nn.Dropout)
        if d == 2 and kind == "foreign":
            from torchvision.ops import FrozenBatchNorm2d

            return FrozenBatchNorm2d(c)
        if kind == "named" and d == 1:
            return Named(c, **settings)
        if kind == "own" and d == 2:
            return OwnForward(c, **settings)
        return BATCH_NORMS[d](c, **settings)

    def _act(self, name: str) -> nn.Module:
        # Two in place, one behind the other, are more than torch's own backward pass bears.
        return {
            "relu": nn.ReLU(inplace=self.before in ("conv", "norm")),
            "gelu": nn.GELU(),
            "dropout": nn.Dropout(0.3),
        }[name]

    def _pool(self) -> nn.Module:
        return Pool()

    def _add(self, steps: tuple[Step, ...]) -> nn.Module:
        before = self.channels
        body = self._all(steps)
        if self.channels != before:
            body.append(self._conv(before, 1, False, ""))
        return Branch(body, concat=False)

    def _concat(self, steps: tuple[Step, ...]) -> nn.Module:
        before = self.channels
        if before > 16:
            return self._add(steps)
        body = self._all(steps)
        self.channels += before
        return Branch(body, concat=True)

    def _nested(self, steps: tuple[Step, ...]) -> nn.Module:
        return nn.Sequential(self._all(steps), nn.Identity())

    def _recomputed(self, steps: tuple[Step, ...]) -> nn.Module:
        self.before = ""  # torch itself cannot compute again what writes over its input
        return Recomputed(self._all(steps))

    def _skip(self, steps: tuple[Step, ...]) -> nn.Module:
        before, shelf = self.channels, Shelf()
        body = self._all(steps)
        if self.channels != before:
            body.append(self._conv(before, 1, False, ""))
        return nn.Sequential(shelf, body, FromShelf(shelf))


def _hook(layer: nn.Module, kind: str) -> None:
    if kind == "pre_hook":
        layer.register_forward_pre_hook(_halve)
    else:
        layer.register_forward_hook(_add_one if kind == "hook" else _look)


def norm_settings() -> st.SearchStrategy[tuple[tuple[str, Any], ...]]:
    """Draw the arguments of a BatchNorm; most are those that pretrained networks have."""
    odd = st.sampled_from(
        [
            (("affine", False),),
            (("track_running_stats", False),),
            (("momentum", None),),
            (("momentum", 0.01), ("eps", 1e-3)),
            (("affine", False), ("momentum", None)),
            (("eps", 1e-7),),
        ]
    )
    return st.one_of(st.just(()), st.just(()), odd)


def norm_steps() -> st.SearchStrategy[Step]:
    """Draw a norm layer."""
    kinds = ["batch"] * 8 + ["act", "act", "sync", "group", "layer", "instance", "act_drop", "foreign", "named", "own"]
    extras = ["", "", "", "", "shared", "shared", "hook", "pre_hook", "looked_at", "constant", "eval"]
    extras += ["recomputed", "training_only", "idle", "picky", "beside"]
    return st.tuples(st.just("norm"), st.sampled_from(kinds), norm_settings(), st.sampled_from(extras))


def conv_steps() -> st.SearchStrategy[Step]:
    """Draw a convolution."""
    extra = st.sampled_from(["", "", "", "twice", "groups", "weight_norm"])
    return st.tuples(st.just("conv"), st.sampled_from(CHANNELS), st.sampled_from([1, 3]), st.booleans(), extra)


def steps() -> st.SearchStrategy[tuple[Step, ...]]:
    """Draw some steps, nested where it comes to that."""
    act = st.tuples(st.just("act"), st.sampled_from(["relu", "relu", "gelu", "dropout"]))
    pair = st.tuples(conv_steps(), norm_steps())
    single = st.one_of(conv_steps(), norm_steps(), act, st.just(("pool",))).map(lambda step: (step,))
    flat = st.one_of(pair, pair, single)

    def within(inner: st.SearchStrategy[tuple[Step, ...]]) -> st.SearchStrategy[tuple[Step, ...]]:
        block = st.tuples(st.sampled_from(["add", "concat", "nested", "recomputed", "skip"]), inner)
        return st.lists(st.one_of(flat, block.map(lambda step: (step,))), min_size=1, max_size=3).map(
            lambda parts: tuple(step for part in parts for step in part)
        )

    once = within(flat)
    return st.one_of(flat, once, within(once))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Draw a network."""
    dimensions = draw(st.sampled_from([1, 2, 2, 2, 2, 3]))
    first = draw(st.one_of(st.just(()), *[st.tuples(conv_steps(), norm_steps())] * 4))
    return Spec(
        dimensions,
        first + draw(steps()),
        head=draw(st.sampled_from(["none", "linear", "neck", "dict"])),
        dtype=draw(st.sampled_from(["float32", "float32", "float32", "float64", "bfloat16"])),
        channels_last=dimensions == 2 and draw(st.booleans()),
        settled=draw(st.sampled_from([True, True, True, False])),
        training=draw(st.booleans()),
        seed=draw(st.integers(0, 50)),
    )
