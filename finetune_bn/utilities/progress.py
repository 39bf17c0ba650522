"""A progress bar on the terminal, where there is one and rich is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from finetune_bn.errors import MissingDependency

Report = Callable[[int, str], None]


@contextlib.contextmanager
def progress_bar(description: str, unit: str, total: int | None, show: bool | None) -> Iterator[Report]:
    """Yield a function `(done, note)` that moves the bar.

    Args:
        description: what is being done.
        unit: what is counted.
        total: how many there are; None where that is not known.
        show: None shows it on a terminal if rich is installed.

    Raises:
        MissingDependency: it is to be shown, and rich is not installed.
    """
    wanted = sys.stderr.isatty() if show is None else show
    if not wanted:
        yield lambda done, note: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        if show:
            raise MissingDependency("progress=True draws with rich: pip install rich") from error
        yield lambda done, note: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn(f"{{task.completed:.0f}} {unit}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    # What was asked for goes to a file too: once, when it is done.
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
