"""Images of several domains at test time, and nobody says which is from which: a bank that finds the nearest.

Statistics are kept for each domain, from images without labels. A batch of the stream, or each image of a mixed one,
gets those that its activations are nearest to. EfficientNet-Lite0 with ImageNet weights and a linear head that is
solved for on 200 emoji; domains are the drawings as they are, their negatives, low contrast, and noise. Prints the
accuracy of one network for all, and of the bank. No network needed.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone
from finetune_bn.data import EmojiData

DOMAINS = {
    "as drawn": lambda x: x,
    "negative": lambda x: -x,
    "low contrast": lambda x: x.mean((2, 3), keepdim=True) + 0.1 * (x - x.mean((2, 3), keepdim=True)),
    "noise": lambda x: (x + 0.7 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1),
}


def emoji(data: EmojiData, split: str, count: int) -> tuple[Tensor, Tensor]:
    images = data.image_set(split)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].tolist()
    rows = [images[i] for i in chosen]
    return torch.stack([row[0] for row in rows]), torch.tensor([int(row[1]) for row in rows])


@torch.no_grad()
def network(images: Tensor, labels: Tensor, classes: int) -> nn.Module:
    """Return the network with a linear head by ridge regression."""
    net = create_backbone("tf_efficientnet_lite0", weights="package", num_classes=0).eval()
    fbn.recalibrate(net, images.split(64), progress=False)  # the head is to go with statistics of its own images
    features = torch.cat([net(part) for part in images.split(64)])
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    normal = features.T @ features + 10 * torch.eye(features.shape[1])
    solved = torch.linalg.solve(normal, features.T @ F.one_hot(labels, classes).double()).float()
    head = nn.Linear(len(solved) - 1, classes)
    head.weight.copy_(solved[:-1].T)
    head.bias.copy_(solved[-1])
    return nn.Sequential(net, head).eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=200, help="to solve for the head, and to measure statistics")
    parser.add_argument("--test-images", type=int, default=48, help="of each domain")
    args = parser.parse_args()

    data = EmojiData(target="category", image_size=64, num_workers=0, mean=(0.5,) * 3, std=(0.5,) * 3)
    train, labels = emoji(data, "train", args.images)
    test, wanted = emoji(data, "test", args.test_images)
    net, bank = network(train, labels, data.num_classes), fbn.StatisticsBank()
    for name, change in DOMAINS.items():
        with bank.restoring(net):
            fbn.recalibrate(net, change(train).split(64), progress=False)
            bank.keep(name, net)

    right, chosen = {"source": 0.0, "nearest": 0.0}, 0.0
    for name, change in DOMAINS.items():
        for images, answers in zip(change(test).split(16), wanted.split(16), strict=True):
            right["source"] += float((net(images).argmax(1) == answers).sum())
            found = bank.nearest(net, images)
            with bank.using(found, net):
                right["nearest"] += float((net(images).argmax(1) == answers).sum())
            chosen += len(images) * (found == name)
    total = len(DOMAINS) * len(test)
    print(f"batches of 16: the right domain for {chosen / total:.0%}")
    print(f"accuracy: {right['source'] / total:.0%} by the source's statistics, {right['nearest'] / total:.0%} nearest")
    mixed = torch.cat([change(test[:16]) for change in DOMAINS.values()])
    names = [name for name in DOMAINS for _ in test[:16]]
    each = bank.nearest_each(net, mixed)
    print(f"a mixed batch of {len(mixed)}: {sum(a == b for a, b in zip(each, names, strict=True))} in the right domain")


if __name__ == "__main__":
    main()
