"""Batches of any form are cut and joined without losing an image, its order or where it came from."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune_bn.errors import BadData, FinetuneBNError
from finetune_bn.utilities.batches import Chunk, Feeder, check_batches, join, recut


class Takes(nn.Module):
    """Takes a keyword argument of a name of its own, and remembers what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.got: list[Tensor] = []

    def forward(self, picture: Tensor, scale: float = 1.0) -> Tensor:
        self.got.append(picture)
        return picture * self.weight * scale


def feeder(model: nn.Module | None = None, forward: Any = None) -> Feeder:
    return Feeder(model or Takes(), forward, None)


def numbered(*sizes: int) -> list[Tensor]:
    """Return batches whose images carry their running number."""
    return list(torch.arange(sum(sizes)).float()[:, None, None].expand(-1, 2, 3).split(sizes))


def chunks(*sizes: int) -> list[Chunk]:
    feed = feeder()
    return [feed.chunk(batch, number) for number, batch in enumerate(numbered(*sizes))]


def numbers(chunk: Chunk) -> list[int]:
    ((x,), kwargs) = chunk.content
    assert kwargs == {}
    return [int(n) for n in x[:, 0, 0]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("sizes", [(1,), (4, 4, 4), (1, 7, 2, 1, 5), (20,), (2, 3)])
def test_recut_keeps_every_image_its_order_and_its_origin(size: int, sizes: tuple[int, ...]) -> None:
    found = list(recut(chunks(*sizes), size))
    assert [n for chunk in found for n in numbers(chunk)] == list(range(sum(sizes)))
    assert [len(chunk) for chunk in found[:-1]] == [size] * (len(found) - 1)
    assert 0 < len(found[-1]) <= size
    origin = [(batch, place) for batch, n in enumerate(sizes) for place in range(n)]
    assert [pair for chunk in found for pair in zip(chunk.batch, chunk.position, strict=True)] == origin


def test_what_has_another_shape_or_cannot_be_joined_is_passed_on_in_its_place() -> None:
    feed = feeder(forward=lambda model, batch: None)
    small, large = torch.zeros(3, 2, 4), torch.zeros(3, 2, 5)
    uncuttable = {"x": torch.zeros(5, 2), "temperature": torch.tensor(0.5)}
    batches: list[Any] = [small, small, large, uncuttable, small]
    found = list(recut([feed.chunk(batch, number) for number, batch in enumerate(batches)], 4))
    assert [sorted(set(chunk.batch)) for chunk in found] == [[0, 1], [1], [2], [3], [4]]
    assert [len(chunk) for chunk in found] == [4, 2, 3, 5, 3]
    assert found[3].shape_key is None
    assert found[3].content is not uncuttable  # moved to the device as a whole
    assert set(found[3].content) == {"x", "temperature"}


@pytest.mark.parametrize("part", [slice(1, 4), [1, 2, 3]])
def test_a_part_of_a_chunk_is_the_part_of_every_tensor(part: Any) -> None:
    feed = feeder(forward=lambda model, batch: None)
    chunk = feed.chunk({"a": torch.arange(5), "b": (torch.arange(10).view(5, 2), "label")}, 7)[part]
    assert chunk.content["a"].tolist() == [1, 2, 3]
    assert chunk.content["b"][0].tolist() == [[2, 3], [4, 5], [6, 7]]
    assert (chunk.batch, chunk.position) == ((7, 7, 7), (1, 2, 3))


def test_joining_keeps_the_form_and_cutting_undoes_it() -> None:
    feed = feeder(forward=lambda model, batch: None)
    parts = [feed.chunk((torch.full((n, 2), float(n)), {"y": torch.arange(n)}), n) for n in (2, 3)]
    whole = join(parts)
    assert len(whole) == 5
    assert whole.content[1]["y"].tolist() == [0, 1, 0, 1, 2]
    again = whole[2:]
    assert torch.equal(again.content[0], parts[1].content[0])
    assert (again.batch, again.position) == (parts[1].batch, parts[1].position)
    assert join(parts[:1]) is parts[0]


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, 3),
        (torch.ones(2, 3), torch.tensor([4, 5])),
        [torch.ones(2, 3), ["a", "b"]],
        {"picture": torch.ones(2, 3), "label": torch.tensor([4, 5])},
        {"image": torch.ones(2, 3), "label": torch.tensor([4, 5])},
        ({"pixel_values": torch.ones(2, 3)}, torch.tensor([4, 5])),
        UserDict(picture=torch.ones(2, 3)),
    ],
    ids=["tensor", "tuple", "list", "a key that forward takes", "a usual key", "tuple of dict", "mapping"],
)
def test_the_input_of_the_model_is_found_in_a_batch(batch: Any) -> None:
    model = Takes()
    feed = feeder(model)
    chunk = feed.chunk(batch, 0)
    assert len(chunk) == 2
    feed(chunk)
    assert torch.equal(model.got[0], torch.ones(2, 3))


def test_a_key_that_forward_takes_comes_before_a_usual_one_and_other_arguments_come_along() -> None:
    model = Takes()
    feed = feeder(model)
    feed(feed.chunk({"image": torch.zeros(2, 3), "picture": torch.ones(2, 3), "scale": 2.0}, 0))
    assert torch.equal(model.got[0], torch.ones(2, 3))
    assert feed.chunk({"picture": torch.ones(2, 3), "scale": 2.0}, 0).content[1]["scale"] == 2.0


def test_a_forward_of_ones_own_gets_the_model_and_the_batch_as_it_came() -> None:
    seen: list[tuple[nn.Module, Any]] = []
    model = Takes()
    feed = feeder(model, lambda *arguments: seen.append(arguments))
    feed(feed.chunk({"left": torch.ones(2, 3), "right": torch.zeros(2, 3)}, 0))
    assert seen[0][0] is model
    assert list(seen[0][1]) == ["left", "right"]


def test_batches_go_where_they_are_sent_and_else_where_the_model_is() -> None:
    assert Feeder(Takes(), None, "meta").chunk(torch.ones(2, 3), 0).content[0][0].device.type == "meta"
    assert Feeder(Takes().to("meta"), None, None).device.type == "meta"
    assert Feeder(nn.ReLU(), None, None).device.type == "cpu"


@pytest.mark.parametrize(
    ("batch", "given"),
    [
        (torch.zeros(0, 3), r"tensor of shape \(0, 3\)"),
        (torch.tensor(1.0), r"tensor of shape \(\)"),
        ((), "tuple of nothing"),
        (([torch.ones(2, 3)],), "list of Tensor"),
        ("words", "str"),
        ({"label": torch.ones(2)}, "dict with the keys label"),
        (None, "NoneType"),
    ],
)
def test_a_batch_without_an_input_is_an_error_that_says_what_it_was(batch: Any, given: str) -> None:
    with pytest.raises(BadData, match=rf"batches\[3\]: got '{given}'"):
        feeder().chunk(batch, 3)


def test_only_what_yields_batches_is_taken_and_a_tensor_is_one_batch() -> None:
    x = torch.ones(2, 3)
    assert check_batches(x) == [x]
    loader = iter([x])
    assert check_batches(loader) is loader
    for wrong in ({"image": x}, "data", nn.ReLU(), 7, None):
        with pytest.raises(FinetuneBNError, match=r"batches: got .*a DataLoader, or a list of batches"):
            check_batches(wrong)
