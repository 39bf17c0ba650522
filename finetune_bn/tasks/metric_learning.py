"""Learn embeddings in which images of one label lie together, and measure how well they find each other."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from finetune_bn.callbacks.module import loader_names
from finetune_bn.errors import FinetuneBNError, UnsupportedLayer, complaint
from finetune_bn.functional.frozen import at_least_float32
from finetune_bn.metric_learning import losses
from finetune_bn.metric_learning.embeddings import Collected
from finetune_bn.metric_learning.gather import gather_batch
from finetune_bn.metric_learning.retrieval import (
    SCORES,
    RetrievalReport,
    measure_of,
    need_pytorch_metric_learning,
    retrieval_report,
)
from finetune_bn.tasks.base import TimmTask
from finetune_bn.tasks.checks import images_and_labels, images_of
from finetune_bn.utilities.checks import number

QUEUES_KEY = "finetune_bn_queues"


class MetricLearning(TimmTask):
    """Fine-tunes a timm network so that images of one label get embeddings that lie close to each other.

    Batches are pairs (images, labels): float images [N, 3, H, W], normalized as the weights want them (see
    `data_config`), and whole numbers [N] from 0 up. Most losses need several images of a label in a training batch:
    see `images_per_label` of the data modules. Labels of validation and test images may be others than those that are
    trained on.

    It logs train_loss, and of validation and test images how well they find each other: val_recall_at_1, 5 and 10
    (the share of images that have one of their label among the nearest), and val_map_at_r (mean average precision at R,
    R being the number of images of that label); test_recall_at_1 and so on. Each image is looked up among all others,
    by embeddings computed in eval mode. Where there are several validation or test loaders, one for each domain, there
    is more: images of one domain looked up in another, as val_recall_at_1/noto_to_fluent and val_map_at_r/...,
    with the names from the data module's `domains`, else the loaders' numbers; and the mean over pairs of different
    domains, as val_recall_at_1/across_domains. Images that have no other of their label in the gallery do not count;
    pairs of domains in which there is none that counts are left out, and named. `val_retrieval` and `test_retrieval`
    are the whole reports. `predict` returns the embeddings, float [N, D].

    The network is `net`, an ordinary timm model whose classifier is the embedding head: in a checkpoint its weights
    have timm's names behind `net.`. What the loss has learned is behind `loss.`.

    Args:
        loss: A loss of pytorch-metric-learning by its class path, as pytorch_metric_learning.losses.NTXentLoss, or any
            module that takes embeddings, labels and what the miner found. CrossBatchMemory is one, around another.
            Default: NTXentLoss as it comes.
        miner: A miner of pytorch-metric-learning, as pytorch_metric_learning.miners.MultiSimilarityMiner, which picks
            the pairs or triplets of a batch that the loss looks at. Default: the loss looks at all.
        distance: By which distance of pytorch-metric-learning the nearest images are found in evaluation. Default:
            that of the loss, else the cosine.
        dimension: Length of the embeddings, the output of a linear layer that starts from random numbers. null: no such
            layer, the pooled features are the embeddings. Take another number than the weights have classes (1000 for
            ImageNet), or their classifier stays.
        normalize: Whether embeddings are scaled to length 1.
        loss_lr_factor: What a loss has to learn itself, such as the proxies of ProxyAnchorLoss, learns at lr times this
            factor, without weight decay.
        gather_negatives: With several processes, let the loss see the embeddings of all of them, as if one process had
            the whole batch: 8 processes of 16 labels x 2 images have 254 negatives for an image in place of 30.
    """

    _collected: Collected

    task_kind: ClassVar[str] = "embedding"  # of a model file
    _modules_given: ClassVar[tuple[str, ...]] = ("loss", "miner", "distance")
    _no_arguments: ClassVar[tuple[str, ...]] = ("num_classes", "class_names")

    def __init__(
        self,
        loss: nn.Module | None = None,
        miner: nn.Module | None = None,
        distance: nn.Module | None = None,
        *,
        dimension: int | None = 128,
        normalize: bool = True,
        loss_lr_factor: float = 100.0,
        gather_negatives: bool = False,
        **kwargs: Any,
    ) -> None:
        if dimension is not None:
            number("dimension", dimension, least=1, whole=True)
        number("loss_lr_factor", loss_lr_factor, least=0)
        need_pytorch_metric_learning()
        super().__init__(**kwargs)
        self._loss_is_default = loss is None
        self.loss = losses.default_loss() if loss is None else losses.check_module("loss", loss)
        self.miner = None if miner is None else losses.check_module("miner", miner)
        self.measure = measure_of(losses.distance_of(self.loss) if distance is None else distance)
        self.normalize, self.loss_lr_factor = normalize, loss_lr_factor
        self.gather_negatives = gather_negatives
        self._build(dimension or 0)
        # Each process remembers its own images: broadcast as other buffers are, rank 0's would replace the others'.
        self._ddp_params_and_buffers_to_ignore = [
            ".".join(part for part in ("loss", name, buffer) if part)
            for name, _ in losses.queues_of(self.loss)
            for buffer in ("embedding_memory", "label_memory")
        ]
        self.val_retrieval: RetrievalReport | None = None
        self.test_retrieval: RetrievalReport | None = None
        self._told: set[str] = set()

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the embeddings [N, D] of images [N, 3, H, W], in float32 or higher."""
        embeddings = super().forward(images)
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 2:
            given = list(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise FinetuneBNError(complaint("backbone", given, "a network that returns one vector an image, [N, D]"))
        embeddings = at_least_float32(embeddings)
        return F.normalize(embeddings, dim=1) if self.normalize else embeddings

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = images_and_labels(batch, batch_idx)
        embeddings, size = self(images), len(labels)
        if self.gather_negatives:
            embeddings, labels = gather_batch(embeddings, labels)
        if batch_idx == 0:
            self._look_for_pairs(labels)
        # Differences of similarities are what is learned: half precision would round them away.
        with torch.autocast(embeddings.device.type, enabled=False):
            loss = losses.compute(self.loss, self.miner, embeddings, labels)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx)

    @override
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, batch_idx, dataloader_idx)

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self._embed(images_of(batch))

    @override
    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._check_classes()

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._begin(self.trainer.val_dataloaders)

    @override
    def on_test_start(self) -> None:
        super().on_test_start()
        self._begin(self.trainer.test_dataloaders)

    @override
    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._begin(())

    @override
    def on_validation_epoch_end(self) -> None:
        self.val_retrieval = self._report("val")

    @override
    def on_test_epoch_end(self) -> None:
        self.test_retrieval = self._report("test")

    @override
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return what is trained as groups for the optimizer: those of the network, and `loss` where it learns."""
        groups = super().parameter_groups()
        modules = [module for module in (self.loss, self.miner) if module is not None]
        learned = [p for p in nn.ModuleList(modules).parameters() if p.requires_grad]
        if learned:
            group = {"params": learned, "lr": self.lr * self.loss_lr_factor, "weight_decay": 0.0}
            groups.append({**group, "name": "loss/no_decay"})
        return groups

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # The images that are remembered are buffers, how many they are is not.
        queues = {
            name: [int(queue.queue_idx), bool(queue.has_been_filled)] for name, queue in losses.queues_of(self.loss)
        }
        if queues:
            checkpoint[QUEUES_KEY] = queues

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(QUEUES_KEY, {})
        for name, queue in losses.queues_of(self.loss):
            if name in saved:
                queue.queue_idx, queue.has_been_filled = saved[name]
        foreign = [key for key in checkpoint["state_dict"] if key.startswith("loss.")]
        if self._loss_is_default and foreign:
            # Made from objects, not class paths, a loss is not in the checkpoint; embeddings do not need it.
            rank_zero_warn(
                f"MetricLearning: {len(foreign)} tensors of the loss in the checkpoint are left out ({foreign[0]}, "
                "...), because no loss was given. To go on training, pass loss= as it was."
            )
            for key in foreign:
                del checkpoint["state_dict"][key]

    def _embed(self, images: Tensor) -> Tensor:
        """Return embeddings computed in eval mode, whatever was done to the modes since the evaluation began."""
        live = [name for name, module in self.net.named_modules() if module.training]
        if live:
            self.net.eval()
            self._warn_once(
                f"MetricLearning: {len(live)} layers were in training mode during evaluation, where BatchNorm mixes "
                "each image with the others of its batch; they are put into eval mode."
            )
        embeddings: Tensor = self(images)
        return embeddings

    def _evaluate(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        images, labels = images_and_labels(batch, batch_idx)
        self._collected.add(self._embed(images), labels, dataloader_idx)

    def _begin(self, loaders: Any) -> None:
        """Get ready for an evaluation by these loaders."""
        by_batch = [
            name
            for name, module in self.net.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is None
        ]
        if by_batch:
            allowed = "BatchNorm layers with running statistics"
            remedy = "Without them the embedding of an image depends on the others of its batch, in eval mode too."
            given = f"{len(by_batch)} without ({by_batch[0]}, ...)"
            raise UnsupportedLayer(complaint("net", given, allowed, remedy))
        width = int(self.net.num_classes or self.net.head_hidden_size)
        self._collected = Collected(tree_leaves(loaders), width, self.device, self.trainer.world_size)

    def _report(self, stage: str) -> RetrievalReport | None:
        embeddings, labels, loaders = self._collected.rows()
        names = loader_names(self.trainer, len(self._collected))
        wrong = int((~torch.isfinite(embeddings)).any(dim=1).sum())
        report = None
        if wrong:
            rank_zero_warn(f"MetricLearning: {wrong} of {len(labels)} {stage} embeddings hold NaN or infinite numbers.")
            kinds = ("", "/across_domains") if len(names) > 1 else ("",)
            scores = {f"{name}{kind}": math.nan for kind in kinds for name in SCORES}
        else:
            spread = self.trainer.world_size > 1
            report = retrieval_report(embeddings, labels, loaders, names, measure=self.measure, over_processes=spread)
            scores = report.named()
            self._tell_what_is_missing(stage, report)
        for name, value in scores.items():
            self.log(f"{stage}_{name}", value, prog_bar=name == SCORES[0], sync_dist=True)
        return report

    def _tell_what_is_missing(self, stage: str, report: RetrievalReport) -> None:
        if self.trainer.sanity_checking:
            return
        overall = report.overall
        if not overall.queries:
            self._warn_once(
                f"MetricLearning: none of the {overall.lone} {stage} images has another one of its label, so nothing "
                "can be retrieved, and the scores are NaN."
            )
        elif overall.lone:
            self._warn_once(
                f"MetricLearning: {overall.lone} of {overall.lone + overall.queries} {stage} images have no other one "
                "of their label; they are left in the gallery and do not count as queries."
            )
        if report.unmatched and overall.queries:
            key = f"{stage}: {report.unmatched}"
            if key not in self._told:
                self._told.add(key)
                rank_zero_info(
                    f"MetricLearning: without scores, since no {stage} image has one of its label there: "
                    f"{', '.join(report.unmatched)}."
                )

    def _look_for_pairs(self, labels: Tensor) -> None:
        """Warn of batches in which each label comes once: a loss on pairs is then 0 or constant."""
        alone = losses.has_parameters(self.loss) or losses.queues_of(self.loss)
        if not alone and len(torch.unique(labels)) == len(labels):
            self._warn_once(
                f"MetricLearning: a training batch of {len(labels)} images has no two of one label, so a loss on pairs "
                "has nothing to bring together. Set images_per_label of the data module to 2 or more."
            )

    def _check_classes(self) -> None:
        """Raise where the loss has fewer classes than the training images; warn where it has more."""
        wanted = getattr(getattr(self.trainer, "datamodule", None), "num_train_classes", None)
        if wanted is None:
            return
        for argument, given in losses.class_counts(self.loss):
            if given < wanted:
                allowed = f"{wanted}, the number of labels of the training images"
                raise FinetuneBNError(complaint(argument, given, allowed))
            if given > wanted:
                self._warn_once(
                    f"MetricLearning: {argument} is {given}, but training images have {wanted} labels: the others are "
                    "learned as labels that no image has."
                )

    def _warn_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            rank_zero_warn(text)
