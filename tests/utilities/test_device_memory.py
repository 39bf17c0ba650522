"""Bytes of activations against sums by hand, and the smaller one of what machine and container have free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_bn.utilities import device_memory
from finetune_bn.utilities.device_memory import available_memory, bytes_alive_at
from tests.models import PreActivation
from tests.tools import untouched


def measure(model: nn.Module, x: Tensor) -> int:
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        return bytes_alive_at(layers, lambda: model(x))


def chain(*channels: int) -> nn.Module:
    parts: list[nn.Module] = []
    for before, after in zip((3, *channels), channels, strict=False):
        parts += [nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("channels", [(8,), (2, 8), (8, 2), (4, 16, 4)])
def test_in_a_chain_only_the_input_of_the_layer_is_alive_beside_what_made_it(channels: tuple[int, ...]) -> None:
    # nn.Sequential rebinds its one variable: when a BatchNorm is reached, the activation in front of the conv is gone.
    pixels = 4 * 6 * 6
    assert measure(chain(*channels), torch.randn(4, 3, 6, 6)) == max(channels) * pixels * 4


def test_what_waits_for_an_addition_counts_and_what_was_there_before_does_not() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            kept = F.relu(x)
            return kept + self.bn(self.conv(kept))

    x = torch.randn(2, 3, 5, 5)
    assert measure(Residual().eval(), x) == 2 * x.nbytes  # kept, and what the conv returned; x itself is the caller's


def test_views_and_work_in_place_take_no_memory_of_their_own() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = (x + 1).relu_().view(-1, 4)
            return self.bn(y.flip(1).mul_(2))

    x = torch.randn(6, 2, 2)
    assert measure(InPlace().eval(), x) == 2 * x.nbytes  # y, and the flipped one


def test_it_grows_in_proportion_to_the_images() -> None:
    model = PreActivation().eval()
    one, four = (measure(model, torch.randn(n, 3, 8, 8)) for n in (1, 4))
    assert four == 4 * one > 0


def test_a_run_that_fails_leaves_no_hook() -> None:
    model, x = chain(4), torch.randn(1, 3, 4, 4)

    def run() -> None:
        model(x)
        raise RuntimeError("no memory")

    with untouched(model), pytest.raises(RuntimeError, match="no memory"):
        bytes_alive_at([model[1]], run)  # type: ignore[index]


@pytest.mark.parametrize(
    ("machine", "limit", "used", "expected"),
    [
        (1000, "2000000", "500000", 1000 * 1024),
        (1000, "900000", "500000", 400_000),
        (1000, "900000", "950000", 0),
        (1000, "max", "500000", 1000 * 1024),
        (1000, None, None, 1000 * 1024),
    ],
)
def test_a_containers_limit_counts_where_it_is_tighter_than_the_machine(
    machine: int, limit: str | None, used: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "/proc/meminfo": f"MemTotal: 9999 kB\nMemAvailable: {machine} kB\n",
        "/sys/fs/cgroup/memory.max": limit,
        "/sys/fs/cgroup/memory.current": used,
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": None,
    }

    def read(self: Path, encoding: str | None = None) -> str:
        content = files[str(self)]
        if content is None:
            raise FileNotFoundError(self)
        return content

    monkeypatch.setattr(Path, "read_text", read)
    assert available_memory(torch.device("cpu")) == expected


@pytest.mark.parametrize(
    ("limit", "expected"), [("900000", 400_000), ("9223372036854771712", 1000 * 1024), ("none", 1000 * 1024)]
)
def test_the_limit_of_a_container_under_version_1_counts_too(
    limit: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "/proc/meminfo": "MemAvailable: 1000 kB\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": limit,
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "500000",
    }

    def read(self: Path, encoding: str | None = None) -> str:
        if str(self) not in files:
            raise FileNotFoundError(self)
        return files[str(self)]

    monkeypatch.setattr(Path, "read_text", read)
    assert available_memory(torch.device("cpu")) == expected


def test_a_machine_that_tells_nothing_is_given_the_benefit_of_the_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "_meminfo", lambda: None)
    monkeypatch.setattr(device_memory, "_cgroup", lambda: None)
    assert available_memory(torch.device("cpu")) == 4 * 2**30


def test_this_machine_has_some() -> None:
    assert available_memory(torch.device("cpu")) > 2**20
