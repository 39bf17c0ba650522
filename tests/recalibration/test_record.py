"""The figures of a record against numpy, and the table and the JSON that are made of them."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune_bn.recalibration.record import LayerRecord, Recalibration


def row(
    names: tuple[str, ...] = ("bn1",),
    mean: tuple[Any, Any] = ([0.0, 1.0], [2.0, 1.0]),
    var: tuple[Any, Any] = ([4.0, 1.0], [1.0, 1.0]),
    error: float = 0.01,
    eps: float = 0.0,
) -> LayerRecord:
    tensors = [torch.as_tensor(values, dtype=torch.float32) for values in (mean[0], var[0], mean[1], var[1])]
    return LayerRecord(names, "BatchNorm2d", 128, *tensors, eps, error)


def record(*rows: LayerRecord, **changes: Any) -> Recalibration:
    values: dict[str, Any] = {"mode": "exact", "how": "renormalize", "images": 16, "left_alone": (), "warnings": ()}
    return Recalibration(rows=rows, **(values | changes))


def draw(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean, after = torch.randn(2, 7, generator=generator)
    var, var_after = torch.rand(2, 7, generator=generator) + 0.1
    return mean, var, after, var_after


@pytest.mark.parametrize("seed", range(3))
def test_shift_is_in_standard_deviations_of_before_and_the_ratio_a_geometric_mean(seed: int) -> None:
    mean, var, after, var_after = draw(seed)
    found = row(mean=(mean, after), var=(var, var_after))
    m, v, a, w = (t.double().numpy() for t in (mean, var, after, var_after))
    assert found.shift == pytest.approx(np.sqrt(np.mean((a - m) ** 2 / v)), rel=1e-6)
    assert found.var_ratio == pytest.approx(np.exp(np.mean(np.log(w / v))), rel=1e-6)


def test_nothing_moved_is_0_and_1() -> None:
    same = row(mean=([3.0, 4.0],) * 2, var=([1.0, 2.0],) * 2)
    assert (same.shift, same.var_ratio) == (0.0, 1.0)


def test_channels_that_hardly_vary_do_not_drown_the_others() -> None:
    found = row(mean=([0.0, 0.0], [0.003, 5.0]), var=([1e-15, 1.0], [2e-15, 4.0]), eps=1e-3)
    assert found.shift == pytest.approx(math.sqrt((0.003**2 / 1e-3 + 25 / 1.001) / 2))
    assert found.var_ratio == pytest.approx(math.sqrt(4.001 / 1.001))
    assert row(mean=([0.0], [3.0]), var=([0.0], [0.0]), eps=1e-3).var_ratio == 1.0


def test_of_several_layers_the_worst_error_and_the_mean_square_of_the_shifts_are_told() -> None:
    rows = [row(error=0.02), row(error=0.07), row(mean=([0.0], [0.0]), var=([1.0], [1.0]), error=0.01)]
    found = record(*rows)
    assert found.standard_error == 0.07
    assert found.shift == pytest.approx(math.sqrt((rows[0].shift ** 2 * 2 + 0) / 3))


@pytest.mark.parametrize("order", [1, -1])
def test_one_layer_whose_error_is_not_known_makes_that_of_all_unknown(order: int) -> None:
    rows = [row(error=0.02), row(error=math.nan)][::order]
    assert math.isnan(record(*rows).standard_error)
    assert math.isnan(record().standard_error)


def test_the_plain_data_is_strict_json_and_has_every_figure() -> None:
    found = record(
        row(("a", "b")), row(error=math.nan), left_alone=(("c", "was not chosen"),), warnings=("not i.i.d.",)
    )
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["rows"][0] == {
        "names": ["a", "b"],
        "kind": "BatchNorm2d",
        "values": 128,
        "shift": pytest.approx(math.sqrt(0.5)),
        "var_ratio": pytest.approx(0.5),
        "standard_error": 0.01,
    }
    assert data["rows"][1]["standard_error"] is None
    assert data["standard_error"] is None
    assert (data["mode"], data["how"], data["images"]) == ("exact", "renormalize", 16)
    assert data["left_alone"] == [["c", "was not chosen"]]
    assert data["warnings"] == ["not i.i.d."]


def test_the_table_names_all_layers_those_left_alone_and_the_warnings_in_lined_up_columns() -> None:
    found = record(
        row(("stem.bn",)),
        row(("a.very.long.name.of.a.layer", "its.other.name")),
        row(("",)),
        left_alone=(("head", "was not reached by the data"), ("", "was not chosen")),
        warnings=("the batches are not i.i.d.",),
    )
    lines = str(found).splitlines()
    assert lines[0].startswith("3 BatchNorm layers recalibrated on 16 images (mode exact, renormalize)")
    assert [line.split("  ")[0] for line in lines[3:6]] == [
        "stem.bn",
        "a.very.long.name.of.a.layer = its.other.name",
        "(root)",
    ]
    assert len({line.index("BatchNorm2d") for line in lines[3:6]} | {lines[1].index("type")}) == 1
    assert lines[6:] == [
        "left alone: head was not reached by the data",
        "left alone: (root) was not chosen",
        "note: the batches are not i.i.d.",
    ]


def test_tensors_are_not_in_the_repr() -> None:
    assert "tensor" not in repr(record(row()))


def test_of_one_layer_the_shift_is_its_own() -> None:
    one = row()
    assert record(one).shift == pytest.approx(one.shift)
    assert record().shift == 0.0
