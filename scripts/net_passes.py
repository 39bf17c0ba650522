"""Networks with random statistics, passes through them and distances: what `checks.py` compares by."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.utilities.probe import distance

SIZES = (64, 96, 128, 160, 192, 224, 256)
SEED = 0


def build(name: str, seed: int) -> nn.Module:
    """Return the net with nothing but BN random in training mode, and no branch switched off."""
    import timm

    torch.manual_seed(seed)
    net: nn.Module = timm.create_model(name, pretrained=False)
    affine = {id(p) for m in net.modules() if isinstance(m, _BatchNorm) for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for parameter in net.parameters():
            # Layer scales and last layers that start at (nearly) zero would hide the BN layers in front of them.
            constant = parameter.numel() and parameter.min() == parameter.max()
            if id(parameter) not in affine and constant and parameter.flatten()[0].abs() <= 1e-2:
                parameter.uniform_(0.05, 0.15)
    for module in net.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for key, value in vars(module).items():
            if isinstance(value, float) and "drop" in key:  # drop_prob, drop_rate, MultiheadAttention.dropout
                setattr(module, key, 0.0)
    return net


def randomize(net: nn.Module, images: Tensor) -> None:
    """Give every BN random affine values, and statistics at random around those of its input for random images.

    The images meet each layer when all before it are done. With statistics that do not fit, the signal of a deep net
    dies out on its way, or grows until rounding errors decide the outputs.
    """
    layers = [m for m in net.modules() if isinstance(m, _BatchNorm)]

    def draw(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        done.append(layer)
        mean: Any = layer.running_mean
        var: Any = layer.running_var
        if done.count(layer) > 1 or mean is None or var is None:
            return
        x = args[0].transpose(0, 1).flatten(1)
        mean.copy_(x.mean(1))
        var.copy_(x.var(1, correction=0))
        var.clamp_(min=max(0.3 * float(var.median()), 1e-3))  # a channel may be dead
        mean.add_(torch.randn_like(mean) * 0.1 * var.sqrt())
        var.mul_(torch.empty_like(var).uniform_(0.5, 1.5))

    done: list[nn.Module] = []
    handles = [layer.register_forward_pre_hook(draw) for layer in layers]
    with torch.no_grad():
        for layer in layers:
            if layer.weight is not None:
                layer.weight.uniform_(0.5, 1.5)
            if layer.bias is not None:
                layer.bias.normal_(0, 0.1)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.random_(1, 1000)
        net.eval()
        net(torch.randn(8, *images.shape[1:]))
    for handle in handles:
        handle.remove()


def fitting_images(net: nn.Module) -> Tensor:
    """Return two random images, as small as the net takes them."""
    config: Any = net.pretrained_cfg
    channels, *default = config["input_size"]
    smallest = config.get("min_input_size") or config["input_size"]
    sizes = sorted({(s, s) for s in SIZES} | {tuple(smallest[1:]), tuple(default)})
    fits = [s for s in sizes if s[0] <= default[0] and not config.get("fixed_input_size")] or [tuple(default)]
    for size in fits:
        images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(SEED))
        try:
            outputs(net, images)
        except Exception:  # whatever a net says to a size that it does not take
            if size == fits[-1]:
                raise
        else:
            return images
    raise AssertionError("unreachable: the last size returns or raises")


def forward(net: nn.Module, images: Tensor, features: bool) -> list[Tensor]:
    """Return the tensors that the net, or its `forward_features`, returns."""
    result = net.forward_features(images) if features else net(images)
    return [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]


def outputs(net: nn.Module, images: Tensor, features: bool = False) -> list[Tensor]:
    """Return what the net returns in eval mode."""
    net.train()
    net.eval()  # the change of mode clears what nets such as LeViT cache in eval mode
    with torch.no_grad():
        return forward(net, images, features)


def train_pass(
    net: nn.Module, images: Tensor, features: bool, seed: int = 0, training: bool = True
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return outputs and gradients by name of one forward and backward of a fixed random function of the outputs."""
    net.eval()
    net.train(training)
    for seed_all in (torch.manual_seed, np.random.seed, random.seed):
        seed_all(seed)
    result = forward(net, images, features)
    generator = torch.Generator().manual_seed(SEED)
    torch.stack([(t * torch.randn(t.shape, generator=generator)).sum() for t in result]).sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return [t.detach() for t in result], gradients


def remember(inputs: dict[nn.Module, Tensor]) -> Callable[..., None]:
    """Return a forward hook that keeps a module's first input."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        inputs.setdefault(module, args[0])

    return hook


def pair_pass(pair: nn.Sequential, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output of a convolution and the norm behind it, without its activation, and gradients.

    The gradients are those of a fixed random function of the output, for the input and both modules' parameters.
    """
    convolution, norm, x = pair[0], pair[1], x.detach().clone().requires_grad_()
    z = convolution(x)
    y = FrozenBatchNorm.forward(norm, z) if isinstance(norm, FrozenBatchNorm) else norm(z)
    del z  # whoever holds it in backward gets its gradient, by the way that shares nothing
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(SEED)).to(y)).sum().backward()
    named = {"x": x}
    for i, module in enumerate(pair):
        named |= {f"{i}.{name}": parameter for name, parameter in module.named_parameters()}
    gradients = {name: t.grad for name, t in named.items() if t.grad is not None}
    for tensor in named.values():
        tensor.grad = None
    return y.detach(), gradients


def set_fold(net: nn.Module, fold: Any) -> None:
    """Let all frozen layers share backward or not."""
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm):
            module.fold = fold


@contextlib.contextmanager
def sharing_layers(net: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the layers that share their backward pass with a convolution."""
    found: set[str] = set()
    names = {id(module): name for name, module in net.named_modules()}
    normalized = FrozenBatchNorm._normalized

    def watched(self: FrozenBatchNorm, *arguments: Any) -> Tensor:
        y = normalized(self, *arguments)
        if "_Shared" in type(y.grad_fn).__name__:
            found.add(names[id(self)])
        return y

    FrozenBatchNorm._normalized = watched  # type: ignore[method-assign]
    try:
        yield found
    finally:
        FrozenBatchNorm._normalized = normalized  # type: ignore[method-assign]


def gradient_distance(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference over the norm, all gradients that both have taken as one vector."""
    pairs = [(gradients[n].double(), expected[n].double()) for n in gradients.keys() & expected.keys()]
    off, norm = (sum(float(t.square().sum()) for t in ts) for ts in ((a - b for a, b in pairs), (b for _, b in pairs)))
    return float((off / norm) ** 0.5)


def each_distance(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of a gradient, relative to its own largest value and to 1e-6 of the largest of all.

    Some gradients are zero but for rounding, as that of a bias before a softmax.
    """
    floor = 1e-6 * max((float(t.abs().max()) for t in expected.values()), default=0.0)
    pairs = [(gradients[n], expected[n]) for n in gradients.keys() & expected.keys()]
    return max((float((a - b).abs().max()) / max(float(b.abs().max()), floor) for a, b in pairs), default=0.0)


def random_modules(net: nn.Module, images: Tensor, features: bool) -> list[str]:
    """Return the innermost modules that turn the same input into different outputs under two seeds."""
    runs: list[list[tuple[str, list[Tensor], list[Tensor]]]] = []
    for seed in (0, 1):
        record: list[tuple[str, list[Tensor], list[Tensor]]] = []
        handles = [m.register_forward_hook(recorder(name, record)) for name, m in net.named_modules()]
        train_pass(net, images, features, seed)
        for handle in handles:
            handle.remove()
        runs.append(record)
    found = {a[0] for a, b in zip(*runs, strict=False) if distance(a[1], b[1]) == 0 and distance(a[2], b[2]) != 0}
    inner = {n for n in found if not any(o != n and (not n or o.startswith(f"{n}.")) for o in found)}
    return sorted(f"{n or '(root)'} ({type(net.get_submodule(n)).__name__})" for n in inner)


def recorder(name: str, record: list[tuple[str, list[Tensor], list[Tensor]]]) -> Callable[..., None]:
    """Return a forward hook that appends its module's name, inputs and outputs to `record`."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        sides = [[t.detach().clone() for t in tree_leaves(s) if torch.is_tensor(t)] for s in (args, output)]
        record.append((name, sides[0], sides[1]))

    return hook


def check_alive(result: list[Tensor]) -> None:
    """Raise unless the outputs are finite and tell the two images apart: on others every comparison would hold."""
    if not all(torch.isfinite(t).all() for t in result):
        raise RuntimeError("this random net gives outputs that are not finite, so it can show nothing")
    if all(distance([t[:1]], [t[1:2]]) < 1e-2 for t in result):
        raise RuntimeError("this random net gives two images the same outputs, so it can show nothing")


def names_of(net: nn.Module, kind: type[nn.Module]) -> set[str]:
    return {name for name, m in net.named_modules(remove_duplicate=False) if isinstance(m, kind)}


def describe(net: nn.Module) -> tuple[str, list[tuple[str, bool]]]:
    """Return the module tree with each layer's settings, and which parameters are trained."""
    return repr(net), [(name, p.requires_grad) for name, p in net.named_parameters()]


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def scramble(net: nn.Module) -> None:
    """Overwrite every number of the state dict, so that what is right afterwards was loaded."""
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.mul_(0.5).add_(0.25)
        else:
            value.zero_()


def same_bits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Tell whether keys, their order, dtypes and every bit agree."""
    if list(state) != list(expected):
        return False
    pairs = [(state[key], expected[key]) for key in expected]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
        for a, b in pairs
    )
