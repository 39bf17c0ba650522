"""The checkpoint behind --ckpt_path: what was typed counts, nothing foreign runs, a broken file is named."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")

from finetune_bn.cli import FinetuneBNCLI, main
from finetune_bn.cli.checkpoints import read_checkpoint
from finetune_bn.errors import FinetuneBNError

VERBS = ("fit", "validate", "test", "predict", "export", "recalibrate")
SMALL = (
    *("--config", "quickstart", "--model.weights", "none", "--model.backbone", "test_efficientnet"),
    *("--data.image_size", "32", "--data.train_size", "16", "--test_after_fit", "false"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.num_sanity_val_steps", "0", "--trainer.max_epochs", "1"),
    *("--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"),
    *("--trainer.limit_test_batches", "1", "--trainer.limit_predict_batches", "1"),
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune-bn"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The checkpoint of one step with lr 0.5 and a label smoothing of 0.1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune-bn"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        folder = tmp_path_factory.mktemp("trained")
        typed = ("--model.lr", "0.5", "--model.label_smoothing", "0.1", "--trainer.default_root_dir", str(folder))
        FinetuneBNCLI(["fit", *SMALL, *typed])
        (path,) = folder.rglob("*.ckpt")
        yield str(path)


def changed(trained: str, **hyper_parameters: Any) -> str:
    """Write the checkpoint with other hyperparameters."""
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["hyper_parameters"] |= hyper_parameters
    torch.save(checkpoint, "changed.ckpt")
    return "changed.ckpt"


def options(verb: str, path: str, *more: str) -> list[str]:
    output = {"export": "net.pt2", "recalibrate": "new.ckpt"}.get(verb)
    return [verb, *SMALL, "--ckpt_path", path, *(("--output", output) if output else ()), *more]


def error_of(*args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    text = caught.value.code
    assert isinstance(text, str), text
    assert text.startswith("finetune-bn: error: ")
    assert "\n" not in text
    return text


# --- what was typed counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["fit", "test", "recalibrate"])
def test_the_network_that_was_typed_is_not_replaced_by_that_of_the_checkpoint(verb: str, trained: str) -> None:
    message = error_of(*options(verb, trained, "--model.backbone", "test_resnet"))
    assert "model.backbone: got 'test_resnet'; allowed: 'test_efficientnet', as in " in message
    assert "run_config.yaml" in message


def test_what_differs_and_fits_is_told_and_the_typed_value_counts(trained: str) -> None:
    with pytest.warns(
        UserWarning, match=r"and count: label_smoothing=0.0 \(checkpoint: 0.1\), lr=0.25 \(checkpoint: 0.5"
    ):
        cli = FinetuneBNCLI(options("validate", trained, "--model.lr", "0.25"))
    assert (cli.model.lr, cli.model.label_smoothing) == (0.25, 0.0)


def test_a_resumed_training_refuses_another_setting_of_its_optimizer_and_takes_others(trained: str) -> None:
    assert "model.lr: got 0.25; allowed: 0.5, as in " in error_of(*options("fit", trained, "--model.lr", "0.25"))
    args = options("fit", trained, "--model.lr", "0.5", "--model.schedule", "constant", "--trainer.max_epochs", "2")
    with pytest.warns(UserWarning, match=r"schedule='constant' \(checkpoint: 'cosine'\)"):
        cli = FinetuneBNCLI(args)
    assert (cli.trainer.global_step, cli.model.schedule) == (2, "constant")


def test_the_same_config_as_in_training_says_nothing(trained: str, recwarn: pytest.WarningsRecorder) -> None:
    FinetuneBNCLI(options("validate", trained, "--model.lr", "0.5", "--model.label_smoothing", "0.1"))
    assert [str(w.message) for w in recwarn if "ckpt_path" in str(w.message)] == []


def test_an_evaluation_needs_no_weights_but_those_of_the_checkpoint(trained: str) -> None:
    cli = FinetuneBNCLI(options("validate", trained, "--model.weights", "nowhere.pth"))
    assert "val_accuracy" in cli.trainer.callback_metrics


def test_a_checkpoint_of_another_task_is_refused(trained: str) -> None:
    path = changed(trained, _class_path="finetune_bn.tasks.MetricLearning")
    assert "allowed: a checkpoint of ImageClassification, as it is configured." in error_of(*options("test", path))


# --- the classes ----------------------------------------------------------------------------------------------------


def test_classes_of_other_names_or_in_another_order_are_refused_by_name(trained: str) -> None:
    names = torch.load(trained, weights_only=True)["hyper_parameters"]["class_names"]
    path = changed(trained, class_names=[*names[:-1], "cats"])
    message = error_of(*options("test", path))
    assert f"Missing in the data: cats. Not in the checkpoint: {names[-1]}." in message
    path = changed(trained, class_names=[names[1], names[0], *names[2:]])
    words = f"They are the same in another order: 0 is {names[1]!r} there and {names[0]!r} in the data."
    assert words in error_of(*options("fit", path, "--model.lr", "0.5"))


def test_a_number_of_classes_is_honoured_or_refused() -> None:
    wrong = ("plan", *SMALL, "--model.num_classes", "7")
    assert "model.num_classes: got 7; allowed: 9, the number of classes of the data" in error_of(*wrong)
    assert FinetuneBNCLI(["plan", *SMALL, "--model.num_classes", "9"]).model.num_classes == 9


# --- nothing foreign ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["fit", "test", "export"])
def test_class_path_and_instantiator_of_a_checkpoint_import_and_run_nothing(
    verb: str, trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text("open('ran', 'w')\ndef run(*a): open('ran', 'w')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    more = ("--model.lr", "0.5") if verb == "fit" else ()
    path = changed(trained, _class_path="planted.ImageClassification", _instantiator="planted.run")
    main(options(verb, path, *more))
    path = changed(trained, _class_path="planted.Net", _instantiator="planted.run")
    assert "It is one of planted.Net." in error_of(*options(verb, path))
    assert "planted" not in sys.modules
    assert not (tmp_path / "ran").exists()


class Planted:
    def __reduce__(self) -> Any:
        return open, ("ran", "w")


@pytest.mark.parametrize("verb", ["fit", "predict", "export"])
def test_a_pickled_object_is_not_unpickled(verb: str, trained: str, tmp_path: Path) -> None:
    path = changed(trained, planted=Planted())
    assert "ckpt_path: got 'changed.ckpt'; allowed: a checkpoint that" in error_of(*options(verb, path))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_from_an_address_is_read_without_unpickling(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(url: str, **kwargs: Any) -> Any:
        asked.append((url, kwargs["weights_only"]))
        raise FinetuneBNError("asked")

    class Web:
        def exists(self, path: str) -> bool:
            return True

    address = "https://host.example/x.ckpt"
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.get_filesystem", lambda path: Web())
    for verb in ("fit", "test", "export"):
        assert "asked" in error_of(*options(verb, address))
    assert asked == [(address, True)] * 3
    monkeypatch.setattr(Web, "exists", lambda self, path: False)
    assert f"ckpt_path: got '{address}'; allowed: a checkpoint that Lightning saved." in error_of(
        *options("test", address)
    )


# --- broken files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_missing_broken_or_foreign_checkpoint_is_one_line(verb: str, trained: str, tmp_path: Path) -> None:
    Path("empty.ckpt").write_bytes(b"")
    Path("text.ckpt").write_text("no checkpoint", encoding="utf-8")
    Path("cut.ckpt").write_bytes(Path(trained).read_bytes()[:20000])
    torch.save({"conv1.weight": torch.zeros(1)}, "state.pth")
    torch.save([1, 2], "list.ckpt")
    Path("folder.ckpt").mkdir()
    before = sorted(tmp_path.iterdir())
    names = ("no.ckpt", "empty.ckpt", "text.ckpt", "cut.ckpt", "state.pth", "list.ckpt", "folder.ckpt")
    for name in names if verb in ("test", "export") else ("cut.ckpt",):
        assert f"ckpt_path: got '{name}'; allowed: a checkpoint that Lightning saved." in error_of(*options(verb, name))
    assert sorted(tmp_path.iterdir()) == before, "nothing was written"


def test_weights_of_another_network_are_one_line(trained: str) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    del checkpoint["state_dict"]["net.conv_stem.weight"], checkpoint["hyper_parameters"]
    torch.save(checkpoint, "other.ckpt")
    message = error_of(*options("test", "other.ckpt"))
    assert "ckpt_path: got 'weights of another network'" in message
    assert "net.conv_stem.weight" in message


def test_weights_alone_are_tested_and_not_gone_on_from(trained: str) -> None:
    checkpoint = torch.load(trained, weights_only=True)
    for key in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):
        checkpoint.pop(key)
    torch.save(checkpoint, "weights.ckpt")
    assert "test_accuracy" in FinetuneBNCLI(options("test", "weights.ckpt")).trainer.callback_metrics
    message = error_of(*options("fit", "weights.ckpt"))
    assert "with the state of the optimizer, to go on from. Begin anew: --model.weights weights.ckpt" in message


def test_a_checkpoint_is_read_whole() -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, buffer)
    Path("x.ckpt").write_bytes(buffer.getvalue())
    assert read_checkpoint("x.ckpt", weights_only=True)["epoch"] == 3
