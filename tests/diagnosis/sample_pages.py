"""A diagnosis, an advice and a comparison as data, with names that are HTML and numbers that are missing."""

from __future__ import annotations

import math

from finetune_bn.comparison.result import Comparison, Run
from finetune_bn.conversion.policies import Freeze
from finetune_bn.diagnosis.advise import Advice
from finetune_bn.diagnosis.results import BatchDiagnosis, Curvature, Diagnosis, Finding, LayerDiagnosis, PolicyMemory
from finetune_bn.diagnosis.rule import Reason

NASTY = """<script>alert('&"')</script>"""


def diagnosis(layers: int = 49) -> Diagnosis:
    rows = []
    for i in range(layers):
        measured = i != 5
        rows.append(
            LayerDiagnosis(
                names=(NASTY,) if i == 3 else (f"blocks.{i // 8}.{i % 8}.bn{1 + i % 3}",),
                kind="BatchNormAct2d",
                channels=16 * (1 + i // 8),
                by_batch=True,
                shift_mean=0.1 + 0.4 * abs(math.sin(i)) if measured else None,
                log_var_ratio=0.8 * math.cos(i / 3) if measured else math.nan,
                log_var=0.3,
                rho=0.2,
                deff=1 + i / 20,
                n_eff=32 / (1 + i / 20),
                running_var_bias=-0.02 * (i % 7),
                leakage=0.02 * (i % 9),
                values_per_channel=max(2, 32 * (64 // (1 + i)) ** 2),
            )
        )
    findings = (
        Finding("batches", "problem", "Batches are no independent draws (p = 0.0002, DEFF 2.1).", 2.1, "Freeze them."),
        Finding(NASTY, "warning", f"{NASTY} is the name of a layer.", None, ""),
        Finding("shift", "note", "The data lie 0.36 sd off the stored means.", 0.36),
        Finding("memory", "ok", "Freezing keeps 14.2 MiB an image less.", 14.2),
    )
    sizes = ((8.0, 96), (24.0, 310))
    return Diagnosis(
        model="EfficientNet",
        family="tf_efficientnet_lite0",
        images=1024,
        classes=54,
        train_images=4000,
        policy="freeze, affine=none",
        findings=findings,
        layers=tuple(rows),
        batches=BatchDiagnosis(32, batches=32, labels=54, images_per_label=2.0, p_value=2e-4, iid=False, deff=2.1),
        curvature=Curvature(12.5, 88.0, 64, "SGD with momentum 0.9", 0.1, 0.304, 0.0432, 0.02),
        memory=(
            PolicyMemory("as it is", 44_100_000, 812, sizes),
            PolicyMemory("freeze, affine=none", 29_400_000, 690, sizes),
            PolicyMemory("freeze, affine=original", 31_000_000, None, None),
        ),
        left_out=("memory of a policy without launches",),
        seconds=21.4,
    )


def advice() -> Advice:
    return Advice(
        arm="none",
        title="Freeze the layers, without gamma and beta",
        policy=Freeze("none"),
        lr_factor=0.5,
        lr=0.02,
        limit_steps=False,
        recalibrate=False,
        schedule=None,
        reasons=(Reason("Batches of 32 are worth 15 images.", 15.0, "study_metric_learning"),),
        second=("limited", f"A learning rate above 0.05 would; {NASTY}."),
        overlay="batch_norm:\n  policy: <finetune_bn.Freeze>\n",
        sure="Within 1 point of the best in 85 % of the settings it was not fitted on.",
    )


def comparison() -> Comparison:
    """Three treatments at three rates and two seeds, one of them dropped, one that failed."""
    runs = []
    for arm, base in (("live", 0.5), ("frozen", 0.62), ("limited", 0.6)):
        for rate in (0.001, 0.01, 0.1):
            for seed in (0, 1):
                dropped = 40 if arm == "live" and rate == 0.1 else None
                failed = "the loss was not finite at step 12" if arm == "frozen" and rate == 0.1 else None
                lengths = (40,) if dropped else (40, 80, 160)
                best = base + 0.05 * math.log10(rate * 1000) + 0.01 * seed
                scores = tuple((n, None if failed else best * (1 - 12 / n)) for n in lengths)
                losses = tuple((n, 2.0 * math.exp(-n / 90) + 0.1) for n in range(10, lengths[-1] + 1, 10))
                score = scores[-1][1]
                runs.append(
                    Run(arm, rate, seed, lengths[-1], scores, losses, score, 3.2, dropped_at=dropped, failed=failed)
                )
    arms = {"live": "as it is", "frozen": f"freeze; {NASTY}", "limited": "freeze, with limited steps"}
    return Comparison("ResNet", "accuracy", arms, tuple(runs), (0, 1), (40, 80, 160), (2560, 400), (NASTY,), 57.6)
