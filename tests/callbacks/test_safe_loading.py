"""A checkpoint is data: whatever is in it, none of our ways to read it runs it."""

from __future__ import annotations

import ast
import contextlib
import copy
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormRecalibration
from finetune_bn.callbacks.recalibrate_checkpoint import load_into, recalibrate_checkpoint
from finetune_bn.data import EmojiData
from finetune_bn.errors import FinetuneBNError
from finetune_bn.tasks import ImageClassification, MetricLearning
from tests.models import Plain, settle

ROOT = Path(__file__).parents[2]
UNSAFE = re.compile(r"pickle\.loads?\(|extractall\(|yaml\.(unsafe_|full_)?load\(")
ran: list[str] = []


def evil(*args: Any, **kwargs: Any) -> Any:
    """Stand for the code of somebody who wishes us ill."""
    ran.append("evil")
    return nn.Identity()


class Pickled:
    def __reduce__(self) -> Any:
        return evil, ()


class Module(pl.LightningModule):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = settle(Plain())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(torch.randn(16, 3, 9, 9)), 8)


def trainer() -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1
    )


def ways(path: Path) -> dict[str, Any]:
    """Return everything of ours that reads a checkpoint."""
    recalibration = BatchNormRecalibration(when="validation", how="preserve")
    output = path.with_name("new.ckpt")
    return {
        "load_into": lambda: load_into(Module(), trainer(), path),
        "recalibrate": lambda: recalibrate_checkpoint(trainer(), Module(), Data(), path, output, recalibration),
        "classification": lambda: ImageClassification.load_from_checkpoint(path),
        "metric learning": lambda: MetricLearning.load_from_checkpoint(path),
        "data": lambda: EmojiData.load_from_checkpoint(str(path)),
        "weights": lambda: fbn.create_backbone("test_efficientnet", weights=str(path)),
        "bank": lambda: fbn.StatisticsBank.load(path),
        "model file": lambda: fbn.load(path),
        "trained part": lambda: fbn.apply_trained(Plain(), path),
    }


@pytest.fixture(autouse=True)
def nothing_ran() -> Any:
    ran.clear()
    yield
    assert ran == []


CRAFTED: dict[str, Any] = {
    "an object": {"note": Pickled()},
    "an object as a weight": {"state_dict": {"net.conv1.weight": Pickled()}},
    "an instantiator": {"hyper_parameters": {"_instantiator": f"{__name__}.evil", "width": 6}},
    "an instantiator that imports": {"hyper_parameters": {"_instantiator": "antigravity.geohash", "width": 6}},
    "a class": {
        "hyper_parameters": {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "this.Zen"}
    },
    "a plan": {"finetune_bn": {"plan": {"rows": [{"policy": Pickled()}]}, "module": "net"}},
    "a plan of another class": {"finetune_bn": {"plan": {"policy": f"{__name__}.evil"}, "module": "net"}},
    "extra state": {"state_dict": {"net.bn1._extra_state": Pickled()}},
}


@pytest.mark.parametrize("way", list(ways(Path("one.ckpt"))))
@pytest.mark.parametrize("crafted", CRAFTED)
def test_a_crafted_checkpoint_runs_nothing(crafted: str, way: str, tmp_path: Path) -> None:
    module = Module()
    fbn.convert(module, fbn.Freeze())
    checkpoint = {
        "state_dict": module.state_dict(),
        "pytorch-lightning_version": pl.__version__,
        "hyper_parameters": {"width": 6},
        "datamodule_hyper_parameters": {},
    }
    for key, value in CRAFTED[crafted].items():
        old = checkpoint.get(key)
        checkpoint[key] = {**old, **value} if isinstance(old, dict) else value
    checkpoint["datamodule_hyper_parameters"] = copy.copy(checkpoint["hyper_parameters"])
    torch.save(checkpoint, tmp_path / "one.ckpt")
    with contextlib.suppress(Exception):  # whether it is refused or read is not the matter here
        ways(tmp_path / "one.ckpt")[way]()
    assert not {"antigravity", "this"} & set(sys.modules)


def test_objects_are_refused_where_nothing_is_said_and_read_where_they_are_asked_for(tmp_path: Path) -> None:
    module = Module()
    checkpoint = {"state_dict": module.state_dict(), "note": Path("an object that torch does not know")}
    torch.save(checkpoint, tmp_path / "one.ckpt")
    with pytest.raises(FinetuneBNError, match=r"ckpt_path: got .*Weights only load failed"):
        load_into(Module(), trainer(), tmp_path / "one.ckpt")
    load_into(Module(), trainer(), tmp_path / "one.ckpt", weights_only=False)


@pytest.mark.parametrize("cls", [ImageClassification, MetricLearning, EmojiData])
def test_a_checkpoint_from_an_address_is_not_unpickled(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(url: str, map_location: Any = None, weights_only: bool | None = None) -> Any:
        asked.append((url, weights_only))
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    for weights_only in (None, True):
        with pytest.raises(OSError, match="no network"):
            cls.load_from_checkpoint("https://example.org/one.ckpt", weights_only=weights_only)
    with pytest.raises(OSError, match="no network"):
        cls.load_from_checkpoint("https://example.org/one.ckpt")
    assert [flag for _, flag in asked] == [True] * 3


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut off"])
def test_a_broken_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "one.ckpt").write_bytes(content)
    with pytest.raises(FinetuneBNError, match=r"ckpt_path: got .*allowed: a checkpoint that Lightning saved"):
        load_into(Module(), trainer(), tmp_path / "one.ckpt")


def test_every_call_of_torch_load_says_weights_only() -> None:
    found = 0
    for path in (*ROOT.glob("finetune_bn/**/*.py"), *ROOT.glob("scripts/**/*.py")):
        text = path.read_text(encoding="utf-8")
        assert not UNSAFE.search(text), path
        if "torch.load(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                found += 1
                words = {word.arg: ast.unparse(word.value) for word in node.keywords}
                # What a user's own argument says may be False; no default may.
                assert words.get("weights_only") in ("True", "weights_only"), f"{path}:{node.lineno}"
    assert found >= 2


PLAN = {"model": "Plain", "rows": []}
ROW = {"names": ["bn1"], "action": {"policy": "Keep"}, "kind": "BatchNorm2d", "num_features": 6, "reason": ""} | {
    "refused": False, "position": ""
}  # fmt: skip


@pytest.mark.parametrize(
    "state",
    [
        3,
        [],
        "plan",
        {"plan": 3, "module": "net"},
        {"plan": {}, "module": "net"},
        {"plan": PLAN, "module": "gone"},
        {"plan": PLAN, "module": ["net"]},
        {"plan": PLAN | {"rows": [3]}, "module": "net"},
        {"plan": PLAN | {"rows": [ROW | {"names": [3]}]}, "module": "net"},
        {"plan": PLAN | {"rows": [ROW | {"names": []}]}, "module": "net"},
        {"plan": PLAN | {"rows": [ROW | {"names": ["bn9"]}]}, "module": "net"},
        {"plan": PLAN | {"rows": [ROW | {"action": {"policy": "Thaw"}}]}, "module": "net"},
    ],
    ids=str,
)
def test_a_plan_that_is_none_is_one_clear_error_and_the_module_stays_as_it_was(state: Any, tmp_path: Path) -> None:
    module = Module()
    layers, before = dict(module.named_modules()), copy.deepcopy(module.state_dict())
    checkpoint = {"state_dict": Module().state_dict(), "pytorch-lightning_version": pl.__version__}
    torch.save(checkpoint | {"finetune_bn": state}, tmp_path / "one.ckpt")
    with pytest.raises(FinetuneBNError):
        load_into(module, trainer(), tmp_path / "one.ckpt")
    assert dict(module.named_modules()) == layers
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    "policy", [fbn.Freeze("merged"), fbn.ToGroupNorm(), fbn.EvalNorm(0.5)], ids=lambda p: p.describe()
)
@pytest.mark.parametrize("value", [None, 3, "text", {"a": 1}], ids=str)
def test_what_is_no_tensor_is_named_by_the_layer_that_was_to_take_it(policy: Any, value: Any) -> None:
    net = fbn.convert(settle(Plain()), policy)
    state = net.state_dict()
    for name in ("weight", "bias"):
        with pytest.raises(RuntimeError, match=rf"bn1\.?{name}|bn1: its {name}|bn1.{name}"):
            net.load_state_dict({**state, f"bn1.{name}": value})
