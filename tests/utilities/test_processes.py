"""Alone every answer is one's own; together all say the same, and one that fails stops the others."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from finetune_bn.functional.moments import Moments
from finetune_bn.utilities.processes import OtherProcessFailed, Ranks

CPU = torch.device("cpu")


def test_alone_every_answer_is_ones_own() -> None:
    ranks = Ranks(None, CPU)
    assert ranks.world == 1
    x = torch.randn(3)
    assert ranks.gather(x) == [x]
    assert ranks.agree(1, 2.5) == [[1.0, 2.5]]
    moments = Moments.of(torch.randn(4, 2))
    assert moments.all_reduce(ranks.group) is moments
    ranks.fail(2)  # nobody to tell


def _two(rank: int, port: int, results: Any) -> None:
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    ranks = Ranks(None, CPU)
    found: dict[str, Any] = {"world": ranks.world, "agree": ranks.agree(rank, 10 + rank, rank == 1)}
    found["gather"] = [t.tolist() for t in ranks.gather(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).t()[rank])]
    torch.manual_seed(0)
    x = torch.randn(6, 2)
    merged = Moments.of(x[:2] if rank else x[2:]).all_reduce(ranks.group)
    found["merge"] = [merged.count, merged.mean.tolist(), merged.m2.tolist()]
    if rank == 0:
        ranks.fail(2)
    else:
        try:
            ranks.agree(1, 2)
        except OtherProcessFailed as error:
            found["error"] = str(error)
    found["after"] = ranks.agree(rank)  # the next round starts afresh
    results[rank] = found
    torch.distributed.destroy_process_group()


def test_two_processes_agree_and_learn_of_each_others_failure() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_two, (port, results), nprocs=2)
    for rank in range(2):
        found = results[rank]
        assert found["world"] == 2
        assert found["agree"] == [[0.0, 10.0, 0.0], [1.0, 11.0, 1.0]]
        assert found["gather"] == [[1.0, 3.0], [2.0, 4.0]]  # rows that do not lie in one piece of memory
        assert found["after"] == [[0.0], [1.0]]
        assert found["merge"] == results[0]["merge"]
    assert "error" not in results[0]
    assert results[1]["error"] == "rank 0 failed, see its own error; nothing was changed on this one"
    torch.manual_seed(0)
    whole = Moments.of(torch.randn(6, 2))
    count, mean, m2 = results[0]["merge"]
    assert count == 6
    torch.testing.assert_close(torch.tensor(mean, dtype=torch.float64), whole.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.tensor(m2, dtype=torch.float64), whole.m2, rtol=1e-6, atol=0)


def test_the_sign_of_failure_is_understood_whoever_sends_it() -> None:
    with pytest.raises(OtherProcessFailed, match="rank 0 failed"):
        Ranks(None, CPU).agree(-2.0, 1.0)
