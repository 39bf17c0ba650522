"""Which treatment, and can it be told in advance? Eight arms in 24 settings, and the regret of following advice.

A setting is a network with ImageNet weights (EfficientNet-Lite0, MobileNetV2), a batch size, a number of training
images, a kind of pictures and a way to draw batches; `SETTINGS` lists them. Images drawn one by one are classified
(9 categories of emoji, 10 digits; cross-entropy, accuracy); batches of 16 emoji x 2 vendors are embedded (NT-Xent,
128 numbers, Recall@1 across vendors, of emoji that were not trained on). All images have 64 pixels.

Every arm of a setting gets the same number of steps, the same ladder of learning rates with a search that goes on
while the best rate is at an edge, AdamW, warm-up and cosine. The rate is chosen by validation images with seed 100,
which reports nothing; seeds 0, 1 and 2 report, on test images. A seed sets the split, the head and the order, for all
arms alike. `live` and `recalibrated` are one training, evaluated twice.

Hardware: 2 CPU cores, about 5 hours. Resumes where it was cut off. Result: results/study_advice.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import cells
import torch
import torch.nn.functional as F
from advice_pictures import Pictures, all_digits, load
from store import Store
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers.sites import find_batch_norms
from finetune_bn.optim.step_limit import limit_steps

ROOT = Path(__file__).resolve().parent.parent
CHOOSE, REPORT = 100, (0, 1, 2)
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RUNGS = (3e-4, 1e-3)
# Images seen in a training, by how many there are: an epoch or more, and enough for the head to be found.
EPOCHS = {100: 10, 400: 4, 1600: 1}
CALIBRATE_ON, RECALIBRATE_ON, SCHEDULED = 256, 512, 0.8
FAMILIES = {"lite0": "tf_efficientnet_lite0", "mobilenetv2": "mobilenetv2_100"}
POLICIES = {
    "live": fbn.Keep(),
    "none": fbn.Freeze("none"),
    "original": fbn.Freeze("original"),
    "limited": fbn.Freeze("none"),  # with the steps of the optimizer limited
    "scheduled": fbn.Keep(),  # until SCHEDULED of the steps; then recalibrated and frozen
    "group_norm": fbn.ToGroupNorm(groups=1),  # calibrated on training images
    "affine": fbn.Freeze("original"),  # gamma, beta and the head are trained, and nothing else
}
ARMS = (*POLICIES, "recalibrated")  # the last is `live`, its statistics recalibrated after training


@dataclass(frozen=True)
class Setting:
    """One case that a user may have.

    Attributes:
        family: network.
        batch: images of a step.
        images: training images.
        pictures: `same`: emoji of one vendor, tested on others of that vendor; `other`: tested on another vendor;
            `corrupted`: of one vendor, trained and tested with inverted colors of low contrast; `digits`.
        sampler: `iid`, or `pk`: 2 images of each label.
    """

    family: str
    batch: int
    images: int
    pictures: str
    sampler: str = "iid"

    @property
    def name(self) -> str:
        """Return how tables and rows call it."""
        return f"{self.family} {self.sampler} {self.batch} of {self.images} {self.pictures}"

    @property
    def steps(self) -> int:
        """Return the length of a training."""
        doubled = 2 if self.batch >= 32 else 1  # fewer than 50 steps do not find a head
        return doubled * EPOCHS[self.images] * self.images // self.batch


# In the order of importance: a run that is cut off has the first ones.
SETTINGS = tuple(
    Setting(*row)
    for row in (
        ("lite0", 4, 400, "same"),
        ("mobilenetv2", 4, 400, "same"),
        ("lite0", 32, 400, "same", "pk"),
        ("lite0", 16, 100, "corrupted"),
        ("mobilenetv2", 4, 100, "digits"),
        ("lite0", 64, 1600, "digits"),
        ("mobilenetv2", 16, 1600, "other"),
        ("lite0", 64, 400, "same"),
        ("mobilenetv2", 64, 400, "same"),
        ("mobilenetv2", 32, 1600, "same", "pk"),
        ("lite0", 16, 400, "same"),
        ("mobilenetv2", 16, 400, "same"),
        ("lite0", 2, 400, "same"),
        ("mobilenetv2", 2, 400, "same"),
        ("lite0", 4, 100, "other"),
        ("mobilenetv2", 4, 1600, "corrupted"),
        ("lite0", 32, 400, "other", "pk"),
        ("mobilenetv2", 64, 100, "digits"),
        ("lite0", 16, 400, "digits"),
        ("mobilenetv2", 2, 400, "corrupted"),
        ("mobilenetv2", 32, 400, "corrupted", "pk"),
        ("lite0", 64, 400, "other"),
        ("lite0", 32, 100, "corrupted", "pk"),
        ("mobilenetv2", 32, 100, "other", "pk"),
    )
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


@cache
def pictures(name: str, seed: int) -> Pictures:
    """Return the images of a setting, normalized as its weights ask."""
    setting = BY_NAME[name]
    mean, std = ((0.5,) * 3,) * 2 if setting.family == "lite0" else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return load(setting.pictures, setting.images, seed, pairs=setting.sampler == "pk", mean=mean, std=std)


@lru_cache(maxsize=4)
def untrained(name: str, seed: int, group_norm: bool) -> nn.Module:
    """Return the network before training, with its head; calibrated where it is converted to GroupNorm."""
    setting, data = BY_NAME[name], pictures(name, seed)
    torch.manual_seed(seed)
    outputs = 128 if setting.sampler == "pk" else data.classes
    net = fbn.create_backbone(FAMILIES[setting.family], "package", num_classes=outputs)
    if group_norm:
        net = fbn.convert(net, POLICIES["group_norm"], verify=False)
        fbn.calibrate_group_norm(net, data.train.split(64), max_samples=CALIBRATE_ON, progress=False)
    return net.to(memory_format=torch.channels_last)


@cache
def missing(setting: Setting) -> str | None:
    """Return why a setting cannot be measured here: weights or pictures that are not installed."""
    try:
        fbn.create_backbone(FAMILIES[setting.family], "package", num_classes=0)
        if setting.pictures == "digits":
            all_digits()
    except (fbn.FinetuneBNError, ImportError) as error:
        print(f"{setting.name} is left out: {error}", file=sys.stderr)
        return str(error)
    return None


def measure(setting: str, arm: str, lr: float, seed: int) -> dict[str, Any]:
    """Train one cell and return its figures; of `live` those of `recalibrated` too."""
    started = time.perf_counter()
    chosen, data = BY_NAME[setting], pictures(setting, seed)
    net = copy.deepcopy(untrained(setting, seed, arm == "group_norm"))
    if arm != "group_norm":
        net = fbn.convert(net, POLICIES[arm], verify=False)
    if arm == "affine":
        fbn.train_only(net, "norm")
    optimizer, schedule = cells.adamw(net, lr, chosen.steps)
    if arm == "limited":
        limit_steps(optimizer, net)
    order = torch.Generator().manual_seed(seed)
    net.train()
    loss = torch.zeros(())
    for step, rows in enumerate(drawn(chosen, data, order)):
        if arm == "scheduled" and step == round(SCHEDULED * chosen.steps):
            recalibrate(net, data, chosen.batch)
            net = fbn.convert(net, fbn.Freeze("none"), verify=False).train()
        loss = objective(net(data.train[rows]), data.labels[rows], chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    figures = {"loss": loss.item(), **scores(net, data, chosen)}
    if arm == "live":
        recalibrate(net, data, chosen.batch)
        figures |= {f"{name}/recalibrated": value for name, value in scores(net, data, chosen).items()}
    return figures | {"seconds": time.perf_counter() - started}


def drawn(setting: Setting, data: Pictures, order: torch.Generator) -> Iterator[Tensor]:
    """Yield the row numbers of each training batch."""
    done = 0
    while True:
        if setting.sampler == "pk":  # rows 2i and 2i + 1 are one label
            labels = torch.randperm(len(data.train) // 2, generator=order)
            epoch = torch.stack([2 * labels, 2 * labels + 1], 1).flatten()
        else:
            epoch = torch.randperm(len(data.train), generator=order)
        whole = len(epoch) - len(epoch) % setting.batch
        for rows in epoch[:whole].split(setting.batch):
            if done == setting.steps:
                return
            done += 1
            yield rows


def objective(outputs: Tensor, labels: Tensor, setting: Setting) -> Tensor:
    """Return the loss of a batch."""
    if setting.sampler == "iid":
        return F.cross_entropy(outputs, labels)
    from pytorch_metric_learning.losses import NTXentLoss

    loss: Tensor = NTXentLoss(temperature=0.1)(F.normalize(outputs), labels)
    return loss


def recalibrate(net: nn.Module, data: Pictures, batch: int) -> None:
    """Give BatchNorm the statistics of training images that are drawn one by one."""
    rows = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:RECALIBRATE_ON]
    fbn.recalibrate(net, data.train[rows].split(max(batch, 32)), progress=False)


@torch.inference_mode()
def scores(net: nn.Module, data: Pictures, setting: Setting) -> dict[str, float]:
    """Return accuracy, or Recall@1 across vendors, of validation and test images, in percent."""
    net.eval()
    found = {}
    for part, images, labels in (("val", data.val, data.val_labels), ("test", data.test, data.test_labels)):
        outputs = torch.cat([net(x) for x in images.split(128)]).nan_to_num(0.0, 0.0, 0.0)
        if setting.sampler == "iid":
            hits = outputs.argmax(1) == labels
        else:
            both = F.normalize(outputs).unflatten(0, (-1, 2))
            alike = both[:, 0] @ both[:, 1].T
            right = torch.arange(len(alike))
            hits = torch.cat([alike.argmax(1) == right, alike.argmax(0) == right])
        found[part] = 100 * hits.float().mean().item()
    return found


def shift_of(setting: Setting) -> dict[str, float]:
    """Return how far the inputs of the layers are from what the statistics of the weights say, before training.

    `shift`: median over layers of the mean over channels of |mean - running_mean| / sd; `log_var` the same of
    |log(variance / running_var)|. Up to 256 training images of the choosing seed, the network in eval mode.
    """
    data = pictures(setting.name, CHOOSE)
    net = copy.deepcopy(untrained(setting.name, CHOOSE, False)).eval()
    sums: dict[int, tuple[float, float]] = {}

    def look(layer: Any, args: tuple[Tensor, ...]) -> None:
        x = args[0].double()
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        source = layer.running_var.double() + layer.eps
        shift = ((mean - layer.running_mean).abs() / source.sqrt()).mean().item()
        sums[id(layer)] = shift, ((var + layer.eps) / source).log().abs().mean().item()

    hooks = [site.module.register_forward_pre_hook(look) for site in find_batch_norms(net)]
    with torch.inference_mode():
        net(data.train[:256])
    for hook in hooks:
        hook.remove()
    columns = torch.tensor(list(sums.values())).median(0).values
    return {"shift": columns[0].item(), "log_var": columns[1].item()}


def tried(store: Store, setting: str, arm: str) -> dict[float, float]:
    """Return the validation figure of the choosing seed by learning rate."""
    trained, score = ("live", "val/recalibrated") if arm == "recalibrated" else (arm, "val")
    rows = (r for r in store.rows if (r["setting"], r["arm"], r["seed"]) == (setting, trained, CHOOSE))
    return {row["lr"]: row[score] for row in rows}


def chosen_rate(store: Store, setting: str, arm: str) -> float | None:
    """Return an arm's learning rate once its search is over."""
    return cells.chosen_rate(tried(store, setting, arm), LADDER, FIRST_RUNGS)


def next_cells(store: Store) -> Iterator[dict[str, Any]]:
    """Yield the cells that can be measured now, most important first: two seeds in all settings, then the third."""
    for seeds in (REPORT[:2], REPORT):
        for setting in (s for s in SETTINGS if missing(s) is None):
            for arm in ARMS:
                trained = "live" if arm == "recalibrated" else arm
                rates = cells.rates_to_try(tried(store, setting.name, arm), LADDER, FIRST_RUNGS)
                wanted = [(lr, CHOOSE) for lr in rates]
                lr = chosen_rate(store, setting.name, arm)
                wanted += [(lr, seed) for seed in seeds if lr is not None]
                for rate, seed in wanted:
                    cell = {"setting": setting.name, "arm": trained, "lr": rate, "seed": seed}
                    if not store.done(cell):
                        yield cell


def main() -> None:
    """Measure what is missing, and write the tables."""
    import study_advice_report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the results")
    parser.add_argument("--report-only", action="store_true", help="measure nothing, only write the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(args.out / "study_advice.json", "python scripts/study_advice.py", (CHOOSE, *REPORT), "cpu")
    if not args.report_only:
        cells.run(store, next_cells, measure, args.workers, "val")
    study_advice_report.write(store, args.out)


if __name__ == "__main__":
    main()
