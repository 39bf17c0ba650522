"""The search for a learning rate and the optimizer that the training studies share."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
pytest.importorskip("rich")
import cells
from store import Store

LADDER, FIRST = (1.0, 2.0, 5.0, 10.0, 20.0), (2.0, 5.0, 10.0)


@pytest.mark.parametrize(
    ("peak", "tried"),
    [(5.0, {2.0, 5.0, 10.0}), (2.0, {1.0, 2.0, 5.0, 10.0}), (20.0, {2.0, 5.0, 10.0, 20.0})],
)
def test_the_search_goes_on_while_the_best_rate_is_at_an_edge_and_ends_at_the_ladders(
    peak: float, tried: set[float]
) -> None:
    scores: dict[float, float] = {}
    while missing := cells.rates_to_try(scores, LADDER, FIRST):
        assert cells.chosen_rate(scores, LADDER, FIRST) is None
        assert not scores.keys() & set(missing)
        scores[missing[0]] = -abs(math.log(missing[0] / peak))
    assert scores.keys() == tried
    assert cells.chosen_rate(scores, LADDER, FIRST) == peak


@pytest.mark.parametrize("order", [(2.0, 5.0, 10.0), (10.0, 5.0, 2.0)])
def test_a_plateau_of_collapsed_trainings_does_not_end_the_search_in_whichever_order_they_came(
    order: tuple[float, ...],
) -> None:
    scores = dict.fromkeys(order, 14.7)  # all collapsed; 1 is the only rate that works
    while missing := cells.rates_to_try(scores, LADDER, FIRST):
        scores[missing[-1]] = 60.0 if missing[-1] == 1.0 else 14.7
    assert cells.chosen_rate(scores, LADDER, FIRST) == 1.0
    # Of two that are as good as each other it is the smaller one, whichever was first, with both sides looked at.
    scores = {lr: 50.0 if lr in (2.0, 5.0) else 40.0 for lr in order}
    assert cells.rates_to_try(scores, LADDER, FIRST) == [1.0]
    assert cells.chosen_rate(scores | {1.0: 40.0}, LADDER, FIRST) == 2.0


def test_vectors_are_not_decayed_what_is_constant_is_left_out_and_others_keep_their_rate() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    net[2].requires_grad_(False)
    proxies = nn.Parameter(torch.zeros(4, 2))
    optimizer, _ = cells.adamw(net, 0.1, 10, [{"params": [proxies], "lr": 5.0, "weight_decay": 0.0}])
    decayed, vectors, others = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(3, 2)]
    assert [p.shape for p in vectors["params"]] == [(3,)] * 3
    assert (decayed["weight_decay"], vectors["weight_decay"]) == (cells.WEIGHT_DECAY, 0.0)
    assert others["initial_lr"] == 5.0


def test_the_rate_rises_over_a_tenth_of_the_steps_and_falls_to_zero() -> None:
    net = nn.Linear(1, 1)
    optimizer, schedule = cells.adamw(net, 1.0, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0)


def measure(number: int) -> dict[str, Any]:
    return {"score": float(number), "seconds": 0.0, "threads": torch.get_num_threads()}


def test_cells_that_appear_with_the_results_are_measured_once_each_on_one_thread(tmp_path: Path) -> None:
    def next_cells(store: Store) -> Iterator[dict[str, Any]]:
        done = len(store.rows)
        yield from ({"number": n} for n in range(min(4, done + 2)) if not store.done({"number": n}))

    store = Store(tmp_path / "results.json", "python x.py", device="cpu")
    cells.run(store, next_cells, measure, 2, "score")
    assert sorted(row["number"] for row in store.rows) == [0, 1, 2, 3]
    assert all(row["score"] == row["number"] and row["threads"] == 1 for row in store.rows)


def test_the_interval_of_a_mean_is_that_of_students_t() -> None:
    # 5, 7, 9: mean 7, sd 2; t with 2 degrees of freedom at 97.5 % is 4.303, as any table of it says
    assert cells.interval([5.0, 7.0, 9.0]) == pytest.approx((7, 7 - 4.303 * 2 / 3**0.5, 7 + 4.303 * 2 / 3**0.5))
    assert cells.interval([1.0, 1.0]) == (1, 1, 1)
