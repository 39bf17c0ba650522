"""Random policies for hypothesis, single and by rules."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

import finetune_bn as fbn
from finetune_bn.conversion.policies import Policy

KINDS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAct2d", "FrozenBatchNorm2d", "SyncBatchNorm")


def single() -> st.SearchStrategy[Policy]:
    """Draw one policy for all layers."""
    folds = st.sampled_from(["auto", "auto", "always", "never"])
    learned = st.builds(fbn.Freeze, affine=st.sampled_from(["none", "shift", "merged", "original"]), fold=folds)
    noisy = st.builds(
        fbn.Freeze, affine=st.sampled_from(["none", "shift", "original"]), noise=st.integers(2, 32), fold=folds
    )
    renorm = st.builds(
        fbn.Renorm,
        r_max=st.sampled_from([1.0, 3.0, math.inf]),
        d_max=st.sampled_from([0.0, 5.0, math.inf]),
        bn_steps=st.integers(0, 2),
        ramp_steps=st.integers(0, 2),
        momentum=st.sampled_from([None, 0.0, 0.01]),
    )
    group = st.one_of(
        st.builds(fbn.ToGroupNorm, groups=st.sampled_from(["auto", 1, 2, 4, 32]), init=_inits()),
        st.builds(fbn.ToGroupNorm, channels_per_group=st.sampled_from([1, 2, 16]), init=_inits()),
        st.builds(fbn.ToGroupNorm, eps=st.sampled_from([1e-3, 2.0])),
    )
    other = st.one_of(
        st.just(fbn.Keep()),
        st.just(fbn.FreezeAffine()),
        st.builds(fbn.NormalizeOnly, change_function=st.booleans()),
        st.builds(fbn.Ghost, groups=st.integers(2, 4)),
        renorm,
        st.builds(fbn.Stochastic, p=st.floats(0, 1)),
        st.builds(fbn.EvalNorm, alpha=st.sampled_from([0.0, 0.1, 0.5])),
        group,
    )
    return st.one_of(learned, learned, learned, noisy, other, other, other)


def _inits() -> st.SearchStrategy[Any]:
    return st.sampled_from(["closed_form", "sequential", "copy", "reset"])


def policies() -> st.SearchStrategy[Policy]:
    """Draw a policy, or rules; most rules match some layer, and some match none."""
    rule = st.one_of(
        st.builds(fbn.Rule, single(), name=st.sampled_from(["*", "body.0*", "*1", "*.0", "neck", "body.*.1*"])),
        st.builds(fbn.Rule, single(), type=st.sampled_from(KINDS)),
    )
    last = st.builds(fbn.Rule, single(), name=st.just("*"))
    rules = st.tuples(st.lists(rule, max_size=3), st.lists(last, max_size=1)).filter(lambda both: any(both))
    return st.one_of(single(), single(), rules.map(lambda both: fbn.Rules([*both[0], *both[1]])))
