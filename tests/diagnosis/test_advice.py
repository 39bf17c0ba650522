"""What is said of a look, and what is not: one test a cause, each with the case just beside it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from finetune_bn.diagnosis import advice, remedies
from finetune_bn.diagnosis.advice import Look, advise, fisher
from finetune_bn.diagnosis.inspector import LayerLook
from finetune_bn.diagnosis.leakage import LayerLeakage, Leakage


def layer(name: str = "bn", **changes: Any) -> LayerLook:
    """A live layer of which there is nothing to say."""
    fine: dict[str, Any] = {
        "name": name, "kind": "BatchNorm2d", "by_batch": True, "tracks": True, "images": 64, "drift": 0.1,
        "drift_z": 1.0, "log_var_ratio": 0.0, "rho": 0.3, "deff": 1.0, "n_eff": 64.0, "running_var_bias": -0.01,
        "channels": 10, "dead": 0, "died": 0, "not_finite": 0,
    }  # fmt: skip
    return LayerLook(**fine | changes)


def frozen(name: str = "bn", **changes: Any) -> LayerLook:
    return layer(name, **{"kind": "FrozenBatchNorm2d", "by_batch": False, "tracks": False} | changes)


def look(*layers: LayerLook, **changes: Any) -> Look:
    return Look(**{"images": 64, "layers": layers or (layer(),)} | changes)


def leaking(total: float) -> Leakage:
    return Leakage(total, 8, 32, (LayerLeakage(("bn", "tied"), "BatchNorm2d", total / 2),))


def causes(one: Look, before: Look | None = None) -> list[str]:
    return [cause for cause, _ in advise(one, before)]


def sentence(one: Look, before: Look | None = None) -> str:
    ((_, text),) = advise(one, before)
    return text


def test_nothing_is_said_of_a_healthy_look() -> None:
    fine = look(p_value=0.5, p_value_so_far=0.5, train_eval_gap=0.3, leakage=leaking(0.3), labels=9, batches=12)
    assert causes(fine, fine) == []


def test_nothing_is_said_of_frozen_layers_whatever_the_batches_are() -> None:
    bad = frozen(images=4, n_eff=1.5, deff=3.0, running_var_bias=-0.4, drift=5.0, drift_z=50.0)
    one = look(bad, images=4, train_eval_gap=0.0, leakage=leaking(0.0), labels=1, batches=12)
    assert causes(one, one) == []


def test_few_independent_images_because_of_labels_are_named_with_what_the_study_found() -> None:
    few = [layer(f"bn{i}", images=32, n_eff=32 / deff, deff=deff) for i, deff in enumerate([2.4, 3.2, 1.0])]
    text = sentence(look(*few))
    assert text.startswith("BatchNorm normalizes by statistics worth fewer than 16 independent images in 2 of 3 layers")
    assert "10.0 in bn1, of 32 in the batch, as images of one label resemble each other (DEFF 3.2)" in text
    assert "policy Freeze" in text
    assert "15 to 21 points, ghost groups none" in text  # they were often advised, and did not help


@pytest.mark.parametrize("known", [True, False], ids=["labels", "no labels"])
def test_few_images_are_named_without_talk_of_labels(known: bool) -> None:
    small = layer(images=4, **({"deff": 1.01, "n_eff": 3.96} if known else {"deff": None, "n_eff": None, "rho": None}))
    text = sentence(look(small, images=4))
    assert "label" not in text
    assert "larger batches" in text
    assert causes(look(layer(images=16, deff=None, n_eff=None))) == []
    assert causes(look(layer(images=16, deff=1.05, n_eff=15.2))) == []  # as good as chance


def test_what_concerns_few_layers_is_not_said() -> None:
    fine = [layer(f"bn{i}") for i in range(4)]
    off = {"n_eff": 5.0, "deff": 12.8, "running_var_bias": -0.2}
    assert causes(look(layer("odd", **off), *fine)) == []
    assert causes(look(layer("odd", **off), *fine[:3])) == ["n_eff", "running_var"]


def test_batches_that_are_not_iid_are_named_by_the_p_value_of_all_looks() -> None:
    assert causes(look(p_value=2e-4, p_value_so_far=0.02)) == []
    text = sentence(look(p_value=0.04, p_value_so_far=2e-4))
    assert "not i.i.d." in text
    assert "p = 0.0002" in text
    assert causes(look(frozen(), p_value=2e-4, p_value_so_far=2e-4)) == []


def test_one_label_in_all_batches_is_named() -> None:
    assert causes(look(labels=1, batches=8)) == ["one label"]
    assert causes(look(labels=2, batches=8)) == []


@pytest.mark.parametrize("bias", [-0.06, 0.06])
def test_a_bias_of_the_running_variance_is_named_with_its_sign(bias: float) -> None:
    text = sentence(look(layer(running_var_bias=bias)))
    assert f"{100 * bias:+.0f} % in bn" in text
    assert "BatchNormRecalibration" in text
    assert causes(look(layer(running_var_bias=bias, tracks=False))) == []


def test_a_gap_is_named_once_it_lasts() -> None:
    wide, narrow = look(train_eval_gap=0.7), look(train_eval_gap=0.5)
    assert causes(wide) == causes(wide, narrow) == causes(narrow, wide) == []
    assert "70 % of the distance between two images" in sentence(wide, wide)


def test_leakage_is_named() -> None:
    assert causes(look(leakage=leaking(0.59))) == []
    assert "moves by 80 % of the distance" in sentence(look(leakage=leaking(0.8)))


def test_channels_that_died_are_named_in_frozen_layers_too() -> None:
    for kind in (layer, frozen):
        assert causes(look(kind(died=2, dead=9))) == []
        assert "3 of 10 channels of bn have lost their variance" in sentence(look(kind(died=3, dead=3)))


def test_values_that_are_not_finite_are_named_with_a_layer() -> None:
    text = sentence(look(layer("a"), layer("b", not_finite=2), layer("c", not_finite=10)))
    assert text.startswith("NaN or infinite values reach 2 of 3 layers, as b: the training has diverged")


def test_batches_with_one_value_a_channel_are_named() -> None:
    assert "drop_last=True" in sentence(look(single_value_batches=3))


def test_every_sentence_names_a_remedy_and_ends_as_one() -> None:
    bad = layer(images=4, n_eff=2.0, deff=2.0, running_var_bias=-0.4, died=9, not_finite=1)
    one = look(
        bad, p_value_so_far=1e-5, train_eval_gap=2.0, leakage=leaking(1.0), labels=1, batches=9, single_value_batches=1
    )
    found = dict(advise(one, one))
    assert len(found) == 9
    remedies = ("Freeze", "Renorm", "shuffle", "BatchNormRecalibration", "learning rate", "drop_last")
    for text in found.values():
        assert text.endswith(".")
        assert any(word in text for word in remedies)


def test_metrics_have_one_name_a_figure_and_nothing_that_is_unknown_or_not_finite() -> None:
    one = look(
        layer("a", drift=0.2),
        layer("b", drift=0.4, n_eff=None, drift_z=math.inf),
        leakage=leaking(0.5),
        p_value=0.25,
        train_eval_gap=math.nan,
    )
    found = one.metrics()
    assert found["bn/drift"] == pytest.approx(0.3)
    assert found["bn_layers/drift/b"] == 0.4
    assert found["bn/n_eff"] == found["bn_layers/n_eff/a"] == 64.0
    assert found["bn/leakage"] == 0.5
    assert found["bn_layers/leakage/bn"] == 0.25
    assert found["bn/p_value"] == 0.25
    assert not {"bn_layers/n_eff/b", "bn_layers/drift_z/b", "bn/train_eval_gap"} & found.keys()
    assert all(math.isfinite(value) for value in found.values())
    assert one.metrics(per_layer=False) == {k: v for k, v in found.items() if k.startswith("bn/")}


def test_fisher_equals_scipy_and_is_uniform_for_uniform_p_values() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    draws = rng.uniform(size=(500, 6))
    found = [fisher(row) for row in draws]
    expected = [stats.combine_pvalues(row).pvalue for row in draws]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert stats.kstest(found, "uniform").pvalue > 0.05
    assert fisher([0.3]) == pytest.approx(0.3)
    assert fisher([]) == 1.0


def test_the_thresholds_are_those_of_the_diagnosis() -> None:
    shared = {"N_EFF", "P_VALUE", "RUNNING_VAR_BIAS", "TRAIN_EVAL_GAP", "LEAKAGE", "SHARE_OF_LAYERS", "DEFF", "SHIFT"}
    assert {name for name, value in vars(remedies).items() if isinstance(value, float)} == shared
    assert {name for name, value in vars(advice).items() if isinstance(value, float)} == {"DIED"}
