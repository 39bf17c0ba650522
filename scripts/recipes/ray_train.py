"""Ray Train: the same LightningModule and callback on the workers of a Ray cluster.

Run once with Ray 2.60 and two workers on CPUs; the tests have no Ray. Nothing changes for BatchNorm. Ray's strategy
is a DDPStrategy, so the layers are converted before they are wrapped, frozen ones have nothing to synchronize, and
`recalibrate`, P x K batches and retrieval go over the workers' process group.
"""

import argparse
import sys

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

import finetune_bn as fbn
from finetune_bn.backbones.create import create_backbone
from finetune_bn.callbacks import BatchNormConversion
from finetune_bn.data import EmojiData

try:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer
    from ray.train.torch import TorchTrainer
except ImportError:
    print("This recipe needs ray: pip install 'ray[train]'")
    sys.exit(0)


class Classifier(pl.LightningModule):
    """As you may have it: nothing in it knows of this package."""

    def __init__(self, num_classes: int, lr: float) -> None:
        super().__init__()
        self.net = create_backbone("tf_efficientnet_lite0", weights="package", num_classes=num_classes)
        self.lr = lr

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=self.lr)


def train(config: dict) -> None:
    """Run on each worker."""
    pl.seed_everything(0)
    data = EmojiData(
        target="category",
        batch_size=config["batch_size"],
        train_size=config["images"],
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        num_workers=0,
    )
    trainer = pl.Trainer(
        max_epochs=config["epochs"],
        devices="auto",  # Ray says how many workers there are
        accelerator="auto",
        strategy=RayDDPStrategy(),
        plugins=[RayLightningEnvironment()],
        callbacks=[BatchNormConversion(fbn.Freeze("none")), RayTrainReportCallback()],
        enable_checkpointing=False,  # Ray keeps what the last callback reports
        limit_val_batches=0,
    )
    prepare_trainer(trainer).fit(Classifier(data.num_classes, config["lr"]), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--images", type=int, default=600, help="training images")
    parser.add_argument("--storage", default=None, help="where results go: a folder that all nodes see")
    args = parser.parse_args()
    # The batch is that of each worker: for the step of one process of 32 images give each of 8 workers 4.
    ray_trainer = TorchTrainer(
        train,
        train_loop_config={"lr": 2e-4, "batch_size": max(1, 32 // args.workers), "images": args.images, "epochs": 2},
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=RunConfig(name="frozen", storage_path=args.storage),
    )
    print(ray_trainer.fit().metrics)


if __name__ == "__main__":
    main()
