"""What policy auto has decided reaches a foreign module: its rate by either name, and a config that says the same."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest

from finetune_bn.callbacks.decision import Decision, check_beside, rate_of, set_rate
from finetune_bn.callbacks.recalibration import BatchNormRecalibration
from finetune_bn.callbacks.step_limit import StepLimit
from finetune_bn.comparison.arms import ARMS
from finetune_bn.errors import FinetuneBNError


class Module(pl.LightningModule):
    """Has a rate as an attribute, as a hyperparameter, or both."""

    def __init__(self, attribute: Any = None, hyperparameter: Any = None, name: str = "lr") -> None:
        super().__init__()
        if attribute is not None:
            setattr(self, name, attribute)
        if hyperparameter is not None:
            self.hparams[name] = hyperparameter


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
@pytest.mark.parametrize(("attribute", "hyperparameter"), [(0.1, None), (None, 0.1), (0.1, 0.1)])
def test_a_rate_is_read_and_set_wherever_the_module_has_it(name: str, attribute: Any, hyperparameter: Any) -> None:
    module = Module(attribute, hyperparameter, name)
    assert rate_of(module) == 0.1
    set_rate(module, 0.02)
    assert rate_of(module) == 0.02
    assert getattr(module, name, None) == (None if attribute is None else 0.02)
    assert module.hparams.get(name) == (None if hyperparameter is None else 0.02)


@pytest.mark.parametrize("value", [None, True, "fast", 0, -1.0])
def test_what_is_no_rate_is_none_and_where_there_is_none_nothing_is_set(value: Any) -> None:
    module = Module(value)
    assert rate_of(module) is None
    if value is None:
        set_rate(module, 0.02)
        assert not hasattr(module, "lr")
        assert dict(module.hparams) == {}


@pytest.mark.parametrize(("arm", "callback"), [("limited", "StepLimit"), ("none", None), ("live", None)])
def test_the_config_of_a_decision_has_its_policy_rate_and_callbacks(arm: str, callback: str | None) -> None:
    decision = Decision.of(ARMS[arm], 0.02, "fast", "because")
    overlay = decision.overlay(None)
    policy = overlay["batch_norm"]["policy"]
    assert policy["class_path"].startswith("finetune_bn.")
    assert overlay["model"] == {"init_args": {"lr": 0.02}}
    added = overlay.get("trainer", {}).get("callbacks+", [])
    if callback is not None:
        assert [part["class_path"].rpartition(".")[2] for part in added] == [callback]
        assert [type(made).__name__ for made in decision.callbacks(None)] == [callback]
    assert "model" not in Decision.of(ARMS[arm], None, "fast", "because").overlay(None)


def test_callbacks_that_are_part_of_treatments_are_refused_beside_it_and_one_for_tests_alone_is_not() -> None:
    check_beside([BatchNormRecalibration(when="test")])
    with pytest.raises(FinetuneBNError, match=r"callbacks: got \['StepLimit', 'BatchNormRecalibration'\]"):
        check_beside([StepLimit(), BatchNormRecalibration()])
