"""The study of GroupNorm's eps: which cells it measures, what a figure is of, and that its table tells them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
pytest.importorskip("rich")
pytest.importorskip("timm")
import study_group_norm_modes as study
from pictures import Pictures
from store import Store

import finetune_bn as fbn
from tests.timm_nets import timm

NET = "test_efficientnet"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A small network, and pictures of noise, another for each kind and split."""
    torch.manual_seed(0)
    net = timm.create_model(NET, num_classes=10).eval()
    fbn.recalibrate(net, [torch.randn(64, 3, 32, 32)])

    def load(kind: str, split: str, size: int) -> Pictures:
        generator = torch.Generator().manual_seed(hash((len(kind), len(split))))
        images = torch.randint(0, 256, (20, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return Pictures(images, torch.zeros(20, dtype=torch.int64), ["noise"])

    monkeypatch.setattr(study.pictures, "load", load)
    monkeypatch.setattr(study.pictures, "available", list)
    for name in ("_teachers", "_shown", "_taught"):
        monkeypatch.setattr(study, name, {NET: net} if name == "_teachers" else {})
    return net


def test_a_network_agrees_with_itself_and_scaled_weights_are_seen_by_frozen_layers_alone(small: nn.Module) -> None:
    frozen = study.measure(NET, "", "", 0)
    assert not [key for key in frozen if "/" in key]
    assert study.agreement(small, NET, "emoji", "val")["agreement"] == 100
    own = study.measure(NET, "own", "emoji", 0)
    assert 1 - own["scale"] < 0.5 * (1 - frozen["scale"])
    assert max(own["contrast"]) < 0.5
    assert {key for key in own if "/" in key} == {f"{kind}/{s}" for kind in study.KINDS for s in ("val", "test")}
    center = study.measure(NET, "center", "", 0)
    assert "contrast" not in center
    assert center["scale"] < own["scale"]


def test_every_mode_is_measured_for_every_kind_before_a_second_seed(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.json", "python x.py", study.SEEDS, device="cpu")
    order: list[dict[str, Any]] = []
    while key := next(study.next_cells(list(study.NETS), list(study.KINDS), store), None):
        order.append(key)
        figures = {f"{kind}/{s}": {"agreement": 70.0 + key["seed"]} for kind in study.KINDS for s in ("val", "test")}
        store.add(key | (figures if key["eps"] else {}) | {"scale": 0.5, "contrast": [0.25, 0.75]})
    assert len({tuple(key.values()) for key in order}) == len(order) == 2 * 3 * 3 * 3 + 6
    assert {key["seed"] for key in order[: 2 * 3 * 3 + 6]} == {0}
    table = study.markdown(study.summarize(store)).splitlines()
    assert "| lite0 | center | emoji | 3 | 71.0 | 71.0 | 71.0 | 50 | 0.50 |" in table
    assert "| mobilenetv2_100 | (frozen BatchNorm) |  | 1 |  |  |  | 50 | 0.50 |" in table
