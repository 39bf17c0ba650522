"""Fine-tune a timm network at batch 4 with its BatchNorm layers frozen, in a LightningModule of your own.

One argument makes the difference: `policy` where the network is built. EfficientNet-Lite0 with ImageNet weights
learns 9 categories of emoji from 200 images. Prints the accuracy on unseen emoji for each vendor who drew them, then
loads the checkpoint into plain timm and compares the logits. No network needed; 20 seconds on a CPU.
"""

import argparse

import lightning.pytorch as pl
import timm
import torch
import torch.nn.functional as F

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone
from finetune_bn.data import EmojiData

NAME = "tf_efficientnet_lite0"
POLICIES = {"live": fbn.Keep(), **{kind: fbn.Freeze(kind) for kind in ("none", "shift", "merged", "original")}}


class Classifier(pl.LightningModule):
    def __init__(self, num_classes: int, policy: str, lr: float, domains: list[str]) -> None:
        super().__init__()
        self.save_hyperparameters()
        # A network that is there already: fbn.convert(timm.create_model(...), POLICIES[policy])
        self.net = create_backbone(NAME, weights="package", policy=POLICIES[policy], num_classes=num_classes)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        hits = (self.net(batch[0]).argmax(dim=1) == batch[1]).float()
        vendor = self.hparams.domains[dataloader_idx]
        self.log(f"accuracy/{vendor}", hits.mean(), batch_size=len(hits), add_dataloader_idx=False)

    def configure_optimizers(self):
        trained = [p for p in self.net.parameters() if p.requires_grad]
        decayed = {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05}
        others = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}  # biases, gamma', beta'
        optimizer = torch.optim.AdamW([decayed, others], lr=self.hparams.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--policy", choices=POLICIES, default="none", help="what happens to the BatchNorm layers")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--train-size", type=int, default=200, help="number of training images")
    parser.add_argument("--test-batches", type=float, default=1.0, help="share of the test batches of each vendor")
    parser.add_argument("--lr", type=float, default=2e-4, help="frozen layers want a smaller one than live ones")
    args = parser.parse_args()
    pl.seed_everything(0)

    data = EmojiData(target="category", train_size=args.train_size, batch_size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
    model = Classifier(data.num_classes, args.policy, args.lr, data.domains)
    trainer = pl.Trainer(max_epochs=args.epochs, limit_test_batches=args.test_batches, logger=False)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    for vendor in data.domains:
        print(f"accuracy on {vendor}: {trainer.callback_metrics[f'accuracy/{vendor}']:.1%}")

    path = trainer.checkpoint_callback.best_model_path
    state = torch.load(path, weights_only=True)["state_dict"]
    plain = timm.create_model(NAME, num_classes=data.num_classes).eval()
    plain.load_state_dict({name.removeprefix("net."): value for name, value in state.items()}, strict=True)
    images, _ = next(iter(data.test_dataloader()[0]))
    with torch.no_grad():
        torch.testing.assert_close(plain(images), model.cpu().eval().net(images), rtol=1e-4, atol=1e-4)
    print(f"{path} loads into plain timm: same logits")


if __name__ == "__main__":
    main()
