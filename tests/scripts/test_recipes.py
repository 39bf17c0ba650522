from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "scripts" / "recipes"


@pytest.mark.parametrize("policy", ["merged", "live"])
def test_the_classification_recipe_gives_each_vendors_accuracy_and_reloads_into_plain_timm(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--policy", policy, "--epochs", "1", "--train-size", "12", "--test-batches", "0.2"]
    monkeypatch.setattr(sys, "argv", ["classification.py", *arguments])
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # the recipe sets them for good; here they go with the test
        monkeypatch.setenv(name, "0")
    runpy.run_path(str(RECIPES / "classification.py"), run_name="__main__")
    printed = capsys.readouterr().out
    accuracies = re.findall(r"^accuracy on (\w+): (\d+\.\d)%$", printed, flags=re.MULTILINE)
    assert [vendor for vendor, _ in accuracies] == ["noto", "twemoji", "fluent"]
    assert all(0 <= float(share) <= 100 for _, share in accuracies)
    path = re.search(r"^(\S+\.ckpt) loads into plain timm: same logits$", printed, flags=re.MULTILINE)
    assert path
    assert Path(path[1]).is_file()


@pytest.mark.parametrize("policy", ["frozen", "ghost"])
def test_the_metric_learning_recipe_trains_and_gives_recall_before_and_after(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pytorch_metric_learning")
    monkeypatch.setattr(
        sys, "argv", ["metric_learning.py", "--policy", policy, "--steps", "2", "--test-batches", "0.2"]
    )
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    runpy.run_path(str(RECIPES / "metric_learning.py"), run_name="__main__")
    recalls = re.search(
        r"^Recall@1 on unseen emoji: (\S+)% before, (\S+)% after$", capsys.readouterr().out, re.MULTILINE
    )
    assert recalls
    assert all(0 < float(share) <= 100 for share in recalls.groups())
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_policy_ends_with_the_allowed_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["classification.py", "--policy", "freeze"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(RECIPES / "classification.py"), run_name="__main__")
    assert re.search(r"invalid choice: 'freeze'.*live.*merged", capsys.readouterr().err)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_a_recipe_is_short_enough_to_read_and_copy(recipe: Path) -> None:
    assert len(recipe.read_text(encoding="utf-8").splitlines()) < 80
