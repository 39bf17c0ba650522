"""GroupNorm of one group by other formulations than PyTorch's kernel: time of forward and backward, and exactness.

One group in a small batch leaves few rows to reduce over: on a GPU PyTorch's kernel keeps few multiprocessors busy.
Tried here: LayerNorm over the memory as it lies, then weight and bias; moments by `var_mean`, then one `addcmul`, left
to autograd; the same with a backward pass of its own, of two reductions and two `addcmul`; and the variance from the
sum of squares, which is one reduction less careful. Each is compared with `torch.nn.functional.group_norm` in the same
rounds, forward and backward, contiguous and in channels_last, and its output and gradients with float64's.

    python scripts/bench_one_group.py                 # three minutes on a CPU core
    python scripts/bench_one_group.py --device cuda

Result: results/bench_one_group.json (bench_one_group_cuda.json) with a table beside it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from step_clock import seconds_of
from store import Store
from torch import Tensor

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
EPS = 1e-5
SHAPES = ((4, 64, 56, 56), (4, 256, 28, 28), (4, 1024, 14, 14))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GroupNorm = Callable[[Tensor, Tensor, Tensor], Tensor]


def native(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return PyTorch's GroupNorm of one group of `x` [N, C, H, W]."""
    return F.group_norm(x, 1, weight, bias, EPS)


def as_it_lies(x: Tensor) -> Tensor:
    """Return `x` [N, C, H, W] as [N, C H W], a view in the order of its memory."""
    return (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).reshape(len(x), -1)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return it by LayerNorm over the memory as it lies."""
    flat = as_it_lies(x)
    lies = x.shape if x.is_contiguous() else [x.shape[i] for i in (0, 2, 3, 1)]
    y = F.layer_norm(flat, flat.shape[1:], None, None, EPS).view(lies)
    y = y if x.is_contiguous() else y.permute(0, 3, 1, 2)
    return torch.addcmul(per_channel(bias), y, per_channel(weight))


def var_mean(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return it by moments of the memory as it lies and one multiplication; backward is autograd's."""
    var, mean = torch.var_mean(as_it_lies(x), 1, correction=0, keepdim=True)
    return scaled(x, weight, bias, mean, torch.rsqrt(var + EPS))


def per_channel(t: Tensor) -> Tensor:
    """Return [C] or [N, C] in a shape to multiply [N, C, H, W] with."""
    return t.view(*t.shape, 1, 1)


def scaled(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rsigma: Tensor) -> Tensor:
    """Return (x - mean) rsigma weight + bias in one pass over `x`; mean and rsigma are [N, 1]."""
    scale = weight * rsigma
    shift = bias - mean * scale
    return torch.addcmul(per_channel(shift.to(x.dtype)), x, per_channel(scale.to(x.dtype)))


class TwoReductions(torch.autograd.Function):
    """It by moments and one multiplication, and a backward pass of two reductions and two multiplications."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, careful: bool) -> Tensor:
        flat = as_it_lies(x)
        if careful:
            var, mean = torch.var_mean(flat, 1, correction=0, keepdim=True)
        else:
            mean = flat.mean(1, keepdim=True)
            square = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=torch.float32).square() / flat.shape[1]
            var = (square - mean.square()).clamp_min(0)
        mean, rsigma = mean.float(), torch.rsqrt(var.float() + EPS)
        ctx.save_for_backward(x, weight, mean, rsigma)
        return scaled(x, weight, bias, mean, rsigma)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rsigma = ctx.saved_tensors
        size = x[0].numel()
        total = grad.sum((2, 3), dtype=torch.float32)
        product = ((grad * x).sum((2, 3), dtype=torch.float32) - mean * total) * rsigma
        of_mean = (weight * total).sum(1, keepdim=True) / size
        of_normed = (weight * product).sum(1, keepdim=True) / size
        by_grad, by_x = weight * rsigma, -of_normed * rsigma.square()
        constant = -rsigma * of_mean - by_x * mean
        parts = (t.to(x.dtype).expand(x.shape[:2]) for t in (constant, by_x, by_grad))
        constant, by_x, by_grad = map(per_channel, parts)
        of_x = torch.addcmul(torch.addcmul(constant, x, by_x), grad, by_grad)
        return of_x, product.sum(0).to(weight.dtype), total.sum(0).to(weight.dtype), None


NATIVE = "torch's kernel"
WAYS: dict[str, GroupNorm] = {
    NATIVE: native,
    "LayerNorm of the memory": layer_norm,
    "var_mean, autograd": var_mean,
    "var_mean, two reductions back": lambda *given: TwoReductions.apply(*given, True),
    "sum of squares, two reductions back": lambda *given: TwoReductions.apply(*given, False),
}


def passes(way: GroupNorm, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of x, weight and bias."""
    given = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = way(*given)
    return y, *torch.autograd.grad(y, given, grad)


def measure(cell: dict[str, Any], rounds: int, device: str) -> list[dict[str, Any]]:
    """Return a row for each way: time to torch's in the same round, median, and the largest error."""
    generator = torch.Generator().manual_seed(0)
    order = {"memory_format": LAYOUTS[cell["layout"]], "device": device}
    # Activations behind a ReLU: their mean is about their standard deviation.
    x, grad = (torch.randn(cell["shape"], generator=generator).add(shift).to(**order) for shift in (1.0, 0.0))
    weight, bias = (torch.rand(x.shape[1], generator=generator).add(0.5).to(device) for _ in range(2))
    given = [t.to(DTYPES[cell["dtype"]]) for t in (x, weight, bias, grad)]
    exact = passes(native, *(t.double() for t in given))
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 2):
        for name, way in WAYS.items():
            spent = seconds_of(lambda way=way: passes(way, *given), device, 1, 3)  # type: ignore[misc]
            if turn >= 2:
                seconds[name].append(spent)
    rows = []
    for name, way in WAYS.items():
        found = passes(way, *given)
        error = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
        same = all(a.stride() == b.stride() for a, b in zip(found[:2], exact[:2], strict=True))
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[NATIVE], strict=True))
        rows.append(cell | {"way": name, "time": ratio, "error": error, "keeps_layout": same, "rounds": rounds})
    return rows


def table(store: Store) -> str:
    """Return the table as Markdown."""
    kinds = [(dtype, layout) for dtype in DTYPES for layout in LAYOUTS]
    lines = ["| | " + " | ".join(f"{dtype}, {layout}" for dtype, layout in kinds) + " |", "|---" * 5 + "|"]
    for name in WAYS:
        cells = []
        for dtype, layout in kinds:
            rows = [r for r in store.rows if (r["way"], r["dtype"], r["layout"]) == (name, dtype, layout)]
            times = ", ".join(f"{row['time']:.2f}" for row in rows)
            cells.append(f"{times} ({max(row['error'] for row in rows):.0e})" if rows else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    shapes = "; ".join(" x ".join(map(str, shape)) for shape in SHAPES)
    note = (
        f"\nForward and backward of a GroupNorm of one group, to torch's kernel in the same rounds, medians; {shapes}. "
    )
    note += "In brackets the largest error of output and gradients, to the largest value, against float64. "
    return "\n".join(lines) + "\n" + note + f"{store.device}.\n"


def main() -> None:
    """Measure what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = ROOT / "results" / f"bench_one_group{'_cuda' * (given.device == 'cuda')}.json"
    store = Store(path, f"python scripts/bench_one_group.py --device {given.device}", [0], device=given.device)
    for shape in SHAPES:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                cell = {"shape": list(shape), "dtype": dtype, "layout": layout}
                if not store.done(cell):
                    for row in measure(cell, given.rounds, given.device):
                        store.add(row)
    store.finish({f"{row['way']}, {row['dtype']}, {row['layout']}, {row['shape']}": row["time"] for row in store.rows})
    text = table(store)
    write_atomically(path.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
