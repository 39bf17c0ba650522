"""The largest batch that fits: from whatever memory and optimizer are given, and none where not one image does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from finetune_bn.cli.fitting import Fitting, gib_of, state_of
from finetune_bn.diagnosis.fits import ADAMW, MEMORIES_GIB, StepMemory
from finetune_bn.errors import FinetuneBNError
from tests.foreign import Net


@pytest.mark.parametrize(
    ("given", "gib"), [("24,8", (8.0, 24.0)), (6, (6.0,)), (0.5, (0.5,)), ([16, 8, 16], (8.0, 16.0)), ("4", (4.0,))]
)
def test_memory_is_a_number_or_several_ascending_and_each_once(given: Any, gib: tuple[float, ...]) -> None:
    assert gib_of(given) == gib


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_number_and_without_a_gpu_usual_ones_are_taken() -> None:
    assert gib_of(None) == MEMORIES_GIB


@pytest.mark.parametrize("given", ["", "8,", [], [0], -1, "eight"])
def test_what_is_no_memory_is_refused(given: Any) -> None:
    with pytest.raises(FinetuneBNError, match="memory_gib: got"):
        gib_of(given)


def test_the_numbers_of_an_optimizer_are_counted_and_adamws_taken_where_it_is_not_known() -> None:
    model: Any = Net()
    found = []
    for name in ("sgd", "lion", "adamw", "lbfgs", "no such optimizer", None):
        model.optimizer_name = name
        found.append(state_of(model))
    assert found[1:] == [1, 2, ADAMW, ADAMW, ADAMW]
    assert found[0] <= 1


def test_a_device_that_is_too_small_for_one_image_has_no_largest_batch() -> None:
    memory = StepMemory(((4, 4 * 2**20),), 2**20, 2 * 2**30, 0, 0)
    small, large = (Fitting(memory, memory, 2.0, (gib,)) for gib in (1.0, 4.0))
    assert str(small).splitlines()[-1] == "Chosen: none, not one image fits in 1 GiB."
    assert small.to_dict()["batch_size"] == 0
    assert str(large).splitlines()[-1].startswith("Chosen: ")
    assert large.to_dict()["batch_size"] > 0
