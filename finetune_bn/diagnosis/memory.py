"""What a training step keeps in memory for its backward pass, layer by layer, before and after a policy."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from finetune_bn.conversion.convert import convert
from finetune_bn.conversion.plan import Plan, check_model
from finetune_bn.conversion.policies import Policy
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.functional.shared_backward import only_counts
from finetune_bn.layers.norm_act import FrozenBatchNormAct2d, modules_behind
from finetune_bn.utilities.layer_figure import layer_figure
from finetune_bn.utilities.probe import Probe, can_run, find_probes
from finetune_bn.utilities.results import Result, Shown

AUTOCAST = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LayerMemory:
    """What autograd keeps of one layer's forward pass, in bytes.

    Attributes:
        name: its first name in the model; "" is the model itself.
        kind: class name.
        before: as the model is.
        after: under the policy; None without one.
    """

    name: str
    kind: str
    before: int
    after: int | None = None


@dataclass(frozen=True)
class MemoryReport(Result):
    """What autograd keeps for a backward pass, in bytes; `print` it, or store it.

    Attributes:
        model: class name of the model.
        inputs: shapes of the tensors it was given.
        autocast: dtype of autocast; None without.
        policy: the policy in words; None without one.
        layers: one row for each layer that keeps anything, the largest first.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    autocast: str | None
    policy: str | None
    layers: tuple[LayerMemory, ...]

    @property
    def before(self) -> int:
        """Bytes that all layers keep, as the model is."""
        return sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int | None:
        """Bytes that all layers keep under the policy; None without one."""
        return None if self.policy is None else sum(layer.after or 0 for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "model": self.model,
            "inputs": [list(shape) for shape in self.inputs],
            "autocast": self.autocast,
            "policy": self.policy,
            "before": self.before,
            "after": self.after,
            "layers": [vars(layer) for layer in self.layers],
        }

    def shown(self) -> Shown:
        """Return the sum, and a row for each layer that keeps anything."""
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        title = f"{self.model} on {shapes}{f', autocast {self.autocast}' if self.autocast else ''}: "
        title += f"{_mib(self.before)} MiB kept for backward"
        if self.after is not None:
            ratio = f" ({self.after / self.before:.2f} of it)" if self.before else ""
            title += f", {_mib(self.after)} MiB{ratio} after: {self.policy}"
        header = ("layer", "type", "MiB", *(() if self.policy is None else ("after",)))
        body = [
            (row.name or "(root)", row.kind, _mib(row.before), *(() if row.after is None else (_mib(row.after),)))
            for row in self.layers
        ]
        return Shown(title, header, body, right=(2, 3))

    def plot(self) -> Any:
        """Return a matplotlib figure: what each layer keeps, before and after the policy, the largest first."""
        kept = {"as it is": [row.before / 2**20 for row in self.layers]}
        if self.policy is not None:
            kept[self.policy] = [(row.after or 0) / 2**20 for row in self.layers]
        return layer_figure(f"{self.model}: kept for backward", [row.name for row in self.layers], {"MiB": kept})


def memory_report(
    model: nn.Module, input: Any, policy: Policy | Plan | None = None, *, autocast: torch.dtype | None = None
) -> MemoryReport:
    """Count the bytes that a training step of `model` keeps for backward, by layer, before and after a policy.

    Each storage counts once, for the layer whose forward pass saved it first; parameters and buffers, which are there
    anyway, do not count. Counted with saved-tensor hooks in a forward pass of copies: the model and the random state
    stay as they are. A model in eval mode is counted in training mode, one in training mode as it is. What autograd
    does not save as a tensor (inputs of checkpointed segments, random states) is not seen.

    Args:
        model: any module, before `torch.compile`, DDP or FSDP wrap it.
        input: a tensor, tuple or dict that `model.forward` takes, of the batch size that is of interest.
        policy: what `convert` takes; None counts the model as it is.
        autocast: `torch.bfloat16` or `torch.float16` to run under autocast.

    Raises:
        FinetuneBNError: an argument is wrong, or the model refuses the input.
        NoBatchNormMatched: the policy fits nothing.
        UnsupportedLayer: the policy asks of a layer what it cannot do.
    """
    check_model(model)
    if autocast is not None and autocast not in AUTOCAST:
        raise FinetuneBNError(complaint("autocast", autocast, f"{', '.join(map(str, AUTOCAST))}, or None"))
    if input is None:
        raise FinetuneBNError(complaint("input", None, f"a tensor, tuple or dict that {_forward(model)} takes"))
    if not can_run(model):
        remedy = "Run it once (lazy layers), or load its weights (meta device), first."
        raise FinetuneBNError(complaint("model", type(model).__name__, "a model whose tensors have values", remedy))
    (probe,) = find_probes(model, input)
    before = _count(_copy(model), probe, autocast)
    after = {}
    if policy is not None:
        converted = convert(_copy(model), policy, example_input=input, verify=False)
        after = _count(converted, probe, autocast)
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    rows = [
        LayerMemory(name, kinds.get(name, ""), before.get(name, 0), None if policy is None else after.get(name, 0))
        for name in {**before, **after}
    ]
    shapes = [tuple(leaf.shape) for leaf in tree_leaves((probe.args, probe.kwargs)) if torch.is_tensor(leaf)]
    words = policy.describe() if isinstance(policy, Policy) else None if policy is None else "the given plan"
    return MemoryReport(
        type(model).__name__,
        tuple(shapes),
        None if autocast is None else str(autocast).removeprefix("torch."),
        words,
        tuple(sorted(rows, key=lambda row: (-row.before, -(row.after or 0)))),
    )


def saved_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Return the bytes that autograd keeps for what `run` returns: each storage once, the model's own tensors left out.

    What was kept on the way and given up again, when the graph no longer leads to it, does not count.
    """
    saved = _Saved(model)
    with saved.hooks():
        output = run()
    total = saved.total()
    del output
    return total


def saved_by_layer(model: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Return the same by the name of the module in whose forward it was saved first; only those that saved anything."""
    saved = _Saved(model)
    # A frozen layer with an activation keeps one tensor for both, but not where somebody observes the activation.
    acting = [layer for layer in model.modules() if isinstance(layer, FrozenBatchNormAct2d)]
    inside = {id(part) for layer in acting for part in modules_behind(layer)}
    outside = (module for module in model.modules() if id(module) not in inside)
    plain = [module for module in outside if not isinstance(module, torch.jit.ScriptModule)]
    handles = [module.register_forward_pre_hook(saved.enter) for module in plain]
    handles += [module.register_forward_hook(saved.leave, always_call=True) for module in plain]
    try:
        with saved.hooks():
            output = run()
    finally:
        for handle in handles:
            handle.remove()
    names = {id(module): name for name, module in model.named_modules()}
    sizes = {names.get(key, ""): size for key, size in saved.by_module().items()}
    del output
    return sizes


class _Packed:
    """A tensor that autograd keeps, as long as it keeps it."""

    def __init__(self, tensor: Tensor, module: int) -> None:
        self.tensor, self.module = tensor, module


class _Saved:
    """The storages that autograd keeps, each with the module that was running when it was first saved."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._kept: list[weakref.ref[_Packed]] = []
        self._latest: dict[int, Callable[[], _Packed | None]] = {}
        self._running: list[int] = []

    def hooks(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda packed: packed.tensor)

    def enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(id(module))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            self._running.pop()

    @only_counts
    def _pack(self, tensor: Tensor) -> _Packed:
        storage = tensor.untyped_storage()._cdata
        before = self._latest.get(storage, lambda: None)()
        # A layer that shares the backward pass of a convolution keeps its input in its place.
        module = before.module if before is not None else self._running[-1] if self._running else 0
        # Detached: a result that leads to the node that keeps it would hold the graph, and all that is in it, for good.
        packed = _Packed(tensor.detach(), module)
        self._kept.append(weakref.ref(packed))
        self._latest[storage] = self._kept[-1]
        return packed

    def total(self) -> int:
        return sum(self.by_module().values())

    def by_module(self) -> dict[int, int]:
        sizes: Counter[int] = Counter()
        counted = set(self._own)
        for packed in (kept() for kept in self._kept):
            storage = None if packed is None else packed.tensor.untyped_storage()
            if packed is not None and storage is not None and storage._cdata not in counted:
                counted.add(storage._cdata)
                sizes[packed.module] += storage.nbytes()
        return sizes


def _count(model: nn.Module, probe: Probe, autocast: torch.dtype | None) -> dict[str, int]:
    """Return the bytes by layer of one forward pass of a model that is not needed afterwards."""
    if not model.training:
        model.train()
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    devices = {t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, autocast, enabled=autocast is not None))
        try:
            return saved_by_layer(model, lambda: probe.call(model))
        except Exception as error:
            given = [tuple(t.shape) for t in tree_leaves((probe.args, probe.kwargs)) if torch.is_tensor(t)]
            said = f"The model said: {type(error).__name__}: {error}"
            raise FinetuneBNError(complaint("input", given, f"what {_forward(model)} takes", said)) from error


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        allowed = "a model that copy.deepcopy can copy"
        raise FinetuneBNError(complaint("model", type(model).__name__, allowed, f"It said: {error}")) from error


def _forward(model: nn.Module) -> str:
    return f"{type(model).__name__}.forward"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.2f}"
