"""The report of bytes kept for backward: against the shapes, by layer, and without a trace on the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import finetune_bn as fbn
from finetune_bn.diagnosis.memory import MemoryReport, memory_report, saved_by_layer, saved_bytes
from tests.models import build
from tests.tools import untouched

FLOAT = 4


def by_name(report: MemoryReport) -> dict[str, tuple[int, int | None]]:
    return {row.name: (row.before, row.after) for row in report.layers}


def floats(*shape: int) -> int:
    return FLOAT * int(torch.Size(shape).numel())


def test_each_layer_keeps_what_its_formula_needs_and_each_storage_counts_once() -> None:
    model, x = build("plain")  # conv - BN - ReLU in place - conv - BN - mean - linear
    n = len(x)
    statistics = {6: floats(2, 6), 8: floats(2, 8)}  # mean and 1/sd of the batch
    expected = {
        "conv1": (floats(n, 3, 9, 9),) * 2,
        "bn1": (floats(n, 6, 7, 7) + statistics[6], 0),  # its input; frozen: gamma', which the layer has in any case
        "act": (floats(n, 6, 7, 7),) * 2,  # its output, which is conv2's input too
        "bn2": (floats(n, 8, 5, 5) + statistics[8], 0),
        "head": (floats(n, 8),) * 2,
    }
    report = memory_report(model, x, fbn.Freeze("none", fold="never"))
    assert by_name(report) == expected
    assert report.before == sum(before for before, _ in expected.values())
    assert report.after == sum(after for _, after in expected.values())


def test_a_resnet_saves_the_input_of_every_batch_norm_by_freezing_it() -> None:
    timm = pytest.importorskip("timm")
    model, n, side = timm.create_model("resnet18", num_classes=3), 2, 64
    shapes = [(64, side // 2)] + [(64, side // 4)] * 4
    for channels, size in ((128, side // 8), (256, side // 16), (512, side // 32)):
        shapes += [(channels, size)] * 5  # two blocks of two, and the shortcut
    gone = sum(floats(n, c, s, s) + floats(2, c) for c, s in shapes)
    x = torch.randn(n, 3, side, side)
    report = memory_report(model, x, fbn.Freeze("shift", fold="never"))
    assert report.after == report.before - gone
    assert report.after is not None
    assert 0.5 < report.after / report.before < 0.6


def test_a_learnable_scale_in_activation_space_and_eval_mode_save_next_to_nothing() -> None:
    model, x = build("plain")
    report = memory_report(model, x, fbn.Freeze("original", fold="never"))
    assert report.after is not None
    assert 0.98 < report.after / report.before <= 1
    evaluated = memory_report(model, x).before
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    assert memory_report(model, x).before > 0.98 * evaluated


def test_folded_a_learnable_scale_keeps_no_activation_either() -> None:
    model, x = build("plain")
    reports = [memory_report(model, x, fbn.Freeze("original", fold=fold)) for fold in ("never", "always")]
    kept = [by_name(report) for report in reports]
    assert kept[0]["bn1"][1] > floats(2, 6, 7, 7)
    assert kept[1]["conv1"][1] <= kept[0]["conv1"][1] + floats(4, 6)  # its input, and a few numbers a channel
    assert kept[1].get("bn1", (0, 0))[1] <= floats(4, 6)


def test_under_bf16_autocast_activations_count_half_and_cast_weights_count() -> None:
    model, x = build("plain")
    full, half = memory_report(model, x), memory_report(model, x, autocast=torch.bfloat16)
    assert by_name(full)["act"][0] == 2 * by_name(half)["act"][0]
    assert by_name(half)["conv2"][0] == model.conv2.weight.numel() * 2
    assert half.autocast == "bfloat16"
    assert "autocast bfloat16" in str(half)


class Functional(nn.Module):
    """Its own operations keep something, besides those of its child; the child is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.linear(torch.sin(self.linear(x))))


def test_operations_between_modules_count_for_the_module_that_calls_them() -> None:
    x = torch.randn(5, 4)
    report = memory_report(Functional(), x)
    one = floats(5, 4)
    assert by_name(report) == {"": (2 * one, None), "linear": (2 * one, None)}  # inputs of sin, softplus; of linear
    assert "(root)" in str(report)


def test_a_model_in_eval_mode_is_counted_in_training_and_one_in_training_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.randn(5, 4)
    with_mask = memory_report(model.eval(), x).before
    model.train()
    assert memory_report(model, x).before == with_mask
    model[1].eval()
    assert memory_report(model, x).before < with_mask


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("net", ["plain", "tied", "norm_act", "root", "head1d", "pre_activation"])
def test_model_modes_and_random_state_stay_as_they_are(net: str, training: bool) -> None:
    model, x = build(net)
    model.train(training)
    with untouched(model), torch.no_grad():
        report = memory_report(model, x, fbn.Freeze("shift"))
    assert report.after is not None
    assert report.after < report.before


def test_what_is_not_trained_keeps_nothing() -> None:
    model, x = build("plain")
    report = memory_report(model.requires_grad_(False), x)
    assert (report.before, report.layers) == (0, ())
    assert "0.00 MiB" in str(report)


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("input", {"input": torch.randn(2, 4, 9, 9)}),
        ("input", {"input": None}),
        ("input", {"input": {"y": torch.randn(2, 3, 9, 9)}}),
        ("autocast", {"autocast": torch.float32}),
        ("policy", {"policy": "freeze"}),
        ("rule", {"policy": fbn.Rules([("nowhere.*", fbn.Keep())])}),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_touched(argument: str, given: dict[str, Any]) -> None:
    model, x = build("plain")
    arguments: dict[str, Any] = {"input": x, "policy": None, "autocast": None} | given
    with untouched(model), pytest.raises(fbn.FinetuneBNError, match=f"^{argument}: got "):
        memory_report(model, arguments["input"], arguments["policy"], autocast=arguments["autocast"])


def test_models_that_cannot_be_counted_are_refused() -> None:
    x = torch.randn(2, 3, 9, 9)
    for model in (nn.DataParallel(build("plain")[0]), build("plain")[0].to("meta"), "plain"):
        with pytest.raises(fbn.FinetuneBNError, match=r"^model: got "):
            memory_report(model, x)  # type: ignore[arg-type]
    model = build("plain")[0]
    model.held = model(x)  # no leaf: deepcopy refuses it
    with pytest.raises(fbn.FinetuneBNError, match=r"copy.deepcopy can copy"):
        memory_report(model, x)


def test_tuples_and_dicts_are_arguments_of_forward() -> None:
    model, x = build("plain")
    reports = [memory_report(model, given) for given in (x, (x,), {"x": x})]
    assert reports[0] == reports[1] == reports[2]
    assert reports[0].inputs == ((2, 3, 9, 9),)


def test_the_table_is_sorted_by_bytes_and_the_data_hold_what_it_shows() -> None:
    model, x = build("plain")
    report = memory_report(model, x, fbn.plan(model, fbn.Freeze("none"), x))
    sizes = [row.before for row in report.layers]
    assert sizes == sorted(sizes, reverse=True)
    first, header, _, *lines = str(report).splitlines()
    assert first.startswith("Plain on 2x3x9x9: ")
    assert first.endswith("after: the given plan")
    assert header.split() == ["layer", "type", "MiB", "after"]
    assert [line.split()[0] for line in lines] == [row.name for row in report.layers]
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert (data["before"], data["after"]) == (report.before, report.after)
    assert data["layers"][0] == {"name": report.layers[0].name, "kind": "BatchNorm2d"} | {
        "before": report.layers[0].before,
        "after": report.layers[0].after,
    }


def test_hooks_are_gone_after_an_error_in_what_is_run() -> None:
    model, x = build("plain")

    def fail() -> None:
        model(x)
        raise ZeroDivisionError

    with untouched(model.eval()):
        for count in (saved_bytes, saved_by_layer):
            with pytest.raises(ZeroDivisionError):
                count(model, fail)
    assert sum(saved_by_layer(model, lambda: model(x)).values()) == saved_bytes(model, lambda: model(x))


@pytest.mark.parametrize("affine", ["merged", "original"])
def test_the_report_of_a_net_with_activations_in_its_norm_layers_is_what_a_step_without_hooks_keeps(
    affine: str,
) -> None:
    model = pytest.importorskip("timm").create_model("test_efficientnet", num_classes=5)
    policy, x = fbn.Freeze(affine, fold="never"), torch.randn(4, 3, 32, 32)  # type: ignore[arg-type]
    report = fbn.memory_report(model, x, policy)
    fbn.convert(model, policy, verify=False).train()
    assert report.after == saved_bytes(model, lambda: model(x))
    assert report.after < 0.9 * report.before


@pytest.mark.parametrize("count", [saved_bytes, saved_by_layer])
def test_nothing_of_the_pass_is_held_afterwards(count: Any) -> None:
    # A result that a node keeps leads to that node: held as it was, the whole graph stayed in memory.
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Sigmoid())
    made: list[Any] = []
    for layer in model:
        layer.register_forward_hook(lambda layer, args, y: made.append(StorageWeakRef(y.untyped_storage())))
    assert count(model, lambda: model(torch.randn(2, 3, 8, 8)))
    assert len(made) == 4
    assert all(storage.expired() for storage in made)
