"""LoRA on the convolutions of a pretrained network, with PEFT, and its BatchNorm layers frozen.

PEFT leaves BatchNorm alone, and live: its statistics move with every forward pass in training mode, and no adapter file
has them, so the adapter that is loaded later meets another network. Frozen, they are the base network's. A frozen layer
shares the backward pass of a plain convolution alone, so with LoRA it is computed by itself, and says so in the plan.
Learns 9 categories of emoji by their first drawings; merges the adapters in the end. No network needed.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone
from finetune_bn.data import EmojiData

try:
    import peft
except ImportError:
    print("This recipe needs peft: pip install peft")
    sys.exit(0)


@torch.no_grad()
def accuracy(net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((torch.cat([net.eval()(x) for x in images.split(64)]).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--test-size", type=int, default=96)
    args = parser.parse_args()
    torch.manual_seed(0)

    data = EmojiData(target="category", image_size=64, num_workers=0, mean=(0.5,) * 3, std=(0.5,) * 3)
    net = create_backbone("tf_efficientnet_lite0", weights="package", num_classes=data.num_classes)
    net = fbn.convert(net, fbn.Freeze("none"))
    statistics = {name: t.clone() for name, t in net.named_buffers()}
    config = peft.LoraConfig(target_modules=r".*conv_pwl?", r=4, modules_to_save=["classifier"])  # 1x1 convolutions
    net = peft.get_peft_model(net, config)
    net.print_trainable_parameters()

    test = data.image_set("test")
    order = torch.randperm(len(test))[: args.test_size].tolist()
    images, labels = torch.stack([test[i][0] for i in order]), torch.tensor([int(test[i][1]) for i in order])
    before = accuracy(net, images, labels)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    loader = DataLoader(data.image_set("train", augment="light"), 8, shuffle=True)
    for _, (x, y) in zip(range(args.steps), loader, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(net.train()(x), y).backward()
        optimizer.step()
    after, adapted = accuracy(net, images, labels), net(images[:8])

    whole = net.merge_and_unload()  # plain convolutions again, frozen layers behind them
    torch.testing.assert_close(whole(images[:8]), adapted, rtol=1e-3, atol=1e-3)
    now = dict(whole.named_buffers())
    assert all(torch.equal(now[name], value) for name, value in statistics.items())
    print(f"{len(statistics)} buffers of BatchNorm are those of the base network, and merged outputs those of before")
    plain = fbn.revert(whole)  # timm's own network, for its checkpoints
    print(f"{type(plain.bn1).__name__} again: accuracy {accuracy(plain, images, labels):.0%}")
    print(f"accuracy on unseen emoji: {before:.0%} before, {after:.0%} after {args.steps} steps of 8 images")


if __name__ == "__main__":
    main()
