"""Running a model once to look at it, and leaving no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune_bn.errors import FinetuneBNError
from finetune_bn.utilities.probe import Probe, can_run, distance, find_probes, quietly
from tests.models import Plain, build
from tests.tools import untouched


class Remembers(nn.Module):
    """Notes how it was called, changes its input in place, and returns tensors inside other things."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.calls: list[dict[str, Any]] = []

    def forward(self, x: Tensor, *, factor: float = 1.0) -> dict[str, Any]:
        self.calls.append(
            {
                "training": self.training,
                "grad": torch.is_grad_enabled(),
                "autocast": torch.is_autocast_enabled("cpu"),
                "random": torch.rand(()),
                "x": x.clone(),
            }
        )
        y = self.inner(x.mul_(2)) * factor
        return {"logits": y, "more": (y + 1, "text", None)}

    def train(self, mode: bool = True) -> Remembers:
        self.calls.append({"train": mode})
        return super().train(mode)


@pytest.mark.parametrize("given", [torch.ones(2, 3), (torch.ones(2, 3),), {"x": torch.ones(2, 3)}])
def test_an_example_input_may_be_a_tensor_a_tuple_or_keywords(given: Any) -> None:
    (probe,) = find_probes(Remembers(), given)
    assert (probe.name, probe.given) == ("", True)
    assert len(probe.run(Remembers())) == 2


def test_every_tensor_of_the_output_is_returned_wherever_it_lies() -> None:
    model = Remembers()
    first, second = Probe("", (torch.ones(1, 3),), {"factor": 0.0}).run(model)
    assert torch.equal(first, torch.zeros(1, 3))
    assert torch.equal(second, torch.ones(1, 3))


def test_the_run_is_in_eval_mode_without_grad_or_autocast_and_with_the_same_random_numbers() -> None:
    model = Remembers()
    probe = Probe("", (torch.ones(1, 3),))
    with torch.autocast("cpu", torch.bfloat16):
        first = probe.run(model)[0]
    torch.rand(5)
    probe.run(model)
    assert not first.requires_grad
    assert len(model.calls) == 2  # and train() was never called: a model's own may do more than flip flags
    for call in model.calls:
        assert (call["training"], call["grad"], call["autocast"]) == (False, False, False)
    assert model.calls[0]["random"] == model.calls[1]["random"]


def test_the_input_is_handed_over_as_a_copy() -> None:
    model, x = Remembers(), torch.ones(1, 3)
    probe = Probe("", (x,))
    probe.run(model)
    probe.run(model)
    assert torch.equal(x, torch.ones(1, 3))
    assert torch.equal(model.calls[1]["x"], x)


def test_modes_and_random_state_are_restored_flag_by_flag_also_after_an_error() -> None:
    model, x = build("norm_act")
    model.train()
    model[1].eval()
    model[1].drop.train()
    with untouched(model):
        Probe("", (x,)).run(model)
    with untouched(model), pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle(model)


def fail_in_the_middle(model: nn.Module) -> None:
    with quietly(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("in the middle")


def test_what_modules_remember_of_a_forward_pass_is_forgotten() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.cache: dict[str, Tensor] = {}
            self.register_buffer("grid", None, persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.cache.setdefault("weight", self.weight * 2)
            self.size = x.shape
            self.grid = torch.zeros(x.shape)
            return x * self.cache["weight"]

    model = Caches()
    cache = model.cache
    with untouched(model):
        Probe("", (torch.ones(2),)).run(model)
    assert model.cache is cache
    assert cache == {}
    assert model.grid is None
    with torch.no_grad():
        model.weight.fill_(5)
    assert torch.equal(model(torch.ones(2)), torch.full((2,), 10.0))


def test_an_input_that_the_model_refuses_is_one_error_that_names_shape_and_cause() -> None:
    model = Plain()
    message = (
        r"example_input: got \[\(1, 4, 9, 9\)\]; allowed: what Plain.forward takes. The model said: RuntimeError: "
    )
    with untouched(model), pytest.raises(FinetuneBNError, match=message) as raised:
        Probe("", (torch.ones(1, 4, 9, 9),)).run(model)
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_lightnings_example_input_array_is_found_and_an_argument_goes_first() -> None:
    model = Remembers()
    assert find_probes(model) == []
    model.example_input_array = torch.zeros(4, 3)
    assert find_probes(model)[0].args[0].shape == (4, 3)
    assert find_probes(model, torch.zeros(1, 3))[0].args[0].shape == (1, 3)


def timm_like(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(size[0], 2, 1)).to(dtype)
    model.pretrained_cfg = {"input_size": size}
    return model


def test_the_input_size_of_timm_models_is_found_however_deep_and_the_outermost_counts() -> None:
    inner, other = timm_like((3, 8, 8)), timm_like((1, 4, 4), torch.float64)
    inner.append(timm_like((2, 8, 8)))
    model = nn.ModuleDict({"body": nn.ModuleDict({"net": inner}), "other": other, "none": nn.Linear(2, 2)})
    probes = find_probes(model)
    assert [(p.name, p.args[0].shape, p.args[0].dtype, p.given) for p in probes] == [
        ("body.net", (1, 3, 8, 8), torch.float32, False),
        ("other", (1, 1, 4, 4), torch.float64, False),
    ]
    assert probes[0].run(model)[0].shape == (1, 2, 8, 8)
    assert torch.equal(probes[0].args[0], find_probes(model)[0].args[0])
    assert [p.name for p in find_probes(inner)] == [""]


@pytest.mark.parametrize("config", [None, {}, {"input_size": None}, "imagenet"])
def test_a_pretrained_cfg_without_an_input_size_gives_no_probe(config: Any) -> None:
    model = nn.Conv2d(3, 2, 1)
    model.pretrained_cfg = config
    assert find_probes(model) == []


def test_a_model_without_values_cannot_run() -> None:
    assert can_run(Plain())
    assert can_run(nn.Identity())
    assert not can_run(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d()))
    assert not can_run(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")))
    assert not can_run(nn.BatchNorm1d(2, affine=False, device="meta"))


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("outputs", "reference", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.1], [1.0, 2.0], 0.05),
        ([1.0, 2.0], [1.0, -4.0], 1.5),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [1.0, 2.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, INF], [1.0, INF], 0.0),
        ([1.1, INF], [1.0, INF], 0.1),
        ([], [], 0.0),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_distance_is_the_largest_difference_over_the_largest_value(
    outputs: list[float], reference: list[float], expected: float
) -> None:
    assert distance([torch.tensor(outputs)], [torch.tensor(reference)]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("outputs", "reference"),
    [
        ([torch.ones(2)], []),
        ([torch.ones(2)], [torch.ones(3)]),
        ([torch.ones(2)], [torch.ones(2).double()]),
        ([torch.ones(2), torch.full((2,), INF)], [torch.ones(2), torch.full((2,), -INF)]),
        ([torch.full((2,), 1e-3)], [torch.zeros(2)]),
    ],
)
def test_outputs_that_do_not_line_up_are_far_apart(outputs: list[Tensor], reference: list[Tensor]) -> None:
    assert distance(outputs, reference) > 1e30


def test_distance_takes_the_worst_of_several_outputs_of_any_dtype() -> None:
    a = [torch.ones(2), torch.tensor([1, 2]), torch.tensor([True]), torch.ones(2).bfloat16()]
    b = [torch.ones(2), torch.tensor([1, 4]), torch.tensor([True]), torch.ones(2).bfloat16()]
    assert distance(a, b) == 0.5
