"""Every test starts from the same seeds, on one thread, and without a network."""

from __future__ import annotations

import os

# Read when these packages are imported, so set before any test imports them; subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# OpenMP's worker threads do not survive a fork, and a forked process that counts on them waits for ever. One thread,
# said before OpenMP starts: what a library sets later (Lightning, compiled code) leaves no workers behind.
os.environ["OMP_NUM_THREADS"] = "1"

import ipaddress
import logging
import random
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

SEED = 1905


class NetworkBlocked(OSError):
    """A test asked for an address outside this machine; an `OSError`, as on a machine without a network."""


def is_local(host: Any) -> bool:
    """Tell whether a host of an INET address names this machine."""
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Let sockets of this process reach this machine only.

    Other families (the Unix sockets of DataLoader workers and multiprocessing) pass, and so does what gloo does in C++.
    """
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: Any) -> None:
        if not is_local(host):
            raise NetworkBlocked(f"tests have no network: a connection to {host!r} was refused")

    def check_address(sock: socket.socket, address: Any) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            check(address[0])

    def guarded_connect(sock: socket.socket, address: Any) -> None:
        check_address(sock, address)
        connect(sock, address)

    def guarded_connect_ex(sock: socket.socket, address: Any) -> int:
        check_address(sock, address)
        return connect_ex(sock, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        check(host)
        return lookup(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def forks_can_train() -> None:
    """Start autograd before anything compiles: torch.compile brings in a pretended CUDA device.

    Autograd starts a thread for each device when it first runs, and refuses to run in a fork from then on.
    """
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def as_loud_as_before() -> Iterator[None]:
    """Give Lightning's logger back the level that it had: a test that wants silence keeps it to itself."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Take down a process group that a test's Trainer opened: Lightning leaves it, and SyncBatchNorm then syncs."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE"):
        if name not in before:
            os.environ.pop(name, None)
