"""Models in files: ONNX and programs of torch.export compute what PyTorch computes, converted, folded and merged."""

from __future__ import annotations

import copy
import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import finetune_bn as fbn
from finetune_bn.conversion.export import export
from finetune_bn.errors import ConversionMismatch, FinetuneBNError, MissingDependency
from finetune_bn.functional.shared_backward import FoldMode
from tests.models import IMAGE, build, settle
from tests.tools import untouched

WITH_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs the extra [export]",
)
KINDS = [".pt2", pytest.param(".onnx", marks=WITH_ONNX)]


def run(path: Path, x: Tensor) -> Tensor:
    """Return what the file computes."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("treatment", ["live", "converted", "folded", "merged"])
def test_the_file_computes_what_the_model_does_for_any_batch(tmp_path: Path, treatment: str, kind: str) -> None:
    model, x = build("plain")
    if treatment != "live":
        how: FoldMode = "never" if treatment == "converted" else "always"
        fbn.convert(model, fbn.Freeze("original", fold=how), example_input=x)
    if treatment == "merged":
        fbn.fold(model, x)
    path = export(model, tmp_path / f"model{kind}", x)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    more = torch.randn(5, *x.shape[1:])
    assert_close(run(path, more), outputs(model, more))


@pytest.mark.parametrize("kind", KINDS)
def test_a_timm_network_folded_every_step_needs_no_input(tmp_path: Path, kind: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = settle(timm.create_model("test_efficientnet", num_classes=3))
    fbn.convert(model, fbn.Freeze("merged", fold="always"))
    path = export(model, tmp_path / f"net{kind}")
    x = torch.randn(3, *model.pretrained_cfg["input_size"])
    assert_close(run(path, x), outputs(model, x), rtol=1e-4, atol=1e-5)


def test_a_program_runs_where_this_package_is_not_installed(tmp_path: Path) -> None:
    model, x = build("norm_act")
    fbn.convert(model, fbn.Freeze("original"), example_input=x)
    export(model, tmp_path / "model.pt2", x)
    torch.save((x, outputs(model, x)), tmp_path / "case.pt")
    code = """
import sys, torch
sys.modules["finetune_bn"] = None
x, expected = torch.load("case.pt")
torch.testing.assert_close(torch.export.load("model.pt2").module()(x), expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_model_its_modes_and_the_random_state_stay_as_they_are(tmp_path: Path, kind: str, training: bool) -> None:
    model, x = build("norm_act")  # with dropout
    fbn.convert(model, fbn.Freeze("merged"), example_input=x)
    model.train(training)
    with untouched(model):
        export(model, tmp_path / f"model{kind}", x)
    assert_close(run(tmp_path / f"model{kind}", x), outputs(model, x))


@pytest.mark.parametrize("kind", KINDS)
def test_several_inputs_by_name(tmp_path: Path, kind: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, image: Tensor, offset: Tensor) -> Tensor:
            return self.bn(self.conv(image)) + offset

    model, x = settle(Two()), torch.randn(IMAGE)
    export(model, tmp_path / f"model{kind}", {"image": x, "offset": torch.tensor(1.0)})
    assert (tmp_path / f"model{kind}").stat().st_size > 0


@pytest.mark.parametrize("output", ["model.pth", "model", "nowhere/model.pt2", "folder.pt2"])
def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path, output: str) -> None:
    (tmp_path / "folder.pt2").mkdir()
    model, x = build("plain")
    with untouched(model), pytest.raises(fbn.FinetuneBNError, match=r"^output: got "):
        export(model, tmp_path / output, x)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.pt2"]


def test_without_an_input_or_with_a_wrong_one_nothing_is_written(tmp_path: Path) -> None:
    model, _ = build("plain")
    wrong = torch.randn(2, 4, 9, 9)
    for given, words in ((None, "got None"), (wrong, r"got \[\(2, 4, 9, 9\)\]")):
        with untouched(model), pytest.raises(fbn.FinetuneBNError, match=f"^example_input: {words}"):
            export(model, tmp_path / "model.pt2", given)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "net.pt2"
    path.write_bytes(b"old")
    monkeypatch.setattr("finetune_bn.conversion.export.write_atomically", full)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    with pytest.raises(FinetuneBNError, match=r"output: got .* allowed: a file that can be written.*No space left"):
        export(model, path, torch.zeros(2, 3, 4, 4))
    assert path.read_bytes() == b"old"


def test_a_program_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    class Remembers(nn.Module):
        """A Python number that changes with each call is a constant in the program."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm2d(3), [0]

        def forward(self, x: Tensor) -> Tensor:
            self.calls[0] += 1
            return self.norm(x) * self.calls[0]

    (tmp_path / "model.pt2").write_text("an older one", encoding="utf-8")
    with pytest.raises(ConversionMismatch, match=r"^output: the exported network's outputs differ"):
        export(Remembers(), tmp_path / "model.pt2", torch.randn(IMAGE))
    assert (tmp_path / "model.pt2").read_text(encoding="utf-8") == "an older one"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["conv1.weight", "bn2.running_mean", "head.bias"])
def test_a_network_whose_weights_are_no_numbers_is_refused(tmp_path: Path, where: str, value: float) -> None:
    model, x = build("plain")
    model.state_dict()[where].view(-1)[0] = value
    with pytest.raises(fbn.FinetuneBNError, match=rf"model: got 'NaN or infinite values in {where}'.*diverged"):
        export(model, tmp_path / "model.pt2", x)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_returns_nan_is_refused_and_one_that_returns_infinity_is_not(tmp_path: Path) -> None:
    class Returns(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, self.value)

    x = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    with pytest.raises(fbn.FinetuneBNError, match="outputs that are NaN"):
        export(Returns(float("nan")), tmp_path / "model.pt2", x)
    assert list(tmp_path.iterdir()) == []
    export(Returns(float("-inf")), tmp_path / "model.pt2", x)


def test_weights_that_no_onnx_file_can_hold_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    model, x = build("plain")
    model.huge = nn.Parameter(torch.zeros(1).expand(600_000_000))  # 2.4 GB, which take none
    with pytest.raises(fbn.FinetuneBNError, match=r"output: got 'weights of 2.2 GB'; allowed: up to 2 GB.*\.pt2"):
        export(model, tmp_path / "model.onnx", x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_cannot_be_captured_is_one_clear_error(tmp_path: Path, kind: str) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) if x.sum() > 0 else x

    with pytest.raises(fbn.FinetuneBNError, match=r"model: got 'Branches'; allowed: a network that torch.export"):
        export(Branches(), tmp_path / f"model{kind}", torch.randn(IMAGE))
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("plain")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with untouched(model), pytest.raises(MissingDependency, match=r"pip install 'finetune-bn\[export\]'"):
        export(model, tmp_path / "model.onnx", x)


@WITH_ONNX
def test_without_onnxruntime_the_file_is_written_and_said_to_be_unproven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, x = build("plain")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == "onnxruntime" else find_spec(n, *a))
    with caplog.at_level(logging.WARNING, "finetune_bn"):
        export(model, tmp_path / "model.onnx", x)
    assert "was not compared with the model" in caplog.text
    assert_close(run(tmp_path / "model.onnx", x), outputs(model, x))
