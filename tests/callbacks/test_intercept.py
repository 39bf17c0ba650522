"""Callbacks that take part in a module's hooks: in order, and gone without a trace in any order."""

from __future__ import annotations

import itertools
from typing import Any

import lightning.pytorch as pl
import pytest

from finetune_bn.callbacks.intercept import intercept


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def setup(self, stage: str) -> str:
        self.calls.append(("own", stage))
        return f"returned for {stage}"


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
def test_they_run_around_the_hook_and_end_in_any_order(order: tuple[int, ...]) -> None:
    module = Module()
    ends = []
    for i in range(3):
        before = lambda stage, i=i: module.calls.append(("before", i, stage))  # noqa: E731
        after = lambda i=i: module.calls.append(("after", i))  # noqa: E731
        ends.append(intercept(module, "setup", before, after))
    left = [0, 1, 2]
    for i in (*order, None):
        module.calls.clear()
        assert module.setup("fit") == "returned for fit"
        around = [("before", j, "fit") for j in left], [("after", j) for j in left]
        assert module.calls == [*around[0], ("own", "fit"), *around[1]]
        if i is not None:
            ends[i]()
            ends[i]()  # once more does nothing
            left.remove(i)
    assert "setup" not in vars(module)


def test_what_the_user_has_set_on_the_module_is_there_again_and_stays_if_it_came_later() -> None:
    module, early, late = Module(), lambda stage: "early", lambda stage: "late"
    vars(module)["setup"] = early
    end = intercept(module, "setup")
    assert module.setup("fit") == "early"
    end()
    assert vars(module)["setup"] is early
    end = intercept(module, "setup")
    vars(module)["setup"] = late
    end()
    assert vars(module)["setup"] is late
