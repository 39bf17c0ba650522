"""Programs of other people with the conversion put in: frozen stays frozen, and what is trained learns.

Segmentation (segmentation-models-pytorch), detection (torchvision), self-supervised training (SimSiam), LoRA (peft),
accelerate and transformers. Those that are not installed are skipped; `pip install segmentation-models-pytorch peft
accelerate transformers` brings them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("lightning.pytorch")

import lightning.pytorch as pl

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.layers.frozen import FrozenBatchNorm
from tests.models import settle

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Program(pl.LightningModule):
    """Trains a network by a loss of its own."""

    def __init__(self, net: nn.Module, loss: Any) -> None:
        super().__init__()
        self.net, self.loss = net, loss
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(self.net, batch)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def fit(folder: Path, program: Program, policy: fbn.Policy, steps: int = 8, batch: Any = IMAGES) -> None:
    """Fit with the callback added, on the same batch over and over."""
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[BatchNormConversion(policy)],
    )
    trainer.fit(program, torch.utils.data.DataLoader([batch] * steps, batch_size=None))


def statistics(net: nn.Module) -> dict[str, Tensor]:
    frozen = [name for name, module in net.named_modules() if isinstance(module, FrozenBatchNorm)]
    assert frozen
    state = net.state_dict()
    return {f"{n}.{s}": state[f"{n}.{s}"].clone() for n in frozen for s in ("running_mean", "running_var")}


def still_and_learning(program: Program, vanilla: dict[str, Tensor]) -> None:
    """Assert that no statistics of a frozen layer moved, and that the loss fell."""
    for name, value in statistics(program.net).items():
        assert torch.equal(value, vanilla[name]), name
    assert program.losses[-1] < program.losses[0]


def pretrained(net: nn.Module, part: nn.Module) -> nn.Module:
    """Give the norm layers of a part statistics, as if weights had been loaded."""
    settle(part)
    return net


@pytest.mark.parametrize("affine", ["none", "original"])
def test_a_u_net_keeps_its_new_decoder_live_and_its_encoder_frozen(tmp_path: Path, affine: Any) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = smp.Unet("resnet18", encoder_weights=None, classes=1)
    pretrained(net, net.encoder)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mask = (IMAGES.mean(1, keepdim=True) > 0).float()
    program = Program(net, lambda net, x: F.binary_cross_entropy_with_logits(net(x), mask))
    fit(tmp_path, program, fbn.Freeze(affine))
    still_and_learning(program, before)
    live = [name for name, module in net.named_modules() if type(module) is nn.BatchNorm2d]
    assert live
    assert all(name.startswith("decoder") for name in live)


def test_a_detector_of_torchvision_trains_on_lists_of_images(tmp_path: Path) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    net = detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=3,
        min_size=64,
        max_size=64,
        norm_layer=nn.BatchNorm2d,
        trainable_backbone_layers=6,
    )
    pretrained(net, net.backbone)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    box = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return sum(net(*batch).values())  # type: ignore[return-value]

    program = Program(net, loss)
    fit(tmp_path, program, fbn.Freeze("shift"), 3, (list(IMAGES[:2]), [box, box]))
    # Of a detector that starts from random weights the loss need not fall in a few steps.
    for name, value in statistics(net).items():
        assert torch.equal(value, before[name]), name
    assert torch.isfinite(torch.tensor(program.losses)).all()
    moved = [name for name, p in net.named_parameters() if not torch.equal(p, before[name])]
    assert any("backbone.body" in name and name.endswith("bias") for name in moved)


def test_simsiam_with_a_head_of_batch_norm_1d_trains_under_a_rule_for_the_backbone(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")

    class SimSiam(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = settle(timm.create_model("test_resnet", num_classes=0))
            width = self.backbone.num_features
            self.projector = nn.Sequential(
                nn.Linear(width, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(True), nn.Linear(32, 32, bias=False)
            )
            self.projector.append(nn.BatchNorm1d(32, affine=False))
            self.predictor = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(True), nn.Linear(16, 32))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.projector(self.backbone(x))
            return self.predictor(z), z.detach()

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        (p1, z1), (p2, z2) = net(x), net(x.flip(3))
        return -(F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2

    net = SimSiam()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    program = Program(net, loss)
    fit(tmp_path, program, fbn.Rules([("net.backbone.*", fbn.Freeze("original")), ("*", fbn.Keep())]))
    still_and_learning(program, before)
    assert not any(isinstance(module, FrozenBatchNorm) for module in (*net.projector, *net.predictor))


@pytest.mark.parametrize("first", ["convert", "peft"])
def test_lora_on_convolutions_learns_before_and_after_the_conversion(first: str) -> None:
    peft = pytest.importorskip("peft")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = settle(timm.create_model("test_resnet", num_classes=3)).eval()
    expected = net(IMAGES)
    config = peft.LoraConfig(target_modules=r".*layer\d.*conv\d", r=2, modules_to_save=["fc"])
    if first == "convert":
        net = peft.get_peft_model(fbn.convert(net, fbn.Freeze("original")), config)
    else:
        net = fbn.convert(peft.get_peft_model(net, config), fbn.Freeze("original"), example_input=IMAGES)
    torch.testing.assert_close(net.eval()(IMAGES), expected, rtol=1e-4, atol=1e-4)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    limit = fbn.limit_steps(optimizer, net)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(net.train()(IMAGES), torch.tensor([0, 1, 2, 0]))
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    zero_at_first = [p for name, p in net.named_parameters() if "lora_B" in name]
    assert all(float(p.detach().norm()) > 0 for p in zero_at_first)
    assert not any("lora" in name for name in limit.limited)


def test_accelerate_prepares_a_converted_network_and_its_limited_optimizer() -> None:
    accelerate = pytest.importorskip("accelerate")
    timm = pytest.importorskip("timm")
    net = fbn.convert(settle(timm.create_model("test_resnet", num_classes=3)), fbn.Freeze("original"))
    before = statistics(net)
    accelerator = accelerate.Accelerator(cpu=True)
    net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-3))
    fbn.limit_steps(optimizer, net)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(net.train()(IMAGES), torch.tensor([0, 1, 2, 0]))
        losses.append(float(loss.detach()))
        accelerator.backward(loss)
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, value in statistics(accelerator.unwrap_model(net)).items():
        assert torch.equal(value, before[name])


def test_a_resnet_of_transformers_is_frozen_and_reverted() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    net = settle(transformers.ResNetForImageClassification(config)).eval()
    expected = net(IMAGES).logits
    state = {name: value.clone() for name, value in net.state_dict().items()}
    net = fbn.convert(net, fbn.Freeze("original"), example_input={"pixel_values": IMAGES})
    torch.testing.assert_close(net(IMAGES).logits, expected)
    net.train()(IMAGES, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    before = statistics(net)
    assert all(torch.equal(value, before[name]) for name, value in statistics(net).items())
    for name, value in fbn.revert(net, example_input={"pixel_values": IMAGES}).state_dict().items():
        assert torch.equal(value, state[name]), name
