"""Metric learning with pytorch-metric-learning in a LightningModule of your own, with BatchNorm frozen.

Two callbacks and a batch sampler are added to it: batches of P labels x K images (of each process, in a distributed
run), frozen BatchNorm layers, and a look at what such batches do to them. EfficientNet-Lite0 with ImageNet weights
learns which drawings show the same emoji; prints Recall@1 on unseen emoji, before and after. No network needed.
"""

import argparse

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import NTXentLoss
from torch.utils.data import DataLoader

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone
from finetune_bn.callbacks import BatchNormConversion, BatchNormMonitor
from finetune_bn.data import EmojiData
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler

POLICIES = {"live": fbn.Keep(), "frozen": fbn.Freeze("none"), "ghost": fbn.Ghost(groups=2)}


class Embedder(pl.LightningModule):
    """As you may have it: nothing in it knows of this package."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        # In your project perhaps: timm.create_model(NAME, pretrained=True, num_classes=128)
        self.net = create_backbone("tf_efficientnet_lite0", weights="package", num_classes=128)
        self.loss, self.lr = NTXentLoss(temperature=0.1), lr

    def forward(self, images):
        return F.normalize(self.net(images))

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def on_test_start(self):
        self.found = []

    def test_step(self, batch, batch_idx):
        self.found.append((self(batch[0]), batch[1]))

    def on_test_epoch_end(self):
        embeddings, labels = (torch.cat(part) for part in zip(*self.found, strict=True))
        nearest = (embeddings @ embeddings.T).fill_diagonal_(-2).argmax(dim=1)  # of the others
        self.log("recall_at_1", (labels[nearest] == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", choices=POLICIES, default="frozen", help="what happens to the BatchNorm layers")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-4, help="frozen layers want a smaller one than live ones")
    parser.add_argument("--test-batches", type=float, default=1.0, help="share of the test batches")
    args = parser.parse_args()
    pl.seed_everything(0)

    data = EmojiData(target="identity", image_size=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    train, test = data.image_set("train", augment="light"), data.image_set("test")  # yours
    sampler = PKBatchSampler(train.labels, num_labels=16, images_per_label=2, seed=0)  # from one label an image
    callbacks = [BatchNormConversion(POLICIES[args.policy]), BatchNormMonitor()]
    options = {"logger": False, "enable_checkpointing": False, "limit_test_batches": args.test_batches}
    trainer = pl.Trainer(max_steps=args.steps, callbacks=callbacks, **options)
    model = Embedder(args.lr)
    (before,) = trainer.test(model, DataLoader(test, 64), verbose=False)
    trainer.fit(model, DataLoader(train, batch_sampler=sampler))
    (after,) = trainer.test(model, DataLoader(test, 64), verbose=False)
    print(f"Recall@1 on unseen emoji: {before['recall_at_1']:.1%} before, {after['recall_at_1']:.1%} after")


if __name__ == "__main__":
    main()
