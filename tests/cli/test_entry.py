"""What the command says before it has a parser, and how it ends where the machine or the user stops it."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")

import finetune_bn
from finetune_bn.cli import FinetuneBNCLI, main
from finetune_bn.cli.entry import names_a_model_file
from finetune_bn.cli.help import VERBS
from finetune_bn.cli.messages import for_the_user

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("--config", "quickstart", "--model.weights", "none", "--model.backbone", "test_efficientnet"),
    *("--data.image_size", "32", "--data.train_size", "16", "--test_after_fit", "false"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0", "--trainer.max_epochs", "1"),
    *("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune-bn"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def error_of(*args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    text = caught.value.code
    assert isinstance(text, str), text
    assert "\n" not in text
    return text


# --- at once --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["configs"], ["--version"]])
def test_what_needs_no_torch_does_not_wait_for_it(args: list[str]) -> None:
    code = "import sys; from finetune_bn.cli import main\ntry: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    command = [sys.executable, "-c", code, *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded & {"torch", "lightning", "jsonargparse", "numpy", "PIL"} == set()
    assert len(done.stdout.splitlines()) >= 2


@pytest.mark.parametrize("module", ["finetune_bn", "finetune_bn.cli"])
def test_the_command_is_a_module_too(module: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == finetune_bn.__version__


def test_the_help_has_every_command_and_nothing_typed_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert {*FinetuneBNCLI.subcommands(), "configs", "init"} == VERBS.keys()
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    text = capsys.readouterr().out
    assert [verb for verb in VERBS if not re.search(rf"^  {verb} +[A-Z]", text, re.MULTILINE)] == []


def test_the_help_of_a_command_begins_with_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recalibrate", "--help"])
    text = capsys.readouterr().out
    places = [text.index(word) for word in ("--ckpt_path", "--domain", "--model ", "--data ", "--batch_norm.policy")]
    assert places == sorted(places)
    assert "--trainer.max_epochs EPOCHS" not in text
    assert "--trainer.accelerator ACCELERATOR" not in text
    with pytest.raises(SystemExit):
        main(["recalibrate", "--help.all"])
    text = capsys.readouterr().out
    assert "--trainer.accelerator ACCELERATOR" in text
    assert "--domain DOMAIN" in text


def test_without_the_extras_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("finetune_bn.cli.")]:
        if name not in ("finetune_bn.cli.entry", "finetune_bn.cli.help", "finetune_bn.cli.configs"):
            monkeypatch.delitem(sys.modules, name)
            monkeypatch.delattr(finetune_bn.cli, name.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    message = error_of("fit", "--config", "quickstart")
    assert (
        message
        == 'finetune-bn: error: the command needs the package jsonargparse. Run: pip install "finetune-bn[demo]"'
    )


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["predict", "--model", "x/model.safetensors", "a.png"], True),
        (["predict", "a.png", "--model=x/model.safetensors"], True),
        (["predict", "--model", "here"], True),
        (["predict", "--model", "ImageClassification", "--data", "EmojiData"], False),
        (["predict", "--config", "quickstart"], False),
        (["test", "--model", "x/model.safetensors"], False),
    ],
)
def test_a_model_file_and_a_class_are_told_apart(args: list[str], found: bool) -> None:
    Path("here").mkdir()
    assert names_a_model_file(args) == found


def test_predict_with_a_model_file_is_the_command_without_lightning() -> None:
    assert "model.safetensors" in error_of("predict", "--model", "nowhere/model.safetensors", "a.png")
    assert error_of("predict", "--model", "nowhere/model.safetensors").startswith("finetune-bn: error: predict: the ")


# --- stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["plan", "recalibrate"])
def test_ctrl_c_ends_in_one_line_and_status_130(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"finetune_bn.cli.trainer.Trainer.{verb}", stop)
    monkeypatch.setattr(FinetuneBNCLI, "_prepare_subcommand_kwargs", lambda self, subcommand: {})
    with pytest.raises(SystemExit) as caught:
        main([verb, *SMALL])
    assert caught.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "finetune-bn: interrupted."


def test_ctrl_c_in_a_training_says_with_what_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune_bn.tasks import ImageClassification

    def stop(self: Any) -> None:
        if self.trainer.current_epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(ImageClassification, "on_train_epoch_start", stop)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as caught:
            main(["fit", *SMALL, "--trainer.max_epochs", "3"])
    finally:
        signal.signal(signal.SIGINT, handler)
    assert caught.value.code == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"finetune-bn: interrupted. Go on with --ckpt_path \S+epoch=0-step=1.ckpt", last)
    assert Path(last.split()[-1]).is_file()


def test_a_disk_that_is_full_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("finetune_bn.callbacks.checkpoint_io.write_atomically", full)
    message = error_of("fit", *SMALL)
    assert message.startswith("finetune-bn: error: No space left on device. Free some space, or write elsewhere (train")


def test_a_folder_that_cannot_be_written_is_one_line() -> None:
    Path("file").write_text("", encoding="utf-8")
    message = error_of("fit", *SMALL, "--trainer.default_root_dir", "file")
    assert re.match(r"finetune-bn: error: (Not a directory|File exists): .*file.*\. Write elsewhere", message)


def test_what_torch_says_of_a_full_disk_is_understood_and_a_fault_is_none() -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0")
    assert "is the disk full?" in str(for_the_user(error))
    assert for_the_user(RuntimeError("shapes do not match")) is None
    assert for_the_user(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


# --- before and after the work --------------------------------------------------------------------------------------


def test_a_config_that_is_not_utf8_is_named_with_its_line() -> None:
    Path("latin.yaml").write_bytes("# a\ntrainer:\n  default_root_dir: Läufe\n".encode("latin-1"))
    message = error_of("plan", "--config", "latin.yaml")
    assert "config: got 'latin.yaml'; allowed: a file in UTF-8. Line 3 is not" in message


@pytest.mark.parametrize(("section", "value"), [("batch_norm", None), ("trainer", None), ("trainer", 7)])
def test_a_section_without_settings_is_named(section: str, value: int | None) -> None:
    # Found by `make fuzz`: all lines of a section commented out ended in a traceback of jsonargparse.
    Path("empty.yaml").write_text(f"seed_everything: 0\n{section}: {value or ''}\n", encoding="utf-8")
    error = error_of("plan", "--config", "quickstart", "--config", "empty.yaml")
    assert error.startswith(f"finetune-bn: error: {section}: got {value}; allowed: its settings. Take the line out")


@pytest.mark.parametrize("verb", ["validate", "predict"])
def test_without_a_checkpoint_the_untrained_head_is_told(verb: str) -> None:
    limit = ("--trainer.limit_test_batches", "1", "--trainer.limit_predict_batches", "1")
    with pytest.warns(
        UserWarning, match=f"{verb}: there is no --ckpt_path, so the model is taken as the config builds"
    ):
        main([verb, *SMALL, *limit])


def test_one_image_a_batch_with_live_layers_is_one_line() -> None:
    live = ("--batch_norm.policy", "Keep", "--data", "EmojiData", "--data.image_size", "32", "--data.batch_size", "1")
    message = error_of("fit", "--model", "tests.foreign.Pooled", *live, *SMALL[12:])
    assert "data.batch_size: got 'an input of size ([1, 4, 1, 1])'; allowed: more than one value for each ch" in message
    assert "--batch_norm.policy Freeze" in message


@pytest.mark.parametrize("name", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_weight_averaging_is_used_from_the_command(name: str) -> None:
    averaging = ("--trainer.callbacks+", name)
    more = ("--trainer.callbacks.swa_lrs", "0.01") if name.startswith("Stoch") else ()
    args = ["fit", *SMALL, *averaging, *more, "--trainer.limit_train_batches", "2", "--trainer.max_epochs", "2"]
    cli = FinetuneBNCLI(args)
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert kinds.index("BatchNormConversion") < kinds.index(name)
    assert cli.trainer.global_step == 4


def test_the_averaged_weights_of_the_checkpoint_are_tested_after_the_training_as_they_are_later() -> None:
    steps = ("--trainer.limit_train_batches", "4", "--trainer.limit_test_batches", "1", "--model.lr", "1e-2")
    args = ["--config", "quickstart", "--config", "with/ema", *SMALL[2:], *steps]
    after = FinetuneBNCLI(["fit", *args, "--test_after_fit", "true"]).trainer.callback_metrics
    (checkpoint,) = Path().rglob("*.ckpt")
    later = FinetuneBNCLI(["test", *args, "--ckpt_path", str(checkpoint)]).trainer.callback_metrics
    assert float(after["test_loss"]) == pytest.approx(float(later["test_loss"]), rel=1e-5)
    state = torch.load(checkpoint, weights_only=True)
    last, averaged = state["current_model_state"], state["state_dict"]
    assert not torch.equal(last["net.conv_stem.weight"], averaged["net.conv_stem.weight"])


# --- splits that are not there --------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 40, 40, 3), dtype=np.uint8)
    for name, members in zip(("cat", "dog"), pixels, strict=True):
        for i, image in enumerate(members):
            path = tmp_path / "images" / "train" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return tmp_path / "images"


def test_missing_test_and_validation_images_are_told_before_the_training_and_the_last_checkpoint_is_kept(
    images: Path, recwarn: pytest.WarningsRecorder
) -> None:
    args = ("--config", "image_folder", *SMALL[2:6], "--data.image_size", "32", *SMALL[12:])
    data = ("--data.root", str(images), "--data.val_fraction", "0", "--data.num_workers", "0")
    cli = FinetuneBNCLI(["fit", *args, *data, "--data.batch_size", "4", "--test_after_fit", "true"])
    words = [str(warning.message) for warning in recwarn]
    assert any("test_after_fit: there are no test images" in text for text in words)
    assert any("there are no validation images, so val_accuracy is never measured" in text for text in words)
    (checkpoint,) = Path("runs/image_folder").rglob("*.ckpt")
    assert checkpoint.name == "epoch=0-step=1.ckpt"
    assert cli.trainer.checkpoint_callback.best_model_path == str(checkpoint)  # type: ignore[union-attr]
