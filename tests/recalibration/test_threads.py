"""Threads: few at once, none left behind where one cannot start, and two recalibrations do not disturb each other."""

from __future__ import annotations

import copy
import random
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import FinetuneBNError
from finetune_bn.utilities.lockstep import MOST_PASSES, TooFewThreads
from tests.models import Plain, settle


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def net() -> nn.Module:
    torch.manual_seed(0)
    return settle(Plain())


def images(number: int, size: int = 9) -> Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 7, 300])
def test_no_more_than_some_dozen_passes_stand_side_by_side(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The default of the callback, 4,096 images, were 2,048 threads at 224 px.
    monkeypatch.setattr("finetune_bn.recalibration.collector._VALUES_OF_A_PIECE", 1)
    model, most, before = net(), 0, threading.active_count()
    reference = copy.deepcopy(model)

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal most
        most = max(most, threading.active_count() - before)

    model.bn2.register_forward_pre_hook(look)
    x = images(600)
    assert fbn.recalibrate(model, x.split(batch), mode="exact").images == 600
    assert 32 < most <= MOST_PASSES == 64
    fbn.recalibrate(reference, [x[:300], x[300:]])
    assert torch.allclose(model.bn2.running_mean, reference.bn2.running_mean, atol=1e-5)


def failing_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the system refuse the thread of this number."""
    start, started = threading.Thread.start, [0]

    def refuse(thread: threading.Thread) -> None:
        started[0] += 1
        if started[0] == number:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return started


@pytest.mark.parametrize("number", [3, 4, 6])
def test_where_a_thread_cannot_start_none_waits_and_the_model_is_as_before(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_bn.recalibration.collector.PIECE", 8)
    model = net()
    before = copy.deepcopy(model.state_dict())
    started = failing_at(number, monkeypatch)
    with pytest.raises(TooFewThreads, match=r"thread \d: can't start new thread.*mode='one_pass'"):
        fbn.recalibrate(model, images(48).split(8), mode="exact")
    assert started[0] == number
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_by_itself_it_goes_on_in_one_pass_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_bn.recalibration.collector.PIECE", 8)
    model = net()
    reference = copy.deepcopy(model)
    fbn.recalibrate(reference, images(48).split(8))
    failing_at(5, monkeypatch)
    with pytest.warns(UserWarning, match="too few threads"):
        record = fbn.recalibrate(model, images(48).split(8))
    assert record.mode == "one_pass"
    assert torch.allclose(model.bn2.running_mean, reference.bn2.running_mean, atol=1e-3)


def run(jobs: list[Any]) -> list[BaseException | None]:
    errors: list[BaseException | None] = [None] * len(jobs)

    def guarded(number: int) -> None:
        try:
            jobs[number]()
        except BaseException as error:
            errors[number] = error

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_two_threads_leave_the_random_states_as_they_were_and_have_the_right_statistics() -> None:
    models = [net() for _ in range(3)]
    reference = copy.deepcopy(models[0])
    fbn.recalibrate(reference, images(48).split(8))

    def batches() -> Iterator[Tensor]:
        for batch in images(48).split(8):
            random.random(), numpy.random.rand(), torch.rand(1)
            yield batch

    def work(model: nn.Module) -> Any:
        return lambda: [fbn.recalibrate(model, batches()) for _ in range(3)]

    planned, few = Plain(), images(2)  # to make these draws too, and nobody undoes that
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        looks = [*map(work, models), lambda: fbn.plan(planned, fbn.Freeze("none"), example_input=few)]
        assert run(looks) == [None] * 4
    assert random.getstate() == states[0]
    assert numpy.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    for model in models:
        assert torch.equal(model.bn2.running_mean, reference.bn2.running_mean)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("part", ["", "bn2"])
def test_the_same_model_in_another_thread_is_refused_by_name(part: str) -> None:
    model = net()
    errors: list[BaseException | None] = []

    def also(module: nn.Module, args: Any) -> None:
        if not errors:
            other = model.get_submodule(part) if part else model
            x = images(16) if not part else torch.randn(16, 8, 3, 3)
            errors.extend(run([lambda: fbn.recalibrate(other, [x])]))

    handle = model.register_forward_pre_hook(also)
    fbn.recalibrate(model, images(48).split(8))
    handle.remove()
    assert isinstance(errors[0], FinetuneBNError)
    assert "no other thread is at work" in str(errors[0])
    assert fbn.recalibrate(model, images(48).split(8)).images == 48
