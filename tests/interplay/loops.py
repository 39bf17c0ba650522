"""The columns of the interplay matrix in loops of one's own: wrappers, precision, checkpointing, compilation."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import finetune_bn as fbn
from tests.interplay.treatments import NET, Loop, Net, Parts, Ran, Treatment, images, loader, plain, start_of
from tests.models import settle

STEPS = 4


class Steps:
    """A training of four steps, with places to put something in.

    Args:
        treatment: the row.
        net: the network before its conversion.
        example: what it takes, where that is no tensor of images.
    """

    def __init__(
        self, treatment: Treatment, net: nn.Module | None = None, example: Any = None, parts: Parts = NET
    ) -> None:
        self.loop, self.parts = Loop(treatment), parts
        self.inner: Any = self.loop.convert(parts.make() if net is None else net, example)
        self.net: Any = self.inner
        self.forward: Callable[[Tensor], Tensor] = lambda x: self.net(x)
        self.backward: Callable[[Tensor], None] = lambda loss: loss.backward()
        self.step: Callable[[], None] = lambda: self.optimizer.step()
        self.optimizer: Any = torch.optim.SGD([p for p in self.inner.parameters() if p.requires_grad], lr=0.05)
        self.tolerance = 1e-3

    def run(self, batches: Any = None, after: Callable[[], None] = lambda: None) -> Ran:
        self.loop.limit(self.optimizer, self.inner)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for number, (x, y) in enumerate(loader() if batches is None else batches):
                self.loop.between(number, STEPS, self.inner)
                self.net.train()
                self.optimizer.zero_grad()
                self.backward(F.cross_entropy(self.forward(x).float(), y))
                self.step()
                after()
                self.loop.after(self.inner)
            self.loop.end(self.inner, STEPS)
        facts = self.loop.facts | {"tolerance": self.tolerance}
        said = [str(w.message) for w in caught]
        start = start_of(self.loop.treatment, self.parts)
        return Ran(self.inner, start, None, self.loop.statistics, said, facts, self.parts)


# ---- averages and statistics


def torch_update_bn(treatment: Treatment, folder: Path) -> Ran:
    steps = Steps(treatment)
    steps.run()
    before = plain(steps.inner)
    update_bn(loader(), steps.inner)
    changed = {name for name, value in plain(steps.inner).items() if not torch.equal(value, before[name])}
    ran = Ran(steps.inner, start_of(treatment), None, steps.loop.statistics, [], steps.loop.facts)
    ran.facts["changed"] = changed
    return ran


def model_ema(treatment: Treatment, folder: Path) -> Ran:
    timm_utils = pytest.importorskip("timm.utils")
    steps = Steps(treatment)
    average = timm_utils.ModelEmaV3(steps.inner, decay=0.6)
    ran = steps.run(after=lambda: average.update(steps.inner))
    return _of_average(treatment, ran, average.module)


def averaged_model(treatment: Treatment, folder: Path) -> Ran:
    steps = Steps(treatment)
    average = AveragedModel(steps.inner, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=True)
    other = AveragedModel(steps.inner, avg_fn=get_ema_avg_fn(0.6), use_buffers=True)

    def update() -> None:
        average.update_parameters(steps.inner)
        other.update_parameters(steps.inner)

    ran = steps.run(after=update)
    ran.facts["rounded"] = plain(other.module)
    return _of_average(treatment, ran, average.module)


def _of_average(treatment: Treatment, ran: Ran, average: nn.Module) -> Ran:
    """Return the run with the average as what is left of it."""
    ran.facts["trained"] = ran.net
    ran.net = average
    if treatment.key == "recalibration":
        fbn.recalibrate(average, [images().tensors[0]], progress=False)
    return ran


# ---- how the network is run


def checkpointed(reentrant: bool) -> Callable[[Treatment, Path], Ran]:
    def column(treatment: Treatment, folder: Path) -> Ran:
        steps, reference = Steps(treatment), Steps(treatment)

        def forward(x: Tensor) -> Tensor:
            x = x.requires_grad_()  # reentrant checkpoints pass gradients on to none but those
            return steps.inner.head(checkpoint(steps.inner.backbone, x, use_reentrant=reentrant))  # type: ignore

        steps.forward = forward
        torch.manual_seed(3)
        ran = steps.run()
        torch.manual_seed(3)
        ran.facts["reference"] = plain(reference.run().net)
        return ran

    return column


def half(treatment: Treatment, folder: Path) -> Ran:
    """Autocast to float16 with a scaled loss; Lightning's 16-mixed is that, and bfloat16 on a CPU."""
    steps = Steps(treatment)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return steps.net(x)

    def step() -> None:
        scaler.step(steps.optimizer)
        scaler.update()

    steps.forward, steps.step = forward, step
    steps.backward = lambda loss: scaler.scale(loss).backward()
    steps.tolerance = 5e-2
    return steps.run()


def channels_last(treatment: Treatment, folder: Path) -> Ran:
    steps = Steps(treatment)
    steps.inner.to(memory_format=torch.channels_last)
    seen: list[bool] = []
    for layer in (steps.inner.backbone[1], steps.inner.backbone[4]):
        layer.register_forward_hook(
            lambda _, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    ran = steps.run([(x.to(memory_format=torch.channels_last), y) for x, y in loader()])
    assert seen
    assert all(seen), "a layer changed the memory format"
    return ran


def compiled(backend: str = "inductor", **options: Any) -> Callable[[Treatment, Path], Ran]:
    def column(treatment: Treatment, folder: Path) -> Ran:
        torch._dynamo.reset()
        steps = Steps(treatment)
        steps.net = torch.compile(steps.inner, backend=backend, **options)
        return steps.run()

    return column


def on_meta(treatment: Treatment, folder: Path) -> Ran:
    """Built and converted without memory, and filled with pretrained weights afterwards."""
    weights = Net().state_dict()
    with torch.device("meta"):
        net = Net.__new__(Net)
        nn.Module.__init__(net)
        net.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        net.head = nn.Linear(6, 2)
    if treatment.policy is not None:
        net = fbn.convert(net, treatment.policy)  # type: ignore[assignment]
    net.to_empty(device="cpu").load_state_dict(weights)
    steps = Steps(dataclasses.replace(treatment, policy=None), net)
    steps.loop.treatment = treatment
    return steps.run()


def synchronized(treatment: Treatment, folder: Path) -> Ran:
    """As Lightning's `sync_batchnorm=True` does it around a fit; with one process layers compute as BatchNorm."""
    steps = Steps(treatment)
    plugin = TorchSyncBatchNorm()
    steps.net = steps.inner = plugin.apply(steps.inner)
    ran = steps.run()
    ran.net = plugin.revert(ran.net)
    return ran


# ---- other libraries


def accelerated(treatment: Treatment, folder: Path) -> Ran:
    accelerate = pytest.importorskip("accelerate")
    steps = Steps(treatment)
    accelerator = accelerate.Accelerator(cpu=True)
    steps.net, steps.optimizer = accelerator.prepare(steps.inner, steps.optimizer)
    steps.backward = accelerator.backward
    return steps.run()


def fabric(treatment: Treatment, folder: Path) -> Ran:
    from lightning.fabric import Fabric

    steps = Steps(treatment)
    run = Fabric(accelerator="cpu", devices=1)
    steps.net, steps.optimizer = run.setup(steps.inner, steps.optimizer)
    steps.backward = run.backward
    return steps.run()


def lora(treatment: Treatment, folder: Path) -> Ran:
    """Converted, then adapters on the convolutions; norm layers and head are trained beside them."""
    peft = pytest.importorskip("peft")
    steps = Steps(treatment)
    trained = [name for name, p in steps.inner.named_parameters() if p.requires_grad and "0." not in name]
    config = peft.LoraConfig(target_modules=r"backbone\.[03]", r=2)
    steps.net = peft.get_peft_model(steps.inner, config)
    for name, parameter in steps.inner.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)
    steps.optimizer = torch.optim.SGD([p for p in steps.net.parameters() if p.requires_grad], lr=0.05)
    ran = steps.run()
    ran.facts["base moved"] = ran.moved(*NET.convolutions)
    steps.net.merge_and_unload()
    return ran


def _of_transformers() -> nn.Module:
    import transformers

    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=2, num_channels=3
    )
    torch.manual_seed(0)
    return settle(transformers.ResNetForImageClassification(config))


def transformers_backbone(treatment: Treatment, folder: Path) -> Ran:
    pytest.importorskip("transformers")
    embedder, first, second = (f"resnet.{name}" for name in (
        "embedder.embedder", "encoder.stages.0.layers.0.layer.0", "encoder.stages.0.layers.0.layer.1",
    ))  # fmt: skip
    units = (embedder, first, second)
    layers, convolutions = ([f"{unit}.{what}" for unit in units] for what in ("normalization", "convolution.weight"))
    parts = Parts(_of_transformers, tuple(layers), tuple(convolutions), "classifier.1.weight")
    steps = Steps(treatment, example={"pixel_values": images().tensors[0][:2]}, parts=parts)
    steps.forward = lambda x: steps.net(x).logits
    return steps.run()


not_reentrant, reentrant = checkpointed(False), checkpointed(True)
compile_default, compile_fullgraph = compiled(), compiled(fullgraph=True)
compile_eager = compiled("eager", fullgraph=True)
compile_reduce = compiled(mode="reduce-overhead")
