from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch

from finetune_bn.data.order import Draw, SeededOrder, randomness


def draws(order: SeededOrder) -> list[tuple[int, int]]:
    return [(int(draw), draw.seed) for draw in order]


def test_a_draw_is_an_integer_that_keeps_its_seed_through_pickling() -> None:
    draw = pickle.loads(pickle.dumps(Draw(3, seed=17)))
    assert draw == 3
    assert list("abcd")[draw] == "d"
    assert draw.seed == 17


def test_the_same_seed_gives_the_same_orders_and_every_epoch_another() -> None:
    first, second = SeededOrder(range(50), seed=1), SeededOrder(range(50), seed=1)
    epochs = [draws(first) for _ in range(3)]
    assert epochs == [draws(second) for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(index for index, _ in epoch) == list(range(50)) for epoch in epochs)
    assert draws(SeededOrder(range(50), seed=2)) != epochs[0]


def test_set_epoch_jumps_to_the_order_that_counting_would_have_reached() -> None:
    counted, jumped = SeededOrder(range(20), seed=0), SeededOrder(range(20), seed=0)
    third = [draws(counted) for _ in range(3)][2]
    jumped.set_epoch(2)
    assert draws(jumped) == third


def test_without_shuffling_the_order_is_that_of_the_data_but_augmentation_seeds_change() -> None:
    order = SeededOrder(range(5), seed=0, shuffle=False)
    first, second = draws(order), draws(order)
    assert [index for index, _ in first] == [index for index, _ in second] == [0, 1, 2, 3, 4]
    assert first != second


@pytest.mark.parametrize(("total", "world_size"), [(10, 3), (9, 3), (2, 4), (1, 1), (0, 2)])
def test_ranks_share_the_data_without_repeats_or_evenly(total: int, world_size: int) -> None:
    exact = [SeededOrder(range(total), seed=0, rank=r, world_size=world_size, even=False) for r in range(world_size)]
    shares = [list(order) for order in exact]
    assert sorted(index for share in shares for index in share) == list(range(total))
    assert [len(share) for share in shares] == [len(order) for order in exact]

    even = [SeededOrder(range(total), seed=0, rank=r, world_size=world_size) for r in range(world_size)]
    shares = [list(order) for order in even]
    assert {len(share) for share in shares} == {len(order) for order in even} == {-(-total // world_size)}
    assert {index for share in shares for index in share} == set(range(total))


def state() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_randomness_is_seeded_inside_and_goes_on_as_before_outside() -> None:
    before = state()
    with randomness(2**62 + 1):
        first = random.random(), float(np.random.rand()), float(torch.rand(()))
    assert state() == before
    with randomness(2**62 + 1):
        assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == first

    def fail() -> None:
        with randomness(0):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert state() == before
    with randomness(5):
        assert random.random() != first[0]
