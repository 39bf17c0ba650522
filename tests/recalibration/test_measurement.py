"""How one recalibration decides: what it settles on, when it stops, what goes through the model together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from finetune_bn.errors import BadData
from finetune_bn.functional.moments import Moments
from finetune_bn.layers.statistics import statistics_of
from finetune_bn.recalibration.measured_layer import MeasuredLayer
from finetune_bn.recalibration.measurement import Measuring
from finetune_bn.recalibration.settings import RecalibrationSettings
from finetune_bn.utilities.batches import Feeder
from finetune_bn.utilities.module_state import ModuleState
from tests.models import Plain, settle
from tests.references import as_array
from tests.tools import untouched

DEFAULTS: dict[str, Any] = {
    "mode": "auto",
    "how": "renormalize",
    "part": "both",
    "prior": 0,
    "max_samples": None,
    "min_samples": 8,
    "tolerance": None,
    "batch_size": None,
    "memory": None,
}


def net() -> Plain:
    torch.manual_seed(0)
    return settle(Plain()).eval()  # type: ignore[return-value]


def images(number: int) -> Tensor:
    return 2 * torch.randn(number, 3, 10, 10, generator=torch.Generator().manual_seed(1)) + 3


def measuring(model: nn.Module, **changes: Any) -> Measuring:
    layers = [MeasuredLayer(n, m, statistics_of(m)) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    return Measuring(
        model,
        layers,
        RecalibrationSettings(**(DEFAULTS | changes)),
        Feeder(model, None, None),
        None,
    )


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
@pytest.mark.parametrize("how", ["renormalize", "preserve"])
def test_measuring_writes_nothing(mode: str, how: str) -> None:
    model, x = net(), images(16)
    run = measuring(model, mode=mode, how=how)
    with untouched(model), torch.no_grad():
        run.run(x.split(5), ModuleState(run.model), False)
    assert run.images == 16
    first = run.statistics()[0]
    arrived = as_array(model.conv1(x))
    assert first is not None
    np.testing.assert_allclose(first.mean.numpy(), arrived.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(first.var.numpy(), arrived.var((0, 2, 3)) * (n := 16 * 64) / (n - 1), rtol=1e-5)


@pytest.mark.parametrize(("prior", "part"), [(0, "both"), (48, "both"), (48, "mean"), (16, "var")])
def test_what_is_settled_on_is_the_mixture_of_both_populations(prior: float, part: str) -> None:
    model = nn.Sequential(settle(nn.BatchNorm2d(3)))
    run = measuring(model, prior=prior, part=part)
    run.images = 16
    x = images(16)
    settled = run._settled(0, Moments.of(x))
    old_mean, old_var = as_array(model[0].running_mean), as_array(model[0].running_var)
    values = as_array(x.transpose(0, 1).reshape(3, -1))
    share = prior / (prior + 16)
    mean = share * old_mean + (1 - share) * values.mean(1)
    between = share * (1 - share) * (old_mean - values.mean(1)) ** 2
    var = share * old_var + (1 - share) * values.var(1, ddof=1) + between
    np.testing.assert_allclose(settled.mean.numpy(), old_mean if part == "var" else mean, rtol=1e-5)
    np.testing.assert_allclose(settled.var.numpy(), old_var if part == "mean" else var, rtol=1e-5)


def test_one_value_has_no_variance_to_settle_on() -> None:
    run = measuring(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(BadData, match="one value for each channel of layer '0'"):
        run._settled(0, Moments.of(torch.ones(1, 3, 1, 1)))


def test_memory_is_weighed_only_where_it_decides() -> None:
    def weighs(**changes: Any) -> bool:
        calls: list[int] = []
        model = net()
        model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
        with torch.no_grad():
            measuring(model, **changes).run(images(16).split(16), ModuleState(model), False)
        return calls[0] == 2  # two images, in front of the sixteen

    assert weighs()
    assert weighs(mode="one_pass")
    assert not weighs(mode="exact")
    assert not weighs(mode="one_pass", batch_size=8)
    assert not weighs(how="preserve")


@pytest.mark.parametrize(("memory", "largest"), [(10**12, 1024), (1, 1)])
def test_one_pass_takes_as_many_images_as_fit_and_1024_at_most(memory: int, largest: int) -> None:
    run = measuring(net(), mode="one_pass", memory=memory)
    with torch.no_grad():
        run.run(images(16).split(8), ModuleState(run.model), False)
    assert run._chunk_size() == largest
    assert measuring(net(), mode="one_pass", batch_size=7)._chunk_size() == 7


def test_a_chunk_is_as_large_as_what_waits_three_times_over_has_room_for() -> None:
    def run(memory: int) -> Measuring:
        found = measuring(net(), mode="one_pass", memory=memory)
        with torch.no_grad():
            found.run(images(16).split(8), ModuleState(found.model), False)
        return found

    an_image = run(1)._per_image
    assert run(math.ceil(3 * an_image * 5))._chunk_size() == 5
    assert run(math.ceil(3 * an_image * 5) - 1)._chunk_size() == 4


def test_the_error_is_that_of_images_and_the_target_what_the_error_asks_for() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    x = torch.randn(64, 3, 1, 1) + torch.zeros(64, 3, 6, 6)  # all positions of an image are alike
    run = measuring(model, tolerance=0.01)
    with torch.no_grad():
        run.run(x.split(16), ModuleState(run.model), False)
    assert 0.9 / 8 < run.standard_error(0) < 3 / 8  # of the mean 1 / sqrt(64), of the log variance sqrt(2 / 64)
    assert run.largest_error == run.standard_error(0)
    assert run._next_target() == 4 * 64  # no more than four times what there is, before that has been looked at
    predicted = run._next_target(most=math.inf)
    assert predicted == pytest.approx(64 * (run.largest_error / 0.01) ** 2, rel=0.05)
    assert "it would take about" in run.warnings[0]
    assert str(predicted) in run.warnings[0]


@pytest.mark.parametrize(
    ("batches", "match"),
    [([], "no batch"), ([torch.zeros(3, 3, 10, 10)], r"3 images.*min_samples=8.*prior=16")],
)
def test_too_few_images_are_an_error(batches: list[Tensor], match: str) -> None:
    model = net()
    with pytest.raises(BadData, match=match), torch.no_grad():
        measuring(model).run(batches, ModuleState(model), False)


@pytest.mark.parametrize(("number", "enough"), [(8, True), (7, False)])
def test_as_many_images_as_are_asked_for_are_enough(number: int, enough: bool) -> None:
    found = measuring(net())
    with torch.no_grad():
        if enough:
            found.run([images(number)], ModuleState(found.model), False)
            assert found.images == number
            return
        with pytest.raises(BadData, match="7 images"):
            found.run([images(number)], ModuleState(found.model), False)


def test_what_the_next_target_asks_for_grows_with_the_square_of_the_error() -> None:
    found = measuring(net(), tolerance=0.01)
    with torch.no_grad():
        found.run(images(16).split(8), ModuleState(found.model), False)
    wanted = 16 * (found.largest_error / 0.01) ** 2
    assert wanted * 1.01 <= found._next_target(most=math.inf) <= 1.1 * wanted
