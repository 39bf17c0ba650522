"""The tables of `bench_step.py`, from its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from store import Store

from finetune_bn.utilities.files import write_atomically

Row = Mapping[str, Any]


def write_tables(
    store: Store, variants: Sequence[str], floor: str, tables: Mapping[str, Sequence[tuple[str, dict[str, Any]]]]
) -> dict[str, Any]:
    """Write one Markdown table a file beside the store's, and return their figures.

    Args:
        store: the measured rows.
        variants: the rows of the tables, in order.
        floor: the variant whose time and memory are 1.
        tables: of each table the columns, a title and what finds the rows of the cell, by what its file's name ends in.
    """
    summary: dict[str, Any] = {}
    for end, shown in tables.items():
        found = [(title, {name: store.find(**key, variant=name) for name in variants}) for title, key in shown]
        measured = [(title, {n: row for n, row in rows.items() if row}) for title, rows in found]
        measured = [(title, rows) for title, rows in measured if rows]
        if not measured:
            continue
        path = store.path.with_name(f"{store.path.stem}{end}.md")
        # Absolute times of a CPU that others use too would tell nothing.
        timed = "" if "cores" in store.device else floor
        text = _table(measured, variants, timed) + _notes(measured, store.device)
        write_atomically(path, text)
        print(text)
        summary[path.stem] = {
            title: {
                name: {what: row[what] for what in ("time", "saved", "peak", "largest_batch") if row.get(what)}
                for name, row in rows.items()
            }
            for title, rows in measured
        }
    return summary


def _table(measured: Sequence[tuple[str, Mapping[str, Row]]], variants: Sequence[str], timed: str) -> str:
    lines = ["| |" + "".join(f" {title} |" for title, _ in measured), "|---|" + "---|" * len(measured)]
    for name in variants:
        cells = [_cell(rows.get(name)) for _, rows in measured]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if timed:
        per_image = [_per_image(rows[timed]) for _, rows in measured]
        lines.append("| *floor, ms per image* | " + " | ".join(per_image) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    """Return time, and bytes kept for backward, to the floor; on a GPU also the peak and the largest batch."""
    if row is None:
        return ""
    if row["error"]:
        return "fails"
    parts = [f"{row['time']:.2f}"] + [f"{row[what]:.2f}" for what in ("saved", "peak") if row.get(what)]
    return " / ".join(parts) + (f" ({row['largest_batch']})" if row.get("largest_batch") else "")


def _per_image(row: Row) -> str:
    return f"{1000 * row['seconds'] / row['batch']:.1f}"


def _notes(measured: Sequence[tuple[str, Mapping[str, Row]]], device: str) -> str:
    rows = [row for _, rows in measured for row in rows.values()]
    one = rows[0]
    peak = ", peak allocated memory" if any(row.get("peak") for row in rows) else ""
    fits = {row["memory_gib"] for row in rows if row.get("memory_gib")}
    batch = f", in brackets the largest batch in {fits.pop():g} GiB" if fits else ""
    threads = f", {one['threads']} thread{'s' * (one['threads'] > 1)}" if "cores" in device else ""
    sizes = sorted({row["batch"] for row in rows})
    text = f"\nStep time / bytes kept for backward{peak}, to the floor's{batch}; medians. {device}{threads}, "
    text += f"batch {', '.join(map(str, sizes))}.\n"
    text = text.rstrip() + " The floor trains a bias for each channel, so that what trains none can take less time.\n"
    as_it_comes = sorted({row["batch"] for row in rows if "cores" in device and not row.get("allocator")})
    if as_it_comes:
        text = text.rstrip() + " Measured without the allocator's settings, so that page faults count: batch "
        text += f"{', '.join(map(str, as_it_comes))}.\n"
    failed = {row["variant"]: [] for row in rows if row["error"]}
    for row in rows:
        if row["error"]:
            failed[row["variant"]].append(f"{row['net']} ({row['error']})")
    return text + "".join(f"\n`fails`: {name} on {'; '.join(sorted(set(why)))}.\n" for name, why in failed.items())
