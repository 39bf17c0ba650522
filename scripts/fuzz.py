"""Thousands of random networks, damaged images and changed configs: a promise kept, or a clear error, and nothing else.

Networks (tests/fuzz/networks.py: nested, shared and recomputed layers, hooks, stored skips, norm layers of all kinds, a
convolution used twice, three dtypes, channels_last) are planned, converted by random policies and rules, reverted,
trained for two steps, recalibrated, saved, loaded, converted once more, merged and exported; tests/fuzz/life.py says
what must hold at each step. Damaged image files go to every reader, changed configs to the command.

    python scripts/fuzz.py                      # 2,000 of each; goes on where it was stopped
    python scripts/fuzz.py --only configs --examples 200

An example that fails is stored with its error, and the script goes on; a row is fifty examples of one seed. Table:
results/fuzz.md.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hypothesis
import torch
from hypothesis import strategies as st
from store import Store

from finetune_bn.utilities.files import write_atomically
from finetune_bn.utilities.tables import text_table

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 50
KINDS = ("networks", "images", "configs", "models")


def example_of(kind: str, folder: Path) -> tuple[Any, Callable[[Any], Counter[str]]]:
    """Return the strategy that draws an example, and what is done with one.

    Args:
        kind: one of `KINDS`.
        folder: an empty folder to work in.
    """
    if kind == "networks":
        from tests.fuzz.life import live
        from tests.fuzz.networks import specs
        from tests.fuzz.policies import policies

        return st.tuples(specs(), policies(), policies(), st.integers(0, 999)), lambda drawn: live(*drawn)
    from tests.fuzz import configs, images, models

    numbers = itertools.count()

    def fresh() -> Path:
        shutil.rmtree(folder / "work", ignore_errors=True)
        (folder / "work").mkdir(parents=True)
        return folder / "work"

    if kind == "images":
        model = models.trained(folder)
        return images.files(), lambda file: images.look_at(file, model, fresh(), thorough=next(numbers) % 5 == 0)
    if kind == "models":
        models.trained(folder)
        return models.damages(), lambda damages: models.load(damages, folder, fresh())
    configs_folder = folder / "images"
    for name in ("a", "b"):
        (configs_folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(24):
            (configs_folder / name / f"{i}.png").write_bytes(images.encoded("PNG", "RGB"))

    def run(drawn: Any) -> Counter[str]:
        work = fresh()
        os.symlink(configs_folder, work / "images")
        os.chdir(work)
        try:
            return configs.run(*drawn, folder=work)
        finally:
            os.chdir(ROOT)

    return configs.runs(), run


def chunk(kind: str, seed: int, folder: Path, count: int = CHUNK) -> dict[str, Any]:
    """Run `count` examples of one seed and return the row: what happened how often, and what failed."""
    strategy, body = example_of(kind, folder)
    happened: Counter[str] = Counter()
    failures: list[dict[str, str]] = []
    began = time.monotonic()
    slowest = 0.0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(strategy)
    def examples(drawn: Any) -> None:
        nonlocal slowest
        start = time.monotonic()
        happened["examples"] += 1
        try:
            happened.update(body(drawn))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
            text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            failures.append({"error": text, "where": where, "example": repr(drawn)[:2000]})
        slowest = max(slowest, time.monotonic() - start)

    examples()
    row = {"kind": kind, "seed": seed, "happened": dict(sorted(happened.items())), "failures": failures}
    return row | {"seconds": round(time.monotonic() - began, 1), "slowest": round(slowest, 1)}


def block_network() -> None:
    """Let this process reach no other machine, whatever a config says; sockets of its own workers stay."""
    connect = socket.socket.connect

    def guarded(sock: socket.socket, address: Any) -> None:
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            refuse()
        connect(sock, address)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("the fuzz run has no network")

    socket.socket.connect = guarded  # type: ignore[method-assign, assignment]
    socket.getaddrinfo = refuse  # type: ignore[assignment]


def table(rows: list[dict[str, Any]]) -> str:
    """Return what happened to the examples of each kind as markdown."""
    lines = ["# What thousands of random examples did", "", "From `python scripts/fuzz.py` (`make fuzz`).", ""]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        if not mine:
            continue
        total: Counter[str] = Counter()
        for row in mine:
            total.update(row["happened"])
        failed = sum(len(row["failures"]) for row in mine)
        count = total.pop("examples")
        slowest = max(row["slowest"] for row in mine)
        lines += [f"## {kind}: {count:,} examples, {failed} failed", "", "| what happened | times |", "|---|---|"]
        lines += [f"| {what} | {times:,} |" for what, times in total.most_common()]
        lines += ["", f"The slowest took {slowest:.1f} s.", ""]
        lines += [f"- `{f['error']}` ({f['where']})" for row in mine for f in row["failures"]]
    return "\n".join(lines).rstrip() + "\n"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the number of examples and failures of each kind."""
    return {
        kind: {
            "examples": sum(row["happened"]["examples"] for row in rows if row["kind"] == kind),
            "failures": sum(len(row["failures"]) for row in rows if row["kind"] == kind),
        }
        for kind in KINDS
    }


def main() -> None:
    """Run what is missing of the examples asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=2000, help="of each kind")
    parser.add_argument("--only", choices=KINDS, nargs="*", default=KINDS)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="run chunks with failures once more")
    parser.add_argument("--output", default=str(ROOT / "results" / "fuzz.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # what users should know of such data is said thousands of times here
    block_network()
    store = Store(args.output, "python scripts/fuzz.py", device="cpu")
    for kind in args.only:
        for seed in range(args.first_seed, args.first_seed + max(1, args.examples // CHUNK)):
            found = store.find(kind=kind, seed=seed)
            if found is not None and not (args.again and found["failures"]):
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = chunk(kind, seed, Path(folder))
            store.drop({"kind": kind, "seed": seed})
            store.add(row)
            failed = [f"{f['error'][:160]} ({f['where']})" for f in row["failures"]]
            lines = text_table(
                ["kind", "seed", "seconds", "failed"], [[kind, str(seed), str(row["seconds"]), str(len(failed))]]
            )
            print(lines[-1], *failed, sep="\n  ", flush=True)
    store.finish(summary(store.rows))
    write_atomically(Path(args.output).with_suffix(".md"), table(store.rows))
    sys.exit(any(row["failures"] for row in store.rows))


if __name__ == "__main__":
    main()
