"""Time and error of recalibration, beside torch's `update_bn`, fvcore's `update_bn_stats` and a bare forward pass.

EfficientNet-Lite0 with its ImageNet weights, the same 512 emoji of 64 pixels in every stream: shuffled, sorted by
class, and P x K (8 subcategories x 4 images), cut into batches of 2 to 128. In each cell all variants run in turn in
one process, from the same weights and on the same batches in memory; a cost is the median over rounds of the CPU time
over that of the bare pass of the same round: no gradients, BatchNorm in batch mode, nothing kept. CPU time, of one
thread, because it is not disturbed by what else runs on the machine. An error is the distance to layer-by-layer
re-estimation in float64 (one full pass a layer, those before it final), over all channels of all layers:
|mean - exact mean| / exact sd, and |log variance - log exact variance|, eps included.

Hardware: a CPU; half an hour. Resumes where it was cut off. Result: results/bench_recalibration.{json,md}, the same
with percentiles in results/bench_recalibration_all.md, and results/bench_recalibration_distance.md: `one_pass` by
batch size.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import track
from store import Store
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import finetune_bn as fbn
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
IMAGES, LABELS, OF_A_LABEL, SEED = 512, 8, 4, 0
SHUFFLED, SORTED, P_X_K = "shuffled", "sorted by class", f"P x K ({LABELS} x {OF_A_LABEL})"
BATCHES = {SHUFFLED: (2, 8, 32, 64, 128), SORTED: (2, 8, 32, 64, 128), P_X_K: (LABELS * OF_A_LABEL,)}
SIZES = (2, 4, 8, 16, 32, 64, 128, 256)
BARE = "bare forward pass"
Exact = dict[str, tuple[Tensor, Tensor]]


def chosen_images(generator: random.Random) -> tuple[list[int], list[int]]:
    """Return numbers of images of the embedded set in the order of a P x K loader, and the class of each.

    The classes of P x K are subcategories: of an emoji itself there are three drawings. They are numbered in the
    order of the index, by category, so that sorting by them sorts by category too.
    """
    from finetune_bn.data.emoji import VENDORS, emoji_index

    of_label: dict[str, list[int]] = {}
    for number, emoji in enumerate(emoji_index()):
        of_label.setdefault(emoji.subcategory, []).extend(range(number * len(VENDORS), (number + 1) * len(VENDORS)))
    batches = IMAGES // (LABELS * OF_A_LABEL)
    groups = []
    for label, images in enumerate(of_label.values()):
        generator.shuffle(images)
        # A label is in each batch at most once.
        full = min(len(images) // OF_A_LABEL, batches)
        groups += [(label, images[i * OF_A_LABEL : (i + 1) * OF_A_LABEL]) for i in range(full)]
    groups = sorted(generator.sample(groups, IMAGES // OF_A_LABEL))
    dealt = [group for batch in range(batches) for group in groups[batch::batches]]
    return [image for _, images in dealt for image in images], [label for label, images in dealt for _ in images]


def streams() -> dict[str, Tensor]:
    """Return the same images [512, 3, 64, 64] in the order of each stream."""
    from finetune_bn.data.emoji import VENDORS, EmojiImages, emoji_index

    generator = random.Random(SEED)
    numbers, labels = chosen_images(generator)
    source = EmojiImages(emoji_index(), VENDORS, [0] * len(emoji_index()) * len(VENDORS))
    source.load(numbers)
    pixels = torch.from_numpy(np.stack([np.asarray(source.open(number)) for number in numbers]))
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    order = list(range(len(numbers)))
    by_class = sorted(order, key=labels.__getitem__)
    generator.shuffle(order)
    return {SHUFFLED: images[order].contiguous(), SORTED: images[by_class].contiguous(), P_X_K: images.contiguous()}


def batch_norms(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def bare_pass(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """A no-grad forward pass with BatchNorm in batch mode, all else in eval mode."""
    for layer in batch_norms(model).values():
        layer.train()
    with torch.no_grad():
        for batch in batches:
            model(batch)


def fvcore_pass(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """fvcore's PreciseBN; it measures layers in training mode."""
    from fvcore.nn.precise_bn import update_bn_stats

    model.train()
    update_bn_stats(model, batches, len(batches))


def ours(mode: Any, *, of_stream: bool = False) -> Callable[[nn.Module, Sequence[Tensor]], None]:
    """Return a run of `recalibrate`, with the default batch size or that of the stream."""

    def run(model: nn.Module, batches: Sequence[Tensor]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fbn.recalibrate(model, batches, mode=mode, batch_size=len(batches[0]) if of_stream else None)

    return run


VARIANTS: dict[str, Callable[[nn.Module, Sequence[Tensor]], None]] = {
    BARE: bare_pass,
    "torch update_bn": lambda model, batches: update_bn(batches, model),
    "fvcore update_bn_stats": fvcore_pass,
    "ours, exact": ours("exact"),
    "ours, one_pass": ours("one_pass"),
    "ours, one_pass, batch_size of the stream": ours("one_pass", of_stream=True),
}


def run(variant: str, model: nn.Module, source: dict[str, Tensor], batches: Sequence[Tensor]) -> float:
    """Return the CPU seconds that a variant takes from the source's statistics; the model keeps what it measured."""
    model.load_state_dict(source)
    model.eval()
    start = time.process_time()
    VARIANTS[variant](model, batches)
    return time.process_time() - start


def exact_statistics(model: nn.Module, images: Tensor) -> Exact:
    """Return mean and unbiased variance of each layer, by the reference of the tests."""
    sys.path.insert(0, str(ROOT))
    from tests.references import layer_by_layer

    found = layer_by_layer(model, images)
    return {name: (torch.from_numpy(mean), torch.from_numpy(var)) for name, (mean, var) in found.items()}


def errors(model: nn.Module, exact: Exact) -> dict[str, float]:
    """Return the distances of the statistics of `model` to the exact ones: average, 99th percentile and maximum.

    Variances with the eps that the layer adds: some estimates are 0. Channels that are constant over all images have
    no standard deviation; their means are left out and counted.
    """
    means, variances, constant = [], [], 0
    for name, layer in batch_norms(model).items():
        mean, var = exact[name]
        alive = var > 1e-6 * var.median()
        constant += int((~alive).sum())
        means.append(((layer.running_mean.double() - mean).abs() / var.sqrt())[alive])
        variances.append(((layer.running_var.double() + layer.eps).log() - (var + layer.eps).log()).abs())
    found: dict[str, float] = {"constant_channels": constant}
    for what, values in (("mean", torch.cat(means)), ("log_var", torch.cat(variances))):
        found |= {
            f"{what}_error": float(values.mean()),
            f"{what}_error_p99": float(values.quantile(0.99)),
            f"{what}_error_max": float(values.max()),
        }
    return found


def measure_cell(
    model: nn.Module, source: dict[str, Tensor], exact: Exact, batches: Sequence[Tensor], rounds: int
) -> dict[str, dict[str, Any]]:
    """Return cost and errors of each variant on these batches; the variants take turns, the first round warms up."""
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    found: dict[str, dict[str, Any]] = {}
    for number in range(rounds + 1):
        for variant in VARIANTS:
            taken = run(variant, model, source, batches)
            if number:
                seconds[variant].append(taken)
            elif variant != BARE:
                found[variant] = errors(model, exact)
    for variant, times in seconds.items():
        costs = [own / bare for own, bare in zip(times, seconds[BARE], strict=True)]
        found[variant] = {"cpu_seconds": times, "cost": median(costs), **found.get(variant, {})}
    return found


def short_table(store: Store, threads: int) -> str:
    """Return the table of cost and average errors, a row a stream."""
    variants = [variant for variant in VARIANTS if variant != BARE]
    lines = [f"| stream, batch size | {' | '.join(variants)} |", "|---|" + "---|" * len(variants)]
    for stream, batch in ((s, b) for s, sizes in BATCHES.items() for b in sizes):
        rows: list[Any] = [store.find(stream=stream, batch=batch, variant=v, threads=threads) for v in variants]
        cells = [f"{row['cost']:.2f}; {row['mean_error']:.1e} / {row['log_var_error']:.1e}" for row in rows]
        lines.append(f"| {stream}, {batch} | {' | '.join(cells)} |")
    note = "Cost to the bare forward pass; errors of means in sd / of log variances, averages over all channels."
    return "\n".join([*lines, "", note]) + "\n"


def table(store: Store, threads: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """Return the table of costs and errors, and the figures that sum it up."""
    costs = " | ".join(f"cost, {n} thread{'s' * (n > 1)}" for n in threads)
    what = "error of means, in sd: average (99 %) | of log variances: average (99 %)"
    lines = [
        f"| stream | batch | variant | {costs} | {what} | update_bn's error, times this one |",
        "|---|---|---|" + "---|" * (len(threads) + 3),
    ]
    summary: dict[str, Any] = {"cost": {}, "update_bn_error_times_ours": {}}
    for stream, batch in ((s, b) for s, sizes in BATCHES.items() for b in sizes):
        theirs: Any = store.find(stream=stream, batch=batch, variant="torch update_bn", threads=threads[0])
        for variant in (v for v in VARIANTS if v != BARE):
            rows: Any = [store.find(stream=stream, batch=batch, variant=variant, threads=n) for n in threads]
            first = rows[0]
            times = {e: theirs[e] / max(first[e], 1e-12) for e in ("mean_error", "log_var_error")}
            cells = [f"{row['cost']:.2f}" for row in rows]
            cells += [f"{first[e]:.1e} ({first[f'{e}_p99']:.1e})" for e in times]
            cells += [" / ".join(f"{ratio:.3g}" for ratio in times.values()) if variant.startswith("ours") else ""]
            lines.append(f"| {stream} | {batch} | {variant} | " + " | ".join(cells) + " |")
            for row, n in zip(rows, threads, strict=True):
                summary["cost"].setdefault(variant, {})[f"{stream}, {batch}, {n} threads"] = row["cost"]
            if variant.startswith("ours"):
                summary["update_bn_error_times_ours"].setdefault(variant, {})[f"{stream}, {batch}"] = times
    summary["largest_cost"] = {variant: max(found.values()) for variant, found in summary["cost"].items()}
    return "\n".join(lines) + "\n", summary


def distance_table(store: Store) -> str:
    """Return the table of the distance of `one_pass` to `exact` by batch size."""
    lines = [
        "| images normalized together | " + " | ".join(f"{stream}: means / log variances" for stream in BATCHES) + " |",
        "|---|" + "---|" * len(BATCHES),
    ]
    for size in SIZES:
        rows: Any = [store.find(stream=stream, batch_size=size, variant="distance") for stream in BATCHES]
        cells = [f"{row['mean_error']:.1e} sd / {row['log_var_error']:.1e}" for row in rows]
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="times that each variant runs in each cell")
    parser.add_argument("--threads", type=int, nargs="+", default=(1,), help="numbers of threads")
    arguments = parser.parse_args()
    try:
        import fvcore.nn.precise_bn  # noqa: F401
    except ImportError:
        sys.exit("fvcore is missing: pip install 'finetune-bn[bench]'")
    from finetune_bn.backbones.create import create_backbone

    path = ROOT / "results" / "bench_recalibration.json"
    store = Store(path, "python scripts/bench_recalibration.py", [SEED], device="cpu")
    model = create_backbone("tf_efficientnet_lite0", weights="package").eval()
    source = {name: value.clone() for name, value in model.state_dict().items()}
    images = streams()
    exact = exact_statistics(model, images[SHUFFLED])
    for stream, size in track([(s, n) for s in images for n in SIZES], description="one_pass by batch size"):
        key = {"stream": stream, "batch_size": size, "variant": "distance"}
        if not store.done(key):
            model.load_state_dict(source)
            ours("one_pass", of_stream=True)(model, images[stream].split(size))
            store.add(key | errors(model, exact))
    cells = [(n, stream, batch) for n in arguments.threads for stream, sizes in BATCHES.items() for batch in sizes]
    for threads, stream, batch in track(cells, description="time and error"):
        key = {"stream": stream, "batch": batch, "threads": threads}
        if all(store.done(key | {"variant": variant}) for variant in VARIANTS):
            continue
        torch.set_num_threads(threads)
        found = measure_cell(model, source, exact, images[stream].split(batch), arguments.rounds)
        for variant, row in found.items():
            store.add({**key, "variant": variant, **row})
    text, summary = table(store, arguments.threads)
    store.finish(summary)
    distance = distance_table(store)
    write_atomically(path.with_suffix(".md"), short_table(store, arguments.threads[0]))
    write_atomically(path.with_name("bench_recalibration_all.md"), text)
    write_atomically(path.with_name("bench_recalibration_distance.md"), distance)
    print(text, distance, sep="\n")


if __name__ == "__main__":
    main()
