"""Time and memory of a training step, by what was done to the BatchNorm layers, as ratios to a net without them.

The floor is the same net with its norm layers removed, a bias in the conv instead. A cell is a net, an image size, a
batch size, a precision, a memory layout, and eager or compiled; in a cell all variants run in one process, in turn:
each round runs a step of every one, and the ratio to the floor's step of the same round goes into the median. A step
is forward, cross entropy, backward and SGD. With one thread on a CPU the clock is the time that the thread got the
CPU, so that other work on the machine counts as little as can be. Bytes are those that autograd keeps for backward;
on a GPU also peak allocated memory, and the largest batch in --memory_gib.

On a CPU the process starts itself anew with settings of glibc's allocator (`ALLOCATOR`) that let it keep the memory
it got. Else large maps are returned to the system and asked for again in each step, and most of the difference
between variants would be page faults. The floor trains a bias for each channel, which a constant affine does not: that
can take less time than the floor.

A variant that cannot run is a row that says why. Cells that the file holds are not measured again. Result:
results/bench_step.json with tables beside it, results/bench_step_cuda.json on a GPU (python scripts/bench_step.py
--device cuda, under 8 minutes). The default run takes the time of a lunch on one CPU core.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from launches import kernels_of, launches_of
from step_clock import Contestant, clock_for, largest_batch, race, ratios
from step_tables import write_tables
from step_variants import (
    COMPILE_OPTIONS,
    EVAL,
    FLOOR,
    INDUCTOR,
    LIVE,
    SHORT,
    TIMM,
    TORCHVISION,
    TUNE,
    VARIANTS,
    base_network,
    build,
    ours,
)
from store import Store, commit

ROOT = Path(__file__).resolve().parent.parent
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
NETS = (
    "resnet50",
    "efficientnet_b0",
    "mobilenetv3_large_100",
    "regnety_008",
    "densenet121",
    "tf_efficientnet_lite0",
)
LEARNABLE = [ours("original", fold) for fold in ("never", "always", "auto")]
GROWTH = [LIVE, EVAL, TUNE, TORCHVISION, TIMM, ours("none", "auto"), *LEARNABLE, FLOOR]
FEW = [LIVE, EVAL, TORCHVISION, TIMM, ours("none", "auto"), ours("original", "auto"), FLOOR]
FEW_COMPILED = [LIVE, EVAL, TIMM, ours("none", "auto"), ours("original", "auto"), FLOOR]
COMPILED = [LIVE, EVAL, INDUCTOR, TORCHVISION, ours("none", "auto"), *LEARNABLE[1:], FLOOR]


@dataclass(frozen=True)
class Cell:
    """What all variants of a race have in common."""

    net: str
    size: int
    batch: int
    bf16: bool = False
    channels_last: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        kinds = ("bf16 autocast" if self.bf16 else "fp32", "channels_last" if self.channels_last else "contiguous")
        return f"{self.net} {self.size} px, batch {self.batch}, {', '.join(kinds)}{', compiled' * self.compiled}"


MAIN = {"cpu": Cell("resnet50", 224, 16), "cuda": Cell("resnet50", 224, 128, bf16=True, channels_last=True)}


def races(device: str) -> list[tuple[Cell, list[str], int]]:
    """Return the cells of a full run with their variants and rounds, those that matter most first."""
    everything = [name for name in VARIANTS if name != INDUCTOR]
    short = [name for name in SHORT if name != INDUCTOR]
    if device == "cuda":
        return [
            (MAIN["cuda"], everything, 10),
            (replace(MAIN["cuda"], compiled=True), COMPILED, 10),
            *[(replace(MAIN["cuda"], net=net, batch=64), short, 7) for net in NETS[1:]],
            *[(replace(MAIN["cuda"], batch=batch), GROWTH, 10) for batch in (8, 32, 256)],
            *[(replace(MAIN["cuda"], bf16=bf16, channels_last=False), short, 7) for bf16 in (False, True)],
        ]
    small = Cell("resnet50", 128, 8)
    kinds = [replace(Cell("resnet50", 96, 4), bf16=b, channels_last=c) for b, c in ((True, False), (False, True))]
    return [
        (MAIN["cpu"], GROWTH, 7),
        *[(replace(MAIN["cpu"], batch=batch), GROWTH, 5) for batch in (1, 2, 4, 8)],
        *[(replace(small, net=net), short, 5) for net in NETS[1:]],
        (small, everything, 5),
        *[(replace(small, bf16=b, channels_last=c), short, 5) for b, c in ((True, False), (False, True), (True, True))],
        (replace(MAIN["cpu"], batch=32), GROWTH, 3),
        *[(replace(kind, net=net), FEW, 3) for net in NETS[1:5] for kind in kinds],
        *[(replace(kind, net=NETS[0]), FEW, 3) for kind in kinds],
        *[(replace(small, net=net, size=96, batch=4, compiled=True), FEW_COMPILED, 3) for net in NETS[:5]],
        (replace(small, compiled=True), COMPILED, 5),
    ]


def columns(device: str) -> dict[str, list[tuple[str, Cell]]]:
    """Return what the tables show: of each the columns, by the name that the table's file ends in."""
    cells = [cell for cell, _, _ in races(device)]
    main = cells[0]
    batches = sorted((cell for cell in cells if replace(cell, batch=main.batch) == main), key=lambda cell: cell.batch)
    kind = {"size": main.size, "batch": main.batch, "net": main.net}
    nets = [cell for cell in cells if cell.net != main.net and replace(cell, **kind) == main]
    few = [cell for cell, variants, _ in races(device) if variants in (FEW, FEW_COMPILED)]
    rest = [cell for cell in cells if cell not in (*batches, *nets, *few)]
    tables = {
        "": [(f"{main.net}, {main.size} px", main), *[(f"{cell.net}, {cell.size} px", cell) for cell in nets]],
        "_batches": [(f"{cell.net}, {cell.size} px, batch {cell.batch}", cell) for cell in batches],
        "_kinds": [(str(cell), cell) for cell in rest],
    }
    for end, of in (("_bf16", "bf16"), ("_channels_last", "channels_last"), ("_compiled", "compiled")):
        tables[end] = [(f"{cell.net}, {cell.size} px", cell) for cell in few if getattr(cell, of)]
    return tables


class Bench:
    """Measures cells into a store.

    Args:
        store: where the rows go; None: to the caller alone.
        device: "cpu" or "cuda".
        threads: of PyTorch, on the CPU.
        backend: what compiles.
        launches: whether rows tell what a step launches, and on a GPU in what share of its time none ran.
    """

    def __init__(
        self, store: Store | None, device: str, threads: int, backend: str = "inductor", launches: bool = False
    ) -> None:
        self.store, self.device, self.threads = store, device, threads
        self.backend, self.launches = backend, launches
        self._base: tuple[tuple[str, int], torch.nn.Module] | None = None

    def key(self, cell: Cell) -> dict[str, Any]:
        """Return what finds the rows of a cell in the store."""
        return asdict(cell) | {"threads": self.threads}

    def measure(
        self, cell: Cell, variants: Iterable[str], rounds: int, late: Callable[[], bool] = lambda: False
    ) -> list[dict[str, Any]]:
        """Return a row for each variant of a cell; one that fails says why, and from when it is `late` on none is made.

        What was made by then is timed all the same, so the floor should come first where that matters.
        """
        contestants, rows = {}, {}
        if cell.compiled:
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 64  # all variants run the code of the same classes
        for name in variants:
            if late():
                break
            rows[name] = self.key(cell) | {"variant": name, "error": None}
            try:
                contestants[name] = self._contestant(name, cell, cell.batch)
                contestants[name].step()
                # What is compiled saves tensors of its own choice, unseen by hooks that come after the compiler.
                rows[name]["saved_bytes"] = None if cell.compiled else contestants[name].saved_bytes()
                if self.device == "cuda":
                    contestants[name].step()  # warm, else what cuDNN tries out counts
                    rows[name]["peak_bytes"] = contestants[name].peak_bytes()
            except Exception as error:
                contestants.pop(name, None)
                rows[name]["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                if name == FLOOR:
                    raise
        seconds = race(contestants, rounds, self.device, self.threads, repeat=3 if self.device == "cuda" else 1)
        for name in contestants:
            rows[name] |= ratios(seconds[name], seconds[FLOOR])
            rows[name] |= {"seconds": sorted(seconds[name])[rounds // 2], "rounds": rounds}
            rows[name]["clock"] = clock_for(self.device, self.threads)
            if self.launches and not cell.compiled:
                rows[name]["launches"] = launches_of(contestants[name].step)[0]
            if self.launches and self.device == "cuda":
                rows[name] |= kernels_of(contestants[name].step)
            for what in ("saved", "peak"):
                own, floor = rows[name].get(f"{what}_bytes"), rows[FLOOR].get(f"{what}_bytes")
                if own and floor:
                    rows[name][what] = own / floor
        return list(rows.values())

    def largest(self, cell: Cell, variants: Iterable[str], limit: int) -> dict[str, int]:
        """Return the largest batch of each variant in `limit` bytes of GPU memory."""
        found = {}
        for name in variants:
            model = self._model(name, cell, 4)

            def make(batch: int, model: torch.nn.Module = model) -> Contestant:
                return self._enter(model, model, cell, batch)

            found[name] = largest_batch(make, limit)
            del model
        return found

    def _contestant(self, name: str, cell: Cell, batch: int) -> Contestant:
        model = self._model(name, cell, batch)
        run: Callable[[torch.Tensor], torch.Tensor] = model
        if cell.compiled:
            options = COMPILE_OPTIONS.get(name, {})
            run = torch.compile(model, dynamic=False, backend=self.backend, options=options or None)
        return self._enter(run, model, cell, batch)

    def _model(self, name: str, cell: Cell, batch: int) -> torch.nn.Module:
        if self._base is None or self._base[0] != (cell.net, cell.size):
            self._base = (cell.net, cell.size), base_network(cell.net, cell.size)
        layout = torch.channels_last if cell.channels_last else torch.contiguous_format
        base = self._base[1].to(self.device, memory_format=layout)
        return build(name, base, self._images(cell, batch))

    def _images(self, cell: Cell, batch: int) -> torch.Tensor:
        layout = torch.channels_last if cell.channels_last else torch.contiguous_format
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, 3, cell.size, cell.size, generator=generator)
        return x.to(self.device, memory_format=layout)

    def _enter(
        self, run: Callable[[torch.Tensor], torch.Tensor], model: torch.nn.Module, cell: Cell, batch: int
    ) -> Contestant:
        y = torch.arange(batch, device=self.device) % 1000
        return Contestant(run, model, self._images(cell, batch), y, cell.bf16)


def arguments() -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on the CPU")
    parser.add_argument("--minutes", type=float, default=7.0, help="on a GPU: begin no cell after so many minutes")
    parser.add_argument("--memory_gib", type=float, default=8.0, help="on a GPU: what the largest batch has to fit in")
    parser.add_argument("--only", default="", help="cells whose name holds this: `batch 1,`, `compiled`")
    parser.add_argument("--rounds", type=int, help="instead of the cells' own number")
    parser.add_argument("--again", action="store_true", help="measure cells that the file holds once more")
    parser.add_argument("--tables", action="store_true", help="measure nothing: write the tables from the file")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing and write the tables."""
    given = arguments()
    if given.device == "cpu" and not given.tables and not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_step.py: --device cuda: there is no CUDA device here")
    torch.set_num_threads(given.threads)
    torch.set_flush_denormal(True)
    path = ROOT / "results" / f"bench_step{'_cuda' * (given.device == 'cuda')}.json"
    command = f"python scripts/bench_step.py --device {given.device} --threads {given.threads}"
    store = Store(path, command, [0, 1], device=given.device)
    bench = Bench(store, given.device, given.threads)
    start = time.perf_counter()
    version = commit()  # of the code that was loaded
    for cell, variants, rounds in races(given.device):
        # The floor's row is stored last: where it is there, all are.
        done = store.done(bench.key(cell) | {"variant": FLOOR}) and not given.again
        late = given.device == "cuda" and time.perf_counter() - start > 60 * given.minutes
        if given.tables or done or late or given.only not in f"{cell},":
            continue
        began = time.perf_counter()
        rows = bench.measure(cell, variants, given.rounds or rounds)
        if cell == MAIN["cuda"]:
            gc.collect()  # the contestants, else they would share the memory
            running = [row["variant"] for row in rows if row["error"] is None]
            largest = bench.largest(cell, running, int(given.memory_gib * 2**30))
            for row in rows:
                row |= {"largest_batch": largest.get(row["variant"]), "memory_gib": given.memory_gib}
        store.drop(bench.key(cell))
        conditions = {"load": os.getloadavg()[0], "allocator": ALLOCATOR if given.device == "cpu" else None}
        conditions["commit"] = version
        for row in rows:
            store.add(row | conditions)
        gc.collect()
        print(f"{cell}: {time.perf_counter() - began:.0f} s", flush=True)
    store.finish(
        write_tables(
            store,
            list(VARIANTS),
            FLOOR,
            {end: [(title, bench.key(cell)) for title, cell in shown] for end, shown in columns(given.device).items()},
        )
    )


if __name__ == "__main__":
    main()
