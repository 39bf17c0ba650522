"""All that only a GPU can tell, in under eight minutes: one script, what matters most first.

    python scripts/gpu_check.py            on a GPU (make gpu): results/gpu_check.json with tables beside it
    python scripts/gpu_check.py --tiny     the whole of it with tiny sizes on a CPU, to see that it runs through

Step times of ResNet-50 at 224 px under bfloat16 autocast in channels_last, eager and compiled, with peak memory,
launches, kernels and the share of time in which none ran; the tests that need a GPU; recalibration and GroupNorm
calibration beside the CPU's; the largest batch in 8, 16 and 24 GiB beside the computed one; what StepLimit costs; CUDA
graphs of a frozen net; apex's fused bottleneck, where apex is there. Each cell is on disk before the next one begins,
and no group begins a cell later than its share of the time allows, so that a cut loses nothing but what is missing: a
second run goes on with that, and with what failed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_cells import Sizes, apex, gpu_tests, graphed, largest, limited, same, steps
from store import Store, commit

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
FULL = Sizes(net="resnet50", size=224, batches=(4, 128, 16, 2), counted=(16, 32), rounds=6)
TINY = Sizes(net="test_resnet", size=32, batches=(2, 4), counted=(2, 4), rounds=1, backend="eager")


@dataclass(frozen=True)
class Group:
    """Cells that belong together.

    Attributes:
        name: its name in the rows.
        seconds: its share of the time; what it leaves is the next one's.
        cells: yields what finds the rows of a cell in the store, and what measures it: a function that takes another,
            which tells whether it is late, and returns rows.
    """

    name: str
    seconds: float
    cells: Callable[[Sizes, str], Iterator[tuple[dict[str, Any], Callable[..., list[dict[str, Any]]]]]]


GROUPS = (
    Group("eager", 120, lambda sizes, device: steps(sizes, device, compiled=False)),
    Group("same as the CPU", 25, same),
    Group("tests", 60, gpu_tests),
    Group("compiled", 150, lambda sizes, device: steps(sizes, device, compiled=True)),
    Group("largest batch", 60, largest),
    Group("step limit", 15, limited),
    Group("CUDA graphs", 15, graphed),
    Group("apex", 10, apex),
)


def run(store: Store, sizes: Sizes, device: str, groups: Sequence[Group], share: float = 1.0) -> list[str]:
    """Measure what the store lacks, and return which cells there was no time for.

    Args:
        store: where the rows go.
        sizes: the networks and batches.
        device: "cuda" or "cpu".
        groups: what is to be measured, in this order.
        share: by which every group's time is multiplied.
    """
    left, end, version = [], time.monotonic(), commit()
    for group in groups:
        end += group.seconds * share

        def late(end: float = end) -> bool:
            return time.monotonic() > end

        for key, measure in group.cells(sizes, device):
            cell = {"group": group.name, "device_type": device} | key
            if store.done(cell | {"error": None, "whole": True}):
                continue
            if late():
                left.append(f"{group.name}: {words(key)}")
                continue
            begin = time.monotonic()
            try:
                rows = measure(late)
                whole = not late()  # else variants may be missing: a second run measures it again
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                rows, whole = [{"error": f"{text} ({Path(frame.filename).name}, line {frame.lineno})"}], False
            store.drop(cell)
            for row in rows:
                store.add(cell | {"error": None} | row | {"whole": whole, "commit": version})
            took = time.monotonic() - begin
            said = next((f", {row['error']}" for row in rows if row.get("error")), "")
            print(f"{group.name}: {words(key)}: {took:.1f} s{said}", flush=True)
    return left


def words(key: dict[str, Any]) -> str:
    """Return what a cell is, in a line."""
    return ", ".join(f"{name} {value}" for name, value in key.items())


def table(store: Store, left: Sequence[str]) -> str:
    """Return the results as Markdown, one table a group, with the cells that are missing and why."""
    lines = [f"{store.device}; torch {store.versions.get('torch')}.", ""]
    hidden = {"group", "device_type", "whole", "commit", "error", "saved_bytes", "peak_bytes", "time_low", "time_high"}
    for group in dict.fromkeys(row["group"] for row in store.rows):
        rows = [row for row in store.rows if row["group"] == group]
        names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in hidden]
        names = [name for name in names if len({str(row.get(name)) for row in rows}) > 1 or len(rows) == 1]
        lines += [f"**{group}**", "", "| " + " | ".join(names) + " | |", "|---" * (len(names) + 1) + "|"]
        for row in rows:
            cells = [text_of(row.get(name)) for name in names]
            lines.append("| " + " | ".join(cells) + f" | {row['error'] or ''} |")
        lines.append("")
    if left:
        lines += ["No time was left for:", "", *(f"- {cell}" for cell in left), ""]
    return "\n".join(lines)


def text_of(value: Any) -> str:
    """Return a cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).replace("|", "/")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU where there is no GPU")
    parser.add_argument("--minutes", type=float, default=7.6, help="time for all of it")
    parser.add_argument("--groups", nargs="+", choices=[group.name for group in GROUPS], help="only these")
    parser.add_argument("--output", type=Path, help="default: results/gpu_check.json; with --tiny a temporary file")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run the check, write the table, and return 1 where something failed."""
    options = arguments(given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("gpu_check.py: there is no CUDA device here; --tiny runs it with tiny sizes on the CPU", file=sys.stderr)
        return 1
    path = options.output or ROOT / "results" / "gpu_check.json"
    if options.tiny and options.output is None:
        path = Path(tempfile.mkdtemp(prefix="gpu_check_")) / "gpu_check.json"
    store = Store(path, f"python scripts/gpu_check.py{' --tiny' * options.tiny}", [0], device=device)
    groups = [group for group in GROUPS if not options.groups or group.name in options.groups]
    share = 60 * options.minutes / sum(group.seconds for group in groups)
    left = run(store, TINY if options.tiny else FULL, device, groups, share)
    # A peer that is not installed is no failure.
    failed = [row for row in store.rows if row["error"] and not row["error"].startswith("ModuleNotFoundError")]
    store.finish({"cells": len(store.rows), "failed": len(failed), "left_out": left})
    write_atomically(path.with_suffix(".md"), table(store, left))
    print(f"{len(store.rows)} rows, {len(failed)} with an error, {len(left)} cells left out: {path}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
