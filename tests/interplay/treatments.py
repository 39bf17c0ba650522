"""The rows of the interplay matrix: what is done to BatchNorm, and what it promises whatever else is in the program.

Each is tried on one tiny network, in a Trainer (by callbacks) and in a loop of one's own (by functions).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import (
    BatchCompositionGuard,
    BatchNormConversion,
    BatchNormMonitor,
    BatchNormRecalibration,
    BatchNormSchedule,
    FinetuneReport,
    GroupNormCalibration,
    ResumeWhole,
    StepLimit,
    TrainOnly,
)
from finetune_bn.layers.frozen import FrozenBatchNorm
from tests.models import settle

BATCH, CLASSES = 4, 2
RATIO = 1e-3
State = dict[str, Tensor]


def images(n: int = 16) -> TensorDataset:
    """Return images whose statistics are not those of the network; labels alternate, so batches are 2 x 2."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(2 + torch.randn(n, 3, 6, 6, generator=generator), torch.arange(n) % CLASSES)


def loader(n: int = 16) -> DataLoader[Any]:
    return DataLoader(images(n), BATCH)


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    settle(net)
    return net


class Net(nn.Module):
    """conv - BN - ReLU - conv - BN - ReLU - pool, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@dataclass(frozen=True)
class Parts:
    """Where norm layers, convolutions and head of a network are."""

    make: Callable[[], nn.Module]
    layers: tuple[str, ...]
    convolutions: tuple[str, ...]
    head: str

    def named(self, *kinds: str) -> list[str]:
        return [f"{layer}.{kind}" for layer in self.layers for kind in kinds]


NET = Parts(Net, ("backbone.1", "backbone.4"), ("backbone.0.weight", "backbone.3.weight"), "head.weight")


@dataclass
class Ran:
    """What one run of a treatment beside something else left.

    Attributes:
        net: the network as it was trained: it holds `backbone` and `head`.
        start: its state when the training began, the layers converted.
        trainer: where there was one.
        statistics: those of the layers after each step.
        warnings: what was warned of.
        facts: what a combination has to tell beside.
        parts: what is where in the network.
        excused: tensors that may stand still, as the note of the cell says.
    """

    net: Any
    start: State
    trainer: pl.Trainer | None = None
    statistics: list[State] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    parts: Parts = NET
    excused: frozenset[str] = frozenset()

    def tensor(self, name: str) -> Tensor:
        return plain(self.net)[name]

    def moved(self, *names: str) -> list[str]:
        """Return which of the tensors are not what they were when the training began, to the last bit."""
        state = plain(self.net)
        return [name for name in names if not torch.equal(state[name].float(), self.start[name].float())]

    def callback(self, kind: type[Any]) -> Any:
        assert self.trainer is not None
        return next(c for c in self.trainer.callbacks if isinstance(c, kind))  # type: ignore[attr-defined]


WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "base_layer.", "_forward_module.")


def plain(net: nn.Module) -> State:
    """Return copies of a network's tensors by the names that they have in `Net`, whatever was wrapped around them."""
    found = {}
    for name, value in net.state_dict().items():
        if not name.endswith("_extra_state") and torch.is_tensor(value):
            for part in WRAPPERS:
                name = name.replace(part, "")
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[name] = whole.detach().cpu().clone()
    return found


STATISTICS = ("running_mean", "running_var")


def statistics(net: nn.Module) -> State:
    return {name: value for name, value in plain(net).items() if name.endswith(STATISTICS)}


@dataclass(frozen=True)
class Treatment:
    """A row of the matrix.

    Attributes:
        key: short name.
        title: as the page of the documentation has it.
        policy: what the layers are converted by; None where they stay as they came.
        callbacks: in a Trainer, beside the conversion.
        still: tensors of the layers that do not move, to the last bit.
        moves: tensors of the layers that are trained or followed.
        frozen_convolutions: nothing but norm layers and head is trained.
    """

    key: str
    title: str
    policy: fbn.Policy | None = None
    callbacks: Callable[[Any], list[pl.Callback]] = lambda folder: []
    still: tuple[str, ...] = ()
    moves: tuple[str, ...] = ()
    frozen_convolutions: bool = False

    def in_trainer(self, folder: Any) -> list[pl.Callback]:
        conversion = [] if self.policy is None else [BatchNormConversion(self.policy)]
        return [*conversion, *self.callbacks(folder)]

    @property
    def live(self) -> bool:
        """Whether layers normalize by the batch in training, at least at first."""
        return "running_mean" in self.moves

    def loader(self, n: int = 16) -> DataLoader[Any]:
        """Return the loader for a Trainer; the guard wants whole P x K batches on each of its processes."""
        if self.key != "report":
            return loader(n)
        data = images(n)
        sampler = fbn.PKBatchSampler(data.tensors[1], CLASSES, BATCH // CLASSES, seed=0)
        return DataLoader(data, batch_sampler=sampler)

    def holds(self, ran: Ran) -> None:
        """Assert what the treatment promises.

        Args:
            ran: a training that is over, long enough for all that is trained to have moved.
        """
        parts = ran.parts
        assert not ran.moved(*parts.named(*self.still)), "what is constant moved"
        for name, value in plain(ran.net).items():
            assert torch.isfinite(value.float()).all(), name
        convolutions = () if self.frozen_convolutions else parts.convolutions
        expected = [*parts.named(*self.moves), parts.head, *convolutions]
        still = set(expected) - set(ran.moved(*expected))
        assert still <= ran.excused, f"what is trained stood still: {sorted(still)}"
        if self.frozen_convolutions:
            assert not ran.moved(*parts.convolutions), "what is not trained moved"
        for check in CHECKS.get(self.key, ()):
            check(ran)


# ---- what callbacks promise beside


def _switched(ran: Ran) -> None:
    layers = [m for m in ran.net.modules() if isinstance(m, FrozenBatchNorm)]
    assert len(layers) == len(ran.parts.layers), "the switch did not happen"
    last, before = ran.statistics[-1], ran.statistics[-2]
    assert all(torch.equal(last[name], before[name]) for name in last), "statistics moved behind the switch"


def _recalibrated(ran: Ran) -> None:
    """The statistics are those of all training images by the weights of today."""
    fresh = ran.parts.make()
    state = {k: v.float() for k, v in plain(ran.net).items() if k in fresh.state_dict()}
    fresh.load_state_dict(state)
    fbn.recalibrate(fresh, [images(ran.facts.get("images", 16)).tensors[0]], progress=False)
    found, tolerance = statistics(ran.net), ran.facts.get("tolerance", 1e-3)
    for name, value in statistics(fresh).items():
        torch.testing.assert_close(found[name].float(), value, rtol=tolerance, atol=tolerance)


def _looked(ran: Ran) -> None:
    if ran.trainer is None:
        assert ran.facts["leakage"].total > 0
        return
    monitor = ran.callback(BatchNormMonitor)
    assert monitor.look is not None, "nothing was looked at"
    assert len(monitor.look.layers) == len(ran.parts.layers)
    assert "error" not in monitor.causes


def _limited(ran: Ran) -> None:
    steps = ran.facts["steps"]
    for name in ran.parts.convolutions:
        now, start = ran.tensor(name).flatten(1).float(), ran.start[name].flatten(1).float()
        share = ((now - start).norm(dim=1) / start.norm(dim=1)).max()
        assert 0 < share < RATIO * steps * 1.2, f"{name} went {share / RATIO:.1f} steps far"


def _reported(ran: Ran) -> None:
    if ran.trainer is None:
        before, after = ran.facts["status"]
        assert before.count("frozen") == after.count("frozen") == len(ran.parts.layers)
        return
    report, guard = ran.callback(FinetuneReport), ran.callback(BatchCompositionGuard)
    assert "train_loss" in report.history[-1]
    if ran.trainer.is_global_zero:
        assert report.path is not None
        assert report.path.is_file()
    assert guard.checked
    assert not guard.mismatches


CHECKS: dict[str, tuple[Callable[[Ran], None], ...]] = {
    "schedule": (_switched,),
    "recalibration": (_recalibrated,),
    "monitor": (_looked,),
    "step_limit": (_limited,),
    "report": (_reported,),
}


# ---- in a loop of one's own


@dataclass
class Loop:
    """A treatment in a loop of one's own, by functions.

    Args:
        treatment: the row.
        net: the network, converted by `begin`.
        unwrapped: returns what `Net` was, from what the loop's library made of it.
    """

    treatment: Treatment
    optimizer: torch.optim.Optimizer | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    statistics: list[State] = field(default_factory=list)

    def convert(self, net: nn.Module, example: Any = None) -> nn.Module:
        """Before the network is wrapped and its optimizer made."""
        policy = self.treatment.policy
        example = torch.zeros(2, 3, 6, 6) if example is None else example
        if policy is not None:
            net = fbn.convert(net, policy, example_input=example)
        if self.treatment.key == "group_norm_fit":
            fbn.calibrate_group_norm(net, [images().tensors[0]], progress=False)
        if self.treatment.key == "train_only":
            fbn.train_only(net)
        if self.treatment.key == "report":
            self.facts["status"] = [fbn.status(net)]
        return net

    def limit(self, optimizer: torch.optim.Optimizer, net: nn.Module) -> None:
        if self.treatment.key == "step_limit":
            self.facts["limit"] = fbn.limit_steps(optimizer, net, RATIO)

    def between(self, step: int, steps: int, net: nn.Module) -> None:
        """Before each step; `net` is the network without what was wrapped around it."""
        if step == steps // 2 and self.treatment.key == "schedule":
            fbn.recalibrate(net, [images().tensors[0]], progress=False)
            fbn.convert(net, fbn.Freeze("original"), verify=False)
        if step == steps // 2 and self.treatment.key == "monitor":
            x = images().tensors[0]
            self.facts["leakage"] = fbn.measure_leakage(net, x[:4], x[4:8])

    def after(self, net: nn.Module) -> None:
        self.statistics.append(statistics(net))

    def end(self, net: nn.Module, steps: int) -> None:
        self.facts["steps"] = steps
        if self.treatment.key == "recalibration":
            fbn.recalibrate(net, [images().tensors[0]], progress=False)
        if self.treatment.key == "report":
            self.facts["status"].append(fbn.status(net))


def start_of(treatment: Treatment, parts: Parts = NET) -> State:
    """Return the state of the network right after its conversion."""
    net = parts.make()
    return plain(net if treatment.policy is None else fbn.convert(net, treatment.policy, verify=False))


def _watching(folder: Any) -> list[pl.Callback]:
    report = FinetuneReport(dirpath=str(folder / "report"), save_model=False)
    return [report, BatchCompositionGuard(CLASSES, BATCH // CLASSES), ResumeWhole()]


LIVE = ("weight", "bias", *STATISTICS)
ROWS = [
    Treatment("keep", "`Keep`", fbn.Keep(), moves=LIVE),
    Treatment("none", '`Freeze("none")`', fbn.Freeze("none"), still=LIVE),
    Treatment("shift", '`Freeze("shift")`', fbn.Freeze("shift"), still=("weight", *STATISTICS), moves=("bias",)),
    Treatment("original", '`Freeze("original")`', fbn.Freeze("original"), still=STATISTICS, moves=("weight", "bias")),
    Treatment("merged", '`Freeze("merged")`', fbn.Freeze("merged"), still=STATISTICS, moves=("weight", "bias")),
    Treatment("noise", "`Freeze(noise=)`", fbn.Freeze("original", noise=8), still=STATISTICS, moves=("weight", "bias")),
    Treatment("freeze_affine", "`FreezeAffine`", fbn.FreezeAffine(), still=("weight", "bias"), moves=STATISTICS),
    Treatment(
        "normalize_only", "`NormalizeOnly`", fbn.NormalizeOnly(change_function=True), still=("weight", "bias"),
        moves=STATISTICS,
    ),
    Treatment("group_norm", "`ToGroupNorm`", fbn.ToGroupNorm(2), moves=("weight", "bias")),
    Treatment("ghost", "`Ghost`", fbn.Ghost(2), moves=LIVE),
    Treatment("renorm", "`Renorm`", fbn.Renorm(), moves=LIVE),
    Treatment("stochastic", "`Stochastic`", fbn.Stochastic(), moves=LIVE),
    Treatment("eval_norm", "`EvalNorm`", fbn.EvalNorm(0.25), moves=LIVE),
    Treatment("schedule", "`BatchNormSchedule`", None, lambda _: [BatchNormSchedule(0.5)], moves=LIVE),
    Treatment("recalibration", "`BatchNormRecalibration`", None, lambda _: [BatchNormRecalibration()], moves=LIVE),
    Treatment("monitor", "`BatchNormMonitor`", None, lambda _: [BatchNormMonitor(1, 1)], moves=LIVE),
    Treatment(
        "step_limit", "`StepLimit`", fbn.Freeze("original"), lambda _: [StepLimit(RATIO)], still=STATISTICS,
        moves=("weight", "bias"),
    ),
    Treatment(
        "train_only", "`TrainOnly`", fbn.Freeze("original"), lambda _: [TrainOnly()], still=STATISTICS,
        moves=("weight", "bias"), frozen_convolutions=True,
    ),
    Treatment(
        "group_norm_fit", "`GroupNormCalibration`", fbn.ToGroupNorm(2, init="sequential"),
        lambda _: [GroupNormCalibration()], moves=("weight", "bias"),
    ),
    Treatment(
        "report", "`FinetuneReport`, `BatchCompositionGuard`, `ResumeWhole`", fbn.Freeze("none"), _watching, still=LIVE
    ),
]  # fmt: skip
