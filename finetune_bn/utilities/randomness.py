"""The random states of torch, numpy and Python, remembered and put back; and one thread at a time that does so."""

from __future__ import annotations

import random
import sys
import threading
from typing import Any

import torch

# The states belong to the whole process: two threads that put them back in turns would leave one state in the other's
# place. Whoever changes them for a while holds this, and the other waits.
ONE_THREAD = threading.RLock()


class RandomStates:
    """The random states as they are now, which data sets, transforms and models draw from.

    Args:
        devices: the devices whose state of torch counts, besides the CPU's.
    """

    def __init__(self, *devices: torch.device) -> None:
        self._python = random.getstate()
        self._numpy: Any = None if (numpy := sys.modules.get("numpy")) is None else numpy.random.get_state()
        self._torch = torch.get_rng_state()
        self._cuda = {d.index or 0: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for index, state in self._cuda.items():
            torch.cuda.set_rng_state(state, index)
