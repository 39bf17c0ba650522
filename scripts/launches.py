"""What a run launches: operators, by the count of the package, and kernels of a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from finetune_bn.diagnosis.launches import Launches, launches_of

__all__ = ["Launches", "kernels_of", "launches_of"]


def kernels_of(run: Callable[[], Any]) -> dict[str, float]:
    """Return the kernels that `run`, which is warm, launches on a GPU, and the share of its time in which none ran."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    ran = [event for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    busy = sum(event.device_time for event in ran) * 1e-6
    return {"kernels": len(ran), "idle": max(0.0, 1 - busy / seconds)}
