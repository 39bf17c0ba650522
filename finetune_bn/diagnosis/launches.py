"""Operators that launch work, counted by a dispatch mode: the numbers depend on no machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# These make or rename a tensor and run no kernel.
_NO_WORK = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift"}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that launch work while it is on; views, empties and detaches are left out.

    Attributes:
        by_name: how often each ran.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_WORK:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self.by_name.values())


def launches_of(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return how many operators `run` launches, and what it returns."""
    with Launches() as counted:
        result = run()
    return counted.total, result
