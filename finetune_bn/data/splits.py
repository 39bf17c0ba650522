"""Seeded splits and subsets, stratified, the same on every machine and in every Python and torch version.

The order comes from SHA-256 of the seed and a stable key of each item (a code point, a relative path), not from a
random number generator or the position in a list. Adding or leaving out other strata therefore moves nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Sequence


def derive_seed(*parts: object) -> int:
    """Return a 63-bit number that depends on all `parts` (by their `str`) and on nothing else."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def hash_order(positions: Sequence[int], keys: Sequence[str], seed: int) -> list[int]:
    """Return `positions` in a random-looking order that depends on `seed` and on their `keys` only."""
    return sorted(positions, key=lambda position: (derive_seed(seed, keys[position]), keys[position]))


def _by_stratum(strata: Sequence[Hashable], positions: Sequence[int]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = {}
    for position in positions:
        groups.setdefault(strata[position], []).append(position)
    return groups


def stratified_split(
    keys: Sequence[str],
    strata: Sequence[Hashable],
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> dict[str, list[int]]:
    """Cut positions `0..len(keys)-1` into train, val and test, each stratum by the same shares.

    Shares are rounded within each stratum, so a stratum of one or two items may be in train only.

    Args:
        keys: one stable name per item, all different.
        strata: one group per item, e.g. its class.
        val_fraction: share of each stratum that goes to val.
        test_fraction: share of each stratum that goes to test.
        seed: another seed gives another split.

    Returns:
        `{"train": [...], "val": [...], "test": [...]}`, disjoint, together complete, each ascending.
    """
    splits: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for members in _by_stratum(strata, range(len(keys))).values():
        order = hash_order(members, keys, seed)
        # cumulative rounding: the shares of val and test together are never more than one item off
        test_end = _half_up(len(order) * test_fraction)
        val_end = _half_up(len(order) * (test_fraction + val_fraction))
        splits["test"] += order[:test_end]
        splits["val"] += order[test_end:val_end]
        splits["train"] += order[val_end:]
    return {name: sorted(members) for name, members in splits.items()}


def _half_up(number: float) -> int:
    # round() rounds half to even, which would make a stratum of 10 and one of 30 lean different ways
    return math.floor(number + 0.5)


def stratified_subset(
    positions: Sequence[int], keys: Sequence[str], strata: Sequence[Hashable], size: int, seed: int
) -> list[int]:
    """Return `size` of `positions`, ascending, with each stratum's share kept as closely as whole items allow.

    Every stratum keeps at least one item where `size` allows it (with fewer items than strata, `size` strata give
    one each). With the same seed a smaller subset is part of every larger one.

    Args:
        positions: what may be chosen, as positions into `keys` and `strata`.
        keys: one stable name per item, all different.
        strata: one group per item, e.g. its class.
        size: how many to choose, at most `len(positions)`.
        seed: another seed gives another subset.
    """
    # Item j of a stratum of n is due when the share (j + 1/2) / n of everything has been chosen (Webster's method);
    # the first item of each stratum is due at once.
    due: list[tuple[float, int, int]] = []
    for members in _by_stratum(strata, positions).values():
        for rank, position in enumerate(hash_order(members, keys, seed)):
            share = (rank + 0.5) / len(members) if rank else 0.0
            due.append((share, derive_seed(seed, "tie", keys[position]), position))
    return sorted(position for _, _, position in sorted(due)[:size])
