"""Video: a 2-D network over frames (TSM), or a 3-D one with BatchNorm3d, frozen for batches of two clips.

Frames of a clip are much alike, so a batch of 2 clips x 8 frames has the statistics of two images, not of sixteen. And
frames are rows of the batch, so what cuts batches must not cut clips: `recalibrate(..., keep_batches=True)`. Learns
whether a disc comes nearer or goes away, which no single frame tells; prints the accuracy on unseen clips. TSM is
EfficientNet-Lite0 with ImageNet weights; the 3-D ResNet has none here and gets statistics first. No network needed.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video import r3d_18

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone

FRAMES = 8


class Shift(nn.Module):
    """Moves an eighth of the channels a frame back, an eighth forth, then convolves (TSM, Lin et al. 2019)."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        clips = x.unflatten(0, (-1, FRAMES))
        back, forth, rest = clips.split([x.shape[1] // 8, x.shape[1] // 8, x.shape[1] - 2 * (x.shape[1] // 8)], dim=2)
        back = torch.cat([back[:, 1:], torch.zeros_like(back[:, :1])], dim=1)
        forth = torch.cat([torch.zeros_like(forth[:, :1]), forth[:, :-1]], dim=1)
        return self.conv(torch.cat([back, forth, rest], dim=2).flatten(0, 1))


class Tsm(nn.Module):
    """Clips [N, 3, T, H, W] to logits [N, 2]: frames through a 2-D network, averaged."""

    def __init__(self) -> None:
        super().__init__()
        # In your project: timm.create_model(..., pretrained=True)
        self.net = create_backbone("tf_efficientnet_lite0", weights="package", num_classes=2)
        for stage in self.net.blocks[1:6]:
            for block in stage[1:]:
                block.conv_pw = Shift(block.conv_pw)

    def forward(self, clips: Tensor) -> Tensor:
        frames = clips.transpose(1, 2).flatten(0, 1)
        return self.net(frames).unflatten(0, (-1, FRAMES)).mean(dim=1)


def clips(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return clips [N, 3, T, 48, 48] of a disc that grows or shrinks, and whether it grows."""
    draw = torch.Generator().manual_seed(seed)
    grows = torch.arange(count) % 2
    radius = 11 + (2 * grows - 1)[:, None] * (torch.arange(FRAMES) - 3.5) * 2
    y, x = torch.randint(18, 30, (2, count, 1, 1, 1), generator=draw)
    grid = torch.arange(48)
    disc = (grid[:, None] - y) ** 2 + (grid - x) ** 2 < radius[..., None, None] ** 2
    found = disc.float()[:, None].expand(-1, 3, -1, -1, -1)
    return found + torch.randn(found.shape, generator=draw) * 0.1, grows


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    x, y = clips(32, seed=1)
    return float((torch.cat([net.eval()(part) for part in x.split(8)]).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--net", choices=["tsm", "r3d_18"], default="tsm")
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    torch.manual_seed(0)

    x, y = clips(2 * args.steps, seed=0)
    net = Tsm() if args.net == "tsm" else r3d_18(weights=None, num_classes=2)
    if args.net == "r3d_18":  # no pretraining here, and so no statistics to freeze
        fbn.recalibrate(net, [clips(8, seed=2)[0]], keep_batches=True, progress=False)
    net = fbn.convert(net, fbn.Freeze("original"), example_input=x[:1])
    print(fbn.status(net))
    # Frozen layers do not scale back what a step made large: a network from scratch wants the smaller steps.
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-4 if args.net == "tsm" else 1e-4)
    before = accuracy(net)
    net.train()
    for clip, label in zip(x.split(2), y.split(2), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(net(clip), label).backward()
        optimizer.step()
    print(f"{args.net}: accuracy on unseen clips {before:.0%} before, {accuracy(net):.0%} after")


if __name__ == "__main__":
    main()
