"""What a network goes through from plan to export, and what must hold at each step."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

import finetune_bn as fbn
from finetune_bn.conversion.plan import Plan
from finetune_bn.conversion.policies import Policy
from finetune_bn.errors import ConversionMismatch, FinetuneBNError
from finetune_bn.functional.frozen import TOLERANCE
from finetune_bn.layers import FrozenBatchNorm
from finetune_bn.layers.frozen import LEARNABLE
from finetune_bn.utilities.probe import distance, tensors_in
from tests.fuzz.networks import Spec
from tests.tools import assert_same_state, untouched, without_extra_state

CHANGE_EVALUATION = (fbn.ToGroupNorm, fbn.EvalNorm, fbn.NormalizeOnly)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Refused(Exception):
    """A step was refused by name; what was refused is as it was, and the life ends here."""


def live(spec: Spec, policy: Policy, second: Policy, choice: int) -> Counter[str]:
    """Take a network through its life, assert what must hold, and return what happened, by name.

    Args:
        spec: the network.
        policy: what happens to its layers.
        second: what happens to them later, after some training.
        choice: which of the dear steps (merge, export, two ways to recalibrate) are taken.
    """
    happened: Counter[str] = Counter()
    # Warnings and the log tell users what is unusual; here all is.
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _live(spec, policy, second, choice, happened)
    except Refused as refused:
        happened[f"refused: {refused}"] += 1
    finally:
        logging.disable(level)
    return happened


def _live(spec: Spec, policy: Policy, second: Policy, choice: int, happened: Counter[str]) -> None:
    x = spec.images()
    original, model = spec.build(), spec.build()
    the_plan = planned(model, policy, x)
    before = outputs(original, x)
    with refusals(model, "convert", may_differ=spec.is_picky):
        converted = fbn.convert(model, policy, example_input=x)
    assert not the_plan.refused, "convert carried out what plan says is refused"
    happened["converted"] += 1
    same_function = not any(isinstance(row.policy, CHANGE_EVALUATION) for row in the_plan.rows)
    check_converted(original, converted, the_plan, policy, x, before, same_function)
    fbn.status(converted).to_dict()
    check_reverted(spec, policy, x)
    check_gradients(spec, converted, the_plan, x, happened)
    check_step(converted, x, happened)
    check_recalibrated(converted, spec, x, choice, happened)
    check_saved(converted, spec, policy, x, same_function)
    check_changed(converted, spec, second, x, same_function, happened)
    if choice % 5 == 0:
        check_merged(converted, x, spec.is_picky, happened)
    if choice % 100 == 7:
        check_exported(converted, x, happened)
    after = outputs(converted, x)
    with refusals(converted, "revert after training", may_differ=spec.is_picky):
        reverted = fbn.revert(converted, example_input=x)
    assert not any(type(m).__module__.startswith("finetune_bn.layers") for m in reverted.modules())
    if same_function:
        assert_close(reverted, outputs(reverted, x), after, "revert after training")
    happened["lived to its end"] += 1


@contextmanager
def refusals(model: nn.Module, step: str, may_differ: bool = False) -> Iterator[None]:
    """Let an error of ours end the life, once it is sure that the model is as it was.

    Args:
        model: what must be as it was.
        step: its name, for the account.
        may_differ: whether the network is one whose function a conversion changes; else that is no excuse.
    """
    with untouched_on_error(model):
        try:
            yield
        except FinetuneBNError as error:
            assert str(error).strip(), "an error without a word"
            if isinstance(error, ConversionMismatch) and not may_differ:
                raise
            raise Refused(f"{step}, {type(error).__name__}") from error


@contextmanager
def untouched_on_error(model: nn.Module) -> Iterator[None]:
    """Assert that a block that raises `Refused` leaves the model as it was."""
    check = untouched(model)
    check.__enter__()
    try:
        yield
    except Refused as refused:
        check.__exit__(None, None, None)
        raise refused


def planned(model: nn.Module, policy: Policy, x: Tensor) -> Plan:
    """Return the plan; it covers each layer once, with reasons, and the model is as it was."""
    with refusals(model, "plan"), untouched(model):
        the_plan = fbn.plan(model, policy, x)
    names: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _BatchNorm):
            names.setdefault(id(module), set()).add(name)
    rows = Counter(name for row in the_plan.rows for name in row.names)
    assert set(rows.values()) <= {1}, "a layer has two rows"
    for aliases in names.values():
        row = next((row for row in the_plan.rows if set(row.names) == aliases), None)
        assert row is not None, f"no row for {aliases}"
    for row in the_plan.rows:
        assert row.reason or (row.policy is not None and not row.refused), f"no reason for {row.names}"
    assert Plan.from_dict(json.loads(the_plan.to_json())) == the_plan
    assert all(row.names[0] in str(the_plan) for row in the_plan.rows)
    return the_plan


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what the model computes in eval mode; its modes are put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return tensors_in(model.eval()(x.clone()))
    finally:
        for module, mode in modes.items():
            module.training = mode


def assert_close(model: nn.Module, ours: list[Tensor], theirs: list[Tensor], what: str) -> None:
    """Assert that two networks computed the same, but for rounding."""
    allowed = max([TOLERANCE[p.dtype] for p in model.parameters()], default=TOLERANCE[torch.float32])
    off = distance(ours, theirs)
    assert off <= allowed, f"{what}: outputs differ by {off:.2g} of the largest value"


def check_converted(
    original: nn.Module,
    converted: nn.Module,
    the_plan: Plan,
    policy: Policy,
    x: Tensor,
    before: list[Tensor],
    same_function: bool,
) -> None:
    """Assert that keys, modes, dtypes and, where it is promised, the function in eval mode are those from before."""
    grouped = any(isinstance(row.policy, fbn.ToGroupNorm) for row in the_plan.rows)
    old, new = original.state_dict(), without_extra_state(converted.state_dict())
    if not grouped:
        assert old.keys() == new.keys(), "keys of the state dict changed"
    assert all(new[key].dtype == value.dtype for key, value in old.items() if key in new)
    replaced = {name for row in the_plan.rows for name in row.names}
    for name, module in original.named_modules():
        now = converted.get_submodule(name)
        if not any(f"{name}.".startswith(f"{r}.") for r in replaced):
            assert type(now).__qualname__ == type(module).__qualname__, name
            assert now.training == module.training, name
    if same_function:
        off = distance(outputs(converted, x), before)
        low = any(p.dtype == torch.bfloat16 for p in converted.parameters())
        allowed = 1e-3 if not low else TOLERANCE[torch.bfloat16]
        if off > allowed and low:  # half precision may be amplified: then float64 decides, as in the package
            wide = copy.deepcopy(original).double()
            off = distance(
                outputs(fbn.convert(wide, policy, verify=False), x.double()),
                outputs(copy.deepcopy(original).double(), x.double()),
            )
            allowed = TOLERANCE[torch.float64]
        assert off <= allowed, f"convert: outputs differ by {off:.2g} of the largest value"
    again = fbn.plan(converted, policy, x)
    assert not again.refused, "what was converted is refused when it is asked for again"


def check_reverted(spec: Spec, policy: Policy, x: Tensor) -> None:
    """Assert that a network that was converted and reverted is what it was, bit for bit."""
    model = spec.build()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = {name: type(module).__qualname__ for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    model = fbn.convert(model, policy, example_input=x, verify=False)
    try:
        model = fbn.revert(model, example_input=x, verify=False)
    except fbn.FinetuneBNError as error:
        assert "Nothing to revert" in str(error), error
    assert_same_state(model.state_dict(), state)
    assert {name: type(module).__qualname__ for name, module in model.named_modules()} == kinds
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert {name: module.training for name, module in model.named_modules()} == modes


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Return a loss; the same random draws each time."""
    torch.manual_seed(11)
    return torch.stack([(y.double() - 0.5).square().mean() for y in tensors_in(model(x.clone()), detach=False)]).sum()


def check_gradients(spec: Spec, converted: nn.Module, the_plan: Plan, x: Tensor, happened: Counter[str]) -> None:
    """Assert that frozen layers give the gradients of BatchNorm layers in eval mode, where all are frozen."""
    frozen = all(
        isinstance(row.policy, fbn.Freeze) and row.policy.noise is None for row in the_plan.rows if row.num_features
    )
    if not frozen or spec.dtype == "bfloat16" or any(row.policy is None for row in the_plan.rows):
        return
    reference, model = spec.build().train(), copy.deepcopy(converted).train()
    for module in reference.modules():
        if isinstance(module, _BatchNorm):
            module.training = False  # of a norm+act layer the dropout goes on
    ours, theirs = loss_of(model, x), loss_of(reference, x)
    assert torch.isclose(ours, theirs, rtol=1e-3), f"in training {float(ours)} and {float(theirs)}"
    if not ours.requires_grad:
        return
    if theirs.requires_grad:
        theirs.backward()
    ours.backward()
    layers = {name for row in the_plan.rows for name in row.names}
    expected = dict(reference.named_parameters())
    largest = max((float(p.grad.abs().max()) for p in expected.values() if p.grad is not None), default=1.0)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] in layers or parameter.grad is None:
            continue
        wanted = expected[name].grad
        assert wanted is not None, name
        off = float((parameter.grad - wanted).abs().max()) / max(largest, 1e-12)
        assert off < 1e-3, f"gradient of {name} is off by {off:.2g} of the largest"
    happened["gradients compared"] += 1


def check_step(model: nn.Module, x: Tensor, happened: Counter[str]) -> None:
    """Train a step; what is frozen does not move, and nothing becomes NaN."""
    model.train()
    fixed = {
        (name, part): tensor.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, FrozenBatchNorm)
        for part, tensor in layer.state_dict(keep_vars=True).items()
        if part in STATISTICS or (part in ("weight", "bias") and part not in LEARNABLE[layer.affine_kind])
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=1e-2) if parameters else None
    for _ in range(2):
        loss = loss_of(model, x)
        assert torch.isfinite(loss), "the loss is no number"
        if optimizer is None or not loss.requires_grad:
            continue
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None)
        optimizer.step()
    for (name, part), value in fixed.items():
        now = model.get_submodule(name).state_dict()[part]
        assert torch.equal(now, value), f"{name}.{part} is frozen, and moved in a training step"
    happened["trained"] += 1


def check_recalibrated(model: nn.Module, spec: Spec, x: Tensor, choice: int, happened: Counter[str]) -> None:
    """Recalibrate; only statistics move, and how the images are cut makes no difference to the exact way."""
    batches = [x, spec.images(5, seed=1)]
    other = copy.deepcopy(model) if choice % 3 == 0 else None
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    how = "preserve" if choice % 7 == 0 else "renormalize"
    try:
        with refusals(model, "recalibrate"):
            record = fbn.recalibrate(model, batches, how=how, memory=1 << 28, progress=False)
    except Refused:
        happened["recalibration refused"] += 1
        return
    assert {name: module.training for name, module in model.named_modules()} == modes
    done = {name for row in record.rows for name in row.names}
    assert done, "a recalibration of nothing"
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in done:
            assert torch.equal(parameter, weights[name]), f"{name} was changed by a recalibration"
    assert all(torch.isfinite(t).all() for t in outputs(model, x))
    happened[f"recalibrated, {record.mode}"] += 1
    if other is not None and record.mode == "exact" and spec.dtype != "bfloat16":
        again = fbn.recalibrate(other, [torch.cat(batches)], how=how, mode="exact", memory=1 << 28, progress=False)
        mine, theirs = ({row.names: row for row in r.rows} for r in (record, again))
        assert mine.keys() == theirs.keys()
        for names, row in mine.items():
            for part in ("mean_after", "var_after"):
                ours, cut = getattr(row, part).double(), getattr(theirs[names], part).double()
                scale = cut.abs().max().clamp_min(1e-6)
                assert ((ours - cut).abs().max() / scale) < 1e-3, f"{names[0]}: {part} depends on how the data are cut"
        happened["recalibrated in one batch and two"] += 1


def check_saved(model: nn.Module, spec: Spec, policy: Policy, x: Tensor, same_function: bool) -> None:
    """Assert that copies, pickles and files give the same network, and a plain one where that is promised."""
    expected = outputs(model, x)
    assert distance(outputs(copy.deepcopy(model), x), expected) == 0, "a deep copy computes something else"
    if not any(parametrize.is_parametrized(module) for module in model.modules()):  # which torch does not pickle
        assert distance(outputs(pickle.loads(pickle.dumps(model)), x), expected) == 0, (
            "a pickle computes something else"
        )
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = fbn.convert(spec.build(), policy, example_input=x)
    fresh.load_state_dict(state, strict=True)
    assert distance(outputs(fresh, x), expected) == 0, "loaded into a converted network it computes something else"
    if same_function:
        plain = spec.build()
        plain.load_state_dict(without_extra_state(state), strict=True)
        assert_close(plain, outputs(plain, x), expected, "loaded into a plain network")


def check_changed(
    model: nn.Module, spec: Spec, second: Policy, x: Tensor, same_function: bool, happened: Counter[str]
) -> None:
    """Convert a trained copy once more, to another policy; the function stays where neither policy changes it."""
    changed = copy.deepcopy(model)
    try:
        with refusals(changed, "second policy"), untouched(changed):
            the_plan = fbn.plan(changed, second, x)
        with refusals(changed, "second policy", may_differ=spec.is_picky):
            changed = fbn.convert(changed, second, example_input=x)
    except Refused:
        happened["second policy refused"] += 1
        return
    if same_function and not any(isinstance(row.policy, CHANGE_EVALUATION) for row in the_plan.rows):
        assert_close(changed, outputs(changed, x), outputs(model, x), "converted once more")
    if any(isinstance(row.policy, fbn.ToGroupNorm) for row in the_plan.rows):
        with refusals(changed, "calibration of GroupNorm"):
            fbn.calibrate_group_norm(changed, [x, spec.images(5, seed=2)])
        happened["calibrated"] += 1
    assert torch.isfinite(loss_of(changed.train(), x))
    happened["converted once more"] += 1


def check_merged(model: nn.Module, x: Tensor, is_picky: bool, happened: Counter[str]) -> None:
    """Merge a copy for good; it computes the same, or is refused by name."""
    merged = copy.deepcopy(model)
    try:
        with refusals(merged, "fold", may_differ=is_picky):
            merged = fbn.fold(merged, x)
    except Refused:
        happened["merging refused"] += 1
        return
    assert_close(merged, outputs(merged, x), outputs(model, x), "merged")
    assert not any(type(m).__module__.startswith("finetune_bn.") for m in merged.modules())
    happened["merged"] += 1


def check_exported(model: nn.Module, x: Tensor, happened: Counter[str]) -> None:
    """Write a program of torch.export; what it computes is compared by `export` itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt2"
        try:
            with refusals(model, "export"):
                fbn.export(model, path, x)
        except Refused:
            assert not path.exists()
            happened["export refused"] += 1
            return
        program: Any = torch.export.load(path).module()
        assert_close(model, tensors_in(program(x)), outputs(model, x), "exported")
    happened["exported"] += 1
