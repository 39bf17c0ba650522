"""What somebody said who looked at the mutants of `mutate.py` that no test notices."""

from __future__ import annotations

SAME = "no result changes"
# What somebody who looked at survivors says of them: file, text of the change, which one of that text.
JUDGED: dict[str, list[tuple[str, str, int]]] = {
    "no result changes: whether something is traced was asked before": [
        ("functional/shared_backward.py", "constant: `True` -> `False`", 1),
    ],
    "no result changes: it decides how many images are computed at a time": [
        ("recalibration/collector.py", "constant: `1` -> `2`", 4),
    ],
    "no result changes: sizes differ by 32 at most": [
        ("functional/balancing.py", "arithmetic: `2.0 ** (-_LARGEST_POWER)` -> `2.0 * -_LARGEST_POWER`", 0),
    ],
    "no result changes: the same ten levels in another order": [
        ("functional/balancing.py", "arithmetic: `sign * size` -> `sign / size`", 0),
    ],
    "no result changes on a CPU, whose kernel takes a weight of the other dtype too": [
        (
            "functional/shared_backward.py",
            "condition: `weight.to(self.dtype) if self.needed else weight` -> `weight.to(self.dtype) if not self.needed else weight`",  # noqa: E501
            0,
        ),
    ],
    "differs at one number alone": [
        ("recalibration/measurement.py", "comparison: `p > _SUSPICIOUS` -> `p >= _SUSPICIOUS`", 0),
        (
            "recalibration/rehearsal.py",
            "comparison: `((a - b).square().mean(1) / spread).max().sqrt() <= limit` -> `((a - b).square().mean(1) / spread).max().sqrt() < limit`",  # noqa: E501  # noqa: E501
            0,
        ),
    ],
    "no result changes: it decides which of two ways to the same figures is taken, for time or memory": [
        ("functional/eager_step.py", "boolean: `len(x) < 2 and (not x.is_cuda)` -> `len(x) < 2 or not x.is_cuda`", 0),
        ("recalibration/collector.py", "constant: `1` -> `2`", 17),
        ("recalibration/collector.py", "constant: `16` -> `17`", 0),
        ("functional/eager_step.py", "constant: `2` -> `3`", 0),
        ("functional/frozen_act.py", "constant: `17` -> `18`", 0),
        ("functional/frozen_act.py", "constant: `1` -> `2`", 0),
        (
            "functional/group_norm.py",
            "arithmetic: `_BLOCK * x.shape[0] // x.numel()` -> `_BLOCK * x.shape[0] * x.numel()`",
            0,
        ),
        ("functional/group_norm.py", "constant: `0` -> `1`", 1),
        ("functional/group_norm.py", "constant: `1` -> `2`", 0),
        ("functional/image_spread.py", "constant: `2` -> `3`", 7),
        ("functional/moments.py", "comparison: `x.device.type == 'cpu'` -> `x.device.type != 'cpu'`", 1),
        ("functional/moments.py", "comparison: `x.device.type == 'cpu'` -> `x.device.type != 'cpu'`", 2),
        ("functional/moments.py", "condition: `if has_long_rows(x):` -> `if not has_long_rows(x):`", 0),
        ("functional/moments.py", "constant: `1` -> `2`", 1),
        ("recalibration/collector.py", "comparison: `device.type == 'cpu'` -> `device.type != 'cpu'`", 0),
        ("recalibration/collector.py", "constant: `19` -> `20`", 0),
        ("recalibration/collector.py", "constant: `2` -> `3`", 0),
        ("recalibration/collector.py", "negation: `not measures_faster(x)` -> `measures_faster(x)`", 0),
    ],
    "no result changes: a check of lengths that the comparison before it has made": [
        ("recalibration/rehearsal.py", "constant: `True` -> `False`", 7),
    ],
    "no result changes: nobody writes to a record that is frozen": [
        ("functional/moments.py", "constant: `True` -> `False`", 1),
    ],
    "differs where nothing is left to gain, and the search ends": [
        (
            "functional/balancing.py",
            "comparison: `values <= values.min() + _TIE * now` -> `values < values.min() + _TIE * now`",
            0,
        ),
    ],
    "differs at one number alone, where both ways are right": [
        (
            "functional/frozen_act.py",
            "comparison: `bias.detach().abs() <= _EXCESS[dtype] * reach` -> `bias.detach().abs() < _EXCESS[dtype] * reach`",  # noqa: E501  # noqa: E501
            0,
        ),
    ],
    "no result changes: the momentum of buffers that are thrown away": [
        ("functional/batch.py", "constant: `0.0` -> `1.0`", 0),
    ],
    "another seed of the permutations, as good as the first": [
        ("functional/image_spread.py", "constant: `0` -> `1`", 0),
    ],
    "of two ends that are as good as each other the second is taken, and always the second": [
        ("functional/balancing.py", "arithmetic: `1 - _TIE` -> `1 + _TIE`", 0),
    ],
    "with just so many images the parts come from two chunks: as good": [
        ("recalibration/rehearsal.py", "comparison: `len(first) >= 2 * _IMAGES` -> `len(first) > 2 * _IMAGES`", 0),
    ],
    "a bound that was chosen with room: 17 is as safe": [
        ("functional/frozen_act.py", "constant: `16.0` -> `17.0`", 1),
    ],
    "no result changes: in evaluation the kernel does not look at the momentum": [
        ("functional/eager_step.py", "constant: `0.0` -> `1.0`", 3),
        ("functional/shared_backward.py", "constant: `0.0` -> `1.0`", 1),
    ],
    "no result changes: another row of a matrix whose rows have one length": [
        ("functional/balancing.py", "constant: `0` -> `1`", 3),
        ("functional/balancing.py", "constant: `0` -> `1`", 4),
    ],
    "no result changes: a number that is sent and not read in this exchange": [
        ("recalibration/measurement.py", "constant: `0` -> `1`", 5),
    ],
    "no result changes: what the kernel makes of one value is not believed, and it is counted as before": [
        ("recalibration/collector.py", "comparison: `values > 1` -> `values >= 1`", 0),
    ],
    "no result changes: a part by itself does not mix with another": [
        ("recalibration/rehearsal.py", "comparison: `len(parts) > 1` -> `len(parts) >= 1`", 0),
    ],
    "a bound that was chosen with room: half of it is as safe": [
        ("functional/frozen_act.py", "constant: `7` -> `8`", 0),
    ],
    "no result changes: moments of no images add nothing": [
        ("recalibration/collector.py", "comparison: `part.start < images` -> `part.start <= images`", 0),
    ],
    "no result changes: a check of lengths that are equal": [
        ("functional/group_norm.py", "constant: `True` -> `False`", 8),
        ("recalibration/iid_test.py", "constant: `True` -> `False`", 0),
        ("conversion/convert.py", "constant: `True` -> `False`", 6),
    ],
    "what stands for NaN on both sides alike: differs at one number alone": [
        ("recalibration/rehearsal.py", "constant: `0.0` -> `1.0`", 2),
    ],
    "no result changes: the same number": [
        ("functional/frozen.py", "arithmetic: `grad * 1` -> `grad / 1`", 0),
    ],
}
VERDICTS = {mutant: said for said, mutants in JUDGED.items() for mutant in mutants}
