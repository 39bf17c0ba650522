"""What `policy: auto` costs beside the training that follows it: the quickstart config, on a CPU.

One `fit` a budget, in this process; timed are the comparison and the rest of the command (training, validation and the
report; without the test). The time of a comparison is bounded by its budget, and by the length of the training: no
short training is longer than the whole one.

Hardware: 2 CPU cores, one thread; about 5 minutes with fast alone. Result: results/bench_auto.{json,md}.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from store import Store

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent


def measure(budget: str, epochs: int) -> dict[str, Any]:
    """Run the quickstart config with policy auto, and return the seconds of the comparison and of the rest."""
    from finetune_bn.callbacks import conversion
    from finetune_bn.cli import main

    spent: list[float] = []
    chosen: list[Any] = []
    decide = conversion.decide

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = decide(*args, **kwargs)
        spent.append(time.perf_counter() - started)
        chosen.append(result)
        return result

    conversion.decide = timed
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            given = ["--batch_norm.policy", "auto", "--batch_norm.budget", budget, "--test_after_fit", "false"]
            given += ["--trainer.max_epochs", str(epochs), "--trainer.default_root_dir", folder]
            given += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
            main(["fit", "--config", "quickstart", *given])
    finally:
        conversion.decide = decide
    total = time.perf_counter() - started
    comparison = chosen[0].comparison
    return {
        "budget": budget,
        "epochs": epochs,
        "compare_seconds": spent[0],
        "fit_seconds": total - spent[0],
        "ratio": spent[0] / (total - spent[0]),
        "arms": list(comparison.arms),
        "lengths": list(comparison.lengths),
        "trainings": sum(len(run.curve) for run in comparison.runs),
        "winner": comparison.best.arm,
        "load": os.getloadavg()[0],
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table."""
    lines = [
        "| budget | compared | short trainings | their steps | comparison, s | training, s | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        steps = ", ".join(map(str, row["lengths"]))
        lines.append(
            f"| {row['budget']} | {', '.join(row['arms'])} | {row['trainings']} | {steps} | "
            f"{row['compare_seconds']:.0f} | {row['fit_seconds']:.0f} | {row['ratio']:.2f} |"
        )
    lines += [
        "",
        "`finetune-bn fit --config quickstart --batch_norm.policy auto`: EfficientNet-Lite0, 600 images of 64 pixels, "
        f"{rows[0]['epochs']} epochs, one thread of a CPU; average load of the machine by its end: "
        f"{', '.join(format(row['load'], '.0f') for row in rows)}. Written by `python scripts/bench_auto.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure each budget, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", nargs="+", default=["fast"], help="fast, good, best")
    parser.add_argument("--epochs", type=int, default=5, help="of the training")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(args.out / "bench_auto.json", "python scripts/bench_auto.py", (0,), device="cpu")
    for budget in args.budgets:
        key = {"budget": budget, "epochs": args.epochs}
        if not store.done(key):
            store.add(measure(**key))
    rows = [row for row in store.rows if row["epochs"] == args.epochs]
    store.finish({"ratios": {row["budget"]: row["ratio"] for row in rows}})
    write_atomically(args.out / "bench_auto.md", markdown(rows))
    print(markdown(rows))


if __name__ == "__main__":
    main()
