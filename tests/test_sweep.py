"""A sample of the timm sweep (`make sweep` runs all of it), and faults that its checks must catch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers.frozen import FrozenBatchNorm, FrozenBatchNorm2d

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import checks
import sweep_timm
from checks import CHECKS, check

pytest.importorskip("timm")

# One net a timm module, small ones, and among them every kind of BN and of place that timm puts it in.
SAMPLE = {
    "byobnet": "test_byobnet",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "dla": "dla46x_c",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "ghostnet": "ghostnet_050",
    "hgnet": "hgnetv2_b0",
    "inception_next": "inception_next_atto",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "maxxvit": "test_coatnet",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilevit": "mobilevit_xxs",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "senet": "legacy_seresnet18",
    "shvit": "shvit_s1",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xcit": "xcit_nano_12_p8_224",
}
