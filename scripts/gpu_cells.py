"""What `gpu_check.py` measures: each function yields its cells, what finds the rows of one and what measures it."""

from __future__ import annotations

import copy
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_launches import Step
from bench_step import FLOOR, Bench, Cell
from launches import kernels_of, launches_of
from net_passes import build as random_net
from net_passes import randomize, train_pass
from step_clock import seconds_of
from step_variants import (
    EVAL,
    GROUP_NORMS,
    LIVE,
    TIMM,
    TORCHVISION,
    TUNE,
    base_network,
    build,
    ours,
)
from torch import nn

import finetune_bn as fbn
from finetune_bn.diagnosis.fits import MEMORIES_GIB, step_memory
from finetune_bn.diagnosis.memory import memory_report
from finetune_bn.utilities.probe import distance

ROOT = Path(__file__).resolve().parent.parent
# The floor first: without it no other counts. Then those that the issue is about.
LEARNABLE = [ours("original", fold) for fold in ("auto", "always", "never")]
EAGER = [FLOOR, LIVE, ours("none", "auto"), *LEARNABLE, EVAL, TORCHVISION, TIMM, *GROUP_NORMS, TUNE]
COMPILED = [FLOOR, LIVE, ours("none", "auto"), LEARNABLE[0], EVAL, "GroupNorm, 1 group", TORCHVISION]
POLICIES: dict[str, fbn.Policy | None] = {
    LIVE: None,
    ours("none", "auto"): fbn.Freeze("none"),
    ours("original", "auto"): fbn.Freeze("original"),
}
Row = dict[str, Any]
Cells = Iterator[tuple[Row, Callable[..., list[Row]]]]
# Of a running standard deviation, or of the outputs: what rounding in another order, and no more, may change.
SAME = 1e-3
NO_CUDA = "needs a CUDA device"


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        net: timm's name of the network.
        size: height and width of its images.
        batches: images in a batch, in the order in which they are measured.
        counted: two batches from which the largest one is computed.
        rounds: of a race.
        backend: what compiles.
    """

    net: str
    size: int
    batches: tuple[int, ...]
    counted: tuple[int, int]
    rounds: int
    backend: str = "inductor"


def steps(sizes: Sizes, device: str, compiled: bool) -> Cells:
    """Races of all variants at each batch size; compiled only at the smallest but one and the largest."""
    batches = sizes.batches[:2] if compiled else sizes.batches
    bench = Bench(None, device, 1, sizes.backend, launches=True)
    for batch in batches:
        cell = Cell(sizes.net, sizes.size, batch, bf16=True, channels_last=True, compiled=compiled)

        def measure(late: Callable[[], bool], cell: Cell = cell) -> list[Row]:
            rounds = sizes.rounds * (2 if cell.batch <= 16 else 1)
            rows = bench.measure(cell, COMPILED if compiled else EAGER, rounds, late)
            for row in rows:
                if row.get("seconds"):
                    row["ms"] = 1000 * row["seconds"]
            # The floor's row comes last: where it is there, all are.
            return rows[1:] + rows[:1]

        yield {"batch": batch, "compiled": compiled}, measure


def gpu_tests(sizes: Sizes, device: str) -> Cells:
    """The tests with the mark gpu, a cell a file."""
    for path in gpu_files(ROOT / "tests"):

        def measure(late: Callable[[], bool], path: Path = path) -> list[Row]:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=180)
            return [outcome(done.returncode, done.stdout + done.stderr)]

        yield {"file": str(path.relative_to(ROOT))}, measure


def gpu_files(folder: Path) -> list[Path]:
    """Return the test files that have a test with the mark gpu."""
    found = sorted(folder.rglob("test_*.py"))
    return [path for path in found if re.search(r"^@pytest\.mark\.gpu\b", path.read_text(encoding="utf-8"), re.M)]


def outcome(code: int, output: str) -> Row:
    """Return how many tests passed, failed and were skipped, of what pytest printed; a failure says its last lines."""
    row: Row = {
        word: sum(int(n) for n in re.findall(rf"(\d+) {word}\b", output)) for word in ("passed", "failed", "skipped")
    }
    bad = code not in (0, 5) or not row["passed"] + row["skipped"]
    return row | {"error": " / ".join(output.strip().splitlines()[-4:])[:600] if bad else None}


def same(sizes: Sizes, device: str) -> Cells:
    """Recalibration, GroupNorm calibration and a folded backward pass: the same numbers as on the CPU."""

    def compare(what: str, figure: float) -> list[Row]:
        wrong = f"{what}: {figure:.1e} off the CPU's, {SAME:.0e} allowed" if not figure <= SAME else None
        return [{"off": figure, "error": wrong}]

    for task in (recalibrated, calibrated, folded):

        def measure(late: Callable[[], bool], task: Callable[[str], float] = task) -> list[Row]:
            torch.backends.cudnn.allow_tf32 = False
            try:
                return compare(task.__name__, task(device))
            finally:
                torch.backends.cudnn.allow_tf32 = True

        yield {"what": task.__name__}, measure


def two_nets(device: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """Return a network with random statistics twice, on the CPU and on the device, and images on the CPU."""
    images = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    net = random_net("test_resnet", 0)
    randomize(net, images)
    return net, copy.deepcopy(net).to(device), images


def recalibrated(device: str) -> float:
    """Return how far the recalibrated means and deviations are apart, in standard deviations."""
    here, there, images = two_nets(device)
    for net in (here, there):
        fbn.recalibrate(net, list(images.split(8)), progress=False)
    worst = 0.0
    for one, other in zip(here.modules(), there.modules(), strict=True):
        if isinstance(one, nn.BatchNorm2d):
            deviation = (one.running_var.double() + one.eps).sqrt()
            of_mean = (other.running_mean.cpu().double() - one.running_mean.double()) / deviation
            of_deviation = (other.running_var.cpu().double() + one.eps).sqrt() / deviation - 1
            worst = max(worst, float(of_mean.abs().max()), float(of_deviation.abs().max()))
    return worst


def calibrated(device: str) -> float:
    """Return how far the outputs of the GroupNorm networks are apart that were fitted to the same images."""
    here, there, images = two_nets(device)
    found = []
    for net in (here, there):
        place = next(net.parameters()).device
        fbn.convert(net, fbn.ToGroupNorm(groups=1, init="sequential"), example_input=images[:2].to(place))
        fbn.calibrate_group_norm(net, list(images.split(8)), progress=False)
        with torch.no_grad():
            found.append(net.eval()(images.to(place)).cpu())
    return distance([found[1]], [found[0]])


def folded(device: str) -> float:
    """Return how far outputs and gradients of a net that shares backward passes are apart."""
    here, there, images = two_nets(device)
    found = []
    for net in (here, there):
        place = next(net.parameters()).device
        fbn.convert(net, fbn.Freeze("original", fold="always"), example_input=images[:2].to(place))
        net.train()
        loss = net(images.to(place)).square().mean()
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu() for p in net.parameters() if p.grad is not None)])
    return max(distance([b], [a]) for a, b in zip(*found, strict=True))


def largest(sizes: Sizes, device: str) -> Cells:
    """The largest batch that runs, beside the computed one, under bfloat16 autocast in channels_last."""
    bench = Bench(None, device, 1)
    for gib in MEMORIES_GIB:
        for name, policy in POLICIES.items():

            def measure(
                late: Callable[[], bool], gib: float = gib, name: str = name, policy: fbn.Policy | None = policy
            ) -> list[Row]:
                base = base_network(sizes.net, sizes.size).to(device)
                reports = [
                    memory_report(
                        base,
                        torch.randn(batch, 3, sizes.size, sizes.size, device=device),
                        policy,
                        autocast=torch.bfloat16,
                    )
                    for batch in sizes.counted
                ]
                row: Row = {"computed": step_memory(base, reports, state=0).largest_batch(gib), "measured": None}
                del base
                if device == "cuda":
                    cell = Cell(sizes.net, sizes.size, 4, bf16=True, channels_last=True)
                    row["measured"] = bench.largest(cell, [name], int(gib * 2**30))[name]
                    row["of measured"] = row["computed"] / max(row["measured"], 1)
                return [row]

            yield {"gib": gib, "variant": name}, measure


def limited(sizes: Sizes, device: str) -> Cells:
    """What StepLimit adds to AdamW's step."""

    def measure(late: Callable[[], bool]) -> list[Row]:
        x = torch.randn(min(sizes.batches), 3, sizes.size, sizes.size)
        base, rows = base_network(sizes.net, sizes.size), []
        for with_limit in (False, True):
            step = Step(build(ours("none", "auto"), base, x).to(device), x.to(device), True, with_limit)
            step.optimizer.param_groups[0]["lr"] = 1e-4
            step.forward().backward()
            for _ in range(3):
                step.optimizer.step()
            seconds = sorted(seconds_of(step.optimizer.step, device, 1, 5) for _ in range(2 * sizes.rounds))
            row: Row = {"limited": with_limit, "ms": 1000 * seconds[len(seconds) // 2]}
            row["launches"] = launches_of(step.optimizer.step)[0]
            rows.append(row | (kernels_of(step.optimizer.step) if device == "cuda" else {}))
        return rows

    yield {"net": sizes.net}, measure


def graphed(sizes: Sizes, device: str) -> Cells:
    """A frozen net as CUDA graphs (`make_graphed_callables`): whether it can be, whether it is right, and its time."""
    for name in (ours("none", "auto"), ours("original", "auto")):

        def measure(late: Callable[[], bool], name: str = name) -> list[Row]:
            batch = sizes.batches[0]
            x = torch.randn(batch, 3, sizes.size, sizes.size).to(device, memory_format=torch.channels_last)
            base = base_network(sizes.net, sizes.size).to(device, memory_format=torch.channels_last)
            plain = build(name, base, x).train()
            expected = train_pass(plain, x.cpu(), False) if device == "cpu" else None
            if device != "cuda":
                return [{"outputs": len(expected[0]) if expected else 0, "error": None, "note": NO_CUDA}]
            model = copy.deepcopy(plain)

            def step(net: nn.Module) -> list[torch.Tensor]:
                net.zero_grad(set_to_none=True)
                out = net(x)
                out.square().mean().backward()
                return [out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]

            want = [t.clone() for t in step(plain)]
            graph = torch.cuda.make_graphed_callables(model, (x,))
            got = [t.clone() for t in step(graph)]
            off = max(distance([b], [a]) for a, b in zip(want, got, strict=True))
            times = {}
            for what, net in (("eager", plain), ("graphed", graph)):
                step(net)
                seconds = sorted(seconds_of(lambda net=net: step(net), device, 1, 5) for _ in range(sizes.rounds))
                times[f"{what} ms"] = 1000 * seconds[len(seconds) // 2]
            wrong = f"gradients {off:.1e} off the eager ones" if not off <= 1e-2 else None
            return [{"off": off, **times, "error": wrong}]

        yield {"variant": name}, measure


def apex(sizes: Sizes, device: str) -> Cells:
    """apex's fused bottleneck with frozen BatchNorm beside the same block with our frozen layers, in half precision."""
    if importlib.util.find_spec("apex") is None or device != "cuda":
        return

    def measure(late: Callable[[], bool]) -> list[Row]:
        from apex.contrib.bottleneck import Bottleneck
        from torchvision.models.resnet import Bottleneck as Plain

        x = torch.randn(sizes.batches[1], 256, 56, 56, device=device, dtype=torch.half)
        block = fbn.convert(Plain(256, 64).to(device), fbn.Freeze("none"), verify=False).half()
        block = block.to(memory_format=torch.channels_last)
        fused = Bottleneck(256, 64, 256, use_cudnn=True, explicit_nhwc=True).to(device).half()
        inputs = {
            "ours, none": (block, x.to(memory_format=torch.channels_last).requires_grad_()),
            "apex, fused": (fused, x.permute(0, 2, 3, 1).contiguous().requires_grad_()),
        }
        rows = []
        for name, (net, images) in inputs.items():

            def step(net: nn.Module = net, images: torch.Tensor = images) -> None:
                net(images).sum().backward()

            for _ in range(3):
                step()
            seconds = sorted(seconds_of(step, device, 1, 5) for _ in range(2 * sizes.rounds))
            rows.append({"block": name, "ms": 1000 * seconds[len(seconds) // 2], **kernels_of(step)})
        return rows

    yield {"width": 64}, measure
