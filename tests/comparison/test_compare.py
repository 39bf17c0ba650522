"""A comparison starts each treatment alike, leaves the model alone, goes on after a kill, and names what failed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_bn.comparison import running
from finetune_bn.comparison.arms import ARMS
from finetune_bn.comparison.compare import compare
from finetune_bn.comparison.result import Comparison
from finetune_bn.comparison.schema import SCHEMA
from finetune_bn.comparison.store import FILE
from finetune_bn.conversion.policies import Freeze, Keep, Stochastic
from finetune_bn.errors import BadData, FinetuneBNError, NoBatchNormMatched
from finetune_bn.layers.frozen import FrozenBatchNorm
from tests.comparison.conftest import Pair, pictures

SHORT: dict[str, Any] = {"batch_size": 12, "rates": (1e-2, 1e-1), "extend": False, "progress": False}


def told(result: Comparison) -> dict[str, Any]:
    """Return a result without times."""
    data = result.to_dict()
    for row in (data, *data["table"], *data["runs"]):
        row.pop("seconds")
    return data


def of_type(schema: dict[str, Any], value: Any, where: str = "") -> None:
    """Check a value against the part of JSON Schema that SCHEMA uses."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}
    if "const" in schema:
        assert value == schema["const"], where
        return
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    assert isinstance(
        value, tuple(k for n in names for k in (kinds[n] if isinstance(kinds[n], tuple) else (kinds[n],)))
    ), where
    assert "maxItems" not in schema or schema["minItems"] <= len(value) <= schema["maxItems"], where
    for i, item in enumerate(value if isinstance(value, list) else ()):
        of_type(schema["items"], item, f"{where}[{i}]")
    if isinstance(value, dict):
        properties = schema.get("properties")
        if properties is not None:
            assert set(value) == set(properties), where
        for key, item in value.items():
            of_type((properties or {}).get(key, schema.get("additionalProperties")), item, f"{where}.{key}")


def test_every_treatment_there_is_runs_on_a_plain_module(model: nn.Module, train: Pair, val: Pair) -> None:
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    result = compare(model, train, val, steps=4, batch_size=12, rates=(1e-2,), progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert [row.failed for row in result.table] == [None] * len(ARMS)
    assert {row.arm for row in result.table} == set(ARMS)
    assert len({round(run.losses[-1][1], 6) for run in result.runs}) >= 5  # they are not one and the same training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert not any(isinstance(module, FrozenBatchNorm) for module in model.modules())
    of_type(SCHEMA, json.loads(result.to_json()))


def test_all_treatments_start_from_the_same_weights_and_see_the_same_batches_in_the_same_order(
    model: nn.Module, train: Pair, val: Pair
) -> None:
    seen: dict[tuple[str, float], list[float]] = {}
    starts: list[dict[str, Tensor]] = []

    def optimizer(net: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, None]:
        starts.append({"conv1": net.conv1.weight.detach().clone(), "head": net.head.weight.detach().clone()})  # type: ignore[union-attr, operator]
        current = seen.setdefault((type(net.bn1).__name__, lr), [])
        net.register_forward_pre_hook(lambda _, args: current.append(args[0].double().sum().item()))
        return torch.optim.SGD(net.parameters(), lr=lr), None

    class Drops(nn.Module):
        """Draws random numbers in a number that depends on its layers."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net
            self.conv1, self.bn1, self.head = net.conv1, net.bn1, net.head

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.bn1, FrozenBatchNorm):
                torch.rand(5)
            return F.dropout(self.net(x), 0.1, self.training)

    arms = {"a": Keep(), "b": Freeze("none"), "c": Freeze("original"), "d": Stochastic()}
    with pytest.raises(NoBatchNormMatched):
        compare(nn.Linear(3, 3), train, val, arms=arms)
    result = compare(Drops(model), train, val, arms=arms, steps=7, optimizer=optimizer, **SHORT)
    assert not any(run.failed for run in result.runs)
    batches = [sums[:7] for sums in seen.values()]
    assert len({tuple(sums) for sums in batches}) == 1
    assert len(set(batches[0])) == 7  # three batches an epoch, in another order in each
    assert all(torch.equal(start["conv1"], model.conv1.weight) for start in starts)  # type: ignore[arg-type]
    assert all(torch.equal(start["head"], model.head.weight) for start in starts)  # type: ignore[union-attr]


def test_a_training_is_that_of_a_plain_loop(model: nn.Module, train: Pair, val: Pair) -> None:
    """The reference: SGD by hand, on the batches that a loader gives."""
    x, y = train
    batches = [(x[i : i + 12], y[i : i + 12]) for i in range(0, 36, 12)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type, var-annotated]

    def sgd(net: nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, None]:
        return torch.optim.SGD(net.parameters(), lr=lr), None

    result = compare(model, loader, val, arms=["live"], rates=(0.1,), steps=5, optimizer=sgd, progress=False)
    net = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for inputs, labels in (batches * 2)[:5]:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    net.eval()
    accuracy = float((net(val[0]).argmax(1) == val[1]).float().mean())
    (run,) = result.runs
    assert run.losses == tuple(enumerate(losses, 1))
    assert run.score == pytest.approx(accuracy, abs=1e-7)


def test_a_comparison_that_was_killed_goes_on_to_the_same_result(
    model: nn.Module, train: Pair, val: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {**SHORT, "arms": ["live", "none", "scheduled"], "steps": 18, "seeds": (0, 1)}
    monkeypatch.setattr(running, "lengths_up_to", lambda steps: (steps // 3, steps))
    whole = compare(model, train, val, folder=tmp_path / "whole", **arguments)
    assert len(whole.lengths) == 2
    genuine, done = running.fine_tune, 0

    def killed(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done == 5:
            raise KeyboardInterrupt
        return genuine(*args)

    monkeypatch.setattr(running, "fine_tune", killed)
    with pytest.raises(KeyboardInterrupt):
        compare(model, train, val, folder=tmp_path / "cut", **arguments)
    assert len(json.loads((tmp_path / "cut" / FILE).read_text())["trainings"]) == 4
    assert not (tmp_path / "cut" / "comparison.json").exists()
    done = 1000
    torch.manual_seed(77)
    resumed = compare(model, train, val, folder=tmp_path / "cut", **arguments)
    assert done - 1000 == len(whole.runs) + sum(len(run.curve) - 1 for run in whole.runs) - 4
    assert told(resumed) == told(whole)
    again = compare(model, train, val, folder=tmp_path / "cut", **arguments)
    assert done - 1000 == len(whole.runs) + sum(len(run.curve) - 1 for run in whole.runs) - 4  # nothing was trained
    assert told(again) == told(whole)
    csv, other = (tmp_path / name / "comparison.csv" for name in ("cut", "whole"))
    columns = [[line.split(",")[:5] for line in path.read_text().splitlines()] for path in (csv, other)]
    assert columns[0] == columns[1]


def test_the_folder_of_another_comparison_is_refused_with_what_differs(
    model: nn.Module, train: Pair, val: Pair, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {**SHORT, "arms": ["none"], "folder": tmp_path}
    compare(model, train, val, steps=2, **arguments)
    content = (tmp_path / FILE).read_text()
    with pytest.raises(FinetuneBNError, match=r"folder: .* It belongs to another one \(steps: 2 there, 3 here\)"):
        compare(model, train, val, steps=3, **arguments)
    with pytest.raises(FinetuneBNError, match=r"It belongs to another one .*data: "):
        compare(model, pictures(36, 5), val, steps=2, **arguments)
    with torch.no_grad():
        model.bn1.running_mean += 1  # type: ignore[operator, union-attr]
    with pytest.raises(FinetuneBNError, match=r"It belongs to another one .*weights: "):
        compare(model, train, val, steps=2, **arguments)
    assert (tmp_path / FILE).read_text() == content
    (tmp_path / FILE).write_text("{")
    with pytest.raises(FinetuneBNError, match=rf"folder: .* {FILE} in it cannot be read"):
        compare(model, train, val, steps=2, **arguments)


def test_treatments_that_diverge_or_are_refused_are_named_and_the_others_go_on(
    model: nn.Module, train: Pair, val: Pair
) -> None:
    model.bn2.affine = False  # type: ignore[union-attr, assignment]
    model.bn2.weight = model.bn2.bias = None  # type: ignore[union-attr, assignment]
    arms = {"live": Keep(), "shift": Freeze("shift"), "wild": Freeze("none")}
    rates = {"live": (1e-2,), "shift": (1e-2,), "wild": (1e30,)}
    options = {**SHORT, "rates": rates}
    result = compare(model, train, val, arms=arms, steps=6, **options)
    failed = {row.arm: row.failed for row in result.table}
    assert failed["live"] is None
    assert "the training loss was" in str(failed["wild"])
    assert result.best is not None
    assert result.best.arm in ("live", "shift")
    assert "wild" in result.notes[0]
    single = compare(
        model, [(train[0][:1], train[1][:1])], val, arms={"live": Keep()}, steps=1, progress=False, rates=(1e-2,)
    )
    assert single.table[0].failed is None  # two positions each channel: it can be normalized


def test_a_budget_in_seconds_becomes_a_number_of_steps_that_a_resumed_run_keeps(
    model: nn.Module, train: Pair, val: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_bn.comparison.budget import Speed

    monkeypatch.setattr(running, "measure_speed", lambda *_: Speed(0.01, 0.01))
    first = compare(model, train, val, arms=["none"], seconds=0.9, folder=tmp_path, **SHORT)
    monkeypatch.setattr(running, "measure_speed", lambda *_: pytest.fail("it was known"))
    second = compare(model, train, val, arms=["none"], seconds=0.9, folder=tmp_path, **SHORT)
    assert first.lengths == second.lengths == (34,)
    with pytest.raises(FinetuneBNError, match=r"seconds: got 5\.0; allowed: steps or seconds, not both"):
        compare(model, train, val, arms=["none"], seconds=5.0, steps=5, **SHORT)


def test_own_losses_metrics_and_batches_of_dicts_are_compared(train: Pair, val: Pair, model: nn.Module) -> None:
    def batches(pair: Pair) -> list[dict[str, Tensor]]:
        return [{"x": x, "labels": y} for x, y in zip(pair[0].split(12), pair[1].split(12), strict=True)]

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.multi_margin_loss(outputs, labels)

    def worst_class(outputs: Tensor, labels: Tensor) -> Tensor:
        hits = outputs.argmax(1) == labels
        return torch.stack([hits[labels == c].float().mean() for c in labels.unique()]).min()

    options: dict[str, Any] = {"arms": ["none"], "rates": (1e-2,), "steps": 3, "progress": False, "loss": loss}
    result = compare(model, batches(train), batches(val), metric=worst_class, **options)
    assert result.metric == "worst_class"
    assert result.table[0].failed is None
    assert 0 <= (result.table[0].score or 0) <= 1
    negative = compare(model, batches(train), batches(val), **options)
    assert negative.metric == "negative loss"
    assert (negative.table[0].score or 0) < 0


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"arms": ["nnone"]}, "arms: got 'nnone'; allowed: live, none, .* Did you mean 'none'"),
        ({"arms": "none"}, r"arms: got 'none'; .* Write \['none'\]"),
        ({"arms": []}, "arms: got .*; allowed: a list of names"),
        ({"arms": ["none", "none"]}, "arms: got 'none'; allowed: each name once"),
        ({"arms": {"mine": "frozen"}}, "policy: got 'frozen'"),
        ({"rates": ()}, "rates: got .*; allowed: one or more learning rates"),
        ({"rates": (0.0,)}, "rates: got 0.0; allowed: a number above 0"),
        ({"rates": {"live": (1e-3,)}}, "rates: got .*; allowed: learning rates for each of none"),
        ({"seeds": ()}, "seeds: got"),
        ({"seeds": (1, 1)}, "seeds: got .*; allowed: each seed once"),
        ({"steps": 0}, "steps: got 0"),
        ({"loss": "ce"}, "loss: got 'ce'; allowed: a function, or None"),
        ({"batch_size": None}, "batch_size: got None"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"train": (torch.zeros(0, 3, 10, 10), torch.zeros(0).long())}, "train: got '0 inputs and 0 targets'"),
        ({"val": []}, "val: got 'no image'"),
        ({"train": {"x": 1}}, "train: got 'dict with the keys x'"),
        ({"train": (torch.zeros(4, 2, 10, 10), torch.zeros(4).long())}, "train: .*RuntimeError"),
        ({"train": (torch.zeros(4, 3, 10, 10), torch.full((4,), 7))}, "train: .*allowed: batches that Plain"),
        ({"train": (torch.full((4, 3, 10, 10), math.nan), torch.zeros(4).long())}, "a loss of nan before training"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_trained(
    model: nn.Module, train: Pair, val: Pair, changed: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "fine_tune", lambda *_: pytest.fail("a training was begun"))
    arguments = {"train": train, "val": val, "arms": ["none"], "steps": 2, **SHORT, **changed}
    with pytest.raises((FinetuneBNError, BadData), match=match) as error:
        compare(model, arguments.pop("train"), arguments.pop("val"), **arguments)
    assert "\n" not in str(error.value)
