"""Segmentation with segmentation-models-pytorch: the pretrained encoder of a U-Net frozen, its new decoder live.

Batches of two images, as segmentation has them. The encoder keeps the statistics of its pretraining; the decoder is
new, has none, and gets them from the batches. Discs on noise; prints the IoU on unseen ones before and after. No
network needed.
"""

import argparse
import sys

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone
from finetune_bn.callbacks import BatchNormConversion

try:
    import segmentation_models_pytorch as smp
except ImportError:
    print("This recipe needs segmentation-models-pytorch: pip install segmentation-models-pytorch")
    sys.exit(0)

NAME = "tf_efficientnet_lite0"


def discs(count: int, seed: int) -> TensorDataset:
    """Return images [N, 3, 64, 64] of a disc on noise, and its mask [N, 1, 64, 64]."""
    draw = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))
    center = torch.rand(count, 2, 1, 1, generator=draw) * 40 + 12
    radius = torch.rand(count, 1, 1, 1, generator=draw) * 10 + 8
    mask = ((grid - center).square().sum(1, keepdim=True).sqrt() < radius).float()
    color = torch.randn(count, 3, 1, 1, generator=draw)
    return TensorDataset(torch.randn(count, 3, 64, 64, generator=draw) * 0.7 + mask * color, mask)


class Segmenter(pl.LightningModule):
    """As you may have it: nothing in it knows of this package."""

    def __init__(self) -> None:
        super().__init__()
        # In your project: smp.Unet(f"tu-{NAME}", encoder_weights="imagenet")
        self.net = smp.Unet(f"tu-{NAME}", encoder_weights=None, decoder_channels=(64, 32, 16, 16, 8))
        pretrained = create_backbone(NAME, weights="package").state_dict()
        missing, _ = self.net.encoder.model.load_state_dict(pretrained, strict=False)  # it has no head
        assert not missing

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self.net(batch[0]), batch[1])

    def on_test_start(self):
        self.both = self.either = 0.0

    def test_step(self, batch, batch_idx):
        found, wanted = self.net(batch[0]) > 0, batch[1] > 0
        self.both += (found & wanted).sum()
        self.either += (found | wanted).sum()

    def on_test_epoch_end(self):
        self.log("iou", self.both / self.either)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=5e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--affine", choices=["none", "shift", "original"], default="none", help="trained in the encoder"
    )
    args = parser.parse_args()
    pl.seed_everything(0)

    policy = fbn.Rules([("net.encoder.*", fbn.Freeze(args.affine)), ("*", fbn.Keep())])
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options["enable_model_summary"] = False
    trainer = pl.Trainer(max_steps=args.steps, callbacks=[BatchNormConversion(policy)], **options)
    model, test = Segmenter(), DataLoader(discs(32, seed=1), 16)
    before_training = {name: t.clone() for name, t in model.net.encoder.named_buffers() if "running" in name}
    (before,) = trainer.test(model, test, verbose=False)
    trainer.fit(model, DataLoader(discs(2 * args.steps, seed=0), batch_size=2))
    (after,) = trainer.test(model, test, verbose=False)
    now = dict(model.net.encoder.named_buffers())
    assert all(torch.equal(now[name], value) for name, value in before_training.items())
    print(f"{len(before_training)} running statistics of the encoder are those of its pretraining, bit for bit")
    print(f"IoU on unseen discs: {before['iou']:.2f} before, {after['iou']:.2f} after")


if __name__ == "__main__":
    main()
