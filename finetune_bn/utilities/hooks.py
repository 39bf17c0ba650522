"""Hooks on modules that are there for the time of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def hooked(
    modules: Iterable[nn.Module], *, pre: Callable[..., Any] | None = None, post: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Call `pre(module, args)` before and `post(module, args, output)` after each of the modules runs.

    Args:
        modules: the modules.
        pre: what is called before; None: nothing.
        post: what is called after; None: nothing.
    """
    handles: list[Any] = []
    try:
        for module in modules:
            if pre is not None:
                handles.append(module.register_forward_pre_hook(pre))
            if post is not None:
                handles.append(module.register_forward_hook(post))
        yield
    finally:
        for handle in handles:
            handle.remove()
