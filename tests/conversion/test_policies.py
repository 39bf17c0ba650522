"""Policies as data: what they refuse, how they are stored, and how YAML becomes one."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

import finetune_bn as fbn
from finetune_bn.conversion.policies import Policy, Rule, check_policy, policy_from_dict
from finetune_bn.errors import FinetuneBNError

POLICIES: list[Policy] = [
    fbn.Keep(),
    *(fbn.Freeze(affine) for affine in ("none", "shift", "merged", "original")),
    fbn.FreezeAffine(),
    fbn.NormalizeOnly(),
    fbn.NormalizeOnly(change_function=True),
    fbn.Freeze(noise=32),
    fbn.Freeze("original", noise=2),
    fbn.Ghost(2),
    fbn.Ghost(4),
    fbn.Renorm(),
    fbn.Renorm(math.inf, math.inf),
    fbn.Renorm(1.5, 2, bn_steps=10, ramp_steps=100, momentum=0.01),
    fbn.Renorm(momentum=0),
    fbn.Stochastic(),
    fbn.Stochastic(p=1),
    fbn.EvalNorm(1 / 32),
    fbn.Rules([("layer4.*", fbn.Keep()), ("*", fbn.Freeze("shift"))]),
    fbn.Rules([Rule(fbn.NormalizeOnly(True), name="a", stage=0, type="BatchNorm1d"), Rule(fbn.Keep(), stage=3)]),
    fbn.Rules([("neck", fbn.Renorm(math.inf, 1)), ("*", fbn.Ghost(4))]),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_survives_json(policy: Policy) -> None:
    restored = policy_from_dict(json.loads(json.dumps(policy.to_dict(), allow_nan=False)))
    assert restored == policy
    assert type(restored) is type(policy)
    assert hash(restored) == hash(policy)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_policy_cannot_be_changed_and_describes_itself_in_one_line(policy: Policy) -> None:
    for field in dataclasses.fields(policy):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(policy, field.name, None)
    assert policy.describe()
    assert "\n" not in policy.describe()


def test_different_policies_describe_themselves_differently() -> None:
    single = [policy for policy in POLICIES if not isinstance(policy, fbn.Rules)]
    # with or without change_function it does the same thing
    assert len({policy.describe() for policy in single}) == len(single) - 1


@pytest.mark.parametrize("affine", ["gamma", "", None, "None", 1, True, ["none"]])
def test_freeze_takes_four_words_for_affine(affine: Any) -> None:
    with pytest.raises(FinetuneBNError, match=r"affine: got .*; allowed: 'none', 'shift', 'merged', 'original'"):
        fbn.Freeze(affine)


def test_a_policy_from_an_older_checkpoint_lacks_what_came_later() -> None:
    assert policy_from_dict({"policy": "Freeze", "affine": "shift"}) == fbn.Freeze("shift", noise=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fbn.Freeze(noise=1), "noise: got 1; allowed: a whole number of images from 2 on"),
        (lambda: fbn.Freeze(noise=0), "noise: got 0"),
        (lambda: fbn.Freeze(noise="8"), "noise: got '8'"),
        (lambda: fbn.Freeze("merged", noise=8), "noise: got 8; allowed: none with affine='merged'"),
        (lambda: fbn.Ghost(1), r"groups: got 1; allowed: a whole number from 2 on\. Take K"),
        (lambda: fbn.Ghost(2.0), "groups: got 2.0"),
        (lambda: fbn.Renorm(r_max=0.5), "r_max: got 0.5; allowed: a number from 1 on, or inf"),
        (lambda: fbn.Renorm(r_max="no limit"), "r_max: got 'no limit'"),
        (lambda: fbn.Renorm(d_max=-1), "d_max: got -1; allowed: a number from 0 on, or inf"),
        (lambda: fbn.Renorm(bn_steps=1.5), "bn_steps: got 1.5; allowed: a whole number from 0 on"),
        (lambda: fbn.Renorm(ramp_steps=-1), "ramp_steps: got -1"),
        (lambda: fbn.Renorm(momentum=1.5), "momentum: got 1.5; allowed: a number from 0 to 1, or None"),
        (lambda: fbn.Renorm(momentum="slow"), "momentum: got 'slow'"),
        (lambda: fbn.Renorm(momentum=True), "momentum: got True"),
        (lambda: fbn.Stochastic(p=2), "p: got 2; allowed: a number from 0"),
        (lambda: fbn.EvalNorm(alpha=1), "alpha: got 1; allowed: a number from 0 to less than 1"),
    ],
)
def test_what_a_layer_would_refuse_its_policy_refuses(make: Any, message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": fbn.Keep()}, r"rule: got Keep\(\); allowed: at least one of name, stage, type"),
        ({"policy": fbn.Keep, "name": "*"}, "rule.policy: got <class .*Keep'>; allowed: a policy such as"),
        ({"policy": "keep", "name": "*"}, "rule.policy: got 'keep'"),
        ({"policy": None, "name": "*"}, "rule.policy: got None"),
        ({"policy": Policy(), "name": "*"}, "rule.policy: got <finetune_bn"),
        ({"policy": fbn.Rules([("*", fbn.Keep())]), "name": "*"}, "rule.policy: .*not Rules"),
        ({"policy": fbn.Keep(), "name": 4}, "rule.name: got 4; allowed: str"),
        ({"policy": fbn.Keep(), "stage": "4"}, "rule.stage: got '4'; allowed: int"),
        ({"policy": fbn.Keep(), "type": object}, "rule.type: got <class 'object'>; allowed: str"),
    ],
)
def test_a_bad_rule_is_one_clear_error(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        Rule(**arguments)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "rules: got .*; allowed: at least one rule. Use Keep"),
        (fbn.Keep(), r"rules: got Keep\(\); allowed: a list"),
        (None, "rules: got None; allowed: a list"),
        ("layer4.*", r"rules\[0\]: got 'l'; allowed: a Rule, or a pair"),
        ([("*", fbn.Keep()), fbn.Keep()], r"rules\[1\]: got Keep\(\); allowed: a Rule, or a pair"),
        ([("*",)], r"rules\[0\]: got \('\*',\)"),
        ([("*", "keep")], "rule.policy: got 'keep'"),
        ([(fbn.Keep(), "*")], r"rules\[0\]"),
    ],
)
def test_bad_rules_are_one_clear_error(rules: Any, message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        fbn.Rules(rules)


def test_a_pair_is_a_rule_by_name() -> None:
    rules = fbn.Rules([("layer4.*", fbn.Keep()), ["*", fbn.Freeze()]])
    assert rules.rules == (Rule(fbn.Keep(), name="layer4.*"), Rule(fbn.Freeze(), name="*"))


@pytest.mark.parametrize(
    ("conditions", "layer", "expected"),
    [
        ({"name": "layer4.*"}, (["layer4.0.bn1"], "BatchNorm2d", 4), True),
        ({"name": "layer4.*"}, (["layer40.bn1"], "BatchNorm2d", 4), False),
        ({"name": "layer?.*"}, (["layer4.0.bn1"], "BatchNorm2d", 4), True),
        ({"name": "LAYER4.*"}, (["layer4.0.bn1"], "BatchNorm2d", 4), False),
        ({"name": "*.bn1"}, (["a.bn2", "b.bn1"], "BatchNorm2d", None), True),
        ({"name": "bn1"}, (["layer4.bn1"], "BatchNorm2d", None), False),
        ({"name": ""}, ([""], "BatchNorm2d", None), True),
        ({"stage": 0}, (["stem"], "BatchNorm2d", 0), True),
        ({"stage": 0}, (["head"], "BatchNorm2d", None), False),
        ({"type": "BatchNorm1d"}, (["neck"], "BatchNorm1d", None), True),
        ({"type": "BatchNorm2d"}, (["neck"], "BatchNormAct2d", None), False),
        ({"name": "a*", "type": "BatchNorm1d"}, (["a"], "BatchNorm2d", None), False),
        ({"name": "a*", "type": "BatchNorm2d", "stage": 1}, (["a"], "BatchNorm2d", 1), True),
        ({"name": "a*", "type": "BatchNorm2d", "stage": 1}, (["a"], "BatchNorm2d", 2), False),
    ],
)
def test_a_rule_matches_where_all_of_its_conditions_are_met(
    conditions: dict[str, Any], layer: tuple[list[str], str, int | None], expected: bool
) -> None:
    assert Rule(fbn.Keep(), **conditions).matches(*layer) is expected


def test_a_rule_describes_its_conditions() -> None:
    assert Rule(fbn.Keep(), name="a.*", stage=0, type="T").describe() == "name='a.*', stage=0, type='T'"
    assert Rule(fbn.Keep(), stage=0).describe() == "stage=0"


def nested(depth: int) -> dict[str, Any]:
    """Return rules within rules, deeper than Python goes."""
    data: dict[str, Any] = {"policy": "Keep"}
    for _ in range(depth):
        data = {"policy": "Rules", "rules": [{"policy": data, "name": "*"}]}
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"policy": "Thaw"},
            "policy: got 'Thaw'; allowed: .*Keep, Freeze, FreezeAffine, NormalizeOnly, ToGroupNorm, Ghost, Renorm",
        ),
        ({}, "policy: got None"),
        ("Freeze", "policy: got 'Freeze'; allowed: a dict"),
        (None, "policy: got None; allowed: a dict"),
        ({"policy": "Freeze", "affin": "none"}, "allowed: the arguments of Freeze"),
        ({"policy": "Freeze", "affine": "all"}, "affine: got 'all'"),
        ({"policy": "Keep", "affine": "none"}, "allowed: the arguments of Keep"),
        ({"policy": "Rules"}, "allowed: the arguments of Rules"),
        ({"policy": "Rules", "rules": [{"policy": {"policy": "Keep"}, "nam": "*"}]}, "allowed: the arguments of Rules"),
        ({"policy": "Rules", "rules": [{"name": "*"}]}, "allowed: the arguments of Rules"),
        ({"policy": "Rules", "rules": [{"policy": {"policy": "Thaw"}, "name": "*"}]}, "policy: got 'Thaw'"),
        ({"policy": ["Freeze"]}, r"policy: got \['Freeze'\]; allowed: a dict"),
        ({"policy": {"policy": "Freeze"}}, "allowed: a dict"),
        ({"policy": "Freeze", 5: "none"}, "allowed: the arguments of Freeze"),
        ({"policy": "Rules", "rules": 5}, "allowed: the arguments of Rules"),
        ({"policy": "Rules", "rules": ["ab"]}, "allowed: the arguments of Rules"),
        (nested(2000), "rule.policy: got 'Rules'; allowed: .*not rules within rules"),
    ],
)
def test_data_that_describe_no_policy_are_one_clear_error(data: Any, message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        policy_from_dict(data)


@pytest.mark.parametrize("given", ["freeze", None, {"policy": "Keep"}, Policy(), 3])
def test_an_unknown_policy_is_answered_with_the_list_of_those_there_are(given: Any) -> None:
    with pytest.raises(FinetuneBNError, match=r"policy: got .*; allowed: Keep\(\.\.\.\), Freeze\(\.\.\.\), "):
        check_policy(given)


def test_a_policy_class_is_answered_with_a_hint() -> None:
    with pytest.raises(FinetuneBNError, match=r"Write it with parentheses: an object, not a class"):
        check_policy(fbn.Freeze)


def test_a_policy_of_someone_elses_making_is_refused_before_anything_happens() -> None:
    class Thaw(Policy):
        pass

    class MyFreeze(fbn.Freeze):
        pass

    for policy in (Thaw(), MyFreeze()):
        with pytest.raises(FinetuneBNError, match="policy: got"):
            check_policy(policy)
    assert check_policy(fbn.Keep()) == fbn.Keep()


# From YAML: what LightningCLI does with a class_path.


def parse(value: Any) -> Any:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=Policy)
    config = parser.parse_object({"policy": value})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
    return instantiate(config).policy


def class_path(policy: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"finetune_bn.{policy}", **({"init_args": arguments} if arguments else {})}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (class_path("Keep"), fbn.Keep()),
        (class_path("Freeze"), fbn.Freeze()),
        (class_path("Freeze", affine="merged"), fbn.Freeze("merged")),
        (class_path("FreezeAffine"), fbn.FreezeAffine()),
        (class_path("NormalizeOnly", change_function=True), fbn.NormalizeOnly(True)),
        (class_path("Freeze", noise=32), fbn.Freeze(noise=32)),
        (class_path("Ghost", groups=2), fbn.Ghost(2)),
        (class_path("Renorm"), fbn.Renorm()),
        (
            class_path("Renorm", r_max=math.inf, d_max=math.inf, momentum=0.01),
            fbn.Renorm(math.inf, math.inf, momentum=0.01),
        ),
        (class_path("Stochastic", p=0.25), fbn.Stochastic(0.25)),
        (class_path("EvalNorm", alpha=0.03125), fbn.EvalNorm(1 / 32)),
        ("finetune_bn.Freeze", fbn.Freeze()),
        (
            class_path(
                "Rules",
                rules=[
                    {"name": "layer4.*", "policy": class_path("Keep")},
                    {"stage": 0, "type": "BatchNorm2d", "policy": class_path("Freeze", affine="original")},
                    {"name": "*", "policy": class_path("Freeze", affine="shift")},
                ],
            ),
            fbn.Rules(
                [
                    ("layer4.*", fbn.Keep()),
                    Rule(fbn.Freeze("original"), stage=0, type="BatchNorm2d"),
                    ("*", fbn.Freeze("shift")),
                ]
            ),
        ),
        (
            class_path("Rules", rules=[["layer4.*", class_path("Keep")], ["*", class_path("Freeze")]]),
            fbn.Rules([("layer4.*", fbn.Keep()), ("*", fbn.Freeze())]),
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_jsonargparse_builds_a_policy_from_what_yaml_holds(value: Any, expected: Policy) -> None:
    assert parse(value) == expected


def test_yaml_writes_infinity_with_a_dot() -> None:
    yaml = pytest.importorskip("yaml")
    value = yaml.safe_load("{class_path: finetune_bn.Renorm, init_args: {r_max: .inf, d_max: .inf}}")
    assert parse(value) == fbn.Renorm(math.inf, math.inf)


@pytest.mark.parametrize(
    "value",
    [
        class_path("Freeze", affine="gamma"),
        class_path("Freeze", affin="none"),
        class_path("Ghost"),
        class_path("Ghost", groups="two"),
        class_path("Thaw"),
        class_path("Rules", rules=[{"name": "*", "policy": class_path("Freeze", affine="gamma")}]),
        class_path("Rules", rules=[{"nam": "*", "policy": class_path("Keep")}]),
        {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}},
    ],
    ids=lambda value: str(value)[-40:],
)
def test_jsonargparse_refuses_what_is_no_policy(value: Any) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    with pytest.raises(jsonargparse.ArgumentError, match="policy"):
        parse(value)
