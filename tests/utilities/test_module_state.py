"""What modules keep is put back as it was: attributes, containers, buffers; closures and globals on request."""

from __future__ import annotations

import types
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune_bn.utilities.module_state import ModuleState

COUNT = 0
KEPT: list[Any] = []


class Keeps(nn.Module):
    """Keeps something in every place that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.nothing, self.names = 1, None, {"a"}
        self.lists, self.nested = [1, 2], {"of": [{"deep": [1]}]}
        self.queue, self.space = deque([1], maxlen=3), types.SimpleNamespace(x=1)
        self.plain = torch.zeros(2)
        self.register_buffer("buffer", torch.zeros(2))
        self.weight = nn.Parameter(torch.zeros(2))
        self.counter = nn.Parameter(torch.zeros(()), requires_grad=False)
        at = 0

        def hook(module: nn.Module, args: Any) -> None:
            nonlocal at
            at += 1

        self.register_forward_pre_hook(hook)
        self.hook = hook

    def forward(self, x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        KEPT.append(x)
        self.number, self.nothing, self.extra = 2, x, x
        self.names.add("b")
        self.lists.append(3)
        self.nested["of"][0]["deep"].append(2)
        self.queue.append(2)
        self.space.x, self.space.y = 2, 3
        self.plain += 1
        self.buffer += 1
        with torch.no_grad():
            self.counter += 1
            self.weight += 1
        return x


def content(model: Keeps) -> Any:
    names = ("number", "nothing", "names", "lists", "nested", "queue", "space")
    at = model.hook.__closure__[0].cell_contents
    tensors = [t.tolist() for t in (model.plain, model.buffer, model.counter)]
    return [repr(getattr(model, name)) for name in names], tensors, hasattr(model, "extra"), at, COUNT, len(KEPT)


def test_all_of_it_comes_back_in_the_same_objects_but_what_was_learned() -> None:
    model = nn.Sequential(Keeps())
    before, objects = content(model[0]), (model[0].lists, model[0].queue, model[0].plain, model[0].buffer)
    state = ModuleState(model)
    model(torch.ones(2))
    model(torch.ones(2))
    assert content(model[0]) != before
    state.restore(outside=True)
    assert content(model[0]) == before
    assert all(
        a is b for a, b in zip(objects, (model[0].lists, model[0].queue, model[0].plain, model[0].buffer), strict=True)
    )
    assert model[0].weight.tolist() == [2, 2]


def test_closures_and_globals_are_a_users_own_unless_asked_for() -> None:
    model = Keeps()
    state, (*_, at, count, kept) = ModuleState(model), content(model)
    model(torch.ones(2))
    state.restore()
    assert content(model)[-3:] == (at + 1, count + 1, kept + 1)
    state.restore(outside=True)
    assert content(model)[-3:] == (at, count, kept)


def test_changes_are_named() -> None:
    model = nn.Sequential(Keeps())
    state = ModuleState(model)
    assert state.changes() == []
    model(torch.ones(2))
    names = set(state.changes())
    inside = {f"0.{n}" for n in ("number", "nothing", "extra", "names", "lists", "queue", "plain", "buffer", "counter")}
    assert inside <= names
    assert {"at", "COUNT", "KEPT"} <= names
    assert {"at", "COUNT", "KEPT"}.isdisjoint(state.changes(outside=False))
    assert not any("weight" in name for name in names)
    state.restore(outside=True)
    assert state.changes() == []


def test_without_depth_it_is_attributes_and_dicts_alone() -> None:
    model = Keeps()
    state = ModuleState(model, deep=False)
    model(torch.ones(2))
    state.restore()
    assert (model.number, model.lists, model.buffer.tolist()) == (1, [1, 2, 3], [1, 1])


def test_a_buffer_that_was_replaced_or_is_an_inference_tensor_comes_back() -> None:
    model = nn.BatchNorm1d(2)
    with torch.inference_mode():
        inference = torch.zeros(2)
    model.running_mean = inference
    state = ModuleState(model)
    with torch.inference_mode():
        model.running_mean += 1
    state.restore()
    assert model.running_mean.tolist() == [0, 0]
    model.running_mean = torch.ones(2)
    state.restore()
    assert model.running_mean is inference


@pytest.mark.parametrize("function", [lambda batch: KEPT.append(batch), len])
def test_functions_beside_the_model_count_too(function: Any) -> None:
    state = ModuleState(nn.ReLU(), [function])
    kept = len(KEPT)
    function([1])
    state.restore(outside=True)
    assert len(KEPT) == kept
