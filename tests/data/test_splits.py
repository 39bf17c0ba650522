from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from finetune_bn.data.splits import derive_seed, stratified_split, stratified_subset

KEYS = [f"item{number}" for number in range(100)]
STRATA = ["big"] * 70 + ["small"] * 29 + ["single"]


def test_a_split_is_disjoint_and_complete_with_the_shares_of_each_stratum() -> None:
    splits = stratified_split(KEYS, STRATA, 0.1, 0.2, seed=0)
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == list(range(100))
    counts = {name: Counter(STRATA[index] for index in members) for name, members in splits.items()}
    assert counts["test"] == {"big": 14, "small": 6}
    assert counts["val"] == {"big": 7, "small": 3}
    assert counts["train"] == {"big": 49, "small": 20, "single": 1}


def test_seeds_repeat_and_differ() -> None:
    assert stratified_split(KEYS, STRATA, 0.1, 0.2, 3) == stratified_split(KEYS, STRATA, 0.1, 0.2, 3)
    assert stratified_split(KEYS, STRATA, 0.1, 0.2, 3) != stratified_split(KEYS, STRATA, 0.1, 0.2, 4)


def test_leaving_out_a_stratum_moves_nothing_in_the_others() -> None:
    whole = stratified_split(KEYS, STRATA, 0.1, 0.2, 0)
    part = stratified_split(KEYS[:70], STRATA[:70], 0.1, 0.2, 0)
    assert part == {name: [index for index in members if index < 70] for name, members in whole.items()}


def test_the_split_is_the_same_on_every_machine() -> None:
    # written down once: it must never depend on Python's hash, its version or torch's generators
    assert derive_seed(1, "a") == 6885665436231814845
    assert stratified_split(KEYS[:10], STRATA[:10], 0.2, 0.2, 0) == {
        "train": [1, 2, 4, 5, 8, 9],
        "val": [3, 6],
        "test": [0, 7],
    }


@pytest.mark.parametrize("size", [3, 10, 37, 99, 100])
def test_a_subset_has_its_size_every_stratum_and_nearly_the_shares(size: int) -> None:
    chosen = stratified_subset(range(100), KEYS, STRATA, size, seed=0)
    assert len(chosen) == len(set(chosen)) == size
    counts = Counter(STRATA[index] for index in chosen)
    assert set(counts) == set(STRATA)
    for stratum, members in Counter(STRATA).items():
        # the one item that each stratum is sure of may cost the others one more
        assert abs(counts[stratum] - size * members / 100) <= 2


def test_smaller_subsets_are_part_of_larger_ones() -> None:
    subsets = [set(stratified_subset(range(100), KEYS, STRATA, size, seed=5)) for size in (2, 3, 20, 60)]
    assert all(small < large for small, large in pairwise(subsets))


def test_fewer_items_than_strata_come_from_different_strata() -> None:
    chosen = stratified_subset(range(100), KEYS, STRATA, 2, seed=0)
    assert len({STRATA[index] for index in chosen}) == 2


def test_a_subset_stays_within_the_positions_given() -> None:
    assert set(stratified_subset(range(50, 80), KEYS, STRATA, 12, seed=0)) <= set(range(50, 80))
