"""What a model file says of itself beside the weights: network, classes, images, BatchNorm layers, versions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from finetune_bn.backbones.weights import import_timm
from finetune_bn.conversion.plan import Plan
from finetune_bn.errors import BadData, FinetuneBNError, complaint
from finetune_bn.utilities.checks import number

FORMAT = 1
Task = Literal["classification", "embedding"]
_LARGEST_SIDE = 100_000
# What the entries of a header may be, which anyone can write.
_KINDS: dict[str, tuple[type, str]] = {
    "backbone": (str, "a name of timm.list_models()"),
    "num_classes": (int, "a whole number"),
    "in_chans": (int, "a whole number"),
    "normalize": (bool, "True or False"),
    "arguments": (Mapping, "arguments of timm.create_model by name"),
    "about": (Mapping, "plain data by name"),
    "versions": (Mapping, "versions by name"),
}


@dataclass(frozen=True)
class Transform:
    """From an image to what the network takes, as it is evaluated.

    Attributes:
        size: height and width in pixels.
        mean: per channel, subtracted from values between 0 and 1.
        std: per channel, divided by.
        interpolation: how images are resized.
        crop_pct: side of the part that is kept, as a share of the resized image.
        crop_mode: timm's `center`, `squash` or `border`.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, Sequence) and len(self.size) == 2 else (0,)
        if not all(isinstance(side, int) and 0 < side <= _LARGEST_SIDE for side in sides):
            allowed = f"height and width, whole numbers from 1 to {_LARGEST_SIDE:,}"
            raise FinetuneBNError(complaint("transform.size", self.size, allowed))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not all(isinstance(v, (int, float)) for v in values):
                raise FinetuneBNError(complaint(f"transform.{name}", values, "a number for each channel"))
        if not len(self.mean) == len(self.std) > 0:
            raise FinetuneBNError(complaint("transform.std", self.std, f"{len(self.mean)} numbers, as in mean"))
        number("transform.crop_pct", self.crop_pct, above=0)
        for name in ("interpolation", "crop_mode"):
            if not isinstance(getattr(self, name), str):
                raise FinetuneBNError(complaint(f"transform.{name}", getattr(self, name), "a word that timm knows"))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Transform:
        """Return the transform of a timm data config, as `finetune_bn.backbones.data_config` gives it."""
        return cls(
            tuple(config["input_size"][-2:]),
            tuple(config["mean"]),
            tuple(config["std"]),
            config["interpolation"],
            config["crop_pct"],
            config.get("crop_mode", "center"),
        )

    def build(self) -> Callable[[Any], Any]:
        """Return the function from a Pillow image to a float tensor [C, height, width]."""
        options = {name: getattr(self, name) for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
        made: Callable[[Any], Any] = import_timm().data.create_transform(
            input_size=(len(self.mean), *self.size), is_training=False, **options
        )
        return made


@dataclass(frozen=True)
class Card:
    """What is needed beside the weights to use a network.

    Attributes:
        task: `classification` (the network returns logits) or `embedding`.
        backbone: name of the timm model.
        num_classes: size of its head; 0 for none.
        in_chans: channels of the images.
        arguments: further arguments of `timm.create_model`.
        classes: names, in the order of the logits; empty for embeddings.
        normalize: whether embeddings are scaled to length 1.
        transform: how images are prepared.
        plan: the policy of each BatchNorm layer in training.
        about: what else is worth knowing, such as where the model comes from; plain data.
        versions: of the software that wrote the file.
    """

    task: Task
    backbone: str
    num_classes: int
    in_chans: int
    transform: Transform
    arguments: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    normalize: bool = False
    plan: Plan = field(default_factory=lambda: Plan("", ()))
    about: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise FinetuneBNError(complaint("task", self.task, " or ".join(map(repr, get_args(Task)))))
        for name, (kind, allowed) in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise FinetuneBNError(complaint(name, value, allowed))
        wanted = self.num_classes if self.task == "classification" else 0
        if not len(self.classes) == len(set(self.classes)) == wanted:
            allowed = f"{wanted} different names, one for each output" if wanted else "none for embeddings"
            raise FinetuneBNError(complaint("classes", list(self.classes), allowed))
        if self.task == "classification" and wanted < 2:
            raise FinetuneBNError(complaint("num_classes", wanted, "2 or more", "Or task='embedding'."))

    def to_json(self) -> str:
        """Return the card as JSON.

        Raises:
            FinetuneBNError: `arguments` or `about` hold more than plain data.
        """
        data = asdict(self) | {"format": FORMAT, "plan": self.plan.to_dict()}
        for name in ("arguments", "about"):
            try:
                json.dumps(data[name])
            except TypeError as error:
                allowed = "plain data: numbers, words, lists, dictionaries"
                raise FinetuneBNError(complaint(name, data[name], allowed, f"{error}.")) from error
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str, origin: str) -> Card:
        """Return the card that `to_json` wrote.

        Args:
            text: the JSON.
            origin: what errors call the place that it is from.

        Raises:
            BadData: it is damaged, or of a version that this one cannot read.
        """
        allowed = "a model file as finetune_bn.save and FinetuneReport write it"
        try:
            data = json.loads(text)
            version = number("format", data.pop("format"), least=1, whole=True)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadData(complaint("path", origin, allowed, f"Its header cannot be read ({error}).")) from error
        if version > FORMAT:
            wrote = (data.get("versions") or {}).get("finetune-bn", "a later version")
            remedy = f"It is of format {version}, written by finetune-bn {wrote}: pip install --upgrade finetune-bn."
            raise BadData(complaint("path", origin, f"a file of format {FORMAT} or older", remedy))
        try:
            transform: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in data.pop("transform").items()
            }
            classes = tuple(map(str, data.pop("classes")))
            plan = Plan.from_dict(data.pop("plan"))
            return cls(**data, transform=Transform(**transform), classes=classes, plan=plan)
        except (AttributeError, KeyError, TypeError, FinetuneBNError) as error:
            raise BadData(complaint("path", origin, allowed, f"Its header is damaged ({error}).")) from error
