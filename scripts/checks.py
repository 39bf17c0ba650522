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
                 outputs and each parameter's gradient are as without to TOLERANCE; revert gives back the same modules
    folded32     in float32 the gradients of each such layer are at most 1.2 times as far from those in float64 as they
                 are without sharing
All but the last are of layers that share nothing (`fold="never"`).
"""

from __future__ import annotations

import copy
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from net_passes import (
    SEED,
    build,
    check_alive,
    describe,
    each_distance,
    fitting_images,
    forward,
    gradient_distance,
    names_of,
    outputs,
    pair_pass,
    random_modules,
    randomize,
    remember,
    same_bits,
    scramble,
    set_fold,
    sharing_layers,
    snapshot,
    train_pass,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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
FLOAT32 = 1e-5  # what a gradient of a folded layer may be off by in float32, relative to its largest value
ROUNDING = 1e-6  # eight roundings of float32: who is no further off is exact, whoever else is nearer


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
        """Compare each layer that shares, in float32, with itself in float64, and so without sharing too.

        All its gradients as one vector may be off by what rounding makes of them without sharing, and a fifth more.
        Each gradient by itself may be off by FLOAT32: that of gamma follows from the gradient of the weight, and is as
        exact as that one is, while without sharing it is a sum of its own.
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
        modes = ("always", "never")
        worst, ratio, right = dict.fromkeys(modes, 0.0), 0.0, True
        for name, norm in names:
            pair = nn.Sequential(net.get_submodule(name), net.get_submodule(norm))
            exact = pair_pass(copy.deepcopy(pair).double(), inputs[pair[0]].double())[1]
            together, alone = {}, {}
            for mode in modes:
                set_fold(pair, mode)
                with sharing_layers(pair) as shared:
                    gradients = pair_pass(pair, inputs[pair[0]])[1]
                right = right and (mode == "always") == bool(shared)
                together[mode], alone[mode] = gradient_distance(gradients, exact), each_distance(gradients, exact)
                worst[mode] = max(worst[mode], alone[mode])
            ratio = max(ratio, together["always"] / max(together["never"], ROUNDING))
            right = right and together["always"] <= max(1.2 * together["never"], ROUNDING)
            right = right and alone["always"] <= max(1.2 * alone["never"], FLOAT32)
        difference["folded32"] = {"original": worst["always"], "unfolded": worst["never"], "ratio": ratio}
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
