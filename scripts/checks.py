"""Every claim about a conversion, checked on one timm net with random BatchNorm (BN) statistics and affine.

A layer that is lost, mixed up or left out changes the output then. For each affine kind (none, shift, merged,
original), on a batch of two random images:
    found        the plan lists every layer that an independent count by isinstance finds, shared ones under all names
    converted    afterwards no BatchNorm is left and as many frozen layers are there, under the same names
    eval_equal   eval-mode outputs are the same: bit for bit for none, shift, original; for merged, which rounds in
                 another order, to TOLERANCE in float64, and in float32 also where the net amplifies rounding errors:
                 to what a change of the input by 1e-6 does to the outputs
    train_equal  training-mode outputs are the eval-mode outputs, dropout and drop-path being set to zero
    still        a training-mode forward and backward changes no tensor of the state dict by a bit
    gradients    a training-mode backward gives the gradients of the untouched net in eval mode; gamma' aside, which the
                 untouched net does not have
    loads        strict loading both ways: vanilla checkpoint into converted net, converted into vanilla; same outputs
    reverts      revert gives back the same modules and, bit for bit, the same state dict; also after loading
    folded       every layer that the plan names shares its backward pass with the convolution in front; in float64
                 outputs and each parameter's gradient are as without to TOLERANCE, in float32 each layer's gradients
                 are no further from float64 than without; and revert gives back the same modules
All but the last are of layers that share nothing (`fold="never"`).
"""

from __future__ import annotations

import contextlib
import copy
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

import finetune_bn as fbn
from finetune_bn.functional.frozen import TOLERANCE
from finetune_bn.layers.frozen import AFFINE_KINDS, Affine, FrozenBatchNorm
from finetune_bn.utilities.probe import distance

CHECKS = (
    "found",
    "converted",
    "eval_equal",
    "train_equal",
    "still",
    "gradients",
    "loads",
    "reverts",
    "folded",
    "folded32",
)
SIZES = (64, 96, 128, 160, 192, 224, 256)
SEED = 0
FLOAT32 = 1e-5  # what a folded layer may differ by in float32, relative to the largest value


def check(name: str) -> dict[str, Any]:
    """Return the row of one timm net: what was found, every check's result, and the error if one was raised."""
    start = time.monotonic()
    row: dict[str, Any] = {"model": name, "checks": {}, "ok": False, "error": ""}
    try:
        NetCheck(name, row).run()
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        row["error"] = f"{type(error).__name__}: {error} ({Path(frame.filename).name}, line {frame.lineno})"
    # "other randomness" is a finding that is named, not a failure.
    row["ok"] = not row["error"] and all(row["checks"].get(c) in (True, "other randomness") for c in CHECKS)
    row["seconds"] = round(time.monotonic() - start, 1)
    return row


class NetCheck:
    """All checks on one net; results go into `row` as soon as they are there."""

    def __init__(self, name: str, row: dict[str, Any]) -> None:
        self.name, self.row, self.checks = name, row, row["checks"]
        self.net = build(name, SEED)
        self.other = build(name, SEED + 1)  # the vanilla net that checkpoints are loaded into
        row["parameters_million"] = round(sum(p.numel() for p in self.net.parameters()) / 1e6, 2)
        self.layers = [m for m in self.net.modules() if isinstance(m, _BatchNorm)]
        row["layers"] = len(self.layers)
        row["kinds"] = dict(Counter(type(m).__name__ for m in self.layers))
        self.images = fitting_images(self.net)
        row["input"] = list(self.images.shape[1:])
        randomize(self.net, self.images)
        self.state = snapshot(self.net)
        self.reference = outputs(self.net, self.images)
        check_alive(self.reference)
        nudged = distance(outputs(self.net, self.images * (1 + 1e-6)), self.reference)
        self.allowed = row["allowed"] = max(TOLERANCE[torch.float32], nudged)
        self.features: bool | None = None  # whether features are compared; known after the first pass in training mode

    def run(self) -> None:
        """Run every check for every affine kind; a check holds if it holds for all of them."""
        difference: dict[str, dict[str, float]] = {
            "eval": {},
            "train": {},
            "gradient": {},
            "folded": {},
            "folded32": {},
        }
        self.row["difference"] = difference
        self.row["compared"] = "outputs"
        held: dict[str, list[bool | str]] = {c: [] for c in CHECKS}
        for affine in AFFINE_KINDS:
            for name, result in self.steps(affine, difference):
                held[name].append(result)
        held["folded"] = list(self.folded_steps(difference))
        held["folded32"] = [self.folded_in_float32(difference)]
        for name, results in held.items():
            named = [r for r in results if isinstance(r, str)]
            self.checks[name] = False if False in results else (named[0] if named else True)

    def steps(self, affine: Affine, difference: dict[str, dict[str, float]]) -> Iterator[tuple[str, bool | str]]:
        """Convert, check, revert; then convert, load, check, revert once more. The net is vanilla again at the end."""
        net, images = self.net, self.images
        names = names_of(net, _BatchNorm)
        description = describe(net)
        plan = fbn.plan(net, fbn.Freeze(affine=affine, fold="never"), images)
        planned = [row for row in plan.rows if row.policy is not None and not row.refused]
        self.row["left_alone"] = sorted(f"{r.names[0]} ({r.kind})" for r in plan.rows if r.policy is None)
        yield "found", len(planned) == len(self.layers) and {n for r in planned for n in r.names} == names

        fbn.convert(net, plan, example_input=images)
        frozen = [m for m in net.modules() if isinstance(m, FrozenBatchNorm)]
        left = [m for m in net.modules() if isinstance(m, _BatchNorm)]
        same_names = names_of(net, FrozenBatchNorm) == names
        yield "converted", not left and len(frozen) == len(self.layers) and same_names

        in_eval = outputs(net, images)
        difference["eval"][affine] = distance(in_eval, self.reference)
        yield "eval_equal", self.equal(difference["eval"][affine], exact=affine != "merged")

        converted_state = snapshot(net)
        yield from self.train_steps(affine, plan, in_eval, difference)
        yield "still", same_bits(net.state_dict(), converted_state)
        self.other.load_state_dict(converted_state, strict=True)
        into_vanilla = distance(outputs(self.other, images), self.reference)
        yield "loads", self.equal(into_vanilla, exact=affine != "merged")
        fbn.revert(net, example_input=images)
        yield "reverts", describe(net) == description and same_bits(net.state_dict(), self.state)

        fbn.convert(net, plan, verify=False)
        scramble(net)
        net.load_state_dict(self.state, strict=True)
        into_converted = distance(outputs(net, images), self.reference)
        yield "loads", self.equal(into_converted, exact=affine != "merged")
        fbn.revert(net, verify=False)
        yield "reverts", describe(net) == description and same_bits(net.state_dict(), self.state)

    def train_steps(
        self, affine: Affine, plan: fbn.Plan, in_eval: list[Tensor], difference: dict[str, dict[str, float]]
    ) -> Iterator[tuple[str, bool | str]]:
        """Compare training mode with eval mode, outputs and gradients; only features where outputs are of two forms."""
        net, images = self.net, self.images
        if self.features is None:
            self.find_forms(in_eval)
        if "random" in self.row:
            yield from ((name, "other randomness") for name in ("train_equal", "gradients"))
            return
        features = bool(self.features)
        outcome, gradients = train_pass(net, images, features)
        difference["train"][affine] = distance(outcome, outputs(net, images, features) if features else in_eval)
        yield "train_equal", self.equal(difference["train"][affine])

        self.other.load_state_dict(self.state, strict=True)
        if affine == "merged":
            yield from self.merged_steps(plan, features, difference)
            return
        _, expected = train_pass(self.other, images, features, training=False)
        off = difference["gradient"][affine] = gradient_distance(gradients, expected)
        trained = {n for n, _ in net.named_parameters()}
        yield "gradients", gradients.keys() == expected.keys() & trained and self.equal(off)

    def merged_steps(
        self, plan: fbn.Plan, features: bool, difference: dict[str, dict[str, float]]
    ) -> Iterator[tuple[str, bool | str]]:
        """Compare outputs and gradients of the merged form in float64.

        Rounding in another order moves some inputs of a ReLU across zero, and each switches a whole path of the
        gradient: in float32 that hides all but gross errors, in float64 it does not happen.
        """
        net, images, exact = self.other.double(), self.images.double(), TOLERANCE[torch.float64]
        before = outputs(net, images)
        _, expected = train_pass(net, images, features, training=False)
        fbn.convert(net, plan, verify=False)
        off = difference["eval"]["merged in float64"] = distance(outputs(net, images), before)
        yield "eval_equal", off <= exact
        _, gradients = train_pass(net, images, features)
        # gamma' is another parameter than gamma, with another gradient.
        for name in names_of(net, FrozenBatchNorm):
            gradients.pop(f"{name}.weight", None)
            expected.pop(f"{name}.weight", None)
        off = difference["gradient"]["merged"] = gradient_distance(gradients, expected)
        yield "gradients", gradients.keys() == expected.keys() and off <= exact
        fbn.revert(net, verify=False)
        net.float()

    def folded_steps(self, difference: dict[str, dict[str, float]]) -> Iterator[bool]:
        """Compare the net with shared backward passes with itself without, in float64 and eval mode, with gradients."""
        self.other.load_state_dict(self.state, strict=True)
        net, images, features = self.other.double(), self.images.double(), bool(self.features)
        description = describe(net)
        for affine in ("merged", "original"):
            rows = fbn.plan(net, fbn.Freeze(affine=affine), images).rows
            why = Counter(row.not_folded for row in rows if row.not_folded)
            pairs = {row.names[0] for row in rows if row.folded_into}
            self.row["pairs"], self.row["not_folded"] = len(pairs), dict(why.most_common())
            if not pairs:
                continue
            fbn.convert(net, fbn.Freeze(affine=affine, fold="always"), example_input=images, verify=False)
            with sharing_layers(net) as shared:
                outcome, gradients = train_pass(net, images, features, training=False)
            set_fold(net, "never")
            expected_outcome, expected = train_pass(net, images, features, training=False)
            off = max(distance(outcome, expected_outcome), each_distance(gradients, expected))
            difference["folded"][affine] = off
            yield pairs <= shared and gradients.keys() == expected.keys() and off <= TOLERANCE[torch.float64]
            fbn.revert(net, verify=False)
            yield describe(net) == description

    def folded_in_float32(self, difference: dict[str, dict[str, float]]) -> bool:
        """Compare each layer that shares, in float32, with itself in float64, and with itself without sharing.

        It may be off by what rounding makes of the layer without sharing, and some more.
        """
        net = self.other.float()
        net.load_state_dict(self.state, strict=True)
        if not self.row["pairs"]:
            return True
        rows = fbn.plan(net, fbn.Freeze(affine="original"), self.images).rows
        names = [(row.folded_into, row.names[0]) for row in rows if row.folded_into]
        fbn.convert(net, fbn.Freeze(affine="original", fold="always"), example_input=self.images, verify=False)
        inputs: dict[nn.Module, Tensor] = {}
        with torch.no_grad():
            handles = [net.get_submodule(name).register_forward_hook(remember(inputs)) for name, _ in names]
            forward(net.eval(), self.images, bool(self.features))
            for handle in handles:
                handle.remove()
        worst, right = 0.0, True
        for name, norm in names:
            pair = nn.Sequential(net.get_submodule(name), net.get_submodule(norm))
            off = [0.0, 0.0]
            exact = pair_pass(copy.deepcopy(pair).double(), inputs[pair[0]].double())[1]
            for i, fold in enumerate(("always", "never")):
                set_fold(pair, fold)
                off[i] = each_distance(pair_pass(pair, inputs[pair[0]])[1], exact)
            worst, right = max(worst, off[0]), right and off[0] <= max(1.2 * off[1], FLOAT32)
        difference["folded32"]["original"] = worst
        fbn.revert(net, verify=False)
        return right

    def find_forms(self, in_eval: list[Tensor]) -> None:
        """Find out, once, whether training mode returns what eval mode returns, and the same each time."""
        outcome, _ = train_pass(self.net, self.images, features=False)
        self.features = [t.shape for t in outcome] != [t.shape for t in in_eval]
        if self.features:
            self.row["compared"] = "forward_features, as training mode returns other outputs than eval mode"
        runs = [train_pass(self.net, self.images, self.features, seed)[0] for seed in (0, 1)]
        if distance(*runs) != 0:
            self.row["random"] = random_modules(self.net, self.images, self.features)

    def equal(self, off: float, exact: bool = False) -> bool:
        return off == 0 if exact else off <= self.allowed


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

    def watched(self: FrozenBatchNorm, x: Tensor) -> Tensor:
        y = normalized(self, x)
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
