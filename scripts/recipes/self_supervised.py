"""Self-supervised training (BYOL) with a frozen backbone, live BatchNorm1d in the heads, and a momentum copy.

The pretrained backbone keeps its statistics, in the student as in its copy; the heads are new, and need BatchNorm that
is live: without it such methods collapse. Two things to mind: convert before the copy is made, and let the copy average
parameters alone. Prints how far the embeddings are from a collapse, 1 being none, 0 all the same. No network needed.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone
from finetune_bn.data import EmojiData

WIDTH = 64


def head(inputs: int) -> nn.Sequential:
    """Return linear - BatchNorm1d - ReLU - linear."""
    layers = nn.Linear(inputs, 2 * WIDTH, bias=False), nn.BatchNorm1d(2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)
    return nn.Sequential(*layers)


class Byol(nn.Module):
    """A student with a predictor, and a teacher that is the moving average of the student."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.student = nn.Sequential(backbone, head(backbone.num_features))
        self.predictor = head(WIDTH)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        losses = []
        for mine, its in ((one, two), (two, one)):
            with torch.no_grad():
                wanted = self.teacher(its)
            losses.append(-F.cosine_similarity(self.predictor(self.student(mine)), wanted).mean())
        return sum(losses) / 2

    @torch.no_grad()
    def follow(self, momentum: float = 0.99) -> None:
        """Move the teacher towards the student: parameters alone, its live layers see its own batches."""
        for mine, its in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            its.lerp_(mine, 1 - momentum)


@torch.no_grad()
def spread(net: nn.Module, images: Tensor) -> float:
    """Return the mean sd of normalized embeddings, of what it is where they point everywhere; 0 is a collapse."""
    found = F.normalize(net.eval()(images))
    net.train()
    return float(found.std(dim=0).mean() * WIDTH**0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)

    backbone = create_backbone("tf_efficientnet_lite0", weights="package", num_classes=0, policy=fbn.Freeze("original"))
    net = Byol(backbone).train()  # the backbone is frozen before it is copied
    statistics = {name: t.clone() for name, t in net.named_buffers() if ".0." in name and "running" in name}
    data = EmojiData(target="identity", image_size=64, augment="full", num_workers=0, mean=(0.5,) * 3, std=(0.5,) * 3)
    views, plain = data.image_set("train", augment="full"), data.image_set("test")
    test = torch.stack([plain[i][0] for i in range(48)])
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-4)
    before = spread(net.student, test)
    losses = []
    for _ in range(args.steps):
        chosen = torch.randint(len(views), (args.batch,)).tolist()
        one, two = (torch.stack([views[i][0] for i in chosen]) for _ in range(2))
        loss = net(one, two)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.follow()
        losses.append(loss.item())
    now = dict(net.named_buffers())
    moved = [name for name, value in statistics.items() if not torch.equal(now[name], value)]
    print(f"statistics of the backbone that moved, in student and teacher: {sum('.0.' in n for n in moved)}")
    print(f"loss {losses[0]:.2f}, at the end {losses[-1]:.2f}")
    print(f"spread of the embeddings of unseen emoji: {before:.2f} before, {spread(net.student, test):.2f} after")


if __name__ == "__main__":
    main()
