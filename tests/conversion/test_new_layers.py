"""New layers beside pretrained ones stay live unless rules say otherwise, and what the plan knows is said."""

from __future__ import annotations

import ast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.conversion.new_layers import as_rules, as_yaml, is_new, patterns_for
from finetune_bn.layers import FrozenBatchNorm
from tests.models import settle

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A pretrained encoder, and a decoder that is new."""

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.decoder = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        )
        if pretrained:
            settle(self.encoder)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))  # type: ignore[no-any-return]


def frozen(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, FrozenBatchNorm)]


@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_new_layers_beside_pretrained_ones_stay_live_and_it_is_said_with_rules_to_paste(
    affine: str, caplog: pytest.LogCaptureFixture
) -> None:
    """qubvel-org/segmentation_models.pytorch#79: frozen decoder 0.263 training loss, kept decoder 0.124."""
    policy = fbn.Freeze(affine)  # type: ignore[arg-type]
    model = fbn.convert(Net(), policy, example_input=X)
    assert frozen(model) == ["encoder.1"]
    assert isinstance(model.decoder[1], nn.BatchNorm2d)  # type: ignore[index]
    assert "2 of 3 BatchNorm layers have seen no data (mean 0, variance 1) and stay live" in caplog.text
    assert 'Rules([("decoder.*", Keep()), ("*", Freeze(' in caplog.text
    rules = fbn.plan(Net(), policy, X)
    assert [type(row.policy).__name__ for row in rules.rows] == ["Freeze", "Keep", "Keep"]


def test_the_rules_that_are_offered_do_what_they_say(caplog: pytest.LogCaptureFixture) -> None:
    fbn.convert(Net(), fbn.Freeze("shift"), example_input=X)
    said = [part.split(")])")[0] + ")])" for part in caplog.text.split("Rules(")[1:] if part.startswith("[(")]
    spared, all_of_them = (eval(f"fbn.Rules({text}", {"fbn": fbn, **vars(fbn)}) for text in (said[0], said[-1]))
    caplog.clear()
    assert frozen(fbn.convert(Net(), spared, example_input=X)) == ["encoder.1"]
    assert caplog.text == ""
    assert frozen(fbn.convert(Net(), all_of_them, example_input=X)) == ["encoder.1", "decoder.1", "decoder.4"]
    assert "2 of 3 BatchNorm layers are frozen as they are made, at mean 0 and variance 1" in caplog.text


def test_a_network_without_its_weights_is_converted_whole_and_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = fbn.convert(Net(pretrained=False), fbn.Freeze(), example_input=X)
    assert len(frozen(model)) == 3
    assert "every layer that is frozen (3) has the statistics of a new one" in caplog.text


def test_a_plan_that_was_read_is_carried_out_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    fbn.convert(model, fbn.plan(model, fbn.Freeze(), X), example_input=X)
    assert frozen(model) == ["encoder.1"]
    assert caplog.text == ""


def test_what_was_frozen_by_a_rule_is_not_set_free_by_a_policy_without_rules() -> None:
    model = fbn.convert(Net(), fbn.Rules([("*", fbn.Freeze())]), example_input=X)
    fbn.convert(model, fbn.Freeze("shift"), example_input=X)
    assert len(frozen(model)) == 3


@pytest.mark.parametrize("policy", [fbn.Ghost(2), fbn.Renorm(), fbn.ToGroupNorm(), fbn.FreezeAffine()], ids=str)
def test_policies_that_do_not_go_by_the_statistics_take_new_layers_too(policy: fbn.Policy) -> None:
    assert all(row.policy == policy for row in fbn.plan(Net(), policy, X).rows)


def test_keeping_a_new_decoder_trains_better_than_freezing_it() -> None:
    """The claim behind the default, at a small scale."""
    target = (F.avg_pool2d(X[:, :1], 5, 1, 1) > 0).long()[:, 0]
    losses = []
    for policy in (fbn.Freeze(), fbn.Rules([("*", fbn.Freeze())])):
        model = fbn.convert(Net(), policy, example_input=X).train()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(30):
            loss = F.cross_entropy(model(X)[:, :2], target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < losses[1]


def test_new_is_told_by_statistics_and_count() -> None:
    assert is_new(nn.BatchNorm2d(3))
    assert not is_new(settle(nn.BatchNorm2d(3)))
    counted = nn.BatchNorm2d(3)
    counted.num_batches_tracked.fill_(1)
    assert not is_new(counted)
    assert not is_new(nn.BatchNorm2d(3, track_running_stats=False))
    assert not is_new(nn.BatchNorm2d(3, device="meta"))
    assert not is_new(nn.LazyBatchNorm2d())


@pytest.mark.parametrize(
    ("chosen", "others", "expected"),
    [
        (["decoder.1", "decoder.4"], ["encoder.1"], ["decoder.*"]),
        (["net.decoder.1", "net.decoder.4"], ["net.encoder.1"], ["net.decoder.*"]),
        (["net.neck"], ["net.encoder.1"], ["net.neck"]),
        (["a.1", "b.2"], ["a.3"], ["a.1", "b.2"]),
    ],
)
def test_patterns_match_the_layers_and_no_others(chosen: list[str], others: list[str], expected: list[str]) -> None:
    assert patterns_for(chosen, [*others, *chosen]) == expected


def test_rules_as_python_and_as_yaml_are_read_back() -> None:
    pairs = [("decoder.*", fbn.Keep()), ("*", fbn.Freeze("shift", noise=4))]
    ast.parse(as_rules(pairs))
    yaml = pytest.importorskip("yaml")
    read = yaml.safe_load(as_yaml(pairs))
    assert read["class_path"] == "finetune_bn.Rules"
    rules = read["init_args"]["rules"]
    assert [rule["name"] for rule in rules] == ["decoder.*", "*"]
    assert rules[0]["policy"] == {"class_path": "finetune_bn.Keep"}
    assert rules[1]["policy"]["init_args"] == {"affine": "shift", "noise": 4}


def test_a_layer_without_weight_is_refused_with_the_rules_that_take_it() -> None:
    """SimSiam's projector ends in BatchNorm1d(affine=False)."""
    model = nn.Sequential(nn.Linear(4, 6), settle(nn.BatchNorm1d(6)), nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False))
    settle(model)
    with pytest.raises(fbn.FinetuneBNError, match=r'Rules\(\[\("3", Freeze\(\)\), \("\*", Freeze\(affine=.merged.\)\)'):
        fbn.convert(model, fbn.Freeze("merged"), example_input=torch.randn(4, 4))
    fbn.convert(model, fbn.Rules([("3", fbn.Freeze()), ("*", fbn.Freeze("merged"))]), example_input=torch.randn(4, 4))
    assert frozen(model) == ["1", "3"]
