"""The advice: what it rules out, what its overlay says, and that reasons have numbers and sources."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_bn.conversion.policies import Freeze
from finetune_bn.diagnosis import advise as module
from finetune_bn.diagnosis.advise import TREATMENTS, Advice, advise
from finetune_bn.diagnosis.overrules import LIVE, setting_of
from finetune_bn.diagnosis.remedies import EVIDENCE
from finetune_bn.diagnosis.results import BatchDiagnosis, Curvature, Diagnosis, Finding, LayerDiagnosis
from finetune_bn.diagnosis.rule import ARMS, Arm, Choice, Reason, Setting

yaml = pytest.importorskip("yaml")

FACTORS: dict[Arm, float] = {"none": 0.2, "scheduled": 0.5}
LAYER = LayerDiagnosis(("bn",), "BatchNorm2d", 8, by_batch=True, shift_mean=0.2, log_var=0.1)


def diagnosis(**changes: Any) -> Diagnosis:
    fine: dict[str, Any] = {
        "model": "Net", "family": "resnet", "images": 600, "classes": 9, "train_images": 600, "policy": None,
        "findings": (), "layers": (LAYER,), "batches": BatchDiagnosis(4, iid=True, images_per_label=1.0),
        "curvature": Curvature(lr=1e-3),
    }  # fmt: skip
    return Diagnosis(**fine | changes)


def ranking(monkeypatch: pytest.MonkeyPatch, *arms: Arm) -> None:
    def recommend(setting: Setting) -> tuple[Choice, ...]:
        return tuple(
            Choice(arm, float(i), 0.5, (Reason(arm, float(i), "study"),), FACTORS.get(arm, 1.0))
            for i, arm in enumerate(arms)
        )

    monkeypatch.setattr(module, "recommend", recommend)


def test_a_setting_is_what_the_diagnosis_measured() -> None:
    found = setting_of(diagnosis())
    assert (found.batch, found.images, found.shift, found.iid, found.family) == (4, 600, 0.2, True, "resnet")
    together = BatchDiagnosis(4, devices=8)
    assert setting_of(diagnosis(batches=together)).batch == 4
    assert setting_of(diagnosis(batches=replace(together, synced=True))).batch == 32


@pytest.mark.parametrize("arm", ARMS)
def test_an_overlay_is_yaml_with_the_policy_and_a_rate_that_is_a_number(
    arm: Arm, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranking(monkeypatch, arm, "live")
    advice = advise(diagnosis())
    config = yaml.safe_load(advice.overlay)
    assert config["batch_norm"]["policy"]["class_path"] == type(TREATMENTS[arm].policy).__name__
    assert config["model"]["init_args"]["lr"] == pytest.approx(1e-3 * FACTORS.get(arm, 1.0))
    assert isinstance(config["model"]["init_args"]["lr"], float)
    assert ("trainer" in config) is bool(TREATMENTS[arm].callback)
    assert advice.limit_steps is (arm == "limited")
    assert json.loads(advice.to_json())["arm"] == arm


def test_a_rate_asked_about_for_frozen_layers_stays_what_it_is_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = (replace(LAYER, by_batch=False),)
    ranking(monkeypatch, "none", "live")
    assert advise(diagnosis(layers=frozen, curvature=Curvature(lr=2e-4))).lr == pytest.approx(2e-4)
    ranking(monkeypatch, "live", "none")
    assert advise(diagnosis(layers=frozen, curvature=Curvature(lr=2e-4))).lr == pytest.approx(1e-3)
    unknown = advise(diagnosis(curvature=None))
    assert unknown.lr is None
    assert "model" not in yaml.safe_load(unknown.overlay)


def test_a_rate_other_than_that_of_live_layers_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking(monkeypatch, "none", "live")
    reason = next(reason for reason in advise(diagnosis()).reasons if "learning rate was 0.2 times" in reason.sentence)
    assert (reason.figure, reason.source) == (0.2, "scripts/study_advice.py")
    ranking(monkeypatch, "live", "none")
    assert not any("times that of live" in reason.sentence for reason in advise(diagnosis()).reasons)


def test_one_value_a_channel_rules_live_layers_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking(monkeypatch, "live", "scheduled", "recalibrated", "original", "none")
    advice = advise(diagnosis(batches=BatchDiagnosis(1, single_value_layers=("bn",))))
    assert advice.arm == "original"
    assert advice.second[0] not in LIVE
    assert any("one value a channel" in reason.sentence for reason in advice.reasons)
    assert advise(diagnosis()).arm == "live"


def test_a_wrong_normalization_comes_before_all_reasons() -> None:
    finding = Finding("normalization", "problem", "the range fits nothing.", 0.8, "Normalize.")
    first = advise(diagnosis(findings=(finding,))).reasons[0]
    assert first.sentence == "First of all: the range fits nothing. Normalize."


def test_reasons_have_a_source_and_the_measured_settings_speak() -> None:
    advice = advise(diagnosis())
    assert all(reason.source and reason.sentence.endswith(".") for reason in advice.reasons)
    assert any(reason.figure is not None for reason in advice.reasons)
    assert "points behind the best treatment" in advice.sure
    assert advice.title in str(advice)
    assert isinstance(advice, Advice)


def test_p_x_k_batches_bring_the_study_of_metric_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking(monkeypatch, "none", "live")
    advice = advise(diagnosis(batches=BatchDiagnosis(32, iid=False, images_per_label=2.0)))
    assert advice.policy == Freeze("none")
    assert {"results/study_metric_learning.md"} <= {reason.source for reason in advice.reasons}


@pytest.mark.parametrize("reason", EVIDENCE.values(), ids=EVIDENCE)
def test_a_figure_of_the_evidence_is_one_that_its_study_printed(reason: Reason) -> None:
    printed = (Path(__file__).resolve().parents[2] / reason.source).read_text(encoding="utf-8")
    found = re.findall(r"\d+\.\d", reason.sentence)
    assert found
    assert set(found) <= set(re.findall(r"\d+\.\d", printed))
