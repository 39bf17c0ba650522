"""P x K batches: what is in them, who gets which, and where an interrupted pass goes on."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import random
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from finetune_bn.errors import BadData, FinetuneBNError
from finetune_bn.metric_learning.pk_sampler import PKBatchSampler
from finetune_bn.metric_learning.resumable_loader import ResumableDataLoader

# 20 labels of 3 to 9 images, in no order.
SIZES = [3 + number % 7 for number in range(20)]
LABELS = random.Random(0).sample([label for label, size in enumerate(SIZES) for _ in range(size)], sum(SIZES))

Batches = list[list[int]]


def pk(labels: Any = LABELS, num_labels: int = 4, images_per_label: int = 3, **arguments: Any) -> PKBatchSampler:
    return PKBatchSampler(labels, num_labels, images_per_label, **arguments)


def ranks(world_size: int, labels: Any = LABELS, p: int = 4, k: int = 3, **arguments: Any) -> list[PKBatchSampler]:
    return [PKBatchSampler(labels, p, k, rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]


def composition(batch: list[int], labels: Any = LABELS) -> list[int]:
    """Return the number of images of each label of a batch."""
    return sorted(Counter(labels[image] for image in batch).values())


def loader(sampler: PKBatchSampler, **arguments: Any) -> ResumableDataLoader:
    images = torch.arange(len(LABELS))
    return ResumableDataLoader(TensorDataset(images, torch.tensor(LABELS)), batch_sampler=sampler, **arguments)


def images_of(batches: Any) -> Batches:
    return [images.tolist() for images, _ in batches]


# What is in a batch


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize(("p", "k"), [(1, 1), (1, 3), (4, 1), (4, 2), (7, 3), (20, 3), (16, 2)])
def test_every_batch_of_every_rank_is_p_labels_with_k_different_images_each(p: int, k: int, world_size: int) -> None:
    for sampler in ranks(world_size, p=p, k=k, num_batches=13):
        batches = [batch for epoch in range(3) for batch in sampler.batches(epoch)]
        assert len(batches) == 3 * 13
        assert all(composition(batch) == [k] * p for batch in batches)
        assert all(len(set(batch)) == p * k for batch in batches)


@pytest.mark.parametrize(
    "kind", [list, tuple, iter, torch.tensor, np.array, lambda x: list(torch.tensor(x)), np.float32]
)
def test_the_container_of_the_labels_changes_nothing(kind: Any) -> None:
    assert list(pk(kind(LABELS))) == list(pk())


def test_labels_may_be_words() -> None:
    words = [f"label {label}" for label in LABELS]
    assert list(pk(words)) == list(pk(np.array(words))) == list(pk())


@pytest.mark.parametrize("world_size", [1, 3])
def test_in_an_epoch_every_label_and_every_image_of_a_label_come_equally_often(world_size: int) -> None:
    batches = [batch for sampler in ranks(world_size, num_batches=17) for batch in sampler]
    drawn = Counter(image for batch in batches for image in batch)
    by_label = dict.fromkeys(LABELS, 0)
    for label in by_label:
        counts = [drawn[image] for image, other in enumerate(LABELS) if other == label]
        by_label[label] = sum(counts)
        assert max(counts) - min(counts) <= 1
    assert set(by_label.values()) <= {3 * (17 * world_size * 4 // 20), 3 * (17 * world_size * 4 // 20 + 1)}


def test_labels_and_images_fall_into_batches_by_chance_alone() -> None:
    """Chi squared of which label, and which image of label 0, is in the first batch of 600 epochs."""
    sampler = pk([label for label in range(20) for _ in range(6)], 4, 2)
    first = [next(sampler.batches(epoch)) for epoch in range(600)]
    labels = np.bincount([image // 6 for batch in first for image in batch[::2]], minlength=20)
    pairs = Counter(tuple(sorted(image for image in batch if image < 6)) for batch in first)
    del pairs[()]
    assert ((labels - 120) ** 2 / 120).sum() * 19 / 16 < 43.8  # 19 degrees of freedom, p = 0.001; 4 of 20 are drawn
    expected = sum(pairs.values()) / 15
    assert len(pairs) == 15
    assert sum((count - expected) ** 2 for count in pairs.values()) / expected < 36.1  # 14 degrees of freedom


@pytest.mark.parametrize(("p", "k"), [(4, 2), (4, 3), (3, 3)])
def test_grouped_batches_give_ghost_groups_of_one_image_a_label(p: int, k: int) -> None:
    for batch in pk(LABELS, p, k, order="grouped"):
        labels = torch.tensor([LABELS[image] for image in batch])
        assert all(len(labels[i::k].unique()) == len(labels[i::k]) == p for i in range(k))
        assert not any(len(chunk.unique()) == p for chunk in labels.chunk(k))


@pytest.mark.parametrize(("p", "k"), [(4, 2), (6, 3)])
def test_interleaved_batches_give_chunks_of_one_image_a_label(p: int, k: int) -> None:
    for batch in pk(LABELS, p, k, order="interleaved"):
        labels = torch.tensor([LABELS[image] for image in batch])
        assert all(len(chunk.unique()) == len(chunk) == p for chunk in labels.chunk(k))
        assert not any(len(labels[i::k].unique()) == p for i in range(k))


def test_both_orders_draw_the_same_images() -> None:
    for grouped, interleaved in zip(pk(), pk(order="interleaved"), strict=True):
        assert torch.equal(torch.tensor(grouped).reshape(4, 3).T, torch.tensor(interleaved).reshape(3, 4))


# Labels of too few images


FEW = ["a"] * 5 + ["b"] * 4 + ["c"] + ["d"] * 2 + ["e"] * 4


def test_short_labels_are_repeated_evenly_counted_and_named() -> None:
    with pytest.warns(UserWarning, match=r"2 of 5 labels have fewer than 4 images .*come more than once.*'c' \(1\)"):
        sampler = pk(FEW, 5, 4, num_batches=6)
    assert sampler.short_labels == {"c": 1, "d": 2}
    for batch in sampler:
        assert composition(batch, FEW) == [4] * 5
        assert sorted(Counter(image for image in batch if FEW[image] in "cd").values()) == [2, 2, 4]


def test_short_labels_are_left_out_counted_and_named() -> None:
    with pytest.warns(UserWarning, match=r"2 of 5 labels have fewer than 4 images .*left out: 'c' \(1\), 'd' \(2\)\."):
        sampler = pk(FEW, 3, 4, short="drop", num_batches=6)
    assert sampler.short_labels == {"c": 1, "d": 2}
    assert sampler.num_images == 13
    assert {FEW[image] for batch in sampler for image in batch} == {"a", "b", "e"}


def test_short_labels_are_refused_by_name() -> None:
    with pytest.raises(
        BadData, match=r"labels: got '2 of 5 labels with fewer'; allowed: at least 4 images .*'d' \(2\)"
    ):
        pk(FEW, 3, 4, short="error")


def test_only_some_of_many_short_labels_are_named() -> None:
    with pytest.warns(UserWarning, match=r"30 of 30 .*: 0 \(1\), 1 \(1\), 2 \(1\), 3 \(1\), 4 \(1\) and 25 more\."):
        pk(range(30), 3, 2)


def test_long_labels_are_no_matter_of_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pk(FEW, 5, 1).short_labels == {}


# Seeds, epochs, length


def test_the_seed_and_the_epoch_decide_and_nothing_else() -> None:
    first, second = pk(seed=3), pk(seed=3)
    epochs = [list(first) for _ in range(3)]
    random.seed(7)
    torch.manual_seed(7)
    assert [list(second) for _ in range(3)] == epochs
    assert not any(a == b for a, b in itertools.combinations(epochs, 2))
    assert list(pk(seed=4)) != epochs[0]
    assert list(pk(seed=1).batches(2)) != list(pk(seed=2).batches(1))  # as with seed + epoch


def test_drawing_leaves_the_global_generators_as_they_are() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    list(pk())
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_set_epoch_jumps_to_the_epoch_that_counting_reaches() -> None:
    counted, jumped = pk(), pk()
    third = [list(counted) for _ in range(3)][2]
    jumped.set_epoch(2)
    assert jumped.epoch == 2
    assert list(jumped) == third


def test_a_pass_that_was_broken_off_is_not_continued_by_the_next() -> None:
    sampler = pk()
    next(iter(sampler))
    assert list(sampler) == list(pk().batches(1))


@pytest.mark.parametrize(
    ("world_size", "num_batches", "expected"),
    [(1, None, sum(SIZES) // 12), (2, None, sum(SIZES) // 24), (50, None, 1), (1, 7, 7), (4, 7, 7)],
)
def test_an_epoch_is_as_long_as_the_images_fill_or_as_asked(world_size: int, num_batches: Any, expected: int) -> None:
    for sampler in ranks(world_size, num_batches=num_batches):
        assert len(sampler) == len(list(sampler)) == expected


# Ranks


@pytest.mark.parametrize(("world_size", "p"), [(2, 4), (2, 10), (4, 5), (5, 4)])
def test_ranks_of_one_step_share_no_label_and_no_image(world_size: int, p: int) -> None:
    for step in zip(*ranks(world_size, p=p, num_batches=25), strict=True):
        labels = [{LABELS[image] for image in batch} for batch in step]
        assert len(set().union(*labels)) == p * world_size
        assert len({image for batch in step for image in batch}) == p * world_size * 3


def test_ranks_share_labels_where_there_are_too_few_but_not_images_while_there_are_enough() -> None:
    labels = [label for label in range(5) for _ in range(12)]
    for step in zip(*ranks(4, labels, p=5, k=3, num_batches=8), strict=True):
        assert all(composition(batch, labels) == [3] * 5 for batch in step)
        assert len({image for batch in step for image in batch}) == 60


def test_ranks_are_dealt_parts_of_one_plan_whose_epoch_sees_all_images() -> None:
    labels = [label for label in range(12) for _ in range(4)]
    drawn = [image for sampler in ranks(3, labels, p=4, k=2) for batch in sampler for image in batch]
    assert sorted(drawn) == list(range(48))


def test_a_distributed_sampler_put_in_names_the_rank_unless_one_was_given() -> None:
    injected = DistributedSampler(range(9), num_replicas=5, rank=3)
    assert (pk(sampler=injected).rank, pk(sampler=injected).world_size) == (3, 5)
    given = pk(rank=1, world_size=2, sampler=injected)
    assert (given.rank, given.world_size) == (1, 2)


def _alone(rank: int, world_size: int, folder: str, sampler: PKBatchSampler) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/at", rank=rank, world_size=world_size)
    epochs = [list(sampler) for _ in range(3)]
    Path(folder, f"{rank}.json").write_text(json.dumps([len(sampler), epochs]))
    torch.distributed.barrier()  # who leaves before the others have connected breaks their connection
    torch.distributed.destroy_process_group()


def run_processes(world_size: int, folder: Path, sampler: PKBatchSampler) -> list[list[Batches]]:
    """Return the batches [rank][epoch] of processes that were started with a sampler made before."""
    mp.start_processes(_alone, (world_size, str(folder), sampler), nprocs=world_size, start_method="fork")
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
    assert all(length == len(epoch) for length, epochs in results for epoch in epochs)
    return [epochs for _, epochs in results]


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_that_start_later_give_the_sampler_its_rank(world_size: int, tmp_path: Path) -> None:
    found = run_processes(world_size, tmp_path, pk(seed=5))
    expected = [[list(s.batches(epoch)) for epoch in range(3)] for s in ranks(world_size, seed=5)]
    assert found == expected


# Size


def test_a_million_images_in_a_hundred_thousand_labels_give_whole_batches_anywhere_in_the_epoch() -> None:
    labels = torch.randint(0, 100_000, (1_000_000,), generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = PKBatchSampler(labels, 16, 4, seed=2)
    last, of = len(sampler) - 3, labels.tolist()
    for batch in sampler.batches(1, start=last):
        assert composition(batch, of) == [4] * 16
    middle = list(itertools.islice(sampler.batches(1, start=last - 2), 3))
    assert middle[2] == next(sampler.batches(1, start=last))  # computed by itself, not dealt from the beginning


@pytest.mark.parametrize("sizes", [(3, 7, 7), (1, 2, 40), (5, 6, 9, 2)])
@pytest.mark.parametrize("k", [2, 3, 4, 5])
def test_images_of_small_labels_come_equally_often_though_they_are_gone_through_many_times(
    sizes: tuple[int, ...], k: int
) -> None:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = PKBatchSampler(labels, 2, k, num_batches=300)
    batches = list(sampler)
    drawn = Counter(image for batch in batches for image in batch)
    for label, size in enumerate(sizes):
        counts = [drawn[image] for image, other in enumerate(labels) if other == label]
        assert max(counts) - min(counts) <= 1
        hands = [tuple(image for image in batch if labels[image] == label) for batch in batches]
        assert all(len(set(hand)) == min(size, k) for hand in hands if hand)
        assert len({hand for hand in hands if hand}) > 1 or size == 1  # shuffled anew, not one order for ever


def test_numbers_of_numpy_are_numbers() -> None:
    plain = pk(seed=3, num_batches=5, rank=1, world_size=2)
    numbers = {"seed": np.int64(3), "num_batches": np.int32(5), "rank": np.int64(1), "world_size": np.uint8(2)}
    sampler = PKBatchSampler(LABELS, np.int64(4), np.int16(3), **numbers)  # type: ignore[arg-type]
    assert list(sampler) == list(plain)
    assert json.loads(json.dumps(sampler.state_dict())) == plain.state_dict()
    sampler.set_epoch(np.int64(4))  # type: ignore[arg-type]
    assert next(iter(sampler)) == next(plain.batches(4))


def test_a_state_of_the_way_of_dealing_before_is_refused() -> None:
    state = pk().state_dict()
    del state["plan"]["version"]
    with pytest.raises(FinetuneBNError, match="version None -> 2"):
        pk().load_state_dict(state | {"batch": 2})


# Resuming


@pytest.mark.parametrize("done", [0, 1, 4, len(pk()) - 1, len(pk())])
def test_a_loaded_state_goes_on_with_the_next_batch_and_then_the_next_epoch(done: int) -> None:
    stopped, resumed = pk(), pk()
    list(stopped)
    run = iter(stopped)
    for _ in range(done):
        next(run)
    resumed.load_state_dict(stopped.state_dict() if done else {"epoch": 1, "batch": 0, "plan": pk().plan()})
    assert len(resumed) == len(pk())
    expected = [*itertools.islice(pk().batches(1), done, None)] or [*pk().batches(2)]
    assert list(resumed) == expected
    assert list(resumed) == list(pk().batches(2 if done < len(pk()) else 3))


def test_set_epoch_keeps_the_place_in_the_epoch_that_was_loaded_and_drops_it_for_another() -> None:
    state = {"epoch": 3, "batch": 2, "plan": pk().plan()}
    same, other = pk(), pk()
    for sampler, epoch in ((same, 3), (other, 4)):
        sampler.load_state_dict(state)
        sampler.set_epoch(epoch)
    assert list(same) == list(pk().batches(3, start=2))
    assert list(other) == list(pk().batches(4))


def test_a_state_is_plain_data() -> None:
    state = pk(["x", "y"] * 9, 2, 3).state_dict()
    assert json.loads(json.dumps(state)) == state
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == state


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (pk(seed=1), "seed 1 -> 0"),
        (pk(LABELS, 5), "num_labels 5 -> 4"),
        (pk(LABELS[::-1]), "labels '"),
        (pk(rank=0, world_size=2), "world_size 2 -> 1"),
    ],
)
def test_a_state_amid_an_epoch_of_another_plan_is_refused_and_one_between_epochs_is_not(other: Any, named: str) -> None:
    next(iter(other))
    state = other.state_dict()
    with pytest.raises(FinetuneBNError, match=f"state_dict: got .*{named}.*at the beginning of an epoch"):
        pk().load_state_dict(state)
    sampler = pk()
    sampler.load_state_dict(state | {"batch": 0, "epoch": 6})
    assert list(sampler) == list(pk().batches(6))


@pytest.mark.parametrize(
    "state",
    [{}, None, {"epoch": 1, "batch": 1}, {"epoch": -1, "batch": 0, "plan": {}}, {"epoch": 0, "batch": "1", "plan": {}}],
)
def test_what_is_no_state_is_refused_and_changes_nothing(state: Any) -> None:
    sampler = pk()
    with pytest.raises(FinetuneBNError, match="state_dict"):
        sampler.load_state_dict(state)
    assert list(sampler) == list(pk())


WORKERS = [{}, {"num_workers": 2}, {"num_workers": 1, "prefetch_factor": 4, "persistent_workers": True}]


@pytest.mark.parametrize("workers", WORKERS, ids=["none", "two", "persistent"])
def test_a_loader_goes_on_behind_what_it_handed_out_however_far_its_workers_drew(workers: dict[str, Any]) -> None:
    whole = images_of(loader(pk()))
    stopped = loader(pk(), **workers)
    run = iter(stopped)
    first = images_of(itertools.islice(run, 2))
    drawn = stopped.batch_sampler.state_dict()["batch"]
    assert drawn > 2 or not workers
    state = stopped.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 2)
    resumed = loader(pk(), **workers)
    resumed.load_state_dict(state)
    assert first + images_of(resumed) == whole
    assert images_of(resumed) == list(pk().batches(1))


def test_workers_wait_for_the_first_batch_and_so_hear_of_the_epoch_in_time() -> None:
    late, plain = loader(pk(), num_workers=1), DataLoader(loader(pk()).dataset, batch_sampler=pk(), num_workers=1)
    runs = iter(late), iter(plain)
    for each in (late, plain):
        each.batch_sampler.set_epoch(5)
    assert images_of(runs[0]) == list(pk().batches(5))
    assert images_of(runs[1]) == list(pk().batches(0))  # what a resumed Trainer does with the workers of a DataLoader


def test_a_loader_between_epochs_names_the_first_batch_of_the_next() -> None:
    images = loader(pk())
    assert (images.state_dict()["epoch"], images.state_dict()["batch"]) == (0, 0)
    list(images)
    assert (images.state_dict()["epoch"], images.state_dict()["batch"]) == (1, 0)
    next(iter(images))
    images.batch_sampler.set_epoch(7)  # a Trainer with limit_train_batches
    assert (images.state_dict()["epoch"], images.state_dict()["batch"]) == (7, 0)


# Being a sampler among others


def test_it_is_a_batch_sampler_that_a_dataloader_takes() -> None:
    sampler = pk()
    assert isinstance(sampler, BatchSampler)
    assert (sampler.batch_size, sampler.drop_last) == (12, True)
    plain = DataLoader(loader(sampler).dataset, batch_sampler=sampler, num_workers=1)
    assert len(plain) == len(sampler)
    assert images_of(plain) == list(pk())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_copy_goes_on_where_the_original_was_and_alone(duplicate: Any) -> None:
    sampler = pk()
    sampler.set_epoch(4)
    twin = duplicate(sampler)
    assert list(twin) == list(pk().batches(4))
    assert sampler.epoch == 4
    assert twin.epoch == 5


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_labels": 0}, "num_labels: got 0; allowed: a whole number from 1 up"),
        ({"num_labels": 2.0}, r"num_labels: got 2\.0"),
        ({"num_labels": 21}, "num_labels: got 21; allowed: at most 20, the number of different labels"),
        ({"images_per_label": 5, "num_labels": 15, "short": "drop"}, "at most 14, .*, 6 with fewer than 5 images left"),
        ({"images_per_label": True}, "images_per_label: got True"),
        ({"short": "skip"}, "short: got 'skip'; allowed: repeat, drop, error"),
        ({"order": "random"}, "order: got 'random'; allowed: grouped, interleaved"),
        ({"num_batches": 0}, "num_batches: got 0"),
        ({"seed": "x"}, "seed: got 'x'; allowed: a whole number"),
        ({"rank": 0}, r"rank, world_size: got \(0, None\); allowed: both or neither"),
        ({"rank": 2, "world_size": 2}, r"rank: got 2; allowed: 0 to 1"),
        ({"rank": 0, "world_size": 0}, "world_size: got 0"),
        ({"labels": []}, r"labels: got \[\]; allowed: one label an image"),
        ({"labels": 3}, "labels: got 3"),
        ({"labels": "abcabc"}, "labels: got 'abcabc'"),
        ({"labels": torch.zeros(4, 2)}, "labels: got tensor"),
        ({"labels": [1.0, float("nan")]}, "labels: got .*nan"),
    ],
)
def test_a_bad_argument_is_named_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FinetuneBNError, match=message):
        pk(**arguments)


@pytest.mark.parametrize("epoch", [-1, 1.5, None])
def test_an_epoch_is_a_whole_number(epoch: Any) -> None:
    with pytest.raises(FinetuneBNError, match="epoch: got"):
        pk().set_epoch(epoch)


def test_a_loader_refuses_other_samplers_and_other_data() -> None:
    data = TensorDataset(torch.arange(5))
    with pytest.raises(FinetuneBNError, match="batch_sampler: got 'BatchSampler'; allowed: a PKBatchSampler"):
        ResumableDataLoader(data, batch_sampler=BatchSampler(range(5), 2, True))  # type: ignore[arg-type]
    with pytest.raises(BadData, match=f"dataset: got '5 images'; allowed: {len(LABELS)} images"):
        ResumableDataLoader(data, batch_sampler=pk())


# What the peers' tests ask of samplers


@pytest.mark.parametrize(("p", "k"), [(20, 5), (1, 50), (2, 1), (10, 10), (55, 1), (5, 17)])
def test_random_labels_give_exact_batches_through_a_dataloader(p: int, k: int) -> None:
    """pytorch-metric-learning tests/samplers/test_m_per_class_sampler.py, both tests: 10,000 random labels."""
    labels = torch.randint(0, 55, (10_000,))
    sampler = PKBatchSampler(labels, p, k, num_batches=40)
    found = [batch for (batch,) in DataLoader(TensorDataset(labels), batch_sampler=sampler)]
    assert len(found) == len(sampler) == 40
    for batch in found:
        values, counts = batch.unique(return_counts=True)
        assert (len(values), set(counts.tolist())) == (p, {k})


def test_batches_of_one_super_label_each_have_k_images_a_label() -> None:
    """pytorch-metric-learning tests/samplers/test_hierarchical_sampler.py: its batches, but of one super label."""
    labels = torch.randint(0, 120, (15_000,))
    for super_label in (0, 11):
        members = torch.nonzero(labels // 10 == super_label).flatten()
        for batch in PKBatchSampler(labels[members], 10, 5):
            drawn = labels[members[batch]]
            assert set(Counter(drawn.tolist()).values()) == {5}
            assert set((drawn // 10).tolist()) == {super_label}
            assert len(drawn) == 50


OML_LABELS = [
    [0, 1, 2, 3, 0, 1, 2, 3],
    [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2],
    [0, 1, 2, 3, 4, 0, 1, 2, 3, 4],
    [0, 1, 2, 2, 1, 0, 1, 0, 2, 0, 1, 2],
]


@pytest.mark.filterwarnings("ignore:PKBatchSampler")
def test_any_valid_numbers_give_balanced_batches_of_different_labels() -> None:
    """open-metric-learning tests/test_oml/test_samplers/test_balance.py: its four cases and 100 random ones.

    There the last batch may be smaller and a label may be left out of an epoch; here neither.
    """
    rng = random.Random(1)
    random_cases = [
        [label for label in range(rng.randint(2, 22)) for _ in range(rng.randint(2, 22))] for _ in range(100)
    ]
    for labels in [*OML_LABELS, *(rng.sample(case, len(case)) for case in random_cases)]:
        p, k = rng.randint(2, len(set(labels))), rng.randint(2, len(labels))
        once = -(-len(set(labels)) // p)  # batches until every label has come
        batches = list(PKBatchSampler(labels, p, k, num_batches=once))
        assert all(composition(batch, labels) == [k] * p for batch in batches)
        assert all(len(set(batch)) >= 4 for batch in batches)
        assert {labels[image] for batch in batches for image in batch} == set(labels)
        in_order = [label for batch in batches for label in dict.fromkeys(labels[image] for image in batch)]
        assert sorted(in_order[: len(set(labels))]) == sorted(set(labels))  # none again before all have come


@pytest.mark.parametrize(("labels", "p", "k"), [(100, 2, 5), (85, 5, 2)])
def test_three_processes_draw_whole_batches_equally_many_and_others_every_epoch(
    labels: int, p: int, k: int, tmp_path: Path
) -> None:
    """open-metric-learning tests/test_oml/test_ddp/test_loader_patcher.py, its balance sampler on 3 ranks."""
    rng = random.Random(2)
    of = [label for label in range(labels) for _ in range(rng.randint(k, 2 * k))]
    found = run_processes(3, tmp_path, PKBatchSampler(of, p, k, num_batches=labels // p // 3))
    for rank in found:
        assert [len(epoch) for epoch in rank] == [labels // p // 3] * 3
        assert len({str(epoch) for epoch in rank}) == 3
    for epoch in zip(*found, strict=True):
        batches = [batch for rank in epoch for batch in rank]
        assert all(composition(batch, of) == [k] * p for batch in batches)
        assert len({image for batch in batches for image in batch}) == len(batches) * p * k


def test_each_process_has_whole_identities_in_every_step() -> None:
    """fast-reid fastreid/data/samplers/triplet_sampler.py, `reorder_index`: no identity is cut between processes.

    Its tests/sampler_test.py only prints an endless sampler; the rule is in the code.
    """
    for step in zip(*ranks(4, p=5, k=2, num_batches=10), strict=True):
        owners = Counter(label for batch in step for label in {LABELS[image] for image in batch})
        assert set(owners.values()) == {1}
