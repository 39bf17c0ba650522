"""policy auto on the command line: what it decides is in the config of the run, and `compare` writes it too."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

pytest.importorskip("lightning")
pytest.importorskip("jsonargparse")

from finetune_bn.callbacks import conversion as conversion_module
from finetune_bn.callbacks.auto import Chosen
from finetune_bn.callbacks.decision import Decision
from finetune_bn.cli import main
from finetune_bn.cli.run_config import with_decision
from finetune_bn.comparison import running
from finetune_bn.comparison.arms import ARMS
from finetune_bn.comparison.budget import BUDGETS, Speed

RUN = (
    "--config", "quickstart", "--model.backbone", "test_efficientnet", "--model.weights", "null",
    "--data.image_size", "32", "--data.train_size", "16", "--data.batch_size", "8", "--trainer.max_epochs", "1",
    "--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", "runs",
    "--trainer.enable_progress_bar", "false", "--test_after_fit", "false", "--trainer.logger", "false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune-bn"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def no_report() -> tuple[str, ...]:
    """Return an overlay without the report, which takes longer than the rest."""
    callbacks = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "val_accuracy", "mode": "max"},
        }
    ]
    Path("plain.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return "--config", "plain.yaml"


def test_the_config_of_the_run_has_the_decision_and_resuming_or_testing_asks_no_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decision = Decision.of(ARMS["limited"], 0.003, "fast", "limited was best")
    monkeypatch.setattr(conversion_module, "decide", lambda *_: Chosen(decision, None, None))  # type: ignore[arg-type]
    overlay = no_report()
    main(["fit", *RUN, *overlay, "--batch_norm.policy", "auto"])
    text = next(Path("runs").rglob("run_config.yaml")).read_text()
    config = yaml.safe_load(text)
    assert "# batch_norm.policy was auto (budget fast): limited was best" in text
    assert config["batch_norm"]["policy"]["class_path"] == "finetune_bn.Freeze"
    assert config["model"]["init_args"]["lr"] == 0.003
    assert [c["class_path"].rpartition(".")[2] for c in config["trainer"]["callbacks"]] == [
        "ModelCheckpoint",
        "StepLimit",
    ]
    monkeypatch.setattr(conversion_module, "decide", lambda *_: pytest.fail("it was decided"))
    path = str(next(Path("runs").rglob("*.ckpt")))
    again = ("--trainer.max_epochs", "2", "--ckpt_path", path)
    main(["fit", *RUN, *overlay, "--batch_norm.policy", "auto", *again])
    main(
        [
            "test",
            *RUN[:-4],
            *overlay,
            "--batch_norm.policy",
            "auto",
            "--trainer.limit_test_batches",
            "1",
            "--ckpt_path",
            path,
        ]
    )


def test_compare_writes_the_best_as_a_config_that_fit_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "measure_speed", lambda *_: Speed(1.0, 0.0))
    monkeypatch.setitem(BUDGETS, "fast", dataclasses.replace(BUDGETS["fast"], minutes=0.1, most=2, factors=(1.0,)))
    given = [*RUN[:-4], *no_report(), "--folder", "found"]
    main(["compare", *given, "--format", "json"])
    data = json.loads(capsys.readouterr().out)
    assert len(data["arms"]) == 2
    assert {path.name for path in Path("found").iterdir()} >= {"policy.yaml", "comparison.json", "comparison.html"}
    best = yaml.safe_load(Path("found/policy.yaml").read_text())
    assert best["batch_norm"]["policy"]["class_path"] == f"finetune_bn.{type(ARMS[data['best']].policy).__name__}"
    main(["plan", *RUN[:-4], "--config", "found/policy.yaml"])
    assert "ImageClassification: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"batch_norm\.policy: got 'auto'; allowed: a policy, to plan for it"):
        main(["plan", *RUN[:-4], "--batch_norm.policy", "auto"])
    with pytest.raises(SystemExit, match="budget"):
        main(["compare", *given, "--budget", "quick"])


def test_a_config_with_a_named_policy_stays_to_the_letter() -> None:
    text = "# head\nbatch_norm:\n  policy:\n    class_path: Freeze\ntrainer: {}\n"
    decision = Decision.of(ARMS["none"], None, "fast", "said")
    assert with_decision(text, decision, None) == text


def test_a_decision_as_an_overlay_names_what_belongs_to_it() -> None:
    for name, arm in ARMS.items():
        overlay: dict[str, Any] = Decision.of(arm, 0.1, "fast", "said").overlay("net")
        names = {part["class_path"].rpartition(".")[2] for part in overlay.get("trainer", {}).get("callbacks+", [])}
        assert bool(names) == (name in ("limited", "scheduled", "recalibrated", "group_norm", "affine"))
        assert overlay["model"]["init_args"] == {"lr": 0.1}
