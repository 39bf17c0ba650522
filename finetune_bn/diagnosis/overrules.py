"""What a diagnosis rules out, or asks for first, whatever was best in a study."""

from __future__ import annotations

from finetune_bn.diagnosis.results import Diagnosis
from finetune_bn.diagnosis.rule import Arm, Reason, Setting

# In these the layers normalize by the batch, at least for a while.
LIVE: tuple[Arm, ...] = ("live", "scheduled", "recalibrated")
# What is to be mended before any treatment is chosen, by the name of the finding.
_FIRST = ("not finite", "not finite inside", "one label", "normalization")


def setting_of(diagnosis: Diagnosis) -> Setting:
    """Return what the rule looks at."""
    batches = diagnosis.batches
    return Setting(
        batch=max(1, batches.batch_size * (batches.devices if batches.synced else 1)),
        images=diagnosis.train_images,
        shift=diagnosis.shift,
        iid=batches.iid,
        images_per_label=batches.images_per_label,
        log_var=diagnosis.log_var,
        family=diagnosis.family,
    )


def mend_first(diagnosis: Diagnosis) -> tuple[Reason, ...]:
    """Return what is to be mended before a treatment is chosen: it spoils all of them."""
    found = [diagnosis.finding(name) for name in _FIRST]
    return tuple(
        Reason(f"First of all: {finding.sentence} {finding.remedy}".strip(), finding.figure, "diagnosis")
        for finding in found
        if finding is not None and finding.level == "problem"
    )


def overrules(diagnosis: Diagnosis) -> dict[Arm, Reason]:
    """Return the treatments that are out of the question, each with the reason."""
    single = diagnosis.batches.single_value_layers
    reason: Reason | None = None
    if single:
        sentence = f"{len(single)} layers would get one value a channel, as {single[0]}: torch refuses that live."
        reason = Reason(sentence, float(len(single)), "diagnosis")
    elif diagnosis.batches.batch_size == 1 and setting_of(diagnosis).batch == 1:
        sentence = "Batches hold one image: live layers would normalize each image by itself."
        reason = Reason(sentence, 1.0, "diagnosis")
    return {} if reason is None else dict.fromkeys(LIVE, reason)
