"""The command: the plan it prints, one readable line for each mistake, and modules that were not written for it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from finetune_bn.cli import FinetuneBNCLI, main, readable
from finetune_bn.conversion.plan import Plan
from finetune_bn.errors import FinetuneBNError
from finetune_bn.layers.frozen import FrozenBatchNorm
from tests.models import settle

MODEL = ("--model", "ImageClassification", "--model.weights", "none", "--model.backbone", "test_efficientnet")
DATA = ("--data", "EmojiData", "--data.image_size", "32")
PLAN = ("plan", *MODEL, *DATA)

CONFIG = """
batch_norm:
  policy:
    class_path: Freeze
    init_args:
      affine: none
model:
  class_path: ImageClassification
  init_args:
    backbone: test_efficientnet
    weights: none
data:
  class_path: EmojiData
  init_args:
    image_size: 32
trainer:
  max_epochs: 1
  callbacks:
  - class_path: FinetuneReport
    init_args:
      check_reload: false
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty folder, and keep the seed that the command leaves in the environment out of other tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune-bn"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def error_of(*args: str) -> str:
    """Return the one line in which the command ends."""
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    text = caught.value.code
    assert isinstance(text, str)
    assert text.startswith("finetune-bn: error: ")
    assert "\n" not in text
    return text


def error_in(config: str) -> str:
    Path("config.yaml").write_text(config, encoding="utf-8")
    return error_of("plan", "--config", "config.yaml")


# --- plan -----------------------------------------------------------------------------------------------------------


def test_plan_prints_a_table_and_trains_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main([*PLAN, "--batch_norm.policy", "Freeze", "--batch_norm.policy.affine", "shift"])
    first, header, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "ImageClassification: 13 x freeze, affine=shift"
    assert header.split()[:2] == ["layer", "type"]
    assert len(rows) == 13
    assert rows[0].split()[:2] == ["net.bn1", "BatchNormAct2d"]
    assert list(tmp_path.iterdir()) == []


def test_plan_as_json_is_the_whole_plan_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    main([*PLAN, "--format", "json", "--batch_norm.module", "net"])
    the_plan = Plan.from_dict(json.loads(capsys.readouterr().out))
    assert the_plan.model == "EfficientNet"
    assert [row.names[0] for row in the_plan.rows][:2] == ["bn1", "blocks.0.0.bn1"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_plan_goes_to_a_file_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path, form: str) -> None:
    (tmp_path / "plan").write_text("an older one", encoding="utf-8")
    main([*PLAN, "--format", form])
    printed = capsys.readouterr().out
    main([*PLAN, "--format", form, "--output", "plan"])
    assert capsys.readouterr().out == "Plan of 13 layers: plan\n"
    assert (tmp_path / "plan").read_text(encoding="utf-8") == printed
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


def test_plan_refuses_a_folder_that_is_not_there_and_a_folder_as_its_file(tmp_path: Path) -> None:
    assert "output: got 'nowhere/plan.json'; allowed: a file that can be written. " in error_of(
        *PLAN, "--output", "nowhere/plan.json"
    )
    (tmp_path / "folder").mkdir()
    assert "output: got 'folder'" in error_of(*PLAN, "--output", "folder")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder"]


def test_plan_with_memory_adds_what_a_batch_of_the_data_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    args = (*PLAN, "--data.batch_size", "3", "--batch_norm.module", "net", "--memory", "true")
    main([*args, "--trainer.precision", "bf16-mixed"])
    the_plan, memory = capsys.readouterr().out.split("\n\n")
    assert len(the_plan.splitlines()) == 3 + 13
    assert re.match(r"EfficientNet on 3x3x32x32, autocast bfloat16: \S+ MiB kept for backward, \S+ MiB \(0\.", memory)
    main([*args, "--format", "json"])
    data = json.loads(capsys.readouterr().out)
    assert len(Plan.from_dict(data).rows) == 13
    assert data["memory"]["inputs"] == [[3, 3, 32, 32]]
    assert 0 < data["memory"]["after"] < data["memory"]["before"]


def test_plan_says_the_largest_batch_that_fits_and_which_one_it_chose(capsys: pytest.CaptureFixture[str]) -> None:
    args = (*PLAN, "--batch_norm.module", "net", "--memory", "true", "--batch_size", "auto", "--memory_gib", "2,1")
    main([*args])
    fits = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert fits[0] == (
        "Largest batch, computed and not measured: 10% of the memory left free, the optimizer keeps 2 numbers for each "
        "weight."
    )
    rows = [[int(cell.replace(",", "")) for cell in line.split()] for line in fits[3:5]]
    assert [row[0] for row in rows] == [1, 2]
    assert all(0 < before < after for _, before, after in rows)
    assert fits[5] == f"Chosen: {rows[0][2]}, which fits in 1 GiB: --data.batch_size {rows[0][2]}"
    main([*args, "--format", "json", "--model.optimizer", "lion"])
    data = json.loads(capsys.readouterr().out)["fits"]
    assert data["optimizer_state"] == 1
    assert data["batch_size"] >= rows[0][2]
    assert [row["gib"] for row in data["largest_batch"]] == [1, 2]


def test_plan_refuses_what_is_no_memory_and_a_batch_size_without_memory() -> None:
    args = (*PLAN, "--batch_size", "auto")
    assert "batch_size: got 'auto'; allowed: auto together with --memory true" in error_of(*args)
    for given in ("8,zero", "0", "[]"):
        assert "memory_gib: got" in error_of(*args, "--memory", "true", "--memory_gib", given)


def test_plan_with_memory_wants_to_know_the_size_of_a_batch() -> None:
    args = ("plan", "--model", "tests.foreign.Net", "--data", "tests.foreign.Data", "--memory", "true")
    assert "data: got 'Data'; allowed: data with an image_size, or a model with an example_input_array" in error_of(
        *args
    )


def test_plan_knows_a_network_that_is_built_in_configure_model(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--model", "tests.foreign.Late", *DATA])
    assert capsys.readouterr().out.startswith("Late: 1 x freeze, affine=none\n")


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_writes_the_network_of_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    cli = FinetuneBNCLI([*PLAN, "--batch_norm.policy", "Freeze", "--batch_norm.policy.affine", "original"])
    settle(cli.model)
    torch.save({"state_dict": cli.model.state_dict()}, "trained.ckpt")
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = cli.model.eval()(x)
    capsys.readouterr()
    args = ("export", *MODEL, *DATA, "--ckpt_path", "trained.ckpt", "--output")
    for output, options in (("merged.pt2", ()), ("plain.pt2", ("--merge", "false"))):
        main([*args, output, *options])
        assert capsys.readouterr().out.endswith(f"Exported: {output}\n")
        program = torch.export.load(output)
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
        assert any("batch_norm" in str(node.target) for node in program.graph.nodes) == (output == "plain.pt2")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "ckpt_path: got None; allowed: a file."),
        (("--ckpt_path", "no.ckpt"), "output: got None; allowed: a file."),
        (("--ckpt_path", "no.ckpt", "--output", "net.pt2"), "ckpt_path: got 'no.ckpt'; allowed: a checkpoint"),
    ],
)
def test_export_says_in_one_line_what_is_wrong(args: tuple[str, ...], words: str, tmp_path: Path) -> None:
    assert words in error_of("export", *MODEL, *DATA, *args)
    assert list(tmp_path.iterdir()) == []


# --- recalibrate ----------------------------------------------------------------------------------------------------

RECALIBRATE = ("recalibrate", *MODEL, *DATA)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "ckpt_path: got None; allowed: the checkpoint to recalibrate."),
        (("--ckpt_path", "no.ckpt"), "ckpt_path: got 'no.ckpt'; allowed: a checkpoint that Lightning saved."),
        (("--ckpt_path", "no.ckpt", "--output", "no/x.ckpt"), "output: got 'no/x.ckpt'; allowed: a file in a folder"),
        (("--ckpt_path", "no.ckpt", "--report", "no/x.json"), "report: got 'no/x.json'; allowed: a file in a folder"),
        (("--ckpt_path", "no.ckpt", "--mode", "fast"), "mode: got 'fast'; allowed: 'auto', 'exact', 'one_pass'."),
        (("--ckpt_path", "no.ckpt", "--prior", "-1"), "prior: got -1"),
        (("--ckpt_path", "no.ckpt", "--split", "dev"), "split: got 'dev'; allowed: 'train', 'val', 'test'."),
    ],
)
def test_recalibrate_says_in_one_line_what_is_wrong_and_writes_nothing(
    args: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    assert message in error_of(*RECALIBRATE, *args)
    assert list(tmp_path.iterdir()) == []


# --- one readable line for each mistake -----------------------------------------------------------------------------

RULES = '{"class_path": "Rules", "init_args": {"rules": [%s]}}'


@pytest.mark.parametrize(
    ("args", "message"),
    [
        # keys
        (("--model.lrr", "1"), "model: ImageClassification has no 'lrr'. Did you mean lr?"),
        (("--data.targt", "category"), "data: EmojiData has no 'targt'. Did you mean target?"),
        (("--data.batchsize", "4"), "data: EmojiData has no 'batchsize'. Did you mean batch_size"),  # of its parent
        (("--batchnorm.policy", "Keep"), "There is no 'batchnorm.policy'. Did you mean batch_norm.policy"),
        (("--checkpoint_path", "x"), "There is no 'checkpoint_path'. Did you mean ckpt_path?"),
        # values
        (("--data.batch_size", "four"), "data.batch_size: got 'four'; allowed: int."),
        (("--data.batch_size", "0"), "batch_size: got 0; allowed: a whole number from 1 up."),
        (("--data.vendors", "noto"), "data.vendors: got 'noto'; allowed: list."),
        (("--model.schedule", "cos"), "model.schedule: got 'cos'; allowed: 'cosine', 'constant'."),
        (("--model.lr", "-1"), "lr: got -1.0; allowed: a number above 0."),
        (("--trainer.max_epochs", "ten"), "trainer.max_epochs: got 'ten'; allowed: int."),
        (("--trainer.accelerator", "gpuu"), "trainer: You selected an invalid accelerator name"),
        (("--seed_everything", "x"), "seed_everything: got 'x'; allowed: bool, int."),
        (("--format", "xml"), "format: got 'xml'; allowed: 'text', 'json'."),
        # classes
        (("--batch_norm.policy", "Freez"), "batch_norm.policy: got 'Freez'; allowed: the name of a Policy or the "),
        (("--batch_norm.policy", "Freez"), "Did you mean Freeze?"),
        (("--batch_norm.policy", "Melt"), "There are: EvalNorm, Freeze, FreezeAffine, Ghost, Keep, "),
        (("--batch_norm.policy", "finetune_bn.data.EmojiData"), "got 'finetune_bn.data.EmojiData'; allowed: the name "),
        (("--model", "ImageClasification"), "Did you mean ImageClassification?"),
        (("--data", "EmojDat"), "Did you mean EmojiData"),
        (("--trainer.callbacks", "FinetuneRport"), "trainer.callbacks: got 'FinetuneRport'; allowed: the name of a C"),
        # what does not fit the model
        (("--model.backbone", "test_convnext"), "allowed: a model with BatchNorm layers. Norm layers in it: {'LayerN"),
        (("--model.backbone", "test_efficientne"), "Closest: test_efficientnet, "),
        (("--model.weights", "nowhere.pth"), "weights: got 'nowhere.pth'; allowed: "),
        (("--batch_norm.module", "nett"), "module: got 'nett'; allowed: a submodule of ImageClassification: ['net', "),
        (
            ("--batch_norm.policy", RULES % '["net.blokcs.*", {"class_path": "Keep"}]'),
            "rule: got \"name='net.blokcs.*'\"; allowed: conditions that match a layer. Close names: ['net.blocks.",
        ),
        (
            ("--batch_norm.policy", RULES % '{"name": "*", "policy": "Freez"}'),
            "batch_norm.policy.rules.policy: got 'Freez'; allowed: the name of a Policy",
        ),
        (
            ("--batch_norm.policy", RULES % '{"nme": "*", "policy": "Freeze"}'),
            "batch_norm.policy.rules: Rule has no 'nme'. Did you mean name?",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_names_it(args: tuple[str, ...], message: str) -> None:
    assert message in error_of(*PLAN, *args)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("max_epochs", "max_epoch", "There is no 'trainer.max_epoch'. Did you mean trainer.max_epochs"),
        ("batch_norm:", "batchnorm:", "Did you mean batch_norm.policy"),
        ("policy:", "polcy:", "Did you mean batch_norm.policy"),
        (
            "init_args:\n      affine",
            "init_arg:\n      affine",
            "Policy has no 'init_arg.affine'. Did you mean init_args?",
        ),
        ("affine: none", "afine: none", "batch_norm.policy: Freeze has no 'afine'. Did you mean affine?"),
        ("affine: none", "affine: nil", "affine: got 'nil'; allowed: 'none', 'shift', 'merged', 'original'."),
        ("class_path: Freeze", "class_path: Freez", "batch_norm.policy: got 'Freez'; allowed: the name of a Policy"),
        ("class_path: Freeze", "class_path: finetune_bn.Freez", "got 'Freez'; allowed: the name of a Policy"),
        ("class_path: Freeze", "class_path: finetune_bm.Freeze", "batch_norm.policy: No module named 'finetune_bm'."),
        ("weights:", "weight:", "model: ImageClassification has no 'weight'. Did you mean weights"),
        ("image_size: 32", "image_size: big", "data.image_size: got 'big'; allowed: int."),
        ("FinetuneReport", "FinetuneRport", "Did you mean FinetuneReport?"),
        ("check_reload", "chek_reload", "trainer.callbacks: FinetuneReport has no 'chek_reload'. Did you mean check_"),
        ("check_reload: false", "check_reload: x", "trainer.callbacks.check_reload: got 'x'; allowed: bool."),
        ("max_epochs: 1", "max_epochs: [1", "Problems parsing config"),
        (CONFIG, "just words", "Unexpected config: just words"),
        (CONFIG, "trainer:\n  max_epochs: 1", "the following arguments are required: plan.data, plan.model"),
    ],
)
def test_a_mistake_in_a_config_is_one_line_that_names_it(right: str, wrong: str, message: str) -> None:
    assert right in CONFIG
    assert message in error_in(CONFIG.replace(right, wrong))


def test_the_config_of_these_mistakes_is_right_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(CONFIG, encoding="utf-8")
    main(["plan", "--config", "config.yaml"])
    assert capsys.readouterr().out.startswith("ImageClassification: 13 x freeze, affine=none\n")


def test_a_missing_folder_of_images_and_a_damaged_checkpoint_are_named(tmp_path: Path) -> None:
    message = error_of("plan", *MODEL, "--data", "ImageFolderData", "--data.root", "no/images")
    assert "root: got 'no/images'; allowed: an existing folder" in message
    (tmp_path / "net.ckpt").write_bytes(b"no checkpoint")
    assert "net.ckpt" in error_of(*PLAN, "--model.weights", "net.ckpt")


def test_what_lightning_finds_wrong_with_a_run_is_one_line() -> None:
    args = ("validate", "--model", "tests.foreign.Net", "--data", "tests.foreign.Data", "--trainer.logger", "false")
    assert "No `validation_step()` method defined to run `Trainer.validate`" in error_of(*args)


def test_a_message_that_is_not_known_stays_readable() -> None:
    message = 'Parser key "data.x":\n  something\n  - new'
    assert readable(message) == "data.x: something - new"


def test_a_mistake_ends_the_process_with_status_1_and_one_line() -> None:
    command = [
        sys.executable,
        "-c",
        "from finetune_bn.cli import main; main()",
        "plan",
        "--config",
        "nowhere.yaml",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"finetune-bn: error: config: got 'nowhere.yaml'; allowed: .*\n", done.stderr)


def test_a_fault_that_is_not_the_users_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="a fault in the module") as caught:
        main(["plan", "--model", "tests.foreign.Broken", *DATA])
    shown = "".join(traceback.format_exception(caught.value))
    assert "ZeroDivisionError: a fault in the module" in shown
    assert 'raise ZeroDivisionError("a fault in the module")' in shown


def test_a_fault_while_an_error_of_ours_is_handled_is_not_hidden_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        try:
            raise FinetuneBNError("ours")
        except FinetuneBNError:
            raise ZeroDivisionError from None

    monkeypatch.setattr("finetune_bn.cli.trainer.plan", fail)
    with pytest.raises(ZeroDivisionError):
        main([*PLAN])


# --- help -----------------------------------------------------------------------------------------------------------


def help_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "--help")
    assert "Fine-tune backbones with their BatchNorm layers in hand." in text
    for verb in ("fit", "validate", "test", "predict", "plan", "recalibrate", "export"):
        assert re.search(rf"\b{verb} [A-Z]", text), verb


def test_the_help_of_recalibrate_explains_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "recalibrate", "--help")
    assert "Give a checkpoint the BatchNorm statistics of the data, and write it to a new file." in text
    assert "--ckpt_path CKPT_PATH The checkpoint. It is read only." in text
    assert "--domain DOMAIN Only the images of this domain." in text


def test_the_help_of_fit_explains_the_policy(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "fit", "--help")
    assert "--batch_norm.policy POLICY What happens to the BatchNorm layers: Freeze (the default), Keep, " in text
    assert "finetune_bn.Freeze" in text
    assert "--test_after_fit" in text


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--batch_norm.policy.help", "Freeze", "what is trained: `none` (gamma', beta' constant)"),
        ("--model.help", "ImageClassification", "Frozen BatchNorm layers want a smaller one"),
        ("--data.help", "ImageFolderData", "subfolder: there is a folder per domain above the classes"),
        ("--trainer.callbacks.help", "BatchNormRecalibration", "in training, every so many steps. fit_start: once,"),
        ("--trainer.callbacks.help", "BatchNormSchedule", "Share of the training, at its end, with frozen layers."),
    ],
)
def test_every_class_has_a_help_of_its_own(
    capsys: pytest.CaptureFixture[str], option: str, name: str, words: str
) -> None:
    assert words in help_of(capsys, "fit", option, name)


# --- what the data tell the model -----------------------------------------------------------------------------------


def test_the_number_and_names_of_the_classes_come_from_the_data() -> None:
    cli = FinetuneBNCLI([*PLAN, "--data.target", "vendor"])
    assert cli.model.num_classes == 3
    assert cli.model.class_names == cli.datamodule.class_names == ["noto", "twemoji", "fluent"]
    assert cli.model.net.num_classes == 3


@pytest.mark.parametrize("model", ["tests.foreign.Net", "tests.foreign.Counted"])
def test_a_foreign_module_gets_of_it_what_it_takes(capsys: pytest.CaptureFixture[str], model: str) -> None:
    cli = FinetuneBNCLI(["plan", "--model", model, *DATA])
    assert getattr(cli.model, "num_classes", 9) == 9
    assert capsys.readouterr().out.startswith(f"{model.rpartition('.')[2]}: 1 x freeze")


def test_a_foreign_datamodule_without_classes_wants_them_in_the_config() -> None:
    args = ("plan", *MODEL, "--data", "tests.foreign.Data")
    assert "num_classes: got None; allowed: a whole number from 2 up." in error_of(*args)
    assert FinetuneBNCLI([*args, "--model.num_classes", "8"]).model.num_classes == 8


def test_a_foreign_module_is_trained_on_foreign_data_with_its_layers_frozen() -> None:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options = [part for name in quiet for part in (f"--trainer.{name}", "false")]
    names = ("--model", "tests.foreign.Net", "--data", "tests.foreign.Data", "--trainer.accelerator", "cpu")
    cli = FinetuneBNCLI(["fit", *names, "--trainer.max_steps", "2", *options])
    assert cli.trainer.global_step == 2
    assert isinstance(cli.model.features[1], FrozenBatchNorm)
