"""What is known of constants holds as long as they are the same tensors with the same numbers, and no longer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from finetune_bn.functional.eager_step import _Seen

EPS = 1e-5
MAKE: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.ones(4),
    "strided": lambda: torch.ones(8)[::2],
    "double": lambda: torch.ones(4, dtype=torch.float64),
    "empty": lambda: torch.ones(0),
}


@pytest.mark.parametrize("kind", MAKE)
def test_tensors_are_known_again_until_they_are_others(kind: str) -> None:
    one, two = MAKE[kind](), MAKE[kind]()
    seen = _Seen(EPS, one, two)
    assert seen.are(EPS, one, two)
    assert seen.are(EPS, one, two)
    assert not seen.are(1e-3, one, two)
    assert not seen.are(EPS, one.clone(), two)
    assert not seen.are(EPS, one, two.clone())
    assert not seen.are(EPS, one, None)
    assert not _Seen(EPS, one, None).are(EPS, one, two)
    assert _Seen(EPS, one, None).are(EPS, one, None)


@pytest.mark.parametrize("kind", ["contiguous", "strided", "double"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_write_to_either_is_noticed(kind: str, which: int) -> None:
    tensors = MAKE[kind](), MAKE[kind]()
    seen = _Seen(EPS, *tensors)
    tensors[which].add_(1)
    assert not seen.are(EPS, *tensors)


@pytest.mark.parametrize("which", [0, 1])
def test_a_write_that_torch_does_not_count_is_noticed_where_the_memory_can_be_read(which: int) -> None:
    tensors = MAKE["contiguous"](), MAKE["contiguous"]()
    seen = _Seen(EPS, *tensors)
    tensors[which].data[0] = 7.0
    assert not seen.are(EPS, *tensors)
    tensors[which].data[0] = 1.0
    assert seen.are(EPS, *tensors)
    tensors[which].data = torch.ones(4)
    assert not seen.are(EPS, *tensors)


def test_a_tensor_of_inference_mode_is_never_known_again() -> None:
    with torch.inference_mode():
        inferred = torch.ones(4)
    assert not _Seen(EPS, inferred, None).are(EPS, inferred, None)
    assert not _Seen(EPS, torch.ones(4), inferred).are(EPS, torch.ones(4), inferred)
