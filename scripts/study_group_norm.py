"""GroupNorm in place of BatchNorm: how much of a pretrained network is left, and how it fine-tunes.

Two parts, of which a run that is cut off has the first ones:

1. zero_shot: EfficientNet-Lite0, 1 and 2 with ImageNet weights at 128 pixels, converted without training and without
   labels. Agreement of the ImageNet top-1 with the BatchNorm network, cosine of the features, and Recall@1 of the same
   emoji in another vendor's drawing, on all drawings of emoji that are not calibrated on. Calibration images by seed.
   The cost of a calibration is told in CPU seconds of one thread, and in passes of the BatchNorm network over the same
   images: as that number is the same for networks of any depth, the cost grows as theirs does.
2. warm_up: the same after distilling the BatchNorm network's features (`distil`), one pass over up to 1,000 images.

Rows whose eps is "to 9 v" are of an earlier calibration, which took the smallest error with eps up to nine variances.
In nearly all layers that was nine, so that they are near to "center"; they stay until those are measured.
scripts/study_group_norm_modes.py has what eps does on other pictures and in another family,
scripts/study_group_norm_tuned.py how the modes fine-tune.

Needs `pip install "finetune-bn[bench]"`. Hardware: 2 CPU cores, about an hour. Resumes where it was cut off.
Result: results/study_group_norm.{json,md,png}.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cells
import torch
import torch.nn.functional as F
from store import Store
from study_group_norm_report import markdown, plot, summarize
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
NETS = ("tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2")
SIDE, IMAGES = 128, 256
GROUPS = (1, 2, 4, 8, 32, "auto")
SEEDS = (0, 1, 2)
_emoji: dict[str, Any] = {}
_teachers: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}


def evaluated() -> tuple[Tensor, Tensor]:
    """Return the test images with their identities; drawing i is by vendor i % 3."""
    if "test" not in _emoji:
        vendors = [list(loader) for loader in _data().test_dataloader()]
        x = torch.stack([torch.cat([x for x, *_ in batches]) for batches in vendors], 1)
        labels = torch.stack([torch.cat([batch[1] for batch in batches]) for batches in vendors], 1)
        assert (labels == labels[:, :1]).all(), "the vendors' loaders have different emoji"
        _emoji["test"] = _fast(x.flatten(0, 1)), labels.flatten()
    x, labels = _emoji["test"]
    return x, labels


def calibrating(seed: int, number: int) -> Tensor:
    """Return so many images to calibrate on, drawn by seed."""
    images = _data().image_set("train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:number]
    return _fast(torch.stack([images[int(i)][0] for i in order]))


def _data() -> Any:
    from finetune_bn.data import EmojiData

    if "data" not in _emoji:
        data = EmojiData(
            target="identity",
            image_size=SIDE,
            augment="none",
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            eval_batch_size=50,
        )
        data.setup("fit")
        data.setup("test")
        _emoji["data"] = data
    return _emoji["data"]


def _fast(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def teacher(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the BatchNorm network, with its features and logits of the images that are evaluated."""
    from finetune_bn.backbones.create import create_backbone

    if name not in _teachers:
        net = create_backbone(name, "package", num_classes=1000).eval().to(memory_format=torch.channels_last)
        _teachers[name] = (net, *predict(net, evaluated()[0]))
    return _teachers[name]


@torch.inference_mode()
def predict(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return features and logits."""
    batches = x.split(64)
    features = torch.cat([net.forward_head(net.forward_features(b), pre_logits=True) for b in batches])  # type: ignore[operator]
    return features, net.get_classifier()(features)  # type: ignore[operator]


def recall(features: Tensor, labels: Tensor) -> float:
    """Return Recall@1 in per cent: whether the nearest drawing by another vendor is of the same emoji."""
    unit = F.normalize(features, dim=1)
    vendor = torch.arange(len(labels)) % 3
    similarity = (unit @ unit.T).masked_fill(vendor[:, None] == vendor, -2.0)
    return 100 * (labels[similarity.argmax(1)] == labels).float().mean().item()


def figures(net: nn.Module, name: str) -> dict[str, float]:
    """Return how near a converted network is to the one it was."""
    x, labels = evaluated()
    _, features, logits = teacher(name)
    own, scores = predict(net, x)
    return {
        "agreement": 100 * (scores.argmax(1) == logits.argmax(1)).float().mean().item(),
        "cosine": F.cosine_similarity(own, features).mean().item(),
        "recall": recall(own, labels),
        "recall_batch_norm": recall(features, labels),
    }


def plain(net: nn.Module) -> nn.Module:
    """Replace timm's norm+act layers by plain BatchNorm2d and the activation, which opacus can see."""
    for parent in list(net.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d) and hasattr(child, "act"):
                bn = nn.BatchNorm2d(child.num_features, child.eps)
                bn.load_state_dict(child.state_dict())
                setattr(parent, name, nn.Sequential(bn, child.drop, child.act))
    return net


def opacus_fix(net: nn.Module) -> nn.Module:
    """Return what opacus makes of the network."""
    from opacus.validators import ModuleValidator

    return ModuleValidator.fix(plain(net))


def zero_shot(net: str, init: str, groups: int | str, eps: str, images: int, seed: int) -> dict[str, Any]:
    """Convert one network and return its figures; `seconds` are those of conversion and calibration, one thread.

    `passes` are those seconds in passes of the BatchNorm network over the same images.
    """
    model = copy.deepcopy(teacher(net)[0])
    x = calibrating(seed, images) if images else None
    started = time.process_time()
    if init == "opacus":
        model = opacus_fix(model).eval()
    else:
        policy = fbn.ToGroupNorm(groups=groups, init=init, eps=eps)  # type: ignore[arg-type]
        model = fbn.convert(model, policy, verify=False)
    record = fbn.calibrate_group_norm(model, [x], max_samples=None) if init == "sequential" else None
    seconds = time.process_time() - started
    row = figures(model, net) | {"seconds": seconds, "layers": len(fbn.plan(teacher(net)[0], fbn.Keep()).rows)}
    if record is not None:
        row |= {"errors": [round(r.error, 4) for r in record.rows], "chosen": [r.groups for r in record.rows]}
        assert x is not None
        started = time.process_time()
        predict(teacher(net)[0], x)
        row["passes"] = seconds / (time.process_time() - started)
    return row


def warm_up(net: str, eps: str, images: int, seed: int) -> dict[str, Any]:
    """Calibrate one network, distil, and return its figures."""
    model = copy.deepcopy(teacher(net)[0])
    x = calibrating(seed, max(images, IMAGES))
    started = time.process_time()
    model = fbn.convert(model, fbn.ToGroupNorm(groups=1, init="sequential", eps=eps), verify=False)  # type: ignore[arg-type]
    fbn.calibrate_group_norm(model, [x[:IMAGES]], max_samples=None)
    record = fbn.distil(model, [x[:images]], max_samples=None)
    seconds = time.process_time() - started
    return figures(model, net) | {"seconds": seconds, "loss": record.loss_after}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "zero_shot": zero_shot,
    "warm_up": warm_up,
}


def zero_shot_cells() -> Iterator[dict[str, Any]]:
    """Yield the cells of the first part, most important first."""

    def cell(
        init: str, groups: int | str, net: str = NETS[0], images: int = IMAGES, seed: int = 0, eps: str = "center"
    ) -> dict[str, Any]:
        fitted = init == "sequential"
        key = {"part": "zero_shot", "net": net, "init": init, "groups": groups, "eps": eps if fitted else "own"}
        return {**key, "images": images if fitted else 0, "seed": seed}

    yield from (cell("sequential", 1), cell("closed_form", 1), cell("copy", 1), cell("opacus", 32), cell("reset", 1))
    yield from (cell("sequential", 1, seed=seed) for seed in SEEDS[1:])
    yield from (cell("sequential", 1, seed=seed, eps=eps) for eps in ("normalize", "own") for seed in SEEDS)
    yield from (cell("sequential", groups) for groups in GROUPS[1:])
    yield from (cell("sequential", 1, net) for net in NETS[1:])
    yield from (cell("closed_form", groups) for groups in GROUPS[1:-1])
    yield from (cell("sequential", 1, images=images) for images in (32, 64, 128, 512))
    yield from (cell(init, 1, net) for net in NETS[1:] for init in ("closed_form", "copy"))
    yield from (cell("sequential", "auto", net) for net in NETS[1:])


def warm_up_cells() -> Iterator[dict[str, Any]]:
    """Yield the cells of the second part."""
    runs = [(NETS[0], 1000, 0), (NETS[0], 1000, 1), (NETS[0], 1000, 2), (NETS[0], 250, 0), (NETS[0], 500, 0)]
    runs += [(net, 1000, 0) for net in NETS[1:]]
    keys = [(net, images, seed, "center") for net, images, seed in runs]
    names = ("net", "images", "seed", "eps")
    yield from ({"part": "warm_up", **dict(zip(names, key, strict=True))} for key in keys)


def next_cells(parts: tuple[str, ...], store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells of these parts that can be measured now, most important first."""
    sources = {"zero_shot": zero_shot_cells, "warm_up": warm_up_cells}
    yield from (key for part in parts for key in sources[part]() if not store.done(key))


def measure(part: str, **key: Any) -> dict[str, Any]:
    """Measure one cell."""
    row = MEASURES[part](**key)
    return {"score": row["agreement"], **row}


def main() -> None:
    """Run the study, or only write its tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--report-only", action="store_true", help="write tables and plot from the rows there are")
    args = parser.parse_args()
    store = Store(ROOT / "results/study_group_norm.json", "python scripts/study_group_norm.py", SEEDS, "cpu")
    if not args.report_only:
        cells.run(store, partial(next_cells, tuple(args.parts)), measure, args.workers, "score")
    summary = summarize(store)
    store.finish(summary)
    write_atomically(store.path.with_suffix(".md"), markdown(summary))
    plot(summary, store.path.with_suffix(".png"))
    print(markdown(summary))


if __name__ == "__main__":
    main()
