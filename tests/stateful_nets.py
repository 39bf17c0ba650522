"""Networks that keep something between their modules, which passes at once mix up, or that take no single images."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class NextAtEachCall(nn.ModuleList):
    """A counter picks the next layer: aim-uofa/AdelaiDet#153, heads with a BatchNorm per pyramid level."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.at = 0

    def forward(self, x: Tensor) -> Tensor:
        y = self[self.at](x)
        self.at = (self.at + 1) % len(self)
        return y


class CountsInBuffer(nn.ModuleList):
    """The same with a buffer that is counted up in place."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.register_buffer("at", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = self[int(self.at) % len(self)](x)
        self.at += 1
        return y


_AT = 0


class CountsInGlobal(nn.ModuleList):
    """The same with a global of the file."""

    def forward(self, x: Tensor) -> Tensor:
        global _AT
        layer = self[_AT % len(self)]
        _AT += 1
        return layer(x)


class Levels(nn.Module):
    """Heads shared by three levels of other scales, with a BatchNorm for each."""

    def __init__(self, pick: type[nn.ModuleList]) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        parts: list[nn.Module] = []
        for _ in range(2):
            norms = [nn.BatchNorm2d(WIDTH) for _ in range(3)]
            parts += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), pick(norms), nn.ReLU()]  # type: ignore[arg-type]
        self.tower = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.bn(self.stem(x)))
        return [self.tower(F.avg_pool2d(x, 2**i) * (1 + 3 * i)) for i in range(3)]


class UNet(nn.Module):
    """An encoder of two stages and a decoder that reads what the stages left somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.up2 = nn.Sequential(nn.Conv2d(2 * WIDTH, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH), nn.ReLU())
        self.up1 = nn.Sequential(nn.Conv2d(WIDTH + 3, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH))
        self.prepare()

    def prepare(self) -> None:
        """Put in what keeps the skips."""

    def keep(self, name: str, x: Tensor) -> None:
        raise NotImplementedError

    def get(self, name: str) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        self.keep("image", x)
        y = self.down1(x)
        self.keep("first", y)
        y = F.interpolate(self.down2(y), scale_factor=2)
        y = F.interpolate(self.up2(torch.cat([y, self.get("first")], 1)), scale_factor=2)
        return self.up1(torch.cat([y, self.get("image")], 1))


class SkipsInAttributes(UNet):
    def keep(self, name: str, x: Tensor) -> None:
        setattr(self, f"skip_{name}", x)

    def get(self, name: str) -> Tensor:
        return getattr(self, f"skip_{name}")


class SkipsInHooks(UNet):
    """Hooks on the encoder's stages fill a dict of a closure, as in fastai's DynamicUnet and many Grad-CAM tools."""

    def prepare(self) -> None:
        found: dict[str, Tensor] = {}
        self.down1.register_forward_hook(lambda module, args, y: found.__setitem__("first", y))
        self.down1.register_forward_pre_hook(lambda module, args: found.__setitem__("image", args[0]))
        self.get = found.__getitem__  # type: ignore[method-assign]

    def keep(self, name: str, x: Tensor) -> None:
        pass


class SkipsInCacheOfName(UNet):
    """A dict of the module, keyed by name and image size."""

    def prepare(self) -> None:
        self.cache: dict[Any, Tensor] = {}

    def keep(self, name: str, x: Tensor) -> None:
        self.cache[name, x.dtype] = x

    def get(self, name: str) -> Tensor:
        return self.cache[name, torch.float32]


class SkipsInNamespace(UNet):
    """An object that the modules share."""

    def prepare(self) -> None:
        self.shared = types.SimpleNamespace()

    def keep(self, name: str, x: Tensor) -> None:
        setattr(self.shared, name, x)

    def get(self, name: str) -> Tensor:
        return getattr(self.shared, name)


_STACK: list[Tensor] = []


class SkipsOnGlobalStack(UNet):
    """A list of the file, pushed by the encoder and popped by the decoder."""

    def keep(self, name: str, x: Tensor) -> None:
        _STACK.append(x)

    def get(self, name: str) -> Tensor:
        return _STACK.pop()


class SkipsOnClosureStack(UNet):
    def prepare(self) -> None:
        stack: list[Tensor] = []
        self.push, self.pop = stack.append, stack.pop

    def keep(self, name: str, x: Tensor) -> None:
        self.push(x)

    def get(self, name: str) -> Tensor:
        return self.pop()


class SkipsCheckpointed(SkipsInAttributes):
    """With `torch.utils.checkpoint` around the stages."""

    def forward(self, x: Tensor) -> Tensor:
        self.keep("image", x)
        y = checkpoint(self.down1, x, use_reentrant=False)
        self.keep("first", y)
        y = F.interpolate(checkpoint(self.down2, y, use_reentrant=True), scale_factor=2)
        y = F.interpolate(self.up2(torch.cat([y, self.get("first")], 1)), scale_factor=2)
        return self.up1(torch.cat([y, self.get("image")], 1))


class KeepsHidden(nn.Module):
    """A recurrent state that is kept from one call to the next, as in BasicVSR and stateful speech models."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.bn1 = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.mix, self.bn2 = nn.Conv2d(2 * WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.inside(x)))
        hidden = torch.zeros_like(y) if self.hidden is None else self.hidden
        self.hidden = y + 1
        return self.bn2(self.mix(torch.cat([y, hidden[: len(y)]], 1)))


class Alternates(nn.Module):
    """A step counter picks one of two BatchNorm layers at each call, as in some adversarial and domain trainings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bns = nn.Conv2d(3, WIDTH, 3, padding=1), nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(2))
        self.last, self.bn = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return self.bn(self.last(F.relu(self.bns[self.step % 2](self.conv(x)))))


_STEP = [0]


class AlternatesByGlobal(Alternates):
    def forward(self, x: Tensor) -> Tensor:
        _STEP[0] += 1
        return self.bn(self.last(F.relu(self.bns[_STEP[0] % 2](self.conv(x)))))


class TwiceEachCall(nn.Module):
    """Runs a part twice in a call, for two views; it keeps its input for a shortcut behind the BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.end, self.bn_end = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.shortcut: Tensor | None = None

    def view(self, x: Tensor) -> Tensor:
        self.shortcut = self.conv(x)
        y = self.bn(self.shortcut)
        return y + self.shortcut.flip(-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_end(self.end(self.view(x) - self.view(x.flip(-1) * 2)))


class TSM(nn.Module):
    """[clips x frames, C, H, W], taken apart by the number of frames: mit-han-lab/temporal-shift-module#204."""

    def __init__(self, frames: int = 5) -> None:
        super().__init__()
        self.frames = frames
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        clips = y.view(-1, self.frames, *y.shape[1:])
        shifted = torch.cat([clips[:, 1:, :4], torch.zeros_like(clips[:, :1, :4])], 1)
        return self.bn2(self.conv2(torch.cat([shifted, clips[:, :, 4:]], 2).view_as(y)))


class Bag(nn.Module):
    """A bag of instances [n, 8]; attention pools them, BatchNorm stands behind the instances and behind the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn = nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH)
        self.score, self.last, self.bn2 = nn.Linear(WIDTH, 1), nn.Linear(2 * WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn(self.lin(x)))
        pooled = (self.score(h).softmax(0) * h).sum(0)
        return self.bn2(self.last(torch.cat([h, pooled.expand_as(h)], 1)))


class TimeFirst(nn.Module):
    """[time, N, 4]: a recurrence along the first dimension, then BatchNorm over all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.bn = nn.GRU(4, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.bn(y.flatten(0, 1))


def images(number: int = 48, seed: int = 1) -> Tensor:
    """Return images with some structure: each has a mean and a size of its own."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 + torch.rand(number, 1, 1, 1, generator=generator)
    return torch.randn(number, 3, 16, 16, generator=generator) * scale + scale


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "a counter picks the level's layer": functools.partial(Levels, NextAtEachCall),
    "a counter in a buffer": functools.partial(Levels, CountsInBuffer),
    "a counter in a global": functools.partial(Levels, CountsInGlobal),
    "skips in attributes": SkipsInAttributes,
    "skips by hooks into a closure": SkipsInHooks,
    "skips in a dict by name": SkipsInCacheOfName,
    "skips in a shared object": SkipsInNamespace,
    "skips on a stack of the file": SkipsOnGlobalStack,
    "skips on a stack of a closure": SkipsOnClosureStack,
    "skips and gradient checkpointing": SkipsCheckpointed,
    "a hidden state from call to call": KeepsHidden,
    "a step alternates between layers": Alternates,
    "a global step alternates between layers": AlternatesByGlobal,
    "a part that runs twice": TwiceEachCall,
}
