"""The table of a comparison under way, on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from finetune_bn.comparison.training import Outcome, Trial
from finetune_bn.errors import MissingDependency

Told = Callable[[Trial, Outcome, bool], None]


@contextlib.contextmanager
def live_table(title: str, metric: str, arms: Sequence[str], total: int, show: bool | None) -> Iterator[Told]:
    """Yield a function `(trial, outcome, known)` that puts a training into the table.

    Args:
        title: what is compared.
        metric: name of the score.
        arms: names of the treatments.
        total: about how many trainings there will be.
        show: None shows it on a terminal if rich is installed.

    Raises:
        MissingDependency: it is to be shown, and rich is not installed.
    """
    wanted = sys.stderr.isatty() if show is None else show
    try:
        if not wanted:
            raise ImportError
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        if wanted and show:
            raise MissingDependency("progress=True draws with rich: pip install rich") from error
        yield lambda trial, outcome, known: None
        return
    cells: dict[str, dict[float, tuple[int, str]]] = {arm: {} for arm in arms}
    done = [0, 0.0]
    console = Console(stderr=True)
    with Live(_table(title, metric, cells, done, total), console=console, auto_refresh=False) as live:

        def told(trial: Trial, outcome: Outcome, known: bool) -> None:
            score = "failed" if outcome.score is None else f"{outcome.score:.4g}"
            cells[trial.arm][trial.lr] = trial.steps, score
            done[0] += 1
            done[1] += 0.0 if known else outcome.seconds
            live.update(_table(title, metric, cells, done, total), refresh=console.is_terminal)

        yield told
        live.refresh()


def _table(
    title: str, metric: str, cells: dict[str, dict[float, tuple[int, str]]], done: Sequence[float], total: int
) -> Any:
    from rich.table import Table

    rates = sorted({lr for row in cells.values() for lr in row})
    caption = f"{metric} (steps); {done[0]:.0f} of about {max(total, int(done[0]))} trainings, {done[1]:.0f} s"
    table = Table(title=title, caption=caption)
    table.add_column("arm")
    for lr in rates:
        table.add_column(f"lr {lr:g}", justify="right")
    for arm, row in cells.items():
        table.add_row(arm, *(f"{row[lr][1]} ({row[lr][0]})" if lr in row else "" for lr in rates))
    return table
