"""What is advised against what, and what it rests on: `diagnose`, `advise` and the monitor say the same.

Figures are those of the results that each sentence names: emoji at 64 pixels, EfficientNet-Lite0 and where it is named
MobileNetV2.
"""

from __future__ import annotations

from collections.abc import Mapping

from finetune_bn.diagnosis.rule import Reason

# With fewer independent images the batch mean is off by more than a quarter of what images differ in their means.
N_EFF = 16.0
# Batches that differ less from batches dealt at random, by chance, once in so many.
P_VALUE = 1e-3
# A running variance this far off in each layer is felt in the output of a deep network.
RUNNING_VAR_BIAS = 0.05
# How far an output may differ between training and eval mode, in distances between two images, at two looks in a row:
# statistics that were pretrained on other data take some batches to follow. ImageNet's EfficientNet-Lite0 on emoji at
# 64 pixels comes down to 0.45 at batch 64, and to 0.75 at batch 16 and at 16 labels x 2 images.
TRAIN_EVAL_GAP = 0.6
# How far an output may move when the other images of its batch are exchanged, in the same unit. There it is 0.4 to 0.5
# at batch 64, and 0.7 to 0.9 at 16 labels x 2 images, where training with live layers fails.
LEAKAGE = 0.6
# One layer may be off by chance, and what concerns few of them need not be felt.
SHARE_OF_LAYERS = 0.25
# From this design effect on, labels and not the size of the batch are worth a word.
DEFF = 1.1
# From this shift on (standard deviations, median over layers) recalibration on target images brought points: 0.11 on
# other vendors, 0.35 to 0.74 under corruptions.
SHIFT = 0.3

# Frozen layers take no step back from weights that grew too far.
LIMIT = "bound what a step does to a convolution (add StepLimit)"
FREEZE = "Freeze the statistics (BatchNormConversion with policy Freeze)"
INSTEAD = f"{FREEZE}, or normalize by batch renorm (Renorm)."
# Ghost groups of one image a label, often advised for such batches, were no better than live layers.
BY_LABELS = f"{FREEZE}: with batches of 16 labels x 2 images that brought 15 to 21 points, ghost groups none."
LARGER = "Or take larger batches."
SHUFFLE = "Shuffle the loader; where batches have to be made that way, BatchNorm should not learn from them."
RECALIBRATE = "Evaluate by statistics of i.i.d. images (add BatchNormRecalibration), or freeze the pretrained ones."
ONE_MODE = (
    "Evaluate by statistics of the data (add BatchNormRecalibration), or train by those of evaluation (policy Freeze)."
)
SMALLER_RATE = "start again from the pretrained weights with a third of it"
DROP_LAST = "Let the loader drop the last batch (drop_last=True), or take larger batches."
SYNC = "Freeze the statistics, set trainer.sync_batchnorm: true, or give each device more images."

# What was measured, by what it speaks for.
EVIDENCE: Mapping[str, Reason] = {
    "batch 2": Reason(
        "At batch 2 frozen layers were 18.0 points ahead of the best live arm with EfficientNet-Lite0 (95 % interval "
        "+14.9 to +21.2), 18.7 with MobileNetV2 (+16.1 to +21.2); 5 seeds.",
        18.0,
        "results/study_small_batch.md",
    ),
    "batch 4": Reason(
        "At batch 4 frozen layers were 8.0 points ahead of the best live arm with EfficientNet-Lite0 (95 % interval "
        "+5.6 to +10.4); with MobileNetV2 it is undecided, 4.1 (-0.1 to +8.4); 5 seeds.",
        8.0,
        "results/study_small_batch.md",
    ),
    "batch 16": Reason(
        "At batch 16 frozen layers reached 64.4 and 63.5 % (EfficientNet-Lite0, MobileNetV2), live ones that were "
        "recalibrated 62.5 and 64.6 %: undecided, 5 seeds.",
        64.4,
        "results/study_small_batch_arms.md",
    ),
    "P x K": Reason(
        "With batches of 16 labels x 2 images frozen layers were 20.9 points of Recall@1 ahead of live ones that were "
        "recalibrated with EfficientNet-Lite0 (95 % interval +15.3 to +26.5), 14.7 with MobileNetV2 (+11.6 to +17.8); "
        "5 seeds.",
        20.9,
        "results/study_pairs.md",
    ),
    "ghost": Reason(
        "Ghost groups with one image of each label were not ahead of plain live layers in an older study of such "
        "batches (-2.5 ± 3.5 points, 3 seeds: undecided).",
        -2.5,
        "results/study_metric_learning.md",
    ),
    "recalibrated first": Reason(
        "Recalibrating before freezing reached 56.6 % there, freezing alone 64.8 % (3 seeds): pretrained weights fit "
        "the statistics that they were trained with.",
        56.6,
        "results/study_metric_learning.md",
    ),
    "rate": Reason(
        "At batch 4 the best rate of frozen layers was a third of that of live ones, in two families of networks; at "
        "1e-3 frozen layers fell to 14.7 %, one class for all images (1 seed a rate).",
        14.7,
        "results/study_small_batch_rates.md",
    ),
    "limited": Reason(
        "With limited steps frozen layers kept 68.7 and 63.0 % at 1e-3 (EfficientNet-Lite0, MobileNetV2), where "
        "without they fell to 14.7 % (1 seed a rate).",
        68.7,
        "results/study_small_batch_rates.md",
    ),
}
