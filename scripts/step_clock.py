"""Time and memory of training steps, several networks in turn, as ratios to one of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_bn.diagnosis.memory import saved_bytes


@dataclass
class Contestant:
    """A network with all that one of its training steps needs.

    Attributes:
        run: what is called, compiled or not.
        model: the network itself.
        x: images [N, 3, H, W].
        y: labels [N].
        bf16: whether it runs under bfloat16 autocast.
    """

    run: Callable[[Tensor], Tensor]
    model: nn.Module
    x: Tensor
    y: Tensor
    bf16: bool

    def __post_init__(self) -> None:
        # A rate of 0 does all the work and leaves the weights where they are, so that all rounds are alike.
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.0)

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bf16):
            return F.cross_entropy(self.run(self.x).float(), self.y)

    def step(self) -> None:
        """Forward, backward, one step of SGD; no gradient stays."""
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def saved_bytes(self) -> int:
        """Return the bytes that autograd keeps of one forward pass."""
        return saved_bytes(self.model, self.loss)

    def peak_bytes(self) -> int:
        """Return the most bytes that are allocated on the GPU in a step, this network's own included, no other's."""
        torch.cuda.synchronize()
        own = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), self.x))
        others = torch.cuda.memory_allocated() - own
        torch.cuda.reset_peak_memory_stats()
        self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - others


def clock_for(device: str, threads: int) -> str:
    """Return which clock tells most about a step: where one thread does all the work, the time that it got the CPU."""
    return "cpu" if device == "cpu" and threads == 1 else "wall"


def seconds_of(step: Callable[[], None], device: str, threads: int, repeat: int) -> float:
    """Return the seconds of one of `repeat` steps in a row."""
    now = time.process_time if clock_for(device, threads) == "cpu" else time.perf_counter
    if device == "cuda":
        torch.cuda.synchronize()
    start = now()
    for _ in range(repeat):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (now() - start) / repeat


def race(
    contestants: dict[str, Contestant], rounds: int, device: str, threads: int, repeat: int = 1
) -> dict[str, list[float]]:
    """Return the seconds of each contestant's step in each round; a round has all of them, each time from another on.

    The caller has warmed them up.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number * len(names) // rounds
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(contestants[name].step, device, threads, repeat))
    return seconds


def ratios(seconds: list[float], floor: list[float]) -> dict[str, float]:
    """Return median and quartiles of the ratios of seconds to those of the floor in the same round."""
    values = sorted(a / b for a, b in zip(seconds, floor, strict=True))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"time": middle, "time_low": low, "time_high": high}


def largest_batch(make: Callable[[int], Contestant], limit: int) -> int:
    """Return the largest batch whose step fits in `limit` bytes of GPU memory, to a sixteenth of it.

    Args:
        make: makes the contestant for a batch; none of them may be alive when this is called.
        limit: bytes that this process may take from the GPU, what the allocator keeps for itself included.
    """
    total = torch.cuda.get_device_properties(0).total_memory

    def fits(batch: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0))
        try:
            contestant = make(batch)
            contestant.step()
            contestant.step()  # the first one may have had room that cuDNN asks for later
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return True

    good, bad = 0, 0
    while not bad or bad - good > max(1, good // 16):
        batch = (good + bad) // 2 if bad else max(2 * good, 4)
        good, bad = (batch, bad) if fits(batch) else (good, batch)
    torch.cuda.empty_cache()
    return good
