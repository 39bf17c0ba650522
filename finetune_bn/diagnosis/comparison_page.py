"""The page of a comparison, made from its plain data: what was best, how each treatment learned, every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from finetune_bn.diagnosis.page import html_list, html_page, html_table, html_text, html_verdict
from finetune_bn.diagnosis.page_plots import Curve, html_curves

Data = Mapping[str, Any]


def comparison_page(comparison: Data) -> str:
    """Return the whole page.

    Args:
        comparison: what `Comparison.to_dict` returned.
    """
    images, seeds = comparison["images"], comparison["seeds"]
    about = [
        f"{len(comparison['arms'])} treatments",
        f"up to {max(comparison['lengths'], default=0):,} steps",
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}",
        f"{images['train']:,} training and {images['val']:,} validation images",
        f"{comparison['seconds']:.0f} s",
    ]
    top = [("", _verdict(comparison))]
    return html_page(f"Comparison on {comparison['model']}", top + comparison_sections(comparison), " · ".join(about))


def comparison_sections(comparison: Data) -> list[tuple[str, str]]:
    """Return headings and contents: treatments, their curves, learning rates, all runs.

    Args:
        comparison: what `Comparison.to_dict` returned.
    """
    curves = _learning(comparison) + _losses(comparison) + _rates(comparison)
    note = html_text("Thin lines are other learning rates and seeds. Treatments that fell behind were dropped early.")
    return [
        ("Treatments, best first", _arms(comparison) + html_list(comparison["notes"])),
        ("How they learned", f'<div class="figures">{curves}</div>{note}' if curves else ""),
        ("All runs", _runs(comparison)),
    ]


def _verdict(comparison: Data) -> str:
    best = next((row for row in comparison["table"] if row["arm"] == comparison["best"]), None)
    if best is None:
        return html_verdict("None", f"of {len(comparison['arms'])} treatments could be trained", "bad")
    spread = "" if best["sd"] is None else f" ± {best['sd']:.2g} over {best['seeds']} seeds"
    said = f"{best['what']}; learning rate {best['lr']:g}, {comparison['metric']} {best['score']:.4g}{spread}"
    return html_verdict(best["arm"], said)


def _arms(comparison: Data) -> str:
    rows, shares = [], []
    most = max((row["score"] for row in comparison["table"] if row["score"] is not None), default=0)
    for row in comparison["table"]:
        score = row["score"]
        rows.append(
            [
                row["arm"],
                _text(score, ".4g"),
                _text(row["sd"], ".2g"),
                _text(row["lr"], "g"),
                row["seeds"],
                row["steps"],
                f"{row['seconds']:.1f}",
                _fate(row),
                row["what"],
            ]
        )
        shares.append(score / most if score is not None and score >= 0 and most > 0 else None)
    metric = comparison["metric"]
    header = ["treatment", metric, "sd", "best lr", "seeds", "steps", "seconds", "what became of it", "in words"]
    return html_table(header, rows, texts=(0, 7, 8), bars={1: shares})


def _fate(row: Data) -> str:
    if row["failed"]:
        return f"failed: {row['failed']}"
    return "to the end" if row["dropped_at"] is None else f"dropped at {row['dropped_at']} steps"


def _learning(comparison: Data) -> str:
    """Return the score over the steps, each treatment at its best rate in bold."""
    best = {row["arm"]: row["lr"] for row in comparison["table"]}
    thin, bold = [], []
    for arm in best:
        for run in _runs_of(comparison, arm):
            about = f"lr {run['lr']:g}, seed {run['seed']}"
            thin.append(Curve(arm, [(x, y) for x, y in run["curve"]], faint=True, about=about))
        lengths: dict[int, list[float]] = {}
        for run in _runs_of(comparison, arm):
            for length, score in run["curve"] if run["lr"] == best[arm] else ():
                if score is not None:
                    lengths.setdefault(length, []).append(score)
        points = [(length, fmean(scores)) for length, scores in sorted(lengths.items())]
        bold.append(Curve(arm, points, about=f"lr {best[arm]:g}, mean of seeds" if best[arm] is not None else ""))
    title = f"{comparison['metric']} by the length of the training"
    return html_curves(title, [*bold, *thin], "step", table="the numbers are in the tables of treatments and runs")


def _losses(comparison: Data) -> str:
    """Return the training loss of the longest training of each treatment at its best rate, first seed."""
    curves = []
    for row in comparison["table"]:
        runs = [run for run in _runs_of(comparison, row["arm"]) if run["lr"] == row["lr"] and run["losses"]]
        points = [(x, y) for x, y in runs[0]["losses"]] if runs else []
        curves.append(Curve(row["arm"], points, about=f"lr {row['lr']:g}" if row["lr"] is not None else ""))
    return html_curves("Training loss at the best learning rate", curves, "step", log=True)


def _rates(comparison: Data) -> str:
    """Return the score by learning rate, of each treatment at the longest training that the rate got."""
    curves = []
    for row in comparison["table"]:
        rates: dict[float, list[Data]] = {}
        for run in _runs_of(comparison, row["arm"]):
            if run["score"] is not None:
                rates.setdefault(run["lr"], []).append(run)
        points = []
        for lr, runs in sorted(rates.items()):
            steps = max(run["steps"] for run in runs)
            points.append((lr, fmean(run["score"] for run in runs if run["steps"] == steps)))
        curves.append(Curve(row["arm"], points))
    title = f"{comparison['metric']} by learning rate"
    return html_curves(title, curves, "lr", xlog=True, table="the numbers are in the table of all runs")


def _runs(comparison: Data) -> str:
    rows = [
        [
            run["arm"],
            f"{run['lr']:g}",
            run["seed"],
            run["steps"],
            _text(run["score"], ".4g"),
            f"{run['seconds']:.1f}",
            _fate(run),
        ]
        for arm in comparison["arms"]
        for run in _runs_of(comparison, arm)
    ]
    header = ["treatment", "lr", "seed", "steps", comparison["metric"], "seconds", "what became of it"]
    return html_table(header, rows, texts=(0, 6))


def _runs_of(comparison: Data, arm: str) -> Sequence[Data]:
    return sorted((r for r in comparison["runs"] if r["arm"] == arm), key=lambda run: (run["lr"], run["seed"]))


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
