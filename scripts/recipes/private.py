"""Private fine-tuning with opacus: BatchNorm stays, frozen, where opacus would ask for GroupNorm.

Frozen layers compute each image by itself, so it has a gradient of its own, and the statistics are those of the public
pretraining. Only beta' and the head are trained, which is few numbers to add noise to. Learns to tell emoji of nature
from emoji of objects; prints the accuracy on unseen ones and the epsilon that was spent. No network needed.
"""

import argparse
import sys
import warnings

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone
from finetune_bn.data import EmojiData

try:
    from opacus import PrivacyEngine
except ImportError:
    print("This recipe needs opacus: pip install opacus")
    sys.exit(0)

CATEGORIES = ["Animals & Nature", "Objects"]


@torch.no_grad()
def accuracy(net: torch.nn.Module, data: TensorDataset) -> float:
    net.eval()
    found = torch.cat([net(images).argmax(1) == labels for images, labels in DataLoader(data, 64)])
    return float(found.float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=128, help="private images, and as many to test on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--noise", type=float, default=1.0, help="noise multiplier")
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Secure RNG|Full backward hook|Optimal order|divide by zero")

    data = EmojiData(categories=CATEGORIES, image_size=64, num_workers=0, mean=(0.5,) * 3, std=(0.5,) * 3)
    sets = []
    for split in ("train", "test"):
        images = data.image_set(split)
        chosen = torch.randperm(len(images))[: args.images].tolist()
        rows = [images[i] for i in chosen]
        sets.append(TensorDataset(torch.stack([x for x, *_ in rows]), torch.tensor([int(y) for _, y, *_ in rows])))

    net = create_backbone("tf_efficientnet_lite0", weights="package", num_classes=2, policy=fbn.Freeze("shift"))
    net = fbn.make_private(net)
    print(str(fbn.train_only(net, "norm")).splitlines()[0])
    before = accuracy(net, sets[1])
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=net.train(),
        optimizer=optimizer,
        data_loader=DataLoader(sets[0], batch_size=32),
        noise_multiplier=args.noise,
        max_grad_norm=1.0,
    )
    for _ in range(args.epochs):
        for images, labels in loader:
            if not len(images):  # Poisson sampling may draw none
                continue
            optimizer.zero_grad()
            F.cross_entropy(private(images), labels).backward()
            optimizer.step()
    spent = engine.get_epsilon(delta=1e-3)
    print(f"accuracy on unseen emoji: {before:.0%} before, {accuracy(net, sets[1]):.0%} after")
    print(f"epsilon {spent:.2f} at delta 0.001, for {args.images} private images")


if __name__ == "__main__":
    main()
