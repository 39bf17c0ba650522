"""Run a model once, quietly: eval mode, no gradients, no trace left in modes or random state."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.lockstep import inside_a_pass
from finetune_bn.utilities.module_state import ModuleState
from finetune_bn.utilities.randomness import ONE_THREAD, RandomStates


@dataclass(frozen=True)
class Probe:
    """An input for one module of a model.

    Attributes:
        name: name of the module within the model; "" for the model itself.
        args: positional arguments of its `forward`.
        kwargs: keyword arguments of its `forward`.
        given: whether the user passed the input; one that was guessed may fail without harm.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    given: bool = True

    def run(self, model: nn.Module) -> list[Tensor]:
        """Return the tensors that the probed module of `model` returns in eval mode.

        Raises:
            FinetuneBNError: the module refuses the user's input.
        """
        with quietly(model):
            try:
                output = self.call(model)
            except Exception as error:
                shapes = [tuple(leaf.shape) for leaf in tree_leaves((self.args, self.kwargs)) if torch.is_tensor(leaf)]
                raise FinetuneBNError(
                    complaint(
                        "example_input",
                        shapes,
                        f"what {type(model).__name__}.forward takes",
                        f"The model said: {type(error).__name__}: {error}",
                    )
                ) from error
        return tensors_in(output)

    def call(self, model: nn.Module) -> Any:
        """Call the probed module of `model`; on a copy of the input, which models may change in place."""
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (self.args, self.kwargs))
        return model.get_submodule(self.name)(*args, **kwargs)


def find_probes(model: nn.Module, example_input: Any = None) -> list[Probe]:
    """Return inputs for the model, or for the parts of it whose input size is known.

    Args:
        model: the model to probe.
        example_input: a tensor (or anything else that is one argument), a tuple of positional or a dict of keyword
            arguments. None looks for Lightning's `example_input_array` and for the input size in the
            `pretrained_cfg` of timm models, however deep.
    """
    given = example_input is not None
    if not given and getattr(model, "example_input_array", None) is not None:
        # It was meant for a summary: it need not be where the model is now, nor of its dtype.
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        example_input = tree_map_only(
            Tensor,
            lambda t: t.to(like.device, like.dtype) if t.is_floating_point() else t.to(like.device),
            model.example_input_array,
        )
    if example_input is not None:
        if isinstance(example_input, dict):
            return [Probe("", kwargs=example_input, given=given)]
        return [Probe("", example_input if isinstance(example_input, tuple) else (example_input,), given=given)]
    probes: list[Probe] = []
    for name, module in model.named_modules():
        config = getattr(module, "pretrained_cfg", None)
        size = config.get("input_size") if isinstance(config, dict) else None
        inside_another = any(name.startswith(f"{p.name}.") or not p.name for p in probes)
        if not size or inside_another:
            continue
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, _channels(module, config or {}, size[0]), *size[1:], generator=generator).to(
            like.device, like.dtype
        )
        probes.append(Probe(name, (image,), given=False))
    return probes


def _channels(module: nn.Module, config: dict[str, Any], channels: int) -> int:
    """Return how many channels an image for a timm model has: `in_chans=` changes the stem, and not the config."""
    names = config.get("first_conv")
    for name in (names,) if isinstance(names, str) else names or ():
        with contextlib.suppress(AttributeError):
            return int(module.get_submodule(name).in_channels)  # type: ignore[arg-type]
    return channels


def can_run(model: nn.Module) -> bool:
    """Tell whether the model has values to compute with: no tensor on the meta device, no lazy layer."""
    return not any(is_lazy(t) or t.is_meta for t in (*model.parameters(), *model.buffers()))


@contextlib.contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast, for the time of the block; modes and random state are restored.

    The modes are set flag by flag: a model's own `train()` may do more than flip them. What modules remember of a
    forward pass (timm's levit and its kin keep attention biases in eval mode) is forgotten: weights may yet be loaded.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    with contextlib.ExitStack() as stack:
        if not inside_a_pass():  # the thread that started the pass holds it
            stack.enter_context(ONE_THREAD)
        before = ModuleState(model, deep=False)
        stack.enter_context(torch.random.fork_rng(devices=[d.index or 0 for d in devices]))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", *(d.type for d in devices)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing was compiled, and asking for it would import it
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Not torch.manual_seed: that one seeds all devices, also those whose state is not restored here.
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            before.restore()


@contextlib.contextmanager
def undisturbed(model: nn.Module, functions: Iterable[Any] = ()) -> Iterator[ModuleState]:
    """As `quietly`, for work on data: random states of numpy and Python, buffers and lists come back too.

    Args:
        model: the model.
        functions: what else runs besides the model, and may keep something in closures and globals.

    Yields:
        What the modules hold at the beginning, in eval mode, to begin anew with in between.

    Raises:
        FinetuneBNError: another thread is at work on a part of the model.
    """
    with at_work_on(model), ONE_THREAD:
        random = RandomStates()
        try:
            with quietly(model):
                state = ModuleState(model, functions)
                try:
                    yield state
                finally:
                    state.restore()
        finally:
            random.restore()


_AT_WORK: dict[int, int] = {}
_AT_WORK_LOCK = threading.Lock()


@contextlib.contextmanager
def at_work_on(model: nn.Module) -> Iterator[None]:
    """Let one thread at a time work on a module: its layers measure, and would measure the other's images too.

    Raises:
        FinetuneBNError: another thread is at work on a part of it.
    """
    parts, own = [id(module) for module in model.modules()], threading.get_ident()
    with _AT_WORK_LOCK:
        if any(_AT_WORK.get(part, own) != own for part in parts):
            allowed = "a model on which no other thread is at work"
            raise FinetuneBNError(complaint("model", type(model).__name__, allowed, "Wait for it, or take a copy."))
        fresh = [part for part in parts if part not in _AT_WORK]
        _AT_WORK.update(dict.fromkeys(fresh, own))
    try:
        yield
    finally:
        with _AT_WORK_LOCK:
            for part in fresh:
                del _AT_WORK[part]


def unwrapped(model: object) -> nn.Module:
    """Return the module that does the work; a DDP wrapper would talk to other processes in each forward pass.

    Raises:
        FinetuneBNError: it is no module, or one without all its values (sharded, on the meta device, lazy).
    """
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        model = model.module
    if not isinstance(model, nn.Module):
        raise FinetuneBNError(complaint("model", model, "a torch.nn.Module"))
    check_whole(model)
    if not can_run(model):
        raise FinetuneBNError(complaint("model", "tensors without values (meta device, lazy layers)", "a real model"))
    return model


def check_whole(model: nn.Module) -> None:
    """Raise where each process holds a part of the parameters alone.

    Raises:
        FinetuneBNError: the model, or a part of it, is sharded by FSDP.
    """
    wrappers = {"FullyShardedDataParallel", "FSDPModule"}
    if any(cls.__name__ in wrappers for module in model.modules() for cls in type(module).__mro__):
        raise FinetuneBNError(complaint("model", "a model sharded by FSDP", "a whole one", "Do it before sharding."))


def tensors_in(output: Any, *, detach: bool = True) -> list[Tensor]:
    """Return the tensors in what a model returned, those in dataclasses included; without gradients, or as they are."""
    tensors: list[Tensor] = []
    for leaf in tree_leaves(output):
        if torch.is_tensor(leaf):
            tensors.append(leaf.detach() if detach else leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            parts = [getattr(leaf, f.name) for f in dataclasses.fields(leaf)]
            tensors += tensors_in(parts, detach=detach)
    return tensors


def distance(outputs: list[Tensor], reference: list[Tensor]) -> float:
    """Return the largest |output - reference| / max|reference| over the tensors; inf where they do not line up.

    NaN on both sides counts as equal, NaN on one side as infinitely far.
    """
    if len(outputs) != len(reference):
        return float("inf")
    worst = 0.0
    for a, b in zip(outputs, reference, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if torch.equal(a, b) or not a.numel():
            continue
        wide = torch.float64 if a.device.type != "mps" else torch.float32
        difference = (a.to(wide) - b.to(wide)).abs().nan_to_num(0.0)
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return float("inf")
        scale = b.to(wide).nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        worst = max(worst, float((difference.max() / scale).cpu()))
    return worst


def storage_of(tensor: Tensor) -> int:
    """Return a number for where the tensor's values lie, the same for all its views; -1 where it has no storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -1
