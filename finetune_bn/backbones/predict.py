"""A trained network with all that its use needs: images in, classes with scores or embeddings out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_bn.backbones.card import Card
from finetune_bn.backbones.inputs import Item, is_many, items_of
from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.functional.frozen import at_least_float32
from finetune_bn.utilities.checks import choice, number
from finetune_bn.utilities.images import as_rgb, unreadable
from finetune_bn.utilities.probe import quietly
from finetune_bn.utilities.progress import progress_bar
from finetune_bn.utilities.results import Result, Shown

READERS = 8  # threads that decode images


@dataclass(frozen=True)
class Prediction(Result):
    """What a classifier says of one image.

    Attributes:
        image: its path, or `image 3` for the fourth of those that have none.
        classes: the most likely classes, best first.
        scores: the probability of each of them.
    """

    image: str
    classes: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def label(self) -> str:
        """The most likely class."""
        return self.classes[0]

    @property
    def score(self) -> float:
        """Its probability."""
        return self.scores[0]

    def to_dict(self) -> dict[str, Any]:
        """Return image, classes and scores as plain data."""
        return {"image": self.image, "classes": list(self.classes), "scores": list(self.scores)}

    def shown(self) -> Shown:
        """Return one sentence, the most likely class first."""
        pairs = zip(self.classes, self.scores, strict=True)
        return Shown(f"{self.image}: {', '.join(f'{name} {100 * score:.1f} %' for name, score in pairs)}")


@dataclass(frozen=True, eq=False)
class Embedding(Result):
    """What a network for metric learning says of one image.

    Attributes:
        image: its path, or `image 3` for the fourth of those that have none.
        vector: float32 [D], on the CPU.
    """

    image: str
    vector: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return image and vector as plain data."""
        return {"image": self.image, "vector": self.vector.tolist()}

    def shown(self) -> Shown:
        """Return one sentence."""
        return Shown(f"{self.image}: a vector of {len(self.vector)} numbers")


class TrainedModel(nn.Module):
    """A network as `finetune_bn.load` returns it, in eval mode.

    Attributes:
        net: the timm model. Frozen layers are BatchNorm layers in eval mode here; to train it further as it was
            trained, `finetune_bn.convert(model.net, model.card.plan)`.
        card: what the file says of it: classes, transform, plan, versions.
    """

    def __init__(self, net: nn.Module, card: Card) -> None:
        super().__init__()
        self.net, self.card = net, card
        self.eval()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the logits; none for embeddings."""
        return self.card.classes

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [N, classes], or embeddings [N, D], of images [N, C, H, W] that are normalized already."""
        outputs: Tensor = at_least_float32(self.net(images))
        return F.normalize(outputs, dim=1) if self.card.normalize else outputs

    def transform(self, image: Any) -> Tensor:
        """Bring a Pillow image to what the network takes, float [C, H, W], as test images were prepared."""
        image = as_rgb(image)
        made: Tensor = self._transform(image.convert("L") if self.card.in_chans == 1 else image)
        return made

    def predict(
        self,
        images: Any,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        *,
        top: int | None = 5,
        on_bad_image: str = "error",
        progress: bool | None = None,
    ) -> Any:
        """Tell the classes of images with their scores, or their embeddings.

        Args:
            images: the path of an image or of a folder (with all folders in it), a Pillow image, a tensor, or a list
                of these. A tensor [C, H, W] or [N, C, H, W] holds pixels: whole numbers from 0 to 255, or floats
                between 0 and 1; it is resized and normalized as any image. For images that are normalized already call
                the model itself.
            batch_size: images that go through the network together.
            device: where to compute, as `cuda`; the model is moved there, and stays. None: where it is.
            top: how many classes an answer holds; None for all.
            on_bad_image: `error`, or `skip` to leave out images that cannot be read, with a warning that names them.
            progress: whether a bar is shown; None: on a terminal.

        Returns:
            A `Prediction` (or an `Embedding`) for one image; a list for a folder, a list, a tensor [N, C, H, W].

        Raises:
            BadData: there is no such file, no image in the folder, or an image that cannot be read.
            FinetuneBNError: an argument is wrong.
        """
        number("batch_size", batch_size, least=1, whole=True)
        top = number("top", top, least=1, whole=True, none=True)
        choice("on_bad_image", on_bad_image, ("error", "skip"))
        if device is not None:
            self.to(checked_device(device))
        items = list(items_of(images, self.card.in_chans))
        bad: list[str] = []
        answers = list(self._answers(items, int(batch_size), top, bad if on_bad_image == "skip" else None, progress))
        if bad:
            warnings.warn(f"{len(bad)} of {len(items)} images cannot be read and are left out: {bad}", stacklevel=2)
        if not is_many(images):
            if not answers:
                raise BadData(complaint("images", items[0][0], "an image that can be read"))
            return answers[0]
        return answers

    @property
    def _transform(self) -> Callable[[Any], Any]:
        if "_made_transform" not in self.__dict__:
            self.__dict__["_made_transform"] = self.card.transform.build()
        made: Callable[[Any], Any] = self.__dict__["_made_transform"]
        return made

    def _answers(
        self,
        items: list[Item],
        batch_size: int,
        top: int | None,
        bad: list[str] | None,
        progress: bool | None,
    ) -> Iterator[Prediction | Embedding]:
        """Yield an answer for each image; names of those that cannot be read go into `bad` where it is a list."""
        errors: tuple[type[Exception], ...] = (BadData, *unreadable())

        def prepare(item: Item) -> Tensor | None:
            try:
                return self.transform(item[1]())
            except errors as error:
                if bad is not None:
                    return None
                if isinstance(error, FinetuneBNError):
                    raise
                why = f"It failed with: {type(error).__name__}: {error}."
                raise BadData(complaint("image", item[0], "an image that can be read whole", why)) from error

        like = next((p for p in self.net.parameters() if p.is_floating_point()), torch.empty(0))
        with (
            ThreadPoolExecutor(max_workers=min(READERS, os.cpu_count() or 1)) as pool,
            progress_bar("Predicting", "images", len(items), progress) as report,
            quietly(self.net),
        ):
            for start in range(0, len(items), batch_size):
                part = items[start : start + batch_size]
                tensors = list(pool.map(prepare, part))
                if bad is not None:
                    bad += [item[0] for item, tensor in zip(part, tensors, strict=True) if tensor is None]
                names = [item[0] for item, tensor in zip(part, tensors, strict=True) if tensor is not None]
                ready = [tensor for tensor in tensors if tensor is not None]
                if ready:
                    outputs = self(torch.stack(ready).to(like.device, like.dtype)).cpu()
                    yield from self._named(names, outputs, top)
                report(start + len(part), "")

    def _named(self, names: list[str], outputs: Tensor, top: int | None) -> Iterator[Prediction | Embedding]:
        if not bool(torch.isfinite(outputs).all()):
            allowed = "a network whose outputs are finite numbers"
            raise FinetuneBNError(complaint("model", f"NaN or infinity for {names[0]}, ...", allowed))
        if self.card.task == "embedding":
            yield from (Embedding(name, vector.clone()) for name, vector in zip(names, outputs.float(), strict=True))
            return
        scores, order = outputs.softmax(1).topk(min(top or len(self.classes), len(self.classes)))
        for name, score, best in zip(names, scores.tolist(), order.tolist(), strict=True):
            yield Prediction(name, tuple(self.classes[i] for i in best), tuple(score))


def checked_device(device: str | torch.device) -> torch.device:
    """Return a device of this machine, or raise `FinetuneBNError` that says which there are."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except Exception as error:  # what torch raises depends on the kind of device
        allowed = "a device of this machine: cpu" + (", cuda" if torch.cuda.is_available() else "")
        raise FinetuneBNError(complaint("device", str(device), allowed)) from error
    return found
