"""What fits on a GPU: the largest batch by network, treatment of the BatchNorm layers, precision and memory. Computed.

    python scripts/table_what_fits.py

The bytes that a step keeps for backward are counted on a CPU for two batch sizes (`memory_report`), and with weights,
gradients, AdamW's state and a tenth of the memory left free they give the largest batch (`diagnosis/fits.py`). No GPU
takes part; `gpu_check.py` compares with what runs on one. For two networks a third batch is counted too, to see how
far the straight line through the first two is off. Result: results/what_fits.json with a table beside it. Cells that
the file holds are not counted again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from step_variants import base_network
from store import Store, commit

import finetune_bn as fbn
from finetune_bn.diagnosis.fits import HEADROOM, MEMORIES_GIB, StepMemory, largest_batches, step_memory
from finetune_bn.diagnosis.memory import memory_report
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
NETS = ("mobilenetv3_large_100", "efficientnet_b0", "regnety_008", "resnet50", "densenet121")
POLICIES = {"none": fbn.Freeze("none"), "original": fbn.Freeze("original"), "GroupNorm": fbn.ToGroupNorm()}
PRECISIONS = {"fp32": None, "bf16 autocast": torch.bfloat16}
COUNTED, CHECKED = (4, 8), 12
# A learnable scale keeps less from some batch on, layer by layer: two counts do not tell what larger batches keep.
MORE_COUNTED = {"original": (4, 8, 16)}
CHECK = ("mobilenetv3_large_100", "resnet50")
SIZE = 224
PARTS = ("working", "weights", "gradients", "optimizer", "most_fixed")


def count(net: str, size: int, precision: str, policy: str, batches: tuple[int, ...] = COUNTED) -> list[dict[str, Any]]:
    """Return a row for the network as it is, live, and one for a policy, both from the same passes."""
    model = base_network(net, size)
    reports = [
        memory_report(
            model,
            torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)),
            POLICIES[policy],
            autocast=PRECISIONS[precision],
        )
        for batch in batches
    ]
    rows = []
    for name, after in (("live", False), (policy, True)):
        memory = step_memory(model, reports[: len(MORE_COUNTED.get(policy, COUNTED))], after=after)
        row = {"net": net, "size": size, "precision": precision, "policy": name, **memory.to_dict()}
        row["largest_batch"] = [list(pair) for pair in largest_batches(memory)]
        if batches[-1] == CHECKED:
            counted = reports[-1].after if after else reports[-1].before
            row |= {"checked": CHECKED, "line_of_counted": memory.kept_for(CHECKED) / (counted or 1)}
        rows.append(row)
    return rows


def table(store: Store) -> str:
    """Return the table as Markdown."""
    lines = ["| net, precision | layers | " + " | ".join(f"{gib:g} GiB" for gib in MEMORIES_GIB) + " | MiB an image |"]
    lines.append("|---" * (len(MEMORIES_GIB) + 3) + "|")
    order = {name: place for place, name in enumerate((*NETS, *PRECISIONS, "live", *POLICIES))}
    ordered = sorted(
        store.rows, key=lambda row: [order.get(row[what], len(order)) for what in ("net", "precision", "policy")]
    )
    for row in ordered:
        memory = StepMemory(tuple(map(tuple, row["kept"])), *(row[name] for name in PARTS))
        cells = [f"{batch:,}" for _, batch in largest_batches(memory)]
        name = f"{row['net']}, {row['precision']}"
        image = (memory.kept_for(101) - memory.kept_for(100)) / 2**20
        lines.append(f"| {name} | {row['policy']} | {' | '.join(cells)} | {image:.1f} |")
    off = [abs(row["line_of_counted"] - 1) for row in store.rows if row.get("line_of_counted")]
    text = f"\nLargest batch at {SIZE} px, AdamW, {HEADROOM:.0%} of the memory left free. Computed, not measured: "
    text += f"bytes kept for backward counted at batches of {COUNTED[0]} and {COUNTED[1]} images on a CPU"
    for policy, batches in MORE_COUNTED.items():
        text += f", for {policy} of {batches[-1]} as well"
    if off:
        text += f" (at {CHECKED} images the line through both is within {100 * max(off):.1f} %)"
    return "\n".join(lines) + "\n" + text + ".\n"


def main() -> None:
    """Count what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS, help="timm names")
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = ROOT / "results" / "what_fits.json"
    store = Store(path, "python scripts/table_what_fits.py", [0], device="cpu")
    version = commit()
    for precision in PRECISIONS:
        for net in given.nets:
            for policy in POLICIES:
                cell = {"net": net, "size": SIZE, "precision": precision}
                if store.done(cell | {"policy": policy}):
                    continue
                check = policy == "none" and precision == "fp32" and net in CHECK
                batches = (*COUNTED, CHECKED) if check else MORE_COUNTED.get(policy, COUNTED)
                for row in count(net, SIZE, precision, policy, batches):
                    if not store.done(cell | {"policy": row["policy"]}):
                        store.add(row | {"commit": version})
                write_atomically(path.with_suffix(".md"), table(store))
                print(net, precision, policy, flush=True)
    store.finish(
        {
            f"{row['net']}, {row['precision']}, {row['policy']}": {f"{gib:g}": n for gib, n in row["largest_batch"]}
            for row in store.rows
        }
    )
    write_atomically(path.with_suffix(".md"), table(store))


if __name__ == "__main__":
    main()
