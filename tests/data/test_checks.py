from __future__ import annotations

import pytest

from finetune_bn.data.checks import choice, fractions, whole
from finetune_bn.errors import BadData


def test_what_the_data_modules_refuse_is_bad_data() -> None:
    with pytest.raises(BadData, match=r"augment: got 'Lihgt'"):
        choice("augment", "Lihgt", ("none", "light"))
    with pytest.raises(BadData, match="allowed: a whole number from 0 up or auto"):
        whole("num_workers", "many", 0, " or auto")


@pytest.mark.parametrize("shares", [(-0.1, 0.2), (1.0, 0.0), (0.5, 0.5), (float("nan"), 0.1)])
def test_fractions_must_leave_something_for_training(shares: tuple[float, float]) -> None:
    assert fractions(0.1, 0.0) == (0.1, 0.0)
    with pytest.raises(BadData, match="fraction"):
        fractions(*shares)
