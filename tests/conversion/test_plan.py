"""The dry run: what would happen to each layer and why, and which rule decides."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import finetune_bn as fbn
from finetune_bn.conversion.plan import Plan, PlanRow
from finetune_bn.conversion.policies import Policy, Rule
from finetune_bn.conversion.refusals import refusal
from finetune_bn.errors import FinetuneBNError, NoBatchNormMatched, UnsupportedLayer
from tests.models import NETS, UNFREEZABLE, Head1d, Plain, Tied, build, settle, with_norm
from tests.tools import untouched

FREEZE, KEEP, SHIFT = fbn.Freeze(), fbn.Keep(), fbn.Freeze("shift")
NOT_IID = [fbn.Ghost(2), fbn.Renorm(float("inf"), 2), fbn.Stochastic(), fbn.EvalNorm(0.1), fbn.Freeze(noise=8)]


def decisions(model: nn.Module, policy: Policy) -> dict[str, Policy | None]:
    return {row.names[0]: row.policy for row in fbn.plan(model, policy).rows}


class Deep(nn.Module):
    """Layers with dotted names, of two types."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
        self.layer10 = nn.BatchNorm2d(4)
        self.neck = nn.BatchNorm1d(4)


# Which rule decides


def test_a_policy_alone_is_for_every_layer() -> None:
    assert set(decisions(Deep(), SHIFT).values()) == {SHIFT}
    assert len(decisions(Deep(), SHIFT)) == 5


def test_the_first_rule_that_matches_decides() -> None:
    rules = fbn.Rules([("layer1.*", KEEP), ("layer1*", SHIFT), ("*", FREEZE)])
    assert decisions(Deep(), rules) == {
        "stem": FREEZE,
        "layer1.0": KEEP,
        "layer1.1.0": KEEP,
        "layer10": SHIFT,
        "neck": FREEZE,
    }


def test_a_star_in_a_name_matches_dots_too() -> None:
    assert decisions(Deep(), fbn.Rules([("*.0", KEEP), ("*", FREEZE)]))["layer1.1.0"] == KEEP


def test_a_rule_by_type_takes_the_class_name() -> None:
    rules = fbn.Rules([Rule(KEEP, type="BatchNorm1d"), ("*", FREEZE)])
    assert [name for name, policy in decisions(Deep(), rules).items() if policy == KEEP] == ["neck"]


def test_a_rule_by_type_finds_the_layer_again_after_it_was_converted() -> None:
    rules = fbn.Rules([Rule(FREEZE, type="BatchNorm1d"), Rule(SHIFT, type="BatchNorm2d")])
    model = fbn.convert(Deep(), rules)
    assert decisions(model, rules) == decisions(Deep(), rules)
    assert decisions(model, fbn.Rules([Rule(KEEP, type="FrozenBatchNorm1d")]))["neck"] == KEEP


def test_all_conditions_of_a_rule_must_be_met() -> None:
    rules = fbn.Rules([Rule(KEEP, name="layer*", type="BatchNorm2d"), Rule(SHIFT, name="neck", type="BatchNorm1d")])
    assert decisions(Deep(), rules) == {
        "stem": None,
        "layer1.0": KEEP,
        "layer1.1.0": KEEP,
        "layer10": KEEP,
        "neck": SHIFT,
    }


def test_a_rule_by_stage_takes_timms_stages() -> None:
    timm = pytest.importorskip("timm")
    rules = fbn.Rules([Rule(KEEP, stage=4), Rule(SHIFT, stage=0, name="bn*"), ("*", FREEZE)])
    decided = decisions(timm.create_model("test_resnet"), rules)
    assert {name for name, policy in decided.items() if policy == SHIFT} == {"bn1"}
    kept = {name for name, policy in decided.items() if policy == KEEP}
    assert kept == {name for name in decided if name.startswith("layer4.")}


def test_a_layer_that_no_rule_matches_is_listed_as_left_alone() -> None:
    rows = {row.names[0]: row for row in fbn.plan(Deep(), fbn.Rules([("neck", FREEZE)])).rows}
    assert len(rows) == 5
    assert (rows["stem"].policy, rows["stem"].reason) == (None, "left alone: no rule matches")
    assert rows["neck"].reason.startswith("rule name='neck'")


def test_a_shared_layer_is_decided_by_a_rule_for_any_of_its_names_that_all_agree_on() -> None:
    assert decisions(Tied(), fbn.Rules([("*.bn", KEEP), ("*", FREEZE)])) == {"first.bn": KEEP, "between": FREEZE}
    same = fbn.Rules([("first.*", SHIFT), ("second.*", fbn.Freeze("shift")), ("*", FREEZE)])
    assert decisions(Tied(), same)["first.bn"] == SHIFT


def test_a_shared_layer_whose_names_get_two_answers_is_an_error_that_gives_them() -> None:
    for rules in ([("first.*", KEEP), ("*", FREEZE)], [("second.*", FREEZE)]):
        with pytest.raises(UnsupportedLayer, match=r"shared as first\.bn, second\.bn gets different policies"):
            fbn.plan(Tied(), fbn.Rules(rules))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(KEEP, name="layr1.*"), r"rule: got \"name='layr1\.\*'\"; allowed: .*Close names: \['layer1"),
        (Rule(KEEP, name="zzz"), r"There are: \['stem', .*types \['BatchNorm1d', 'BatchNorm2d'\], stages \[\]"),
        (Rule(KEEP, type="BatchNorm3d"), r"type='BatchNorm3d'.*types \['BatchNorm1d', 'BatchNorm2d'\]"),
        (Rule(KEEP, name="stem", type="BatchNorm1d"), "name='stem', type='BatchNorm1d'"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error_that_helps(rule: Rule, message: str) -> None:
    with pytest.raises(NoBatchNormMatched, match=message):
        fbn.plan(Deep(), fbn.Rules([rule, ("*", FREEZE)]))


def test_a_stage_that_no_layer_is_in_is_an_error_that_gives_the_stages() -> None:
    timm = pytest.importorskip("timm")
    with pytest.raises(NoBatchNormMatched, match=r"stage=9.*stages \[0, 1, 2, 3, 4\]"):
        fbn.plan(timm.create_model("test_resnet"), fbn.Rules([Rule(KEEP, stage=9)]))


def test_a_rule_behind_rules_that_decide_all_it_matches_is_an_error() -> None:
    for shadowed in (("layer1.0", KEEP), Rule(KEEP, name="*", type="BatchNorm2d")):
        with pytest.raises(NoBatchNormMatched, match="the first match wins, so put the special one first"):
            fbn.plan(Deep(), fbn.Rules([Rule(FREEZE, type="BatchNorm2d"), shadowed]))


def test_a_catch_all_that_is_left_with_nothing_is_none() -> None:
    assert set(decisions(Deep(), fbn.Rules([("[ls]*", FREEZE), ("n*", FREEZE), ("*", KEEP)])).values()) == {FREEZE}


# What is refused, and what is said


@pytest.mark.parametrize("case", UNFREEZABLE)
@pytest.mark.parametrize("affine", ["none", "shift", "merged", "original"])
def test_a_layer_that_cannot_be_frozen_is_refused_with_the_reason(case: str, affine: Any) -> None:
    make, reason = UNFREEZABLE[case]
    model = nn.Sequential(make())
    (row,) = fbn.plan(model, fbn.Freeze(affine)).rows
    assert row.refused
    assert reason in row.reason
    assert fbn.plan(model, fbn.Freeze(affine)).refused == (row,)
    assert not fbn.plan(model, KEEP).refused


def test_planning_does_not_initialize_lazy_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d())
    fbn.plan(model, FREEZE, example_input=torch.randn(1, 3, 8, 8))
    assert type(model[1]) is nn.LazyBatchNorm2d


class WithExtraState(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("seen", torch.zeros(1))


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def with_parametrization() -> nn.Module:
    return parametrize.register_parametrization(nn.BatchNorm2d(4), "weight", Doubled())


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.BatchNorm2d(4), "weight", amount=1)


def patched() -> nn.Module:
    bn = nn.BatchNorm2d(4)
    bn.forward = lambda x: x
    return bn


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: WithExtraState(4), "holds seen besides BatchNorm's five tensors"),
        (pruned, "holds weight_orig, weight_mask besides BatchNorm's five tensors"),
        (with_parametrization, "has parametrized tensors"),
        (patched, "BatchNorm2d has a forward patched in"),
    ],
)
def test_what_a_frozen_layer_would_lose_is_refused(make: Any, reason: str) -> None:
    assert reason in (refusal(make(), FREEZE) or "")
    assert refusal(make(), KEEP) is None


def test_normalize_only_is_refused_with_an_explanation_where_it_would_change_the_function() -> None:
    model = settle(Plain())
    (first, _) = fbn.plan(model, fbn.NormalizeOnly()).refused
    assert "resetting them changes what the pretrained layer computes" in first.reason
    assert "NormalizeOnly(change_function=True)" in first.reason
    assert not fbn.plan(model, fbn.NormalizeOnly(change_function=True)).refused
    assert not fbn.plan(Plain(), fbn.NormalizeOnly()).refused  # gamma is 1, beta is 0


@pytest.mark.parametrize("affine", ["none", "merged", "original"])
def test_normalize_only_looks_at_the_values_of_today_also_in_a_frozen_layer(affine: Any) -> None:
    frozen = fbn.convert(Plain(), fbn.Freeze(affine))
    assert not fbn.plan(frozen, fbn.NormalizeOnly()).refused
    frozen.load_state_dict(settle(Plain()).state_dict())
    assert len(fbn.plan(frozen, fbn.NormalizeOnly()).refused) == 2


@pytest.mark.parametrize("first", NOT_IID[:4], ids=str)
def test_normalize_only_looks_at_the_values_of_today_also_in_a_layer_that_tracks_statistics(first: Policy) -> None:
    model = fbn.convert(Plain(), first)
    assert not fbn.plan(model, fbn.NormalizeOnly()).refused
    model.load_state_dict(settle(Plain()).state_dict())
    assert len(fbn.plan(model, fbn.NormalizeOnly()).refused) == 2


@pytest.mark.parametrize("policy", NOT_IID, ids=str)
def test_what_layers_for_other_batches_would_lose_is_refused(policy: Policy) -> None:
    assert "holds seen besides BatchNorm's five tensors" in (refusal(WithExtraState(4), policy) or "")
    assert "has parametrized tensors" in (refusal(with_parametrization(), policy) or "")
    assert "BatchNorm2d has a forward patched in" in (refusal(patched(), policy) or "")
    assert "track_running_stats=False" in (refusal(nn.BatchNorm2d(4, track_running_stats=False), policy) or "")
    assert refusal(nn.BatchNorm2d(4, affine=False), policy) is None


@pytest.mark.parametrize("policy", [fbn.FreezeAffine(), fbn.NormalizeOnly()])
def test_holding_constant_what_is_not_there_is_refused(policy: Policy) -> None:
    assert "no weight and no bias" in (refusal(nn.BatchNorm2d(4, affine=False), policy) or "")


def test_a_tensor_that_the_user_does_not_train_is_said_to_stay_that_way() -> None:
    model = settle(Head1d())
    model.neck.weight.requires_grad_(False)
    (row,) = fbn.plan(model, fbn.Freeze("merged")).rows
    assert row.reason == "weight keep requires_grad=False"
    (row,) = fbn.plan(model, fbn.Freeze("shift")).rows
    assert row.reason == ""


def test_statistics_of_a_layer_that_never_saw_data_are_remarked_on() -> None:
    (row,) = fbn.plan(Head1d(), FREEZE).rows
    assert "statistics are those of a new layer" in row.reason
    assert not row.refused
    (row,) = fbn.plan(settle(Head1d()), FREEZE).rows
    assert row.reason == ""


def test_layers_that_only_look_like_batch_norm_are_listed_as_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True))
    row = fbn.plan(model, FREEZE).rows[1]
    assert (row.names, row.kind, row.policy) == (("1",), "InstanceNorm2d", None)
    assert "is no torch BatchNorm" in row.reason


# The plan as data and as text


@pytest.mark.parametrize("net", NETS)
def test_a_plan_lists_every_layer_and_survives_json(net: str) -> None:
    model, x = build(net)
    policy = fbn.Rules([("*", fbn.Freeze("shift"))])
    with untouched(model):
        planned = fbn.plan(model, policy, example_input=x)
    batch_norms = {id(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert len(planned.rows) == len(batch_norms)
    assert all(row.position for row in planned.rows) or net == "root"
    restored = Plan.from_dict(json.loads(planned.to_json()))
    assert restored == planned
    assert str(restored) == str(planned)


def test_a_plan_of_every_policy_survives_json() -> None:
    rules = [Rule(KEEP, name="stem"), ("layer10", FREEZE), ("neck", fbn.FreezeAffine()), ("*.1.*", fbn.NormalizeOnly())]
    planned = fbn.plan(Deep(), fbn.Rules(rules))
    assert Plan.from_dict(json.loads(planned.to_json())) == planned
    for policy in NOT_IID:
        other = fbn.plan(Deep(), policy)
        assert Plan.from_dict(json.loads(other.to_json())) == other
        assert "Infinity" not in other.to_json()  # which is Python's JSON and nobody else's
    assert {type(row.policy) for row in planned.rows} == {
        fbn.Keep,
        fbn.Freeze,
        fbn.FreezeAffine,
        fbn.NormalizeOnly,
        type(None),
    }


@pytest.mark.parametrize(
    "data",
    [
        {},
        None,
        [],
        {"model": "Plain"},
        {"model": "Plain", "rows": [{"names": ["bn1"]}]},
        {"model": "Plain", "rows": [None]},
    ],
    ids=str,
)
def test_data_that_are_no_plan_are_one_clear_error(data: Any) -> None:
    with pytest.raises(FinetuneBNError, match=r"plan: got .*; allowed: what Plan.to_dict returned"):
        Plan.from_dict(data)


def test_a_plan_that_names_an_unknown_policy_is_one_clear_error() -> None:
    data = fbn.plan(Plain(), FREEZE).to_dict()
    data["rows"][0]["action"]["policy"] = "Thaw"
    with pytest.raises(FinetuneBNError, match="policy: got 'Thaw'; allowed: "):
        Plan.from_dict(data)


def test_a_plan_prints_as_a_table_with_the_counts_on_top() -> None:
    model = settle(nn.ModuleDict({"net": Tied(), "neck": nn.BatchNorm1d(4, affine=False)}))
    table = str(fbn.plan(model, fbn.Rules([("net.*", SHIFT), Rule(fbn.FreezeAffine(), type="BatchNorm1d")])))
    top, header, line, *rows = table.splitlines()
    assert top == "ModuleDict: 2 x freeze, affine=shift, 1 x REFUSED"
    assert header.split() == ["layer", "type", "C", "what", "happens", "why"]
    assert set(line) == {"-"}
    assert rows[0].split()[:5] == ["net.first.bn", "=", "net.second.bn", "BatchNorm2d", "4"]
    assert "REFUSED" in rows[2]
    assert "no weight and no bias" in rows[2]


def test_the_root_is_called_by_its_place_in_the_table() -> None:
    assert "(root)" in str(fbn.plan(nn.BatchNorm2d(2), FREEZE))


def test_a_plan_is_the_same_after_it_was_carried_out_but_for_the_type() -> None:
    model, x = build("plain")
    before = fbn.plan(model, FREEZE, example_input=x)
    after = fbn.plan(fbn.convert(model, FREEZE, example_input=x), FREEZE, example_input=x)
    assert [(row.names, row.policy, row.position) for row in after.rows] == [
        (row.names, row.policy, row.position) for row in before.rows
    ]
    assert {row.kind for row in after.rows} == {"FrozenBatchNorm2d"}


def test_a_plan_on_the_meta_device_needs_no_values() -> None:
    with torch.device("meta"):
        model = Plain()
    planned = fbn.plan(model, FREEZE, example_input=torch.randn(1, 3, 8, 8))
    assert [row.policy for row in planned.rows] == [FREEZE, FREEZE]
    assert not planned.refused


# Bad input


@pytest.mark.parametrize(
    ("model", "given"),
    [(None, "None"), ("resnet18", "'resnet18'"), ({}, r"\{\}"), (torch.nn.BatchNorm2d, "<class")],
    ids=["None", "str", "dict", "class"],
)
def test_what_is_no_model_is_one_clear_error(model: Any, given: str) -> None:
    with pytest.raises(FinetuneBNError, match=f"model: got {given}.*; allowed: a torch.nn.Module"):
        fbn.plan(model, FREEZE)


def test_a_model_without_batch_norm_is_an_error_that_counts_what_it_has() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.GroupNorm(1, 2), nn.LayerNorm(2))
    with pytest.raises(NoBatchNormMatched, match=r"got 'Sequential'; .*\{'LayerNorm': 2, 'GroupNorm': 1\}"):
        fbn.plan(model, FREEZE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_a_model_that_is_wrapped_already_is_refused_by_name() -> None:
    wrapped = [torch.compile(Plain(), backend="eager"), nn.DataParallel(Plain()), torch.jit.script(Plain())]
    sharded = Plain()
    sharded.__class__ = type("FSDPPlain", (type("FSDPModule", (), {}), Plain), {})  # what fully_shard makes of a module
    for model in (*wrapped, sharded):
        with pytest.raises(
            FinetuneBNError, match=r"model: got .*; allowed: the module before it is wrapped. Convert first"
        ):
            fbn.plan(model, FREEZE)


def test_a_probe_input_of_the_wrong_size_is_one_clear_error_and_changes_nothing() -> None:
    model = settle(Plain())
    with untouched(model), pytest.raises(FinetuneBNError, match=r"example_input: got \[\(1, 1, 9, 9\)\]"):
        fbn.plan(model, FREEZE, example_input=torch.zeros(1, 1, 9, 9))


def test_planning_under_every_policy_changes_nothing_not_even_in_converted_models() -> None:
    for before in (*map(fbn.Freeze, ("none", "shift", "merged", "original")), *NOT_IID):
        model, x = build("tied")
        fbn.convert(model, before, example_input=x)
        twin = copy.deepcopy(model)
        for policy in (FREEZE, KEEP, SHIFT, fbn.FreezeAffine(), fbn.NormalizeOnly(), fbn.NormalizeOnly(True), *NOT_IID):
            with untouched(model):
                fbn.plan(model, policy, example_input=x)
        for ours, other in zip(fbn.revert(model).parameters(), fbn.revert(twin).parameters(), strict=True):
            assert torch.equal(ours, other)


def test_layers_that_a_plan_does_not_list_are_named_when_it_is_carried_out(caplog: pytest.LogCaptureFixture) -> None:
    model = settle(Deep())
    whole = fbn.plan(model, FREEZE)
    with caplog.at_level(logging.WARNING, logger="finetune_bn"):
        fbn.convert(model, Plan(whole.model, whole.rows[:3]))
    assert "2 BatchNorm layers are not in the plan and are left alone: ['layer10', 'neck']" in caplog.text


def test_a_row_says_by_default_that_nothing_stands_in_the_way() -> None:
    row = PlanRow(("bn",), "BatchNorm2d", 4, FREEZE, "")
    assert (row.refused, row.position) == (False, "")


def test_momentum_none_and_other_kinds_are_planned_alike() -> None:
    for norm in (nn.BatchNorm2d(4, momentum=None), nn.SyncBatchNorm(4), nn.BatchNorm2d(4, affine=False)):
        (row,) = fbn.plan(with_norm(norm), FREEZE).rows
        assert (row.policy, row.refused) == (FREEZE, False)


def test_the_price_of_group_norm_on_a_gpu_is_said_once_and_only_where_it_is_planned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    said = "On a GPU GroupNorm takes longer than BatchNorm"
    assert str(fbn.plan(model, fbn.ToGroupNorm(groups=2))).count(said) == 1
    assert said not in str(fbn.plan(model, fbn.Freeze("none")))
