"""Convert and revert one net of every timm architecture module that has BatchNorm (BN), and prove each step.

    python scripts/sweep_timm.py                                the smallest net with BN of every module (make sweep)
    python scripts/sweep_timm.py --modules resnet levit
    python scripts/sweep_timm.py --all --max-parameters 60      every net of up to 60 million parameters

What is checked: see the head of checks.py. Result: results/sweep_timm.json, a row a net, and the table beside it. A
run that was cut off goes on where it was, failed nets are checked again, a finished file is measured anew. Exit code 1
if a family fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import itertools
import re
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from checks import SEED, check
from store import Store
from torch.nn.modules.batchnorm import _BatchNorm

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    import timm
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--modules", nargs="+", metavar="NAME", help="only these timm modules, or patterns such as res*"
    )
    parser.add_argument("--all", action="store_true", help="every net with BN, not only each module's smallest")
    parser.add_argument("--max-parameters", type=float, metavar="MILLION", help="skip larger nets, and count them")
    parser.add_argument(
        "--output", type=Path, help="default: sweep_timm.json (with --all sweep_timm_all.json) in results/"
    )
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # timm's about its own deprecated layers, one a net

    modules = timm.list_modules()
    chosen = [m for m in modules if not options.modules or any(fnmatch.fnmatch(m, p) for p in options.modules)]
    unknown = [p for p in options.modules or [] if not fnmatch.filter(modules, p)]
    if unknown:
        parser.error(
            f"--modules: timm {timm.__version__} has no module {', '.join(unknown)}; it has {', '.join(modules)}"
        )
    path = options.output or ROOT / "results" / f"sweep_timm{'_all' if options.all else ''}.json"
    given = sys.argv[1:] if arguments is None else list(arguments)
    store = Store(path, shlex.join(["python", "scripts/sweep_timm.py", *given]), seeds=[SEED], device="cpu")
    if store.summary:
        for module in chosen:
            store.drop({"module": module})
        store.summary = {}
    for module in chosen:
        store.drop({"module": module, "ok": False})

    console = Console()
    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("timm modules", total=len(chosen))
        for module in chosen:
            progress.update(bar, description=module)
            for row in sweep_module(module, options.all, options.max_parameters, store):
                console.print(line_of(row), highlight=False, soft_wrap=True)
            progress.advance(bar)
    summary = summarize(store.rows)
    store.finish(summary)
    write_atomically(path.with_suffix(".md"), table(store.rows, summary))
    write_atomically(path.with_name(f"{path.stem}_summary.md"), headline(summary))
    console.print(summary["line"], style="bold", highlight=False, soft_wrap=True)
    for row in store.rows:
        if not row["ok"]:
            console.print(line_of(row), style="red", highlight=False, soft_wrap=True)
    return int(summary["families_exact"] < summary["families"])


def sweep_module(module: str, every: bool, limit: float | None, store: Store) -> Iterator[dict[str, Any]]:
    """Check the nets of one timm module that are not in the store yet; a module without BN gets a row as well."""
    if not every and store.done({"module": module}):
        return
    nets = sorted(inventory(module))
    with_bn = [(size, name) for size, name, layers in nets if layers]
    counts = {"nets": len(nets), "nets_with_bn": len(with_bn)}
    if not with_bn:
        if not store.done({"module": module}):
            store.add({"module": module, "model": None, **counts, "layers": 0, "ok": True})
            yield store.rows[-1]
        return
    for size, name in with_bn if every else with_bn[:1]:
        if store.done({"module": module, "model": name}):
            continue
        if limit is not None and size > limit * 1e6:
            skipped = {
                "model": name,
                "parameters_million": round(size / 1e6, 2),
                "layers": 0,
                "ok": True,
                "skipped": True,
            }
            store.add({"module": module, **counts, **skipped})
        else:
            store.add({"module": module, **counts, **check(name)})
        gc.collect()
        yield store.rows[-1]


def inventory(module: str) -> Iterator[tuple[int, str, int]]:
    """Yield number of parameters, name and number of BN layers of each net of a timm module, without weights."""
    import timm

    for name in timm.list_models(module=module):
        with torch.device("meta"):
            net = timm.create_model(name, pretrained=False)
        layers = sum(isinstance(m, _BatchNorm) for m in net.modules())
        yield sum(p.numel() for p in net.parameters()), name, layers


def line_of(row: dict[str, Any]) -> str:
    """Return one row in words."""
    if row["model"] is None:
        return f"{row['module']}: no BatchNorm in any of {row['nets']} nets"
    head = f"{row['module']}: {row['model']}"
    if row.get("skipped"):
        return f"{head}: skipped, {row['parameters_million']:.0f} million parameters are over the limit"
    failed = [name for name, result in row["checks"].items() if result is False]
    verdict = "converted exactly" if row["ok"] else f"FAILED {', '.join(failed)} {row['error']}".rstrip()
    return f"{head}: {row.get('layers', '?')} layers, {verdict}, {row['seconds']} s"


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the README; a family is a timm module, exact if all its checked nets are."""
    checked = [row for row in rows if row["model"] is not None and not row.get("skipped")]
    families = {key: list(group) for key, group in itertools.groupby(sorted(checked, key=module_of), key=module_of)}
    exact = [name for name, group in families.items() if all(row["ok"] for row in group)]
    layers = sum(row.get("layers", 0) for row in checked if row["ok"])

    def largest(kind: str, affine: Callable[[str], bool]) -> float:
        values = [v for r in checked for k, v in r.get("difference", {}).get(kind, {}).items() if affine(k)]
        return worst(values)

    kinds: Counter[str] = Counter()
    for row in checked:
        kinds.update(row.get("kinds", {}))
    without = sorted(row["module"] for row in rows if row["model"] is None)
    return {
        "line": f"{len(exact)} of {len(families)} families with BN converted exactly, {layers} layers",
        "families": len(families),
        "families_exact": len(exact),
        "families_failed": sorted(families.keys() - set(exact)),
        "nets": len(checked),
        "layers": layers,
        "kinds": dict(kinds.most_common()),
        "largest_eval_difference_none_shift_original": largest("eval", lambda affine: "merged" not in affine),
        "largest_eval_difference_merged": largest("eval", lambda affine: affine == "merged"),
        "largest_eval_difference_merged_in_float64": largest("eval", lambda affine: affine == "merged in float64"),
        "largest_train_eval_difference": largest("train", lambda affine: True),
        "largest_gradient_difference": largest("gradient", lambda affine: True),
        "pairs": sum(row.get("pairs", 0) for row in checked),
        "largest_folded_difference_in_float64": largest("folded", lambda affine: True),
        "largest_folded_difference_of_a_layer_in_float32": largest("folded32", lambda what: what == "original"),
        "largest_unfolded_difference_of_a_layer_in_float32": largest("folded32", lambda what: what == "unfolded"),
        "largest_ratio_of_both_for_all_gradients_of_a_layer": largest("folded32", lambda what: what == "ratio"),
        "not_folded": dict(reasons(checked).most_common()),
        "other_randomness": sorted(f"{r['model']}: {', '.join(r['random'])}" for r in checked if r.get("random")),
        "compared_by_features": sorted(r["model"] for r in checked if r.get("compared", "outputs") != "outputs"),
        "left_alone": sorted(f"{r['model']}: {name}" for r in checked for name in r.get("left_alone", [])),
        "skipped": sorted(row["model"] for row in rows if row.get("skipped")),
        "families_without_bn": len(without),
        "without_bn": without,
        "seconds": round(sum(row["seconds"] for row in checked)),
    }


def reasons(rows: Sequence[dict[str, Any]]) -> Counter[str]:
    """Return why layers do not share, without the names in it."""
    found: Counter[str] = Counter()
    for row in rows:
        for why, n in row.get("not_folded", {}).items():
            found[re.sub(r"[\w.]+\.[\w.]+", "...", why)] += n
    return found


def module_of(row: dict[str, Any]) -> str:
    return str(row["module"])


def table(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> str:
    """Return the results as a Markdown page."""
    header = ["module", "net", "million parameters", "BN layers", "kinds"]
    header += ["none, shift, original", "merged", "merged, float64", "train", "gradient", "pairs", "folded, float64"]
    header += ["folded layer, float32", "the same unfolded", "of both, all gradients", "result"]
    lines = [
        f"# {summary['line']}",
        "",
        "A family is a timm architecture module. The figures are largest differences relative to the largest value: of "
        "eval-mode outputs before and after the conversion, by affine kind; `train`, of training-mode from eval-mode "
        "outputs of the converted net; `gradient`, of its gradients from those of the untouched net in eval mode; "
        "`folded`, of outputs and gradients in float64 with as many layers folded as there are `pairs`, from those in "
        "activation space; the next columns those of a single layer's worst gradient in float32 from that in float64, "
        "with and without folding, and the largest quotient of the two for all gradients of a layer as one vector (the "
        "divisor is at least 1e-6). "
        "`scripts/checks.py` says what else is checked.",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
    ]
    nets = [row for row in rows if row["model"] is not None]
    for row in sorted(nets, key=lambda row: (row["module"], row.get("parameters_million", 0))):
        lines.append("| " + " | ".join(table_cells(row)) + " |")
    notes = {
        f"Modules without BatchNorm ({summary['families_without_bn']})": summary["without_bn"],
        "Random in training mode besides dropout, so not compared there": summary["other_randomness"],
        "Other outputs in training than in eval mode, so compared by features": summary["compared_by_features"],
        "Norm layers that are no torch BatchNorm, left alone": summary["left_alone"],
        "Skipped because of --max-parameters": summary["skipped"],
    }
    lines += ["", *(f"- {what}: {', '.join(names) or 'none'}." for what, names in notes.items())]
    return "\n".join(lines) + "\n"


def headline(summary: dict[str, Any]) -> str:
    """Return the figures that the README quotes."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in summary["kinds"].items())
    off = {
        name: summary[f"largest_{name}"]
        for name in (
            "folded_difference_in_float64",
            "folded_difference_of_a_layer_in_float32",
            "unfolded_difference_of_a_layer_in_float32",
            "ratio_of_both_for_all_gradients_of_a_layer",
        )
    }
    in64, in32, apart, ratio = off.values()
    folded = f"{summary['pairs']} of these layers can share the backward pass of a convolution, the same numbers "
    folded += (
        f"(largest relative difference {in64:.0e} in float64; in float32 a gradient of a layer is at most {in32:.0e} "
    )
    folded += f"off, and {apart:.0e} without sharing, all gradients of a layer together {ratio:.2f} times as far)"
    return f"**{summary['line']}** ({kinds}); {folded}. Modules without BN: {summary['families_without_bn']}.\n"


def table_cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one net."""
    off = row.get("difference", {})
    in_eval = off.get("eval", {})
    figures = [
        [v for k, v in in_eval.items() if "merged" not in k],
        [v for k, v in in_eval.items() if k == "merged"],
        [v for k, v in in_eval.items() if k == "merged in float64"],
        list(off.get("train", {}).values()),
        list(off.get("gradient", {}).values()),
        list(off.get("folded", {}).values()),
        [v for k, v in off.get("folded32", {}).items() if k == "original"],
        [v for k, v in off.get("folded32", {}).items() if k == "unfolded"],
    ]
    failed = [name for name, result in row.get("checks", {}).items() if result is False]
    result = "exact" if row["ok"] else f"FAILED: {', '.join(failed) or row['error'][:80]}"
    *before, folded, folded32, apart32 = (
        f"{worst(values):.0e}".replace("0e+00", "0") if values else "" for values in figures
    )
    return [
        row["module"],
        row["model"],
        str(row.get("parameters_million", "")),
        str(row.get("layers", "")),
        ", ".join(f"{n} {kind}" for kind, n in row.get("kinds", {}).items()),
        *before,
        str(row.get("pairs", "")),
        folded,
        folded32,
        apart32,
        f"{off['folded32']['ratio']:.2f}" if off.get("folded32", {}).get("ratio") else "",
        "skipped" if row.get("skipped") else result,
    ]


def worst(values: Sequence[float | None]) -> float:
    """Return the largest difference; the store's None stands for an infinite one."""
    return max((float("inf") if v is None else v for v in values), default=0.0)


if __name__ == "__main__":
    raise SystemExit(main())
