"""Detection with torchvision's Faster R-CNN and RetinaNet, on a timm backbone whose BatchNorm layers are frozen.

A detector takes lists of images of any size and trains on a few at a time, so its backbone is the classic case for
frozen layers. Of the backbone's gamma' x + beta' only beta' is trained. A box an image; prints how well the best box
fits on unseen images, and how far an image's features depend on the image beside it. No network needed.
"""

import argparse
from functools import partial

import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone

NAME = "tf_efficientnet_lite0"
LEVELS = ["0", "1", "2"]
LR = {"faster_rcnn": 5e-4, "retinanet": 2e-4}  # at 5e-4 RetinaNet's scores all rise, then all fall under the threshold


class Backbone(nn.Module):
    """Features of a timm network, at strides of 8, 16 and 32 pixels, with a feature pyramid over them."""

    def __init__(self) -> None:
        super().__init__()
        # In your project: timm.create_model(NAME, pretrained=True, features_only=True, ...)
        self.body = timm.create_model(NAME, features_only=True, out_indices=(2, 3, 4))
        self.body.load_state_dict(create_backbone(NAME, weights="package").state_dict(), strict=False)
        self.out_channels = 64
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x):
        return self.pyramid(dict(zip(LEVELS, self.body(x), strict=True)))


def detector(kind: str) -> nn.Module:
    size = {"min_size": 96, "max_size": 128}
    if kind == "faster_rcnn":
        anchors = AnchorGenerator(tuple((8 * 2**i, 16 * 2**i) for i in range(3)), ((0.5, 1.0, 2.0),) * 3)
        roi_align = MultiScaleRoIAlign(LEVELS, output_size=7, sampling_ratio=2)
        return FasterRCNN(Backbone(), 2, rpn_anchor_generator=anchors, box_roi_pool=roi_align, **size)
    anchors = AnchorGenerator(tuple((16 * 2**i, 24 * 2**i) for i in range(3)), ((0.5, 1.0, 2.0),) * 3)
    return RetinaNet(Backbone(), 2, anchor_generator=anchors, norm_layer=partial(nn.GroupNorm, 8), **size)  # new head


def scenes(count: int, seed: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return images [3, H, W] of several sizes with a bright box each, and where it is."""
    draw = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for number in range(count):
        image = torch.rand(3, 96, 96 + 8 * (number % 3), generator=draw) * 0.4
        x, y, w, h = (torch.rand(4, generator=draw) * 32 + torch.tensor([4.0, 4.0, 24.0, 24.0])).tolist()
        image[:, int(y) : int(y + h), int(x) : int(x + w)] += 0.6
        images.append(image)
        targets.append({"boxes": torch.tensor([[x, y, x + w, y + h]]), "labels": torch.tensor([1])})
    return images, targets


@torch.no_grad()
def fit_of_best_box(net: nn.Module, seed: int = 1, count: int = 12) -> float:
    images, targets = scenes(count, seed)
    found = net.eval()(images)
    best = [box_iou(f["boxes"][:1], t["boxes"]).sum() for f, t in zip(found, targets, strict=True)]
    return float(torch.stack(best).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--detector", choices=["faster_rcnn", "retinanet"], default="faster_rcnn")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    net, (images, targets) = detector(args.detector), scenes(2 * args.steps, seed=0)
    net = fbn.convert(net, fbn.Rules([("backbone.body.*", fbn.Freeze("shift"))]), example_input=[images[0]])
    print(fbn.status(net))
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=LR[args.detector])
    before, losses = fit_of_best_box(net), []
    net.train()
    for step in range(args.steps):
        now = slice(2 * step, 2 * step + 2)
        loss = sum(net(images[now], targets[now]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():  # in training mode, beside its negative
        moved = net.backbone(torch.stack([images[0], 1 - images[0]]))["0"][:1] - net.backbone(images[0][None])["0"]
    print(f"features of an image move by {moved.abs().max():.4f} when another is beside it")
    print(f"{args.detector}: loss {losses[0]:.2f}, at the end {losses[-1]:.2f}")
    print(f"IoU of the best box on unseen images: {before:.2f} before, {fit_of_best_box(net):.2f} after")


if __name__ == "__main__":
    main()
