from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "scripts" / "recipes"
UNTRIED = {"ray_train"}  # ray is not among the packages that the tests have


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


def run(
    name: str, arguments: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a recipe in this process, in an empty folder, and return what it printed."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments.split()])
    monkeypatch.chdir(folder)
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(variable, "0")
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    assert list(folder.iterdir()) == []
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "package", "says"),
    [
        (
            "segmentation",
            "--steps 1",
            "segmentation_models_pytorch",
            r"96 running .*\nIoU on unseen discs: 0\.\d\d before",
        ),
        pytest.param("detection", "--steps 1", "torchvision", r"by 0\.0000 when another", marks=pytest.mark.slow),
        pytest.param(
            "detection", "--detector retinanet --steps 1", "torchvision", r"by 0\.0000 when", marks=pytest.mark.slow
        ),
        pytest.param(
            "self_supervised",
            "--steps 1 --batch 4",
            "timm",
            r"in student and teacher: 0\nloss ",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "video", "--steps 1", "timm", r"49 frozen(?s:.*)tsm: accuracy on unseen clips", marks=pytest.mark.slow
        ),
        pytest.param("video", "--steps 1 --net r3d_18", "timm", r"r3d_18: accuracy", marks=pytest.mark.slow),
        ("lora", "--steps 1 --test-size 8", "peft", r"245 buffers(?s:.*)BatchNormAct2d again(?s:.*)after 1 steps"),
        ("robot_learning", "--steps 1", "timm", r"15 frozen(?s:.*)frozen: error on unseen scenes 0\.\d+ before"),
        pytest.param("robot_learning", "--steps 1 --norm group_norm", "timm", r"15 GroupNorm", marks=pytest.mark.slow),
        pytest.param(
            "private", "--images 16 --epochs 1", "opacus", r"epsilon \d+\.\d+ at delta 0.001", marks=pytest.mark.slow
        ),
        pytest.param(
            "stream",
            "--images 40 --test-images 16",
            "timm",
            r"the right domain for (100|75|50)%",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_recipe_runs_and_says_what_it_shows(
    name: str, arguments: str, package: str, says: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip(package)
    assert re.search(says, run(name, arguments, tmp_path, monkeypatch, capsys))


@pytest.mark.parametrize(
    ("name", "package"), [("segmentation", "segmentation_models_pytorch"), ("lora", "peft"), ("private", "opacus")]
)
def test_a_recipe_without_its_package_says_which_and_ends_well(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as ended:
        run(name, "", tmp_path, monkeypatch, capsys)
    assert ended.value.code == 0
    assert re.match(r"This recipe needs (\S+): pip install \1\n", capsys.readouterr().out)


def test_the_pages_show_every_recipe_with_its_transcript_as_the_script_made_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(RECIPES.parent))
    import make_recipe_transcripts as transcripts

    with_tests_of_their_own = {"classification", "metric_learning"}
    assert {path.stem for path in RECIPES.glob("*.py")} - with_tests_of_their_own == {*transcripts.COMMANDS} | UNTRIED
    for name, commands in transcripts.COMMANDS.items():
        page = (RECIPES.parents[1] / "docs" / "recipes" / f"{name}.md").read_text(encoding="utf-8")
        assert f'--8<-- "scripts/recipes/{name}.py"' in page
        if not (transcripts.RESULTS / f"{name}.md").exists():
            assert "```console" not in page  # not made yet
            continue
        shown = re.findall(r"^\$ (.*)$", page, re.MULTILINE)
        assert shown == [transcripts.line_of(name, arguments) for arguments in commands], name
        assert not re.search(r"(?<![\w.])/(?:tmp|work|root|home)/", page)


def test_a_transcript_is_without_progress_bars_notices_and_the_ends_of_long_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(RECIPES.parent))
    import make_recipe_transcripts as transcripts

    printed = "GPU available: False, used: False\n10 %\r100 %\nIoU 0.5\n\n" + "x" * 200 + "\n"
    assert transcripts.shown(printed) == "100 %\nIoU 0.5\n" + "x" * 117 + "..."


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.name)
def test_a_recipe_is_short_enough_to_read_and_copy(recipe: Path) -> None:
    assert len(recipe.read_text(encoding="utf-8").splitlines()) < 100
