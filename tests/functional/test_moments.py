"""Moments against float64 numpy, for any cut, order and number of processes."""

from __future__ import annotations

import socket
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from finetune_bn.errors import FinetuneBNError
from finetune_bn.functional.moments import Moments, merge_all


def reference(x: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return mean and biased variance per channel, two passes in float64."""
    values = np.moveaxis(x.double().numpy(), 1, 0).reshape(x.shape[1], -1)
    mean = values.mean(axis=1)
    return mean, ((values - mean[:, None]) ** 2).mean(axis=1)


@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 5), (7, 3, 4, 5), (2, 3, 2, 3, 4), (1, 3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_a_tensor_are_those_of_numpy_in_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (5 + 2 * torch.randn(shape)).to(dtype)
    mean, var = reference(x)
    moments = Moments.of(x)
    assert moments.mean.dtype == moments.m2.dtype == torch.float64
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(moments.var().numpy(), var, rtol=1e-5, atol=1e-12)
    assert moments.count == x.numel() / 3


@pytest.mark.parametrize("pieces", [1, 3, 50, 500])
def test_a_mean_of_10000_with_sd_001_keeps_its_digits_however_it_is_cut(pieces: int) -> None:
    # peers.md section 2, fvcore: E[x^2] - E[x]^2 in float32 gives variance 0 at mean 1000, negative at 10,000.
    x = 10_000 + 0.01 * torch.randn(500, 2, 3, 3)
    mean, var = reference(x)
    moments = merge_all(Moments.of(part) for part in x.chunk(pieces))
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=0, atol=1e-4 * 0.01)
    np.testing.assert_allclose(moments.var().numpy(), var, rtol=1e-4)
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    assert not np.allclose(naive.numpy(), var, rtol=0.1)


@pytest.mark.parametrize(
    ("layout", "shape"), [(torch.channels_last, (9, 2, 3, 3)), (torch.channels_last_3d, (5, 2, 2, 3, 3))]
)
def test_a_large_mean_keeps_its_digits_in_channels_last_too(
    layout: torch.memory_format, shape: tuple[int, ...]
) -> None:
    # Where values do not lie channel by channel torch's kernel counts, in the dtype of x, and then is not believed.
    x = (100_000 + 0.5 * torch.randn(shape)).contiguous(memory_format=layout)
    mean, var = reference(x)
    moments = Moments.of(x)
    np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(moments.var().numpy(), var, rtol=1e-6)
    by_kernel, _ = torch.batch_norm_update_stats(x, None, None, 0.0)
    assert not np.allclose(by_kernel.double().numpy(), mean, rtol=0, atol=1e-6)


def test_any_order_and_any_grouping_gives_the_same() -> None:
    parts = [Moments.of(torch.randn(n, 4, 2, 2) * n) for n in (1, 2, 7, 3, 11)]
    forward, backward = merge_all(parts), merge_all(parts[::-1])
    chain = parts[0]
    for part in parts[1:]:
        chain = chain.merge(part)
    for other in (backward, chain):
        torch.testing.assert_close(forward.mean, other.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(forward.m2, other.m2, rtol=1e-12, atol=1e-12)
        assert forward.count == other.count


def test_no_values_are_the_neutral_element() -> None:
    moments, none = Moments.of(torch.randn(5, 3)), Moments.none(3)
    for merged in (moments.merge(none), none.merge(moments)):
        torch.testing.assert_close(merged.mean, moments.mean, rtol=0, atol=1e-15)
        torch.testing.assert_close(merged.m2, moments.m2, rtol=0, atol=1e-15)
    assert none.merge(none).count == 0
    assert none.merge(none).is_finite


def test_means_of_batch_variances_are_not_what_merging_gives() -> None:
    # peers.md section 0.4: mmpretrain, pycls and update_bn average variances, which drops the variance of the means.
    x = torch.cat([torch.randn(8, 2) + 10 * k for k in range(4)])
    merged = merge_all(Moments.of(part) for part in x.chunk(4))
    np.testing.assert_allclose(merged.var().numpy(), reference(x)[1], rtol=1e-5)
    assert (torch.stack([part.var(0) for part in x.chunk(4)]).mean(0) < 0.1 * merged.var()).all()


def test_statistics_turn_into_moments_and_back() -> None:
    mean, var = torch.randn(4), torch.rand(4)
    moments = Moments.of_statistics(mean, var, 12)
    torch.testing.assert_close(moments.var().float(), var)
    torch.testing.assert_close(moments.var(correction=1).float(), var * 12 / 11)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_shows(value: float) -> None:
    x = torch.randn(4, 3)
    assert Moments.of(x).is_finite
    x[2, 1] = value
    assert not Moments.of(x).is_finite


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 3, 0)])
def test_nothing_to_count_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(FinetuneBNError, match=r"x: got .*allowed: \[N, C, \.\.\.\]"):
        Moments.of(torch.zeros(shape))
    with pytest.raises(FinetuneBNError, match="parts"):
        merge_all([])


CUTS = [[5, 3, 0], [1, 9, 2], [6, 0, 0]]


def _values(cuts: list[int]) -> torch.Tensor:
    return 100 + torch.randn(sum(cuts), 3, 2, 2, generator=torch.Generator().manual_seed(0))


def _rank(rank: int, port: int, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    found = []
    for cuts in CUTS:
        mine = _values(cuts).split(cuts)[rank]
        moments = (Moments.of(mine) if len(mine) else Moments.none(3)).all_reduce()
        found.append((moments.count, moments.mean.tolist(), moments.m2.tolist()))
    results[rank] = found
    torch.distributed.destroy_process_group()


def test_uneven_ranks_agree_to_the_bit_and_with_one_process() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_rank, (port, results), nprocs=3)
    assert results[1] == results[2] == results[0]
    for cuts, (count, mean, m2) in zip(CUTS, results[0], strict=True):
        whole = Moments.of(_values(cuts))
        assert count == whole.count
        np.testing.assert_allclose(mean, whole.mean.numpy(), rtol=1e-6)
        np.testing.assert_allclose(m2, whole.m2.numpy(), rtol=1e-5)


def test_a_mean_is_in_range_up_to_the_given_ratio_to_the_standard_deviation() -> None:
    x = torch.tensor([[-1.0], [1.0]]) + 3.0  # mean 3, biased standard deviation 1
    moments = Moments.of(x)
    assert moments.mean_is_in_range(9.0)  # 3 squared: the bound itself is in range
    two = torch.tensor([2.0])
    assert Moments.of_statistics(two, torch.ones(1), 2).mean_is_in_range(4.0)  # no number here is rounded
    assert not moments.mean_is_in_range(8.9)
    assert moments.mean_is_in_range(100.0)
