"""A robot-learning encoder: ResNet-18 under a policy head, with a moving average of the weights, frozen or GroupNorm.

Imitation learning averages the weights (EMA), and BatchNorm does not go with that: the average has statistics of other
weights than its own. The usual cure is to put GroupNorm in place of every layer, which throws a pretrained network's
function away. Either freeze the layers, or let `ToGroupNorm` start from what BatchNorm did. Regresses where a disc is,
from 64 images; prints the error of the network and of its average. No network needed, so the encoder is random here and
gets the statistics of the images first; a pretrained one has its own.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import finetune_bn as fbn

POLICIES = {"frozen": fbn.Freeze("original"), "group_norm": fbn.ToGroupNorm(), "live": fbn.Keep()}


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, 64, 64] with a disc, and where it is, from -1 to 1, [N, 2]."""
    draw = torch.Generator().manual_seed(seed)
    place = torch.rand(count, 2, generator=draw) * 1.4 - 0.7
    grid = torch.linspace(-1, 1, 64)
    far = (grid[:, None] - place[:, 0, None, None]) ** 2 + (grid - place[:, 1, None, None]) ** 2
    disc = (far < 0.06).float()[:, None]
    return torch.rand(count, 3, 64, 64, generator=draw) * 0.3 + disc * torch.tensor([1.0, -1.0, 0.5])[
        :, None, None
    ], place


class Policy(nn.Module):
    """Images to actions: features over positions, their expected places (spatial softmax), and a small head."""

    def __init__(self) -> None:
        super().__init__()
        # In your project: timm.create_model("resnet18", pretrained=True, features_only=True, out_indices=(3,))
        self.encoder = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=(3,))
        self.head = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.encoder(images)[0]
        weights = maps.flatten(2).softmax(dim=2).view_as(maps)
        y, x = (torch.linspace(-1, 1, side) for side in maps.shape[2:])
        return self.head(torch.cat([(weights.sum(3) * y).sum(2), (weights.sum(2) * x).sum(2)], dim=1))


@torch.no_grad()
def error(net: nn.Module) -> float:
    images, places = scenes(64, seed=1)
    return float(F.l1_loss(net.eval()(images), places))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--norm", choices=POLICIES, default="frozen", help="what happens to the BatchNorm layers")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)

    net, (images, places) = Policy(), scenes(64, seed=0)
    fbn.recalibrate(net, images.split(32), progress=False)  # not for a pretrained encoder
    net = fbn.convert(net, POLICIES[args.norm], example_input=images[:2])
    if args.norm == "group_norm":
        fbn.calibrate_group_norm(net, [images])
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)  # behind the conversion
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    before = error(net)
    for step in range(args.steps):
        rows = torch.arange(8) + 8 * (step % 8)
        optimizer.zero_grad()
        F.mse_loss(net.train()(images[rows]), places[rows]).backward()
        optimizer.step()
        average.update_parameters(net)
    print(fbn.status(net))
    print(
        f"{args.norm}: error on unseen scenes {before:.3f} before, {error(net):.3f} after, average {error(average):.3f}"
    )


if __name__ == "__main__":
    main()
