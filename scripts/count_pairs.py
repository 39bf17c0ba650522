"""How many BatchNorm (BN) layers can go into the weight in front of them: as found by this package, and by fx.

This package runs a probe input through the network (`finetune_bn.conversion.producers`). mmengine's Tune mode
(`turn_on_efficient_conv_bn_eval`) traces it with torch.fx and looks for a convolution module whose only user is a BN
module; where that fails the row says why. Without weights, eval mode, a minute on a CPU. Needs
`pip install "finetune-bn[bench]"`. Result: results/count_pairs.{json,md}.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from store import Store
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

import finetune_bn as fbn
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
NETS = (
    "resnet50",
    "tf_efficientnet_lite0",
    "tf_efficientnet_b0",
    "efficientnet_b0",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "regnety_008",
    "hrnet_w18",
    "densenet121",
    "levit_128s",
    "inception_v3",
    "ghostnet_100",
    "repvit_m1",
    "mobilevit_xxs",
    "vgg11_bn",
    "convmixer_768_32",
)


def by_probe(model: nn.Module) -> tuple[int, dict[str, int]]:
    """Return how many layers this package pairs, and why it leaves the others, by count."""
    rows = fbn.plan(model, fbn.Freeze("original")).rows  # of a learnable scale `auto` pairs all that can be
    reasons = Counter(reason(row.not_folded) for row in rows if not row.folded_into)
    return sum(bool(row.folded_into) for row in rows), dict(reasons.most_common())


def reason(why: str) -> str:
    """Return a reason without the names of modules in it."""
    return "the output of the map is used elsewhere too" if "also used elsewhere" in why else why


def by_fx(model: nn.Module) -> int:
    """Return how many layers mmengine's Tune mode pairs.

    Raises:
        Exception: whatever torch.fx or mmengine raises on this network.
    """
    from mmengine.model import efficient_conv_bn_eval as tune

    traced = fx.symbolic_trace(model)
    tune.efficient_conv_bn_eval_graph_transform(traced)
    return sum(node.target is tune.efficient_conv_bn_eval_control for node in traced.graph.nodes)


def measure(net: str) -> dict[str, Any]:
    """Return the row of one network."""
    torch.manual_seed(0)
    model = timm.create_model(net).eval()
    layers = sum(isinstance(module, _BatchNorm) for module in model.modules())
    ours, left = by_probe(model)
    row: dict[str, Any] = {"net": net, "layers": layers, "ours": ours, "not_folded": left, "fx": None, "error": None}
    try:
        row["fx"] = by_fx(model)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| net | BN layers | this package | mmengine Tune mode (fx) | left by this package |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        found = "fails" if row["fx"] is None else row["fx"]
        left = "; ".join(f"{n} x {why}" for why, n in row["not_folded"].items())
        lines.append(f"| {row['net']} | {row['layers']} | {row['ours']} | {found} | {left} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Count what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="count anew what the file holds")
    again = parser.parse_args().again
    try:
        import mmengine
    except ImportError:
        sys.exit("mmengine is missing: pip install 'finetune-bn[bench]'")
    store = Store(ROOT / "results" / "count_pairs.json", "python scripts/count_pairs.py", device="cpu")
    for net in NETS:
        if again or not store.done({"net": net}):
            row = measure(net) | {"mmengine": mmengine.__version__}
            store.drop({"net": net})
            store.add(row)
            gc.collect()
            print(f"{net}: {row['ours']} of {row['layers']}, by fx {row['fx']} {row['error'] or ''}", flush=True)
    rows = [row for net in NETS if (row := store.find(net=net))]
    store.finish({"layers": sum(r["layers"] for r in rows), "ours": sum(r["ours"] for r in rows)})
    write_atomically(store.path.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()
