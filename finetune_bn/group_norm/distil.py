"""Warm up a network that was converted to GroupNorm: train it to return what its BatchNorm network returns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.group_norm.twin import batch_norm_twin, group_norm_sites
from finetune_bn.layers.group_norm import GroupNorm
from finetune_bn.layers.sites import BatchNormSite
from finetune_bn.utilities.batches import Chunk, Feeder, Forward, Stock, check_batches, join
from finetune_bn.utilities.checks import number
from finetune_bn.utilities.hooks import hooked
from finetune_bn.utilities.probe import tensors_in, undisturbed, unwrapped
from finetune_bn.utilities.processes import Ranks
from finetune_bn.utilities.progress import progress_bar
from finetune_bn.utilities.results import Result, Shown

# Share of the steps in which the learning rate rises, and images on which the distance is measured before and after.
_RISE, _MEASURED = 0.05, 64


@dataclass(frozen=True)
class Distillation(Result):
    """What `distil` did.

    Attributes:
        images: images of all processes that were used.
        steps: optimizer steps.
        loss_before: distance of the two networks before, see `distil`, on the first 64 images.
        loss_after: distance after, on the same.
    """

    images: int
    steps: int
    loss_before: float
    loss_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain data."""
        return asdict(self)

    def shown(self) -> Shown:
        """Return one sentence."""
        return Shown(
            f"{self.steps} steps on {self.images} images: distance to the BatchNorm network "
            f"{self.loss_before:.3f} before, {self.loss_after:.3f} now"
        )


def distil(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int = 1,
    batch_size: int = 2,
    lr: float = 1e-5,
    affine_only: float = 0.1,
    blend: float = 0.0,
    max_samples: int | None = 1000,
    seed: int = 0,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    progress: bool | None = None,
) -> Distillation:
    """Train a network that was converted by `ToGroupNorm` towards its frozen BatchNorm network, without labels.

    The loss is the mean, over the converted layers, of the squared difference between what the layer returns in the
    two networks, in units of the variance of what it returns in the BatchNorm network; plus the same of what the models
    return. First weight and bias of the converted layers are trained, then everything that requires a gradient. Adam,
    with a learning rate that rises and falls as a cosine. Dropout and drop path are off, live BatchNorm layers are in
    eval mode. `calibrate_group_norm` first: it goes most of the way, in less time.

    Args:
        model: a model behind `convert(model, ToGroupNorm(...))`, not trained since; a DDP wrapper is looked through.
            Autocast is that of the caller.
        batches: as in `calibrate_group_norm`; they are held in memory, and cut and shuffled anew.
        epochs: how often each image is used.
        batch_size: images in a step. GroupNorm needs no large batches, and many steps go further.
        lr: highest learning rate. A network that was calibrated is near already, and a large one leads it away again.
        affine_only: share of the steps in which only weight and bias of the converted layers are trained.
        blend: share of the steps over which the network is handed over: converted layers return alpha BN +
            (1 - alpha) GN, alpha falling from 1 to 0. 0: GroupNorm from the first step.
        max_samples: take so many images at most, over all processes together; None takes all.
        seed: decides the order of the images.
        forward: see `calibrate_group_norm`.
        device: where batches are moved to; None: where the model is.
        group: process group over which gradients are averaged; None: all processes, where there are several.
        progress: show a progress bar; None: on a terminal.

    Returns:
        Distances before and after.

    Raises:
        FinetuneBNError: an argument, a batch or the model is none that this can work with, or the loss became NaN or
            infinite. Nothing was changed then.
    """
    check_distillation(
        epochs=epochs, batch_size=batch_size, lr=lr, affine_only=affine_only, blend=blend, max_samples=max_samples
    )
    model = unwrapped(model)
    sites = group_norm_sites(model)
    feeder = Feeder(model, forward, device)
    ranks = Ranks(group, feeder.device)
    share = max_samples if max_samples is None else -(-max_samples // ranks.world)
    kind = feeder.device.type
    amp = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    with undisturbed(model), torch.inference_mode(False), contextlib.ExitStack() as stack:
        pair = _Pair(sites, feeder, Feeder(batch_norm_twin(model), forward, device))
        stack.enter_context(pair.listening())
        stock = Stock(check_batches(batches), feeder, share)
        images = [part for chunk in stock.up_to(math.inf) for part in _single(chunk)]
        alike = len({chunk.shape_key for chunk in images}) == 1 and images[0].shape_key is not None
        rows = ranks.agree(len(images), alike or not images, stock.images)
        size = batch_size if all(row[1] for row in rows) else 1  # what cannot be joined is a step each
        steps = epochs * math.ceil(min(row[0] for row in rows) / size)
        if not steps:
            raise BadData(complaint("batches", "no images on one of the processes", "some on each"))
        stack.enter_context(amp)
        with torch.no_grad():
            before = pair.mean_loss(images)
        with _undone_on_error(model), progress_bar("Distilling", "steps", steps, progress) as report:
            optimizer = _optimizer(model, pair.layers)
            for step, chunk in enumerate(_cut(images, size, steps, seed)):
                for layer in pair.layers:
                    layer.alpha = max(0.0, 1 - step / (blend * steps)) if blend else 0.0
                _set_rates(optimizer, lr, step, steps, affine_only)
                with torch.enable_grad():
                    loss = pair.loss(chunk)
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                distance = float(loss.detach())
                if not all(math.isfinite(row[0]) for row in ranks.agree(distance)):
                    raise FinetuneBNError(complaint("lr", lr, "a learning rate with which the loss stays finite"))
                _average_gradients(optimizer, ranks)
                optimizer.step()
                report(step + 1, f"distance {distance:.3f}")
            optimizer.zero_grad()
            for layer in pair.layers:
                layer.alpha = 0.0
        with torch.no_grad():
            after = pair.mean_loss(images)
    return Distillation(int(sum(row[2] for row in rows)), steps, before, after)


class _Pair:
    """The two networks side by side.

    Args:
        sites: the converted layers of the student.
        student: passes images to the network that is trained.
        teacher: passes images to the BatchNorm network.
    """

    def __init__(self, sites: Sequence[BatchNormSite], student: Feeder, teacher: Feeder) -> None:
        self.layers = [site.module for site in sites if isinstance(site.module, GroupNorm)]
        self._student, self._teacher = student, teacher
        self._outputs: dict[int, list[Tensor]] = {}
        self._learns = self._hidden = False
        others = [teacher.model.get_submodule(site.names[0]) for site in sites]
        self._watched = ((student, self.layers), (teacher, others))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take what the layers return, for the time of the block."""

        def listener(feeder: Feeder) -> Callable[..., None]:
            def take(module: nn.Module, args: Any, y: Tensor) -> None:
                # Gradient checkpointing runs layers once more, in the backward pass: that is no output of theirs.
                if id(feeder) in self._outputs:
                    self._outputs[id(feeder)].append(y)
                    self._hidden = self._hidden or (self._learns and not torch.is_grad_enabled())

            return take

        with contextlib.ExitStack() as stack:
            for feeder, layers in self._watched:
                stack.enter_context(hooked(layers, post=listener(feeder)))
            yield

    def loss(self, chunk: Chunk) -> Tensor:
        """Return the distance of the two networks."""
        with torch.no_grad():
            targets, end_target = self._run(self._teacher, chunk)
        outputs, end = self._run(self._student, chunk)
        if self._hidden:
            given = f"{type(self._student.model).__name__}, whose layers run without gradients"
            allowed = (
                "one without torch.no_grad() and without checkpoint(use_reentrant=True), which hide them from the loss"
            )
            raise FinetuneBNError(complaint("model", given, allowed, "Set use_reentrant=False, or switch it off."))
        inner = [_distance(y, target) for y, target in zip(outputs, targets, strict=True)]
        outer = [_distance(y, target) for y, target in zip(end, end_target, strict=True) if y.is_floating_point()]
        total = torch.stack(inner).mean()
        return total + torch.stack(outer).mean() if outer else total

    def mean_loss(self, images: Sequence[Chunk]) -> float:
        """Return the distance on the first images, for comparison."""
        few = images[:_MEASURED]
        if len({chunk.shape_key for chunk in few}) == 1 and few[0].shape_key is not None:
            return float(self.loss(join(few)))
        losses = [float(self.loss(chunk)) for chunk in few]
        return sum(losses) / len(losses)

    def _run(self, feeder: Feeder, chunk: Chunk) -> tuple[list[Tensor], list[Tensor]]:
        self._outputs[id(feeder)] = []
        self._learns = torch.is_grad_enabled()
        end = feeder(chunk)
        return self._outputs.pop(id(feeder)), tensors_in(end, detach=False)


def _distance(y: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared difference relative to the target's variance."""
    y, target = y.float(), target.float()
    return (y - target).square().mean() / target.var(correction=0).clamp_min(1e-12)


def _cut(images: Sequence[Chunk], size: int, steps: int, seed: int) -> Iterator[Chunk]:
    """Yield so many batches, each pass over the images in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while True:
        order = torch.randperm(len(images), generator=generator).tolist()
        for start in range(0, len(order), size):
            if done == steps:
                return
            done += 1
            yield join([images[i] for i in order[start : start + size]])


def _single(chunk: Chunk) -> list[Chunk]:
    """Return the images of a chunk one by one; the chunk itself where it cannot be cut."""
    return [chunk] if chunk.shape_key is None else [chunk[[i]] for i in range(len(chunk))]


def _optimizer(model: nn.Module, layers: Sequence[nn.Module]) -> torch.optim.Optimizer:
    affine = {id(p): p for layer in layers for p in layer.parameters(recurse=False) if p.requires_grad}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in affine]
    groups = [{"params": list(affine.values()), "affine": True}, {"params": rest, "affine": False}]
    groups = [each for each in groups if each["params"]]
    if not groups:
        raise FinetuneBNError(complaint("model", type(model).__name__, "a model with parameters that are trained"))
    return torch.optim.Adam(groups)


def _set_rates(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int, affine_only: float) -> None:
    rise = max(1, round(_RISE * steps))
    factor = min((step + 1) / rise, (1 + math.cos(math.pi * step / steps)) / 2)
    for each in optimizer.param_groups:
        each["lr"] = lr * factor if each["affine"] or step >= affine_only * steps else 0.0


def _average_gradients(optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    if ranks.world == 1:
        return
    for parameter in (p for each in optimizer.param_groups for p in each["params"] if p.grad is not None):
        torch.distributed.all_reduce(parameter.grad, group=ranks.group)
        parameter.grad /= ranks.world


@contextlib.contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    copies = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, copy in copies:
                parameter.copy_(copy)
                parameter.grad = None
        raise


def check_distillation(
    *, epochs: int, batch_size: int, lr: float, affine_only: float, blend: float, max_samples: int | None
) -> None:
    """Raise unless these are arguments of `distil`.

    Raises:
        FinetuneBNError: one is none of the values allowed.
    """
    number("epochs", epochs, least=1, whole=True)
    number("batch_size", batch_size, least=1, whole=True)
    number("max_samples", max_samples, least=1, whole=True, none=True)
    number("lr", lr, above=0, below=math.inf)
    number("affine_only", affine_only, least=0, most=1)
    number("blend", blend, least=0, most=1)
