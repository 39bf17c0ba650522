"""Tables and plot of scripts/study_group_norm.py, from the rows that it measured."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from store import Store

MAIN_NET = "tf_efficientnet_lite0"


def summarize(store: Store) -> dict[str, Any]:
    """Return the figures that the README quotes."""
    near: list[dict[str, Any]] = []
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    names = ("part", "net", "init", "groups", "eps", "images")
    for row in store.rows:
        grouped.setdefault(tuple(row.get(name, "") for name in names), []).append(row)
    for (part, net, init, groups, eps, images), rows in grouped.items():
        line = {"part": part, "net": net, "init": init, "groups": groups, "eps": eps, "images": images}
        line["seeds"] = len(rows)
        for key in ("agreement", "cosine", "recall", "recall_batch_norm", "seconds"):
            line[key] = fmean(row[key] for row in rows)
        line["agreement sd"] = stdev(row["agreement"] for row in rows) if len(rows) > 1 else None
        line["layers"] = rows[0].get("layers")
        line["passes"] = fmean(row["passes"] for row in rows) if "passes" in rows[0] else None
        near.append(line)
    return {"near": near}


def markdown(summary: dict[str, Any]) -> str:
    """Return the figures without training as a table."""
    head = ["network (layers)", "how", "groups", "eps", "images", "agreement %", "cosine", "Recall@1 % (BatchNorm)"]
    head += ["CPU seconds", "in passes"]
    layers = {line["net"]: line["layers"] for line in summary["near"] if line["layers"]}
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    order = {"copy": 0, "reset": 1, "opacus": 2, "closed_form": 3, "sequential": 4, "": 5}
    for line in sorted(
        summary["near"],
        key=lambda r: (r["net"], order[r["init"]], r["eps"] != "own", r["eps"], str(r["groups"]).zfill(2), r["images"]),
    ):
        spread = "" if line["agreement sd"] is None else f" ± {line['agreement sd']:.1f}"
        cells = [
            f"{line['net'].removeprefix('tf_efficientnet_')} ({layers.get(line['net'], '?')})",
            line["init"] or "sequential, distilled",
            str(line["groups"] or 1),
            line["eps"],
            str(line["images"] or "none"),
            f"{line['agreement']:.1f}{spread}",
            f"{line['cosine']:.3f}",
            f"{line['recall']:.1f} ({line['recall_batch_norm']:.1f})",
            f"{line['seconds']:.0f}",
            "" if line["passes"] is None else f"{line['passes']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw agreement against the seconds spent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    mine = [r for r in summary["near"] if r["net"] == MAIN_NET and r["groups"] in (1, 32, "")]
    mine = [r for r in mine if r["init"] != "sequential" or r["eps"] in ("center", "to 9 v")]
    for i, init in enumerate(("copy", "opacus", "closed_form", "sequential", "")):
        rows = sorted(
            (r for r in mine if r["init"] == init and (r["groups"] != 32) == (init != "opacus")),
            key=lambda r: r["seconds"],
        )
        if rows:
            label = {"": "sequential, distilled"}.get(init, init)
            axis.plot([max(r["seconds"], 0.01) for r in rows], [r["agreement"] for r in rows], f"C{i}o-", label=label)
    axis.set(xscale="log", xlabel="CPU seconds", ylabel="agreement with the BatchNorm network, %", ylim=(0, 100))
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)
