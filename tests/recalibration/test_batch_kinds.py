"""Batches that are not one tensor with an image in each row: clips, bags, lists, graphs, padded sequences."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import finetune_bn as fbn
from finetune_bn.errors import BadData, FinetuneBNError
from tests.recalibration.test_stateful import distance, recalibrated, whole_batch
from tests.stateful_nets import TSM, Bag, TimeFirst


@pytest.mark.parametrize("mode", ["auto", "exact", "one_pass"])
@pytest.mark.parametrize("keep", [None, True])
@pytest.mark.parametrize("size", [16, 96])
def test_clips_are_kept_whole(mode: Any, keep: bool | None, size: int) -> None:
    # mit-han-lab/temporal-shift-module#204: [clips x frames, C, H, W]; cut in the midst of a clip, the model raised.
    torch.manual_seed(0)
    model, clips = TSM(frames=5), torch.randn(6, 5, 3, size, size)
    x = clips.flatten(0, 1)
    reference = whole_batch(model, x)
    record = recalibrated(model, x.split(10), mode=mode, keep_batches=keep)
    assert record.images == 30
    told = any("kept as they came" in w and "keep_batches=True" in w for w in record.warnings)
    assert told == (keep is None)
    # In one_pass each batch of two clips has its own statistics: near, and exact in the first layer.
    assert distance(model, reference) < (0.2 if mode == "one_pass" else 3e-4)


def test_a_cut_that_the_user_asks_for_and_the_model_refuses_names_the_remedy() -> None:
    with pytest.raises(RuntimeError) as caught:
        fbn.recalibrate(TSM(frames=5), torch.randn(40, 3, 16, 16).split(20), keep_batches=False)
    assert any("pass keep_batches=True" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (Bag(), [torch.randn(n, 8) for n in (7, 5, 9, 7)]),
        (TimeFirst(), [torch.randn(n, 3, 4) for n in (7, 5, 9, 7)]),
    ],
    ids=["bags", "time first"],
)
def test_bags_and_time_first_see_whole_batches(model: nn.Module, batches: list[Tensor]) -> None:
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, []).append(args[0].detach().clone())

    other = copy.deepcopy(model)
    record = recalibrated(model, batches)
    assert (record.mode, record.images) == ("exact", sum(map(len, batches)))
    for name, layer in other.named_modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.register_forward_pre_hook(keep(name))
    first = next(name for name, layer in other.named_modules() if isinstance(layer, nn.BatchNorm1d))
    with torch.no_grad():
        for batch in batches:
            other.eval()(batch)
    values = numpy.concatenate([x.double().numpy() for x in seen[first]])
    layer = model.get_submodule(first)
    assert numpy.abs(layer.running_mean.numpy() - values.mean(0)).max() < 1e-6
    assert numpy.abs(layer.running_var.numpy() / values.var(0, ddof=1) - 1).max() < 1e-5


class Detector(nn.Module):
    """Takes images of different sizes in a list, and in training targets; pads them as torchvision does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.box, self.bn_box = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Tensor:
        size = [max(image.shape[i] for image in images) for i in (1, 2)]
        x = torch.stack([F.pad(i, (0, size[1] - i.shape[2], 0, size[0] - i.shape[1])) for i in images])
        y = F.relu(self.bn(self.conv(x)))
        proposals = y.flatten(2).transpose(1, 2)[:, ::7].flatten(0, 1)
        return self.bn_box(self.box(proposals[proposals.sum(1) > proposals.sum(1).mean()]))


@pytest.mark.parametrize("number", [2, 3, 4])
def test_lists_of_images_and_targets_go_through_a_forward_of_ones_own(number: int) -> None:
    torch.manual_seed(0)
    images = [torch.randn(3, 16, 16) + i for i in range(4 * number)]
    batches = [(images[i : i + number], [{"boxes": torch.rand(2, 4)}] * number) for i in range(0, len(images), number)]
    model = Detector()
    reference = copy.deepcopy(model)
    with torch.no_grad():
        first = model.conv(torch.stack(images)).double()
    record = recalibrated(model, batches, forward=lambda net, batch: net(batch[0], batch[1]))
    assert record.images == len(images)  # and not the channels of the first image
    assert record.mode == "exact"
    assert float((model.bn.running_mean - first.mean((0, 2, 3))).abs().max()) < 1e-5
    assert float((model.bn.running_var / first.var((0, 2, 3)) - 1).abs().max()) < 1e-4
    plain = recalibrated(reference, [batch[0] for batch in batches], forward=lambda net, batch: net(batch))
    assert plain.images == len(images)
    assert distance(model, reference) < 1e-6


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_list_of_images_without_forward_leads_to_it(number: int) -> None:
    batch = [torch.randn(3, 16, 16) for _ in range(number)]
    for given in (batch, (batch, [{}] * number)):
        with pytest.raises(BadData, match=r"batches\[0\]: got 'list|tuple.*Or pass forward=lambda model, batch"):
            fbn.recalibrate(Detector(), [given])


def test_where_a_detector_proposes_nothing_nothing_is_measured() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.lin, self.bn_box = nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn_box(self.lin(self.bn(x)[x[:, 0] > 5]))

    torch.manual_seed(0)
    x = torch.randn(32, 3)
    x[20:24, 0] = 6
    model = Picks()
    record = recalibrated(model, x.split(8), keep_batches=True)
    assert record.rows[1].values == 4
    for mode in ("exact", "one_pass"):
        record = recalibrated(Picks(), torch.randn(32, 3).clamp(-3, 3).split(8), keep_batches=True, mode=mode)
        assert [row.names for row in record.rows] == [("bn",)]
        assert ("bn_box", "was not reached by the data") in record.left_alone


@dataclass
class Sample:
    picture: Tensor
    target: Tensor


class Graphs:
    """What a batch of a graph library is: an object with tensors, that can be moved."""

    def __init__(self, x: Tensor, edges: Tensor, graph: Tensor) -> None:
        self.x, self.edges, self.graph = x, edges, graph
        self.moved_to: list[torch.device] = []

    def to(self, device: torch.device) -> Graphs:
        self.moved_to.append(device)
        return self


class CountedGraphs(Graphs):
    num_graphs = 5


class GraphNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn, self.lin2, self.bn2 = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, g: Graphs) -> Tensor:
        h = F.relu(self.bn(self.lin(g.x)))
        h = h + torch.zeros_like(h).index_add(0, g.edges[1], h[g.edges[0]])
        return self.bn2(self.lin2(h))


def graphs(kind: type[Graphs], number: int = 5, nodes: int = 4) -> Graphs:
    n = number * nodes
    x = torch.randn(n, 6) * 2 + 1
    return kind(x, torch.stack([torch.arange(n), torch.arange(n).roll(1)]), torch.arange(number).repeat_interleave(4))


@pytest.mark.parametrize(("kind", "count"), [(Graphs, 6), (CountedGraphs, 30)])
@pytest.mark.parametrize("mode", ["auto", "exact"])
def test_batches_of_a_class_of_ones_own_are_one_batch_for_the_statistics(kind: Any, count: int, mode: Any) -> None:
    # pytorch/pytorch#49082: a model whose forward takes its own kind of batch, here a graph network's.
    torch.manual_seed(0)
    data, model = [graphs(kind) for _ in range(6)], GraphNet()
    offsets = torch.arange(6) * 20
    whole = Graphs(
        torch.cat([g.x for g in data]), torch.cat([g.edges + o for g, o in zip(data, offsets, strict=True)], 1), None
    )
    reference = copy.deepcopy(model).train()
    for layer in (reference.bn, reference.bn2):
        layer.momentum = None
    with torch.no_grad():
        reference(whole)
    record = recalibrated(model, data, forward=lambda net, batch: net(batch), mode=mode)
    assert (
        float(((model.bn.running_mean - reference.bn.running_mean) / reference.bn.running_var.sqrt()).abs().max())
        < 1e-5
    )
    # Eval mode normalizes by the variance over n - 1, as stored; training mode by that over n.
    assert float((model.bn.running_var / reference.bn.running_var - 1).abs().max()) < 1e-5
    assert distance(model, reference) < 1e-2
    assert (record.images, record.mode) == (count, "exact")
    assert any("each counts as one" in w for w in record.warnings) == (kind is Graphs)
    assert data[0].moved_to


def test_an_own_class_without_forward_leads_to_it() -> None:
    with pytest.raises(BadData, match=r"Graphs.*Or pass forward=lambda model, batch"):
        fbn.recalibrate(GraphNet(), [graphs(Graphs)])


def test_too_few_values_of_uncounted_batches_are_an_error() -> None:
    def recalibrated(least: int) -> fbn.Recalibration:
        return fbn.recalibrate(GraphNet(), [graphs(Graphs)], forward=lambda net, batch: net(batch), min_samples=least)

    with pytest.raises(BadData, match="min_samples=100"):
        recalibrated(100)
    seen: list[int] = []
    net = GraphNet()
    net.bn.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    net(graphs(Graphs))
    assert recalibrated(seen[0]).images == 1  # just so many are enough
    with pytest.raises(BadData, match=f"min_samples={seen[0] + 1}"):
        recalibrated(seen[0] + 1)


class Speech(nn.Module):
    """BatchNorm1d over padded sequences [N, C, L], with lengths; the second half at half the length."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(8, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.conv2, self.bn2 = nn.Conv1d(6, 6, 3, stride, padding=1), nn.BatchNorm1d(6)
        self.out, self.bn3 = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        keep = (torch.arange(x.shape[2]) < lengths[:, None])[:, None]
        x = F.relu(self.bn(self.conv(x))) * keep
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.out(x.mean(2)))


def utterances(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    batches = []
    for _ in range(6):
        lengths = torch.randint(10, 60, (8,))
        x = torch.randn(8, 8, 60) + 1
        batches.append((x * (torch.arange(60) < lengths[:, None])[:, None], lengths))
    return batches


def real(batch: Any) -> Tensor:
    return torch.arange(batch[0].shape[2]) < batch[1][:, None]


@pytest.mark.parametrize("mode", ["exact", "one_pass"])
def test_padding_does_not_count_where_a_mask_is_given(mode: Any) -> None:
    # pytorch/pytorch#70529, SeanNaren/deepspeech.pytorch#312: padding of BatchNorm1d's sequences was counted.
    batches = utterances()
    torch.manual_seed(1)
    model = Speech()
    with torch.no_grad():
        frames = torch.cat([model.conv(x).transpose(1, 2)[real((x, n))] for x, n in batches]).double().numpy()
        everything = torch.cat([model.conv(x).transpose(1, 2).flatten(0, 1) for x, _ in batches]).double().numpy()
    record = recalibrated(model, batches, forward=lambda net, batch: net(*batch), mask=real, mode=mode)
    assert numpy.abs(model.bn.running_mean.numpy() - frames.mean(0)).max() < 1e-5
    assert numpy.abs(model.bn.running_var.numpy() / frames.var(0, ddof=1) - 1).max() < 1e-5
    assert numpy.abs(frames.mean(0) - everything.mean(0)).max() > 0.1
    assert record.images == 48
    assert record.rows[0].values == len(frames)
    assert record.rows[2].values == 48  # behind the pooling every sequence counts


def test_without_a_mask_padding_counts() -> None:
    batches = utterances()
    model = Speech()
    with torch.no_grad():
        everything = torch.cat([model.conv(x).transpose(1, 2).flatten(0, 1) for x, _ in batches])
    recalibrated(model, batches, forward=lambda net, batch: net(*batch))
    assert torch.allclose(model.bn.running_mean, everything.mean(0), atol=1e-5)


def test_layers_that_see_other_lengths_need_a_mask_of_their_own() -> None:
    batches = utterances()
    model = Speech(stride=2)
    with pytest.raises(BadData, match=r"mask: got .*60.*one of shape \(\d+, 30\) for layer 'bn2'.*one for each length"):
        fbn.recalibrate(model, batches, forward=lambda net, batch: net(*batch), mask=real)
    both = recalibrated(
        model, batches, forward=lambda net, batch: net(*batch), mask=lambda batch: [real(batch), real(batch)[:, ::2]]
    )
    assert both.rows[1].values == sum(int(-(-n // 2)) for _, lengths in batches for n in lengths)
    one = recalibrated(model, batches, forward=lambda net, batch: net(*batch), mask=real, layers=["bn", "bn3"])
    assert len(one.rows) == 2


@pytest.mark.parametrize("wrong", [lambda batch: real(batch).float(), lambda batch: real(batch)[:3], lambda batch: 3])
def test_a_mask_that_is_none_is_named(wrong: Any) -> None:
    with pytest.raises(FinetuneBNError, match=r"^mask\(batches\[0\]\): got"):
        fbn.recalibrate(Speech(), utterances(), forward=lambda net, batch: net(*batch), mask=wrong)
    with pytest.raises(FinetuneBNError, match=r"^mask: got 3; allowed: a function"):
        fbn.recalibrate(Speech(), utterances(), mask=3)  # type: ignore[arg-type]


class Flattened(nn.Module):
    """Frames as rows: [N * L, C], as torch's BatchNorm1d takes them fastest."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn = nn.Linear(8, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.lin(x.transpose(1, 2).flatten(0, 1)))


def test_a_mask_counts_for_frames_that_are_rows_too() -> None:
    batches, model = utterances(), Flattened()
    with torch.no_grad():
        frames = torch.cat([model.lin(x.transpose(1, 2)[real((x, n))]) for x, n in batches])
    recalibrated(model, batches, mask=real)
    assert torch.allclose(model.bn.running_mean, frames.mean(0), atol=1e-5)


def test_packed_sequences_are_counted_by_sequence_and_kept() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.bn = nn.GRU(8, 4, batch_first=True), nn.BatchNorm1d(4)

        def forward(self, x: Any) -> Tensor:
            y, _ = pad_packed_sequence(self.rnn(x)[0], batch_first=True)
            return self.bn(y[:, 0])

    data = [pack_padded_sequence(x.transpose(1, 2), n, batch_first=True, enforce_sorted=False) for x, n in utterances()]
    record = recalibrated(Packed(), data, forward=lambda net, batch: net(batch))
    assert record.images == 48


def test_a_model_with_more_arguments_leads_to_forward() -> None:
    with pytest.raises(BadData, match=r"missing a required argument|missing 1 required.*Pass forward=lambda"):
        fbn.recalibrate(Speech(), utterances())


def test_many_batches_that_stay_whole_go_one_by_one_and_it_is_said() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = fbn.recalibrate(TSM(frames=2), torch.randn(140, 3, 4, 4).split(2), keep_batches=True)
    assert record.mode == "one_pass"
    assert any("more than 64 batches that cannot be joined" in str(w.message) for w in caught)


def test_where_it_is_the_memory_that_does_not_suffice_nothing_is_said_of_many_batches() -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = fbn.recalibrate(TSM(frames=2), torch.randn(128, 3, 4, 4).split(2), keep_batches=True, memory=1)
    assert record.mode == "one_pass"
    assert not any("batches that cannot be joined" in str(w.message) for w in caught)
