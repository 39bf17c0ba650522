"""Images are counted as the caller's batches have them, and never channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from finetune_bn.utilities.batch_size import Count, count_images, count_in_call, is_list_of_images


@dataclass
class Sample:
    picture: Tensor
    label: Tensor


class Graphs:
    def __init__(self, **facts: Any) -> None:
        vars(self).update(facts)


def image(size: int = 8) -> Tensor:
    return torch.zeros(3, size, size)


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.zeros(5, 3, 8, 8), Count(5)),
        ((torch.zeros(5, 3, 8, 8), torch.zeros(5)), Count(5)),
        ({"label": torch.zeros(7, 2), "image": torch.zeros(5, 3, 8, 8)}, Count(5)),
        ({"temperature": torch.tensor(1.0), "y": torch.zeros(6)}, Count(6)),
        (Sample(torch.zeros(4, 3, 8, 8), torch.zeros(4)), Count(4)),
        ([image(), image(), image(9), image()], Count(4, first=False)),
        (([image(), image()], [{"boxes": torch.zeros(6, 4)}] * 2), Count(2, first=False)),
        ({"images": [image()] * 6, "targets": [{}] * 6}, Count(6, first=False)),
        (([torch.zeros(5, 3, 8, 8), torch.zeros(5, 3, 8, 8)], torch.zeros(5)), Count(5)),  # two views
        ([torch.zeros(8, 20, 7), torch.zeros(8, 20, 2)], Count(8)),  # sequences: input and target
        (pack_sequence([torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(1, 2)]), Count(3, first=False)),
        (Graphs(num_graphs=6, x=torch.zeros(30, 2)), Count(6, first=False)),
        (Graphs(batch_size=3, x=torch.zeros(30, 2)), Count(3, first=False)),
        (Graphs(x=torch.zeros(30, 2)), Count(1, first=False, known=False)),
        ("words", Count(1, first=False, known=False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_batch_has_so_many_images(batch: Any, count: Count) -> None:
    assert count_images(batch) == count


def test_a_list_is_one_of_images_for_networks_that_take_images() -> None:
    pair = [torch.zeros(3, 20, 7), torch.zeros(3, 20, 2)]
    assert is_list_of_images(pair)
    assert count_images(pair) == Count(2, first=False)
    assert count_images(pair, takes_lists=False) == Count(3)


def test_a_call_is_counted_by_its_first_argument_that_tells() -> None:
    assert count_in_call((torch.zeros(5, 3, 8, 8), torch.zeros(2)), {}) == Count(5)
    assert count_in_call(([image(), image()],), {}) == Count(2, first=False)
    assert count_in_call((0.5,), {"mask": torch.zeros(4, 9), "pixel_values": torch.zeros(6, 3, 8, 8)}) == Count(6)
    assert not count_in_call((None,), {}).known
