"""Keep the images of an evaluation of which a classifier is most wrong, for its report."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler
from torch.utils.hooks import RemovableHandle

from finetune_bn.callbacks.report_facts import class_names
from finetune_bn.data.transforms import model_normalization
from finetune_bn.diagnosis.training_page import WorstImage

SIDE = 160  # pixels of the longer side that are kept of an image


@dataclass
class _Kept:
    """Rows of the worst images, the worst first: what they look like, and numbers that say which they are."""

    losses: Tensor  # [K]
    images: Tensor  # [K, 3, SIDE, SIDE]
    numbers: Tensor  # [K, 6]: true class, predicted class, its probability, loader, batch, place in the batch

    def merged(self, other: _Kept, most: int) -> _Kept:
        losses = torch.cat([self.losses, other.losses])
        order = losses.topk(min(most, len(losses))).indices
        images, numbers = torch.cat([self.images, other.images]), torch.cat([self.numbers, other.numbers])
        return _Kept(losses[order], images[order], numbers[order])


class WorstImages:
    """Watches one evaluation after the other; of the last, it has the images with the highest loss.

    The logits are what the module, or one of its parts, returned last in a step, in the shape [N, classes]; the batch
    begins with images [N, 3, H, W] or [N, 1, H, W], and has labels [N] behind them. Nothing waits for the device.

    Attributes:
        left_out: why there are none, a sentence; "" where there are.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.left_out = ""
        self._handles: list[RemovableHandle] = []
        self._outputs: list[Tensor] = []
        self._kept: _Kept | None = None
        self._classes = 0

    def start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last evaluation, and watch the next."""
        self.stop()
        self._kept = None
        self._classes = _number_of_classes(trainer, pl_module)
        if not self.most or trainer.sanity_checking:
            self.left_out = "none were asked for" if not self.most else ""
            return
        if not self._classes:
            name = type(pl_module).__name__
            self.left_out = f"{name} is no classifier that says how many classes there are, as `num_classes`"
            return
        self.left_out = f"no step of {type(pl_module).__name__} had images, labels and logits [N, {self._classes}]"
        # A hook within what torch.compile has compiled would have it compiled anew.
        parts = [pl_module, *(m for m in pl_module.children() if getattr(m, "_compiled_call_impl", None) is None)]
        self._handles = [part.register_forward_hook(self._hear) for part in parts]

    def stop(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._outputs = [], []

    def add(self, batch: Any, batch_idx: int, loader: int) -> None:
        """Look at a batch behind its step."""
        outputs, self._outputs = self._outputs, []
        if not self._handles:
            return
        found = _images_and_labels(batch)
        if found is None:
            return
        images, labels = found
        logits = next((t for t in reversed(outputs) if t.shape == (len(labels), self._classes)), None)
        if logits is None:
            return
        new = _worst(images, logits.float(), labels, self.most, batch_idx, loader)
        self._kept = new if self._kept is None else self._kept.merged(new, self.most)
        self.left_out = ""

    def gathered(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loaders: Sequence[Any], domains: Sequence[str]
    ) -> list[WorstImage]:
        """Return the worst of all processes, the worst first; to be called by all of them.

        Args:
            trainer: of the evaluation.
            pl_module: that was evaluated.
            loaders: its loaders.
            domains: their names.
        """
        kept = self._over_processes(trainer, pl_module.device)
        if kept is None:
            return []
        mean, std = _normalization(trainer, pl_module)
        names = class_names(trainer, pl_module, self._classes)
        images: list[WorstImage] = []
        rows = zip(kept.losses.tolist(), kept.images.cpu(), kept.numbers.tolist(), strict=True)
        for loss, image, (true, predicted, probability, loader, batch, place) in rows:
            if loss == -math.inf:  # without a label, or of a process that had fewer
                continue
            name = "" if trainer.world_size > 1 else _name_of(loaders[int(loader)], int(batch), int(place))
            domain = domains[int(loader)] if len(domains) > 1 else ""
            picture = _jpeg(image, mean, std)
            if trainer.world_size > 1 and any(picture == other.data for other in images):
                continue  # a sampler for several processes gives some images twice
            images.append(WorstImage(names[int(true)], names[int(predicted)], probability, loss, name, domain, picture))
        return images

    def _hear(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_tensor(output) and output.dim() == 2 and output.is_floating_point():
            self._outputs.append(output.detach())

    def _over_processes(self, trainer: pl.Trainer, device: torch.device) -> _Kept | None:
        if trainer.world_size == 1:
            return self._kept
        empty = _Kept(
            torch.full((self.most,), -math.inf, device=device),
            torch.zeros(self.most, 3, SIDE, SIDE, device=device),
            torch.zeros(self.most, 6, device=device),
        )
        mine = empty if self._kept is None else self._kept.merged(empty, self.most)
        parts = [trainer.strategy.all_gather(t.float()).flatten(0, 1) for t in (mine.losses, mine.images, mine.numbers)]
        order = parts[0].topk(self.most).indices
        found = _Kept(*(part[order] for part in parts))
        known = bool((found.losses > -math.inf).any())
        self.left_out = "" if known else self.left_out
        return found if known else None


def _number_of_classes(trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
    """Return how many classes a classifier tells apart; 0 where it is none, or does not say."""
    if getattr(pl_module, "task_kind", "classification") != "classification":
        return 0
    data = getattr(trainer, "datamodule", None)
    counts = [getattr(pl_module, "num_classes", None), pl_module.hparams.get("num_classes")]
    counts += [getattr(data, "num_classes", None), len(getattr(data, "class_names", None) or ())]
    return next((n for n in counts if isinstance(n, int) and n > 1), 0)


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Return images and labels of a batch (images, labels, ...); None where it is another."""
    if not isinstance(batch, (list, tuple)) or len(batch) < 2:
        return None
    images, labels = batch[:2]
    if not torch.is_tensor(images) or not torch.is_tensor(labels) or not images.is_floating_point():
        return None
    fits = images.dim() == 4 and images.shape[1] in (1, 3) and labels.shape == images.shape[:1] and len(labels)
    return (images, labels) if fits and not labels.is_floating_point() else None


def _worst(images: Tensor, logits: Tensor, labels: Tensor, most: int, batch_idx: int, loader: int) -> _Kept:
    """Return the worst of a batch; what is not finite is the worst of all."""
    classes = logits.shape[1]
    shares = (logits >= 0).all(1, keepdim=True) & ((logits.sum(1, keepdim=True) - 1).abs() < 1e-3)
    logits = torch.where(shares, logits.clamp_min(1e-30).log(), logits)  # a module may return probabilities
    losses = F.cross_entropy(logits, labels.long().clamp(0, classes - 1), reduction="none")
    losses = losses.nan_to_num(torch.finfo(torch.float32).max)
    losses = losses.masked_fill((labels < 0) | (labels >= classes), -math.inf)
    probability, predicted = logits.softmax(1).nan_to_num(0.0).max(1)
    losses, order = losses.topk(min(most, len(losses)))
    place = torch.full_like(losses, loader), torch.full_like(losses, batch_idx), order.float()
    numbers = torch.stack([labels[order].float(), predicted[order].float(), probability[order], *place], dim=1)
    return _Kept(losses, _square(images[order]), numbers)


def _square(images: Tensor) -> Tensor:
    """Bring images to one size, the longer side SIDE, gray beside the shorter; one channel becomes three."""
    height, width = images.shape[2:]
    scale = SIDE / max(height, width)
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    small = F.interpolate(images.float(), size, mode="area" if scale < 1 else "nearest")
    left, top = (SIDE - size[1]) // 2, (SIDE - size[0]) // 2
    return F.pad(small.expand(-1, 3, -1, -1), (left, SIDE - size[1] - left, top, SIDE - size[0] - top))


def _normalization(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Return mean and standard deviation by which images were normalized, [3, 1, 1] each, or (None, None)."""
    known = getattr(getattr(trainer, "datamodule", None), "normalization", None)
    if known is None:
        known = next(filter(None, map(model_normalization, (pl_module, getattr(pl_module, "net", None)))), None)
    return (None, None) if known is None else tuple(torch.tensor(part).view(-1, 1, 1) for part in known)


def _jpeg(image: Tensor, mean: Tensor | None, std: Tensor | None) -> bytes:
    """Return an image [3, H, W] as it was before it was normalized; where that is not known, from black to white."""
    from PIL import Image

    if mean is not None and std is not None:
        image = image * std + mean
    else:
        image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-12)
    pixels = (image.nan_to_num(0.0).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def _name_of(loader: Any, batch: int, place: int) -> str:
    """Return what the user knows an image by, where the loader gives them in the order of a data set with `names`."""
    in_order = isinstance(loader, DataLoader) and isinstance(loader.sampler, SequentialSampler)
    names = getattr(loader.dataset, "names", None) if in_order and loader.batch_size else None
    at = batch * (loader.batch_size or 0) + place if names else 0
    return str(names[at]) if names and at < len(names) else ""
