"""A short run of what `make fuzz` does at length: random networks, damaged files, changed configs."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis")
pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")
pytest.importorskip("timm")
pytest.importorskip("safetensors")
pytest.importorskip("torchvision")

import hypothesis
from hypothesis import strategies as st

import finetune_bn as fbn
from finetune_bn.errors import ConversionMismatch, UnsupportedLayer
from tests.fuzz import configs, images, life, models
from tests.fuzz.networks import Spec, specs
from tests.fuzz.policies import policies

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SPEC = Spec(
    2, (("conv", 4, 3, False, ""), ("norm", "batch", (), ""), ("conv", 6, 1, True, ""), ("norm", "act", (), ""))
)


def examples(count: int, *strategies: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Run a test on so many examples, the same ones each time."""
    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],  # no search for a smaller one: `make fuzz` is the place for that
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    return lambda test: settings(hypothesis.given(*strategies)(test))


def test_a_network_keeps_its_promises_from_plan_to_export() -> None:
    happened: Counter[str] = Counter()

    @examples(12, specs(), policies(), policies(), st.integers(0, 99))
    def run(spec: Spec, policy: Any, second: Any, choice: int) -> None:
        happened.update(life.live(spec, policy, second, choice))

    run()
    assert happened["lived to its end"] >= 2, happened


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("model")
    return models.trained(folder), folder


def fresh(folder: Path, name: str) -> Path:
    work = folder / f"{name}{len(list(folder.iterdir()))}"
    work.mkdir()
    return work


def test_a_damaged_image_is_read_or_named(trained: tuple[Any, Path], tmp_path: Path) -> None:
    happened: Counter[str] = Counter()

    @examples(30, images.files())
    def run(file: Any) -> None:
        thorough = happened["read"] + happened["refused by name"] in (3, 12)
        happened.update(images.look_at(file, trained[0], fresh(tmp_path, "image"), thorough))

    run()
    assert happened["read"]
    assert happened["refused by name"]


def test_a_damaged_model_file_is_loaded_or_named(trained: tuple[Any, Path], tmp_path: Path) -> None:
    happened: Counter[str] = Counter()

    @examples(15, models.damages())
    def run(damages: Any) -> None:
        happened.update(models.load(damages, trained[1], fresh(tmp_path, "file")))

    run()
    assert happened["refused by name"]


def test_a_changed_config_is_carried_out_or_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: Counter[str] = Counter()
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(24):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(images.encoded("PNG", "RGB"))
    monkeypatch.chdir(tmp_path)

    @examples(3, configs.runs())
    def run(drawn: Any) -> None:
        names, changes, _ = drawn
        happened.update(configs.run(names, changes, 50, tmp_path))

    run()
    assert sum(happened.values()) >= 3


# What it has to find


def test_a_conversion_that_changes_the_network_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = fbn.convert

    def broken(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        model = convert(model, *args, **kwargs)
        with torch.no_grad():
            model.body[0].weight.mul_(1.5)
        return model

    monkeypatch.setattr(fbn, "convert", broken)
    with pytest.raises(AssertionError, match="convert: outputs differ"):
        life.live(SPEC, fbn.Freeze(), fbn.Keep(), 1)


def test_a_refusal_that_leaves_something_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        with torch.no_grad():
            model.body[0].weight.mul_(1.5)
        raise UnsupportedLayer("no")

    monkeypatch.setattr(fbn, "convert", broken)
    with pytest.raises(AssertionError, match=r"body.0.weight"):
        life.live(SPEC, fbn.Freeze(), fbn.Keep(), 1)


def test_a_mismatch_without_a_cause_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        raise ConversionMismatch("no")

    monkeypatch.setattr(fbn, "convert", broken)
    with pytest.raises(ConversionMismatch):
        life.live(SPEC, fbn.Freeze(), fbn.Keep(), 1)


def test_frozen_statistics_that_move_in_a_step_are_found() -> None:
    model = fbn.convert(SPEC.build(), fbn.Freeze("shift"), example_input=SPEC.images())

    def move(module: nn.Module, _args: Any, _output: Any) -> None:
        module.running_mean.add_(0.1)

    model.body[1].register_forward_hook(move)
    with pytest.raises(AssertionError, match=r"body.1.running_mean is frozen, and moved"):
        life.check_step(model, SPEC.images(), Counter())


def test_a_plan_without_a_row_for_a_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = fbn.plan

    def broken(*args: Any, **kwargs: Any) -> fbn.Plan:
        whole = plan(*args, **kwargs)
        return fbn.Plan(whole.model, whole.rows[1:])

    monkeypatch.setattr(fbn, "plan", broken)
    with pytest.raises(AssertionError, match=r"no row for \{'body.1'\}"):
        life.planned(SPEC.build(), fbn.Freeze(), SPEC.images())


def test_a_traceback_of_the_command_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fault in (TypeError("foreign"), SystemExit("two\nlines"), SystemExit(1)):

        def broken(_args: Any, fault: BaseException = fault) -> None:
            raise fault

        monkeypatch.setattr(configs, "main", broken)
        with pytest.raises((AssertionError, TypeError)):
            configs.run(["quickstart"], [], 50, tmp_path)


# The script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    path = list(sys.path)
    import fuzz

    yield fuzz
    sys.path[:] = path
    for name in ("fuzz", "store"):
        sys.modules.pop(name, None)


def test_the_script_counts_examples_and_keeps_failures_with_what_failed(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def odd(number: int) -> Counter[str]:
        assert number != 7, "seven"
        return Counter({"fine": 1})

    monkeypatch.setattr(script, "example_of", lambda *_: (st.integers(0, 9), odd))
    row = script.chunk("networks", 0, tmp_path, count=60)
    count = row["happened"]["examples"]
    assert row["happened"]["fine"] == count - len(row["failures"])
    assert [f["example"] for f in row["failures"]] == ["7"]
    assert script.summary([row, copy.deepcopy(row)])["networks"] == {"examples": 2 * count, "failures": 2}
    text = script.table([row])
    assert f"## networks: {count} examples, 1 failed" in text
    assert "seven" in text
