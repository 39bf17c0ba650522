"""What a training step keeps in memory and launches under each of some policies, on copies of a model."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from finetune_bn.conversion.convert import convert
from finetune_bn.conversion.policies import Freeze, Keep, Policy
from finetune_bn.diagnosis.fits import largest_batches, step_memory
from finetune_bn.diagnosis.launches import launches_of
from finetune_bn.diagnosis.memory import memory_report
from finetune_bn.diagnosis.results import PolicyMemory
from finetune_bn.errors import FinetuneBNError
from finetune_bn.utilities.batches import Chunk
from finetune_bn.utilities.probe import tensors_in

POLICIES: tuple[Policy, ...] = (Keep(), Freeze("none"), Freeze("shift"), Freeze("merged"), Freeze("original"))


def policy_costs(
    model: nn.Module,
    chunk: Chunk,
    policies: Sequence[Policy] = POLICIES,
    *,
    until: float = float("inf"),
    report: Callable[[int, str], None] = lambda done, note: None,
) -> tuple[list[PolicyMemory], list[str]]:
    """Return one row a policy, and what was left out, a sentence each.

    Args:
        model: the model, which is copied.
        chunk: images to run a step on; their number is divided by.
        policies: what is compared.
        until: by `time.perf_counter`, when no further policy is begun.
        report: moves a progress bar.
    """
    rows: list[PolicyMemory] = []
    left_out: list[str] = []
    for number, policy in enumerate(policies):
        name = policy.describe()
        if number and time.perf_counter() > until:
            left_out.append(f"memory under {name}: there was no time left")
            continue
        report(number, name)
        try:
            with unheard():
                rows.append(_cost(model, chunk, policy, name))
        except FinetuneBNError as error:
            left_out.append(f"memory under {name}: {error}")
        except Exception as error:  # whatever a network raises in training mode
            left_out.append(f"memory under {name}: the model said {type(error).__name__}: {_line(error)}")
    return rows, left_out


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Let conversions of copies that nobody asked for say nothing in the log."""
    log = logging.getLogger("finetune_bn")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _cost(model: nn.Module, chunk: Chunk, policy: Policy, name: str) -> PolicyMemory:
    args, kwargs = chunk.content
    example = kwargs or tuple(args)
    report = memory_report(model, example, policy)
    largest = largest_batches(step_memory(model, report))
    converted = copy.deepcopy(model)
    if not isinstance(policy, Keep):
        converted = convert(converted, policy, example_input=example, verify=False)
    converted.train()
    with torch.enable_grad():

        def step() -> None:
            outputs: list[Any] = [t for t in tensors_in(converted(*args, **kwargs), detach=False) if t.requires_grad]
            if outputs:
                torch.autograd.backward([t.float().sum() for t in outputs])

        launches = launches_of(step)[0]
    return PolicyMemory(name, round((report.after or 0) / len(chunk)), launches, largest)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
