from __future__ import annotations

import importlib.util
import logging
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("pytorch_metric_learning")

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_metric_learning import distances, losses, miners

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, FinetuneReport
from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency, UnsupportedLayer
from finetune_bn.layers.frozen import FrozenBatchNorm
from finetune_bn.metric_learning.losses import queues_of
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler
from finetune_bn.metric_learning.resumable_loader import ResumableDataLoader
from finetune_bn.metric_learning.retrieval import retrieval_report
from finetune_bn.tasks import MetricLearning

LABELS = 6  # to train on


class Things(pl.LightningDataModule):
    """Noise around a pattern for each label: 6 labels x 4 images to train on, others in two domains to evaluate."""

    def __init__(self, sizes: tuple[int, ...] = (7, 9), evaluated: int = 5, images_per_label: int | None = 2) -> None:
        super().__init__()
        self.domains = ["ink", "oil", "chalk"][: len(sizes)]
        self.num_train_classes = LABELS
        self.images_per_label = images_per_label
        generator = torch.Generator().manual_seed(0)
        patterns = torch.randn(LABELS + evaluated, 3, 8, 8, generator=generator)

        def draw(labels: Tensor) -> TensorDataset:
            images = F.interpolate(patterns[labels], scale_factor=4.0)
            return TensorDataset(images + 2 * torch.randn(images.shape, generator=generator), labels)

        self.train = draw(torch.arange(LABELS).repeat(4))
        self.sets = [draw(LABELS + torch.arange(n) % evaluated) for n in sizes]

    def train_dataloader(self) -> DataLoader[Any]:
        if self.images_per_label is None:
            return DataLoader(self.train, batch_size=4)
        sampler = PKBatchSampler(self.train.tensors[1], 4 // self.images_per_label, self.images_per_label)
        return ResumableDataLoader(self.train, batch_sampler=sampler)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(images, batch_size=2) for images in self.sets]

    test_dataloader = predict_dataloader = val_dataloader


class Fail(pl.Callback):
    """Raises in the middle of epoch 1."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1 and trainer.global_step == 9:
            raise RuntimeError("power cut")


class Gradients(pl.Callback):
    """Notes the gradients of the network at every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([p.grad.clone() for p in pl_module.net.parameters() if p.grad is not None])


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "level", logging.ERROR)


def make_task(loss: Any = None, **arguments: Any) -> MetricLearning:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"backbone": "test_efficientnet", "weights": None, "dimension": 8, "lr": 1e-2}
    return MetricLearning(loss, **defaults | {"backbone_args": {"drop_rate": 0.0}} | arguments)


def make_trainer(root: Path, *callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    shown = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": root}
    return pl.Trainer(**defaults | shown | {"callbacks": list(callbacks)} | arguments)


def proxies(**arguments: Any) -> losses.ProxyAnchorLoss:
    torch.manual_seed(1)
    return losses.ProxyAnchorLoss(**{"num_classes": LABELS, "embedding_size": 8} | arguments)


def memory(**arguments: Any) -> losses.CrossBatchMemory:
    return losses.CrossBatchMemory(losses.ContrastiveLoss(), **{"embedding_size": 8, "memory_size": 14} | arguments)


def said_once(caught: Any, words: str) -> None:
    assert sum(words in str(warning.message) for warning in caught) == 1, [str(w.message) for w in caught]


def alone(task: MetricLearning, images: Tensor) -> Tensor:
    """The embeddings of images, one by one."""
    task.eval()
    with torch.no_grad():
        return torch.cat([task(image[None]) for image in images])


def by_hand(task: MetricLearning, sets: list[TensorDataset], names: list[str]) -> dict[str, float]:
    rows = torch.cat([alone(task, images.tensors[0]) for images in sets])
    labels = torch.cat([images.tensors[1] for images in sets])
    domains = torch.cat([torch.full((len(images),), i) for i, images in enumerate(sets)])
    return retrieval_report(rows, labels, domains, names).named()


# --- the network ----------------------------------------------------------------------------------------------------


def test_the_network_is_timms_with_the_embedding_head_as_its_classifier() -> None:
    task = make_task(normalize=False).eval()
    plain = timm.create_model("test_efficientnet", num_classes=8).eval()
    plain.load_state_dict(task.net.state_dict(), strict=True)
    images = Things().train.tensors[0][:3]
    with torch.no_grad():
        assert torch.equal(task(images), plain(images))
        unit = make_task().eval()(images)
    torch.testing.assert_close(unit, F.normalize(plain(images), dim=1))
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(3))


def test_without_a_head_the_pooled_features_are_the_embeddings() -> None:
    task = make_task(dimension=None, normalize=False).eval()
    plain = timm.create_model("test_efficientnet", num_classes=0).eval()
    plain.load_state_dict(task.net.state_dict(), strict=True)
    images = Things().train.tensors[0][:3]
    with torch.no_grad():
        assert torch.equal(task(images), plain(images))


def test_a_network_that_returns_no_vectors_is_refused() -> None:
    task = make_task(dimension=None, backbone_args={"global_pool": ""})
    with pytest.raises(
        FinetuneBNError, match=r"backbone: got \[2, \d+, \d, \d\]; allowed: a network that returns one v"
    ):
        task(torch.zeros(2, 3, 32, 32))


def test_predictions_are_embeddings_for_pairs_and_for_images_alone(tmp_path: Path) -> None:
    task, data = make_task(), Things()
    of_pairs = make_trainer(tmp_path).predict(task, datamodule=data)
    images = [DataLoader(one.tensors[0], batch_size=2) for one in data.sets]  # type: ignore[arg-type]
    of_images = make_trainer(tmp_path).predict(task, dataloaders=images)
    for one, pairs, only in zip(data.sets, of_pairs or [], of_images or [], strict=True):
        torch.testing.assert_close(torch.cat(pairs), alone(task, one.tensors[0]), rtol=1e-4, atol=1e-5)
        assert torch.equal(torch.cat(pairs), torch.cat(only))


# --- retrieval ------------------------------------------------------------------------------------------------------


def test_a_report_leaves_a_file_that_answers_with_the_embeddings_of_the_task(tmp_path: Path) -> None:
    report, task = FinetuneReport(), make_task()
    trainer = make_trainer(tmp_path, BatchNormConversion(fbn.Freeze("original")), report)
    trainer.fit(task, datamodule=Things())
    trainer.test(task, datamodule=Things(), verbose=False)
    assert report.path is not None
    model, images = fbn.load(report.path.with_name("model.safetensors")), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images), task.eval()(images), rtol=0, atol=1e-5)
    assert isinstance(model.predict(torch.rand(3, 40, 40)), fbn.Embedding)
    assert "of the test images have one of their label as the nearest" in report.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", ["val", "test"])
def test_scores_are_those_of_all_images_and_of_each_pair_of_domains(tmp_path: Path, stage: str) -> None:
    task, data = make_task(), Things(sizes=(7, 12))
    trainer = make_trainer(tmp_path)
    (trainer.validate if stage == "val" else trainer.test)(task, datamodule=data, verbose=False)
    expected = {f"{stage}_{name}": value for name, value in by_hand(task, data.sets, data.domains).items()}
    found = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert found == pytest.approx(expected, rel=1e-6)
    assert {f"{stage}_recall_at_1", f"{stage}_map_at_r/ink_to_oil", f"{stage}_recall_at_5/across_domains"} < set(found)
    assert found[f"{stage}_recall_at_1/ink_to_oil"] != found[f"{stage}_recall_at_1/oil_to_ink"]
    report = task.val_retrieval if stage == "val" else task.test_retrieval
    assert report is not None
    assert report.overall.queries == 19


def test_a_single_loader_has_overall_scores_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.validate(make_task(), datamodule=Things(sizes=(10,)), verbose=False)
    assert set(trainer.logged_metrics) == {"val_recall_at_1", "val_recall_at_5", "val_recall_at_10", "val_map_at_r"}


def test_loaders_without_names_are_numbered(tmp_path: Path) -> None:
    trainer, data = make_trainer(tmp_path), Things()
    trainer.validate(make_task(), dataloaders=data.val_dataloader(), verbose=False)
    assert {"val_recall_at_1/0_to_1", "val_recall_at_1/1_to_0"} < set(trainer.logged_metrics)


def test_the_sanity_check_and_an_earlier_data_set_leave_nothing_behind(tmp_path: Path) -> None:
    task, data = make_task(), Things(sizes=(6, 5, 8))
    make_trainer(tmp_path).validate(task, datamodule=Things(sizes=(4,), evaluated=2), verbose=False)
    trainer = make_trainer(tmp_path, num_sanity_val_steps=1)
    trainer.fit(task, datamodule=data)
    expected = by_hand(task, data.sets, data.domains)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
    assert found == pytest.approx({f"val_{name}": value for name, value in expected.items()}, rel=1e-6)
    assert "train_loss" in trainer.callback_metrics


class Note(pl.Callback):
    """Notes the scores of every validation."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append(float(trainer.callback_metrics["val_recall_at_1"]))


def test_the_best_epoch_is_kept_and_a_run_without_progress_is_stopped(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_recall_at_1", mode="max")
    across = EarlyStopping("val_map_at_r/across_domains", mode="max", patience=2, min_delta=1.0)
    note = Note()
    trainer = make_trainer(tmp_path, note, checkpoint, across, max_epochs=5, enable_checkpointing=True)
    trainer.fit(make_task(lr=1e-3), datamodule=Things())
    assert len(note.seen) == 3
    assert len(set(note.seen)) > 1
    assert float(checkpoint.best_model_score) == pytest.approx(max(note.seen))
    assert f"epoch={note.seen.index(max(note.seen))}-" in checkpoint.best_model_path


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Things(sizes=(7,), evaluated=5), "3 of 7 val images have no other one of their label"),
        (Things(sizes=(4,), evaluated=5), "none of the 4 val images has another one of its label"),
    ],
    ids=["some", "all"],
)
def test_images_without_another_of_their_label_are_counted(tmp_path: Path, data: Things, words: str) -> None:
    trainer = make_trainer(tmp_path, max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(make_task(), datamodule=data)
    said_once(caught, words)
    assert math.isnan(trainer.callback_metrics["val_recall_at_1"]) == ("none" in words)


def test_pairs_without_a_match_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    data = Things(sizes=(5, 10))
    trainer = make_trainer(tmp_path)
    with caplog.at_level(logging.INFO):
        trainer.fit(make_task(), datamodule=data)
    assert "val_recall_at_1/ink_to_ink" not in trainer.callback_metrics
    assert "val_recall_at_1/oil_to_oil" in trainer.callback_metrics
    text = "without scores, since no val image has one of its label there: ink_to_ink."
    assert sum(text in record.message for record in caplog.records) == 1


def test_a_network_that_has_diverged_has_scores_that_say_so(tmp_path: Path) -> None:
    task = make_task()
    nn.init.constant_(task.net.conv_stem.weight, math.nan)
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="16 of 16 val embeddings hold NaN or infinite numbers"):
        trainer.validate(task, datamodule=Things(), verbose=False)
    assert {"val_recall_at_1", "val_map_at_r/across_domains"} < set(trainer.callback_metrics)
    assert all(math.isnan(value) for value in trainer.callback_metrics.values())
    assert task.val_retrieval is None


@pytest.mark.parametrize(
    ("loss", "distance", "measure"),
    [
        (losses.NTXentLoss(), None, "cosine"),
        (losses.TripletMarginLoss(distance=distances.LpDistance(normalize_embeddings=False)), None, "euclidean"),
        (losses.TripletMarginLoss(), distances.DotProductSimilarity(normalize_embeddings=False), "dot"),
        (losses.CrossBatchMemory(losses.ContrastiveLoss(distance=distances.LpDistance(p=1)), 8), None, None),
        (losses.VICRegLoss(), None, "cosine"),
    ],
)
def test_images_are_found_by_the_distance_of_the_loss_or_the_one_given(loss: Any, distance: Any, measure: Any) -> None:
    found = make_task(loss, distance=distance).measure
    assert found == measure if measure else callable(found)


# --- eval mode ------------------------------------------------------------------------------------------------------


class Wake(pl.Callback):
    """Puts the network into training mode in the midst of an evaluation, as a careless callback does."""

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.net.train()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_never_mixes_the_images_of_a_batch(tmp_path: Path, stage: str) -> None:
    task, data = make_task(), Things()
    expected = by_hand(task, data.sets, data.domains)
    before = {name: value.clone() for name, value in task.net.state_dict().items()}
    trainer = make_trainer(tmp_path, Wake())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(trainer, stage)(task, datamodule=data, verbose=False)
    said_once(caught, "layers were in training mode during evaluation")
    prefix = {"validate": "val", "test": "test"}[stage]
    found = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert found == pytest.approx({f"{prefix}_{name}": value for name, value in expected.items()}, rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in task.net.state_dict().items())


def test_predicted_embeddings_do_not_depend_on_who_else_is_in_the_batch(tmp_path: Path) -> None:
    task, data = make_task(), Things()
    with pytest.warns(UserWarning, match="training mode"):
        parts = make_trainer(tmp_path, Wake()).predict(task, datamodule=data)
    for one, found in zip(data.sets, parts or [], strict=True):
        torch.testing.assert_close(torch.cat(found), alone(task, one.tensors[0]), rtol=1e-4, atol=1e-5)
    task.net.train()
    together = task(data.sets[0].tensors[0])
    assert not torch.allclose(together, torch.cat((parts or [[]])[0]), atol=1e-2), "training mode must differ"


def test_training_goes_on_in_training_mode_after_an_evaluation(tmp_path: Path) -> None:
    modes = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
            modes.append(pl_module.net.bn1.training)

    make_trainer(tmp_path, Look(), Wake(), max_epochs=2).fit(make_task(), datamodule=Things())
    assert len(modes) == 12
    assert all(modes)


def test_layers_without_running_statistics_are_refused_for_evaluation(tmp_path: Path) -> None:
    task = make_task()
    task.net.bn1.running_mean = task.net.bn1.running_var = None
    with pytest.raises(
        UnsupportedLayer, match=r"net: got '1 without \(bn1, ...\)'; allowed: BatchNorm layers with run"
    ):
        make_trainer(tmp_path).validate(task, datamodule=Things(), verbose=False)


# --- losses, miners, optimizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        losses.NTXentLoss(temperature=0.1),
        losses.MultiSimilarityLoss(),
        losses.TripletMarginLoss(),
        losses.ArcFaceLoss(num_classes=LABELS, embedding_size=8),
        losses.SoftTripleLoss(num_classes=LABELS, embedding_size=8, centers_per_class=2),
        losses.MarginLoss(learn_beta=True, num_classes=LABELS),
        losses.MultipleLosses([losses.NTXentLoss(), losses.TripletMarginLoss()]),
        proxies(),
        memory(),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_any_loss_trains_the_network_and_itself(tmp_path: Path, loss: Any) -> None:
    task = make_task(loss)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    trainer.fit(task, datamodule=Things())
    assert math.isfinite(trainer.callback_metrics["train_loss"])
    still = [name for name, p in task.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_the_default_loss_is_nt_xent() -> None:
    assert type(make_task().loss) is losses.NTXentLoss


def test_what_the_miner_finds_is_what_the_loss_looks_at(tmp_path: Path) -> None:
    seen = []

    class Loss(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor, found: Any) -> Tensor:
            again = miners.MultiSimilarityMiner(epsilon=0.3)(embeddings, labels)
            seen.append(all(torch.equal(a, b) for a, b in zip(found, again, strict=True)))
            return embeddings[found[0]].sum() + embeddings.sum()

    task = make_task(Loss(), miner=miners.MultiSimilarityMiner(epsilon=0.3))
    make_trainer(tmp_path, limit_val_batches=0).fit(task, datamodule=Things())
    assert seen == [True] * 6


def test_what_a_loss_learns_has_a_rate_of_its_own_and_no_decay(tmp_path: Path) -> None:
    task = make_task(proxies(), loss_lr_factor=50, head_lr_factor=5)
    task.trainer = make_trainer(tmp_path)
    groups = {group["name"]: group for group in task.parameter_groups()}
    assert [p is task.loss.proxies for p in groups["loss/no_decay"]["params"]] == [True]
    assert groups["loss/no_decay"]["lr"] == 50 * 1e-2
    assert groups["loss/no_decay"]["weight_decay"] == 0
    assert groups["head/decay"]["lr"] == 5 * 1e-2
    found = Counter(id(p) for group in groups.values() for p in group["params"])
    assert found == {id(p): 1 for p in task.parameters() if p.requires_grad}


def test_the_rate_of_the_loss_follows_the_schedule(tmp_path: Path) -> None:
    ratios = set()

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            ratios.add(round(rates["loss/no_decay"] / rates["backbone/decay"], 6))

    trainer = make_trainer(tmp_path, Look(), max_epochs=2, limit_val_batches=0)
    trainer.fit(make_task(proxies(), warmup=0.3), datamodule=Things())
    assert ratios == {100.0}


def test_a_loss_that_learns_nothing_has_no_group() -> None:
    assert not [group for group in make_task().parameter_groups() if group["name"].startswith("loss")]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_the_loss_is_computed_in_float32_or_higher(tmp_path: Path, precision: Any) -> None:
    dtypes = set()

    class Loss(nn.Module):
        def forward(self, embeddings: Tensor, labels: Tensor, found: Any) -> Tensor:
            products = embeddings @ embeddings.T
            dtypes.update({embeddings.dtype, products.dtype})
            return products.square().mean()

    conversion = BatchNormConversion(fbn.Freeze("merged"))
    trainer = make_trainer(tmp_path, conversion, precision=precision)
    trainer.fit(make_task(Loss()), datamodule=Things())
    assert dtypes == {torch.float64 if precision == "64-true" else torch.float32}
    assert 0 <= trainer.callback_metrics["val_recall_at_1"] <= 1


@pytest.mark.parametrize("policy", [fbn.Keep(), fbn.Freeze("none"), fbn.Freeze("merged")], ids=lambda p: p.describe())
def test_accumulated_gradients_are_the_mean_over_the_batches(tmp_path: Path, policy: fbn.Policy) -> None:
    """With a rate of 0, so that all gradients are taken at one point."""

    def gradients(accumulate: int) -> list[list[Tensor]]:
        seen = Gradients()
        trainer = make_trainer(
            tmp_path,
            BatchNormConversion(policy),
            seen,
            accumulate_grad_batches=accumulate,
            limit_val_batches=0,
        )
        trainer.fit(make_task(head_lr_factor=0, affine_lr_factor=0, lr=1e-30), datamodule=Things())
        return seen.seen

    single, double = gradients(1), gradients(2)
    assert (len(single), len(double)) == (6, 3)
    for i, accumulated in enumerate(double):
        for a, b, both in zip(single[2 * i], single[2 * i + 1], accumulated, strict=True):
            torch.testing.assert_close(both, (a + b) / 2, rtol=1e-4, atol=1e-6)


# --- cross-batch memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_memory_holds_the_embeddings_of_the_last_batches(tmp_path: Path, accumulate: int) -> None:
    produced: list[Tensor] = []
    task = make_task(memory(memory_size=10))
    task.net.register_forward_hook(lambda module, args, out: produced.append(F.normalize(out.detach(), dim=1)))
    trainer = make_trainer(tmp_path, accumulate_grad_batches=accumulate, limit_val_batches=0)
    trainer.fit(task, datamodule=Things())
    assert trainer.global_step == 6 // accumulate
    rows = torch.cat(produced)
    assert len(rows) == 24
    place = [i % 10 for i in range(24)]
    for row, where in list(zip(rows, place, strict=True))[-10:]:
        assert torch.equal(task.loss.embedding_memory[where], row)
    assert task.loss.has_been_filled


def test_remembered_images_change_the_gradient(tmp_path: Path) -> None:
    def gradients(loss: Any) -> list[list[Tensor]]:
        seen = Gradients()
        trainer = make_trainer(tmp_path, seen, limit_val_batches=0)
        trainer.fit(make_task(loss, lr=1e-30), datamodule=Things())
        return seen.seen

    with_memory, without = gradients(memory()), gradients(losses.ContrastiveLoss())
    same = [
        all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(with_memory, without, strict=True)
    ]
    assert not any(same[1:])


@pytest.mark.parametrize(
    ("policy", "make_loss"),
    [(fbn.Keep(), losses.NTXentLoss), (fbn.Freeze("merged"), proxies), (fbn.Freeze("none"), memory)],
    ids=["live, a plain loss", "merged, proxies", "none, a memory"],
)
def test_crash_and_resume_equal_an_uninterrupted_run_bit_for_bit(
    tmp_path: Path, policy: fbn.Policy, make_loss: Any
) -> None:
    def final(name: str, ckpt: Path | None = None, *more: pl.Callback) -> dict[str, Any]:
        root = tmp_path / name
        checkpoint = ModelCheckpoint(dirpath=root, save_last=True)
        trainer = make_trainer(
            root, BatchNormConversion(policy), *more, checkpoint, max_epochs=3, enable_checkpointing=True
        )
        trainer.fit(make_task(make_loss(), warmup=0.2), datamodule=Things(), ckpt_path=ckpt)
        return torch.load(root / "last.ckpt", weights_only=True)

    whole = final("whole")
    with pytest.raises(RuntimeError, match="power cut"):
        final("cut", None, Fail())
    before = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert before["global_step"] == 6
    resumed = final("resumed", tmp_path / "cut" / "last.ckpt")
    assert resumed["state_dict"].keys() == whole["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name
    assert resumed.get("finetune_bn_queues") == whole.get("finetune_bn_queues")
    assert ("finetune_bn_queues" in whole) == (make_loss is memory)
    assert not torch.equal(before["state_dict"]["net.conv_stem.weight"], whole["state_dict"]["net.conv_stem.weight"])


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, MetricLearning]:
    task = make_task(proxies())
    trainer = make_trainer(tmp_path, BatchNormConversion(fbn.Freeze("merged")))
    trainer.fit(task, datamodule=Things())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt", task


def test_a_checkpoint_loads_with_its_loss_or_without(trained: tuple[Path, MetricLearning]) -> None:
    path, task = trained
    images = Things().sets[0].tensors[0]
    with pytest.warns(
        UserWarning, match=r"1 tensors of the loss .* left out \(loss.proxies, ...\), because no loss was"
    ):
        embedder = MetricLearning.load_from_checkpoint(path, map_location="cpu")
    whole = MetricLearning.load_from_checkpoint(path, map_location="cpu", loss=proxies())
    assert torch.equal(whole.loss.proxies, task.loss.proxies)
    for loaded in (embedder, whole):
        assert {m.affine_kind for m in loaded.modules() if isinstance(m, FrozenBatchNorm)} == {"merged"}
        assert torch.equal(alone(loaded, images), alone(task, images))


def test_another_loss_than_that_of_the_checkpoint_is_not_loaded_in_silence(
    trained: tuple[Path, MetricLearning],
) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*loss.W.*Unexpected key.*loss.proxies"):
        MetricLearning.load_from_checkpoint(trained[0], loss=losses.ArcFaceLoss(num_classes=LABELS, embedding_size=8))


def test_a_checkpoint_loads_into_plain_timm_with_the_same_embeddings(trained: tuple[Path, MetricLearning]) -> None:
    path, task = trained
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["weights"] is None
    assert checkpoint["hyper_parameters"]["dimension"] == 8
    assert not {"loss", "miner", "distance"} & checkpoint["hyper_parameters"].keys()
    state = {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("net.")}
    plain = timm.create_model("test_efficientnet", num_classes=8).eval()
    plain.load_state_dict({name.removeprefix("net."): value for name, value in state.items()}, strict=True)
    images = Things().sets[0].tensors[0]
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(plain(images), dim=1), alone(task, images), rtol=1e-4, atol=1e-5)


def test_no_module_is_kept_among_the_hyperparameters() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task = make_task(proxies(), miner=miners.MultiSimilarityMiner(), distance=distances.CosineSimilarity())
    assert not {"loss", "miner", "distance"} & task.hparams.keys()
    assert task.hparams["backbone"] == "test_efficientnet"
    assert task.hparams["weight_decay"] == 0.05
    assert task.hparams["dimension"] == 8


# --- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "NTXentLoss"}, "loss: got 'str'; allowed: a loss of pytorch-metric-learning, or another module"),
        ({"miner": 3}, "miner: got 'int'; allowed: a miner of pytorch-metric-learning"),
        ({"distance": nn.Identity()}, "distance: got 'Identity'; allowed: a distance of pytorch-metric-learning"),
        ({"dimension": 0}, "dimension: got 0; allowed: a whole number from 1 up"),
        ({"dimension": 8.0}, "dimension: got 8.0"),
        ({"loss_lr_factor": -1}, "loss_lr_factor: got -1; allowed: a number from 0 up"),
        ({"lr": 0}, "lr: got 0; allowed: a number above 0"),
        ({"optimizer": "adamv"}, "optimizer: got 'adamv'.*Closest: adam"),
        ({"backbone": "resnet5"}, "resnet5.*Closest: resnet50"),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        make_task(**arguments)


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pytorch_metric_learning" else find(name, *a)
    )
    with pytest.raises(MissingDependency, match="Run: pip install pytorch-metric-learning"):
        make_task()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (proxies(embedding_size=5), "RuntimeError: "),
        (memory(memory_size=3), "AssertionError"),
        (nn.CrossEntropyLoss(), "TypeError"),
    ],
    ids=["embedding_size", "memory_size", "another kind"],
)
def test_a_loss_that_does_not_fit_is_one_clear_error(tmp_path: Path, loss: Any, said: str) -> None:
    with pytest.raises(
        FinetuneBNError, match=r"loss: got '.*'; allowed: a loss.* of embeddings \[4, 8\] and labels"
    ) as e:
        make_trainer(tmp_path).fit(make_task(loss), datamodule=Things())
    assert e.match(said)


def test_a_loss_of_too_few_classes_is_refused_before_training(tmp_path: Path) -> None:
    loss = losses.MultipleLosses([losses.NTXentLoss(), proxies(num_classes=4)])
    with pytest.raises(FinetuneBNError, match=r"loss\.\S*num_classes: got 4; allowed: 6, the number of labels"):
        make_trainer(tmp_path).fit(make_task(loss), datamodule=Things())


def test_a_loss_of_too_many_classes_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"loss.num_classes is 9, but training images have 6 labels"):
        make_trainer(tmp_path).fit(make_task(proxies(num_classes=9)), datamodule=Things())


def test_batches_without_two_images_of_a_label_are_said_where_the_loss_needs_them(tmp_path: Path) -> None:
    def texts(loss: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make_trainer(tmp_path, max_epochs=2).fit(make_task(loss), datamodule=Things(images_per_label=None))
        return [str(w.message) for w in caught if "no two of one label" in str(w.message)]

    assert len(texts(losses.TripletMarginLoss())) == 1
    assert not texts(proxies())
    assert not texts(memory())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([torch.zeros(4, 3, 32, 32), torch.tensor([0, 1, -2, 0])], "labels: got -2; allowed: 0 and above"),
        ([torch.zeros(4, 3, 32, 32)], r"batch: got .*allowed: \(images, labels\)"),
        ([torch.zeros(4, 3, 32, 32), torch.zeros(4)], r"batch: got .*allowed: \(images, labels\)"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_batch_of_another_form_is_one_clear_error(tmp_path: Path, stage: str, batch: Any, message: str) -> None:
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(BadData, match=message):
        getattr(make_trainer(tmp_path), stage)(make_task(), loader)


# --- processes ------------------------------------------------------------------------------------------------------


class Odd(Things):
    """Of sizes that two processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__(sizes=(7, 9))

    def val_dataloader(self) -> list[DataLoader[Any]]:
        # In this order a repeated image is the only match of some other, so that a double would be seen.
        return [DataLoader(images, batch_size=3) for images in self.sets]


class Apart(pl.Callback):
    """Raises where the processes remember the same images."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for _, queue in queues_of(pl_module.loss):
            one, other = pl_module.all_gather(queue.embedding_memory[: queue.queue_idx])
            assert queue.queue_idx == 12
            assert (one != other).any(dim=1).all()


@pytest.mark.slow
@pytest.mark.parametrize("make_loss", [proxies, memory])
def test_two_processes_learn_together_and_give_the_scores_of_one(tmp_path: Path, make_loss: Any) -> None:
    def trainer(**arguments: Any) -> pl.Trainer:
        conversion = BatchNormConversion(fbn.Freeze("shift"))
        return make_trainer(tmp_path, conversion, Apart(), strategy="ddp_fork", devices=2, **arguments)

    task, data = make_task(make_loss()), Odd()
    before = task.net.conv_stem.weight.detach().clone()
    trainer().fit(task, datamodule=data)  # a parameter without a gradient would end it in the second step
    assert not torch.equal(task.net.conv_stem.weight, before)
    second = trainer()
    second.validate(task, datamodule=data, verbose=False)
    expected = {f"val_{name}": value for name, value in by_hand(task, data.sets, data.domains).items()}
    found = {name: float(value) for name, value in second.callback_metrics.items()}
    assert found == pytest.approx(expected, rel=1e-6)


class Cut(Things):
    """Three training batches of 4 labels x 2 images, of which each process takes its part."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        whole = torch.arange(LABELS * 4).reshape(4, LABELS).T.reshape(-1, 8)[:3]
        part = 8 // self.trainer.world_size
        rank = self.trainer.global_rank
        return DataLoader(self.train, batch_sampler=whole[:, rank * part : (rank + 1) * part].tolist())


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_that_gather_negatives_learn_what_one_process_with_the_whole_batch_learns(
    tmp_path: Path, world_size: int
) -> None:
    def weights(world: int, gathers: bool) -> tuple[float, Tensor]:
        task = make_task(losses.NTXentLoss(0.1), gather_negatives=gathers, optimizer="sgd", lr=1e-2, weight_decay=0.0)
        trainer = make_trainer(
            tmp_path, BatchNormConversion(fbn.Freeze("none")), limit_val_batches=0, num_sanity_val_steps=0,
            devices=world, strategy="ddp_fork" if world > 1 else "auto", use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(task, datamodule=Cut())
        return float(trainer.callback_metrics["train_loss_epoch"]), task.net.conv_stem.weight.detach()

    (loss, expected), before = weights(1, True), make_task().net.conv_stem.weight.detach()
    found = weights(world_size, True)
    assert found[0] == pytest.approx(loss, rel=1e-6)
    moved = float((expected - before).abs().max())
    assert float((found[1] - expected).abs().max()) < 1e-5 * moved  # float32
    alone = weights(world_size, False)
    assert alone[0] < loss - 0.1
    assert float((alone[1] - expected).abs().max()) > 0.1 * moved


@pytest.mark.filterwarnings("error:.*live BatchNorm layers")
def test_few_images_of_each_process_under_live_batch_norm_are_warned_of(tmp_path: Path) -> None:
    task = make_task(losses.NTXentLoss())
    trainer = make_trainer(
        tmp_path, BatchNormConversion(fbn.Keep()), limit_val_batches=0, devices=2, strategy="ddp_fork", fast_dev_run=1
    )
    warned = r"normalize by the 4 images of their own process, not by the 8 of all 2"
    with pytest.raises(Exception, match=warned):  # the processes hand on errors, not warnings
        trainer.fit(task, datamodule=Things())


def test_buffers_of_a_memory_are_left_to_each_process() -> None:
    assert make_task(memory())._ddp_params_and_buffers_to_ignore == ["loss.embedding_memory", "loss.label_memory"]
    wrapped = losses.MultipleLosses([memory(), losses.NTXentLoss()])
    task = make_task(wrapped)
    names = {name for name, _ in task.named_buffers()}
    assert set(task._ddp_params_and_buffers_to_ignore) <= names
    assert len(task._ddp_params_and_buffers_to_ignore) == 2
