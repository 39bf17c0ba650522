from __future__ import annotations

import builtins
import importlib.util
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

pytest.importorskip("pytorch_metric_learning")

from pytorch_metric_learning import distances
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency
from finetune_bn.metric_learning.neighbors import Gallery
from finetune_bn.metric_learning.retrieval import (
    SCORES,
    Retrieval,
    RetrievalReport,
    gather_rows,
    measure_of,
    retrieval,
    retrieval_report,
)
from finetune_bn.utilities.processes import OtherProcessFailed
from tests.references import Array, as_array

Labels = np.typing.NDArray[np.int64]


def draw(labels: Tensor, width: int = 5, noise: float = 1.0, seed: int = 0) -> Tensor:
    """Embeddings that lie around one point for each label."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(int(labels.max()) + 1, width, generator=generator)
    return centers[labels] + noise * torch.randn(len(labels), width, generator=generator)


def uneven(n: int, labels: int, seed: int = 0) -> Tensor:
    """Labels of which some come often and some once."""
    generator = torch.Generator().manual_seed(seed)
    return (labels * torch.rand(n, generator=generator) ** 2).long()


def reference(
    queries: Array, wanted: Labels, gallery: Array, known: Labels, own: bool
) -> tuple[dict[str, float], int, int]:
    """Recall@K and MAP@R from their definitions, query by query, in float64; with the queries that count or do not."""
    totals, counted = dict.fromkeys(SCORES, 0.0), 0
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    for i, query in enumerate(queries):
        scores = np.round(unit @ (query / np.linalg.norm(query)), 9)
        order = [j for j in sorted(range(len(gallery)), key=lambda j: (-scores[j], j)) if not (own and j == i)]
        right = [known[j] == wanted[i] for j in order]
        total = sum(right)
        if not total:
            continue
        counted += 1
        for k in (1, 5, 10):
            totals[f"recall_at_{k}"] += any(right[:k])
        precisions = [sum(right[: j + 1]) / (j + 1) for j in range(total) if right[j]]
        totals["map_at_r"] += sum(precisions) / total
    return {name: value / counted for name, value in totals.items()}, counted, len(queries) - counted


CHUNKS = pytest.mark.parametrize("chunk_bytes", [1, 100_000, 2**29], ids=["one by one", "some", "all at once"])


@CHUNKS
@pytest.mark.parametrize("labels", [7, 60, 150], ids=["many each", "few each", "mostly alone"])
def test_scores_are_those_of_brute_force_whatever_the_chunk(labels: int, chunk_bytes: int) -> None:
    known = uneven(180, labels)
    rows = draw(known)
    expected, queries, lone = reference(as_array(rows), known.numpy(), as_array(rows), known.numpy(), own=True)
    found = retrieval(rows, known, chunk_bytes=chunk_bytes)
    assert found.scores == pytest.approx(expected, rel=1e-12)
    assert (found.queries, found.lone) == (queries, lone)
    assert len(set(expected.values())) == 4, "the scores must differ, or a mix-up would not be seen"
    assert (lone > 0) == (labels > 7)


@CHUNKS
def test_scores_in_another_gallery_are_those_of_brute_force(chunk_bytes: int) -> None:
    labels = uneven(150, 40)
    rows = draw(labels)
    parts = (rows[:60], labels[:60], rows[60:], labels[60:])
    arrays = (as_array(parts[0]), parts[1].numpy(), as_array(parts[2]), parts[3].numpy())
    expected, queries, lone = reference(*arrays, own=False)
    found = retrieval(*parts, chunk_bytes=chunk_bytes)
    assert found.scores == pytest.approx(expected, rel=1e-12)
    assert (found.queries, found.lone) == (queries, lone)
    assert lone > 0


def test_the_calculator_gives_the_same_scores_by_its_own_search() -> None:
    labels = uneven(180, 40)
    rows = draw(labels)
    include = ("precision_at_1", "mean_average_precision_at_r")
    device = torch.device("cpu")
    knn = CustomKNN(distances.CosineSimilarity())
    calculator = AccuracyCalculator(include=include, k="max_bin_count", knn_func=knn, device=device)
    theirs = calculator.get_accuracy(rows, labels)
    ours = retrieval(rows, labels)
    assert [ours.recall_at_1, ours.map_at_r] == pytest.approx([theirs[name] for name in include], rel=1e-6)


@CHUNKS
def test_equal_embeddings_give_the_same_scores_in_any_chunk(chunk_bytes: int) -> None:
    labels = uneven(90, 12)
    rows = draw(torch.arange(3), width=7, noise=0)[uneven(90, 3, seed=1)]
    expected, *_ = reference(as_array(rows), labels.numpy(), as_array(rows), labels.numpy(), own=True)
    assert retrieval(rows, labels, chunk_bytes=chunk_bytes).scores == pytest.approx(expected, rel=1e-12)


def test_an_image_does_not_find_itself_but_finds_a_copy() -> None:
    rows = torch.eye(6)
    assert retrieval(rows, torch.tensor([0, 1, 2, 0, 1, 2])).recall_at_1 < 0.5
    copies = retrieval(rows[[0, 1, 2, 0, 1, 2]], torch.tensor([0, 1, 2, 0, 1, 2]))
    assert copies.scores == dict.fromkeys(SCORES, 1.0)


def test_labels_are_any_whole_numbers() -> None:
    labels = uneven(60, 9)
    rows = draw(labels)
    # Beyond 2^24 float32 holds even numbers only, and the calculator makes float32 of labels.
    assert retrieval(rows, labels + 2**40) == retrieval(rows, labels) == retrieval(rows, -labels)


def test_fewer_images_than_ten_can_be_looked_through() -> None:
    found = retrieval(torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1]]), torch.tensor([4, 4, 4]))
    assert found == Retrieval(1.0, 1.0, 1.0, 1.0, queries=3, lone=0)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_without_any_match_there_are_no_scores(n: int) -> None:
    found = retrieval(torch.randn(n, 4), torch.arange(n))
    assert (found.queries, found.lone) == (0, n)
    assert all(math.isnan(value) for value in found.scores.values())


# --- domains --------------------------------------------------------------------------------------------------------


def in_domains() -> tuple[Tensor, Tensor, Tensor]:
    """40 labels in three domains: twice in ink, once in oil, in chalk only the labels from 20 up."""
    ink, oil, chalk = torch.arange(40).repeat(2), torch.arange(40), torch.arange(20, 40)
    labels = torch.cat([ink, oil, chalk])
    domains = torch.cat([torch.full_like(part, i) for i, part in enumerate((ink, oil, chalk))])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))
    return draw(labels)[order], labels[order], domains[order]


NAMES = ["ink", "oil", "chalk"]


def test_pairs_of_domains_are_looked_up_in_each_other() -> None:
    rows, labels, domains = in_domains()
    report = retrieval_report(rows, labels, domains, NAMES)
    arrays = as_array(rows), labels.numpy(), domains.numpy()
    for i, query in enumerate(NAMES):
        for j, gallery in enumerate(NAMES):
            of_query, of_gallery = arrays[2] == i, arrays[2] == j
            pair = report.pairs[query, gallery]
            if (query, gallery) in (("oil", "oil"), ("chalk", "chalk")):
                assert pair.queries == 0
                continue
            expected, queries, lone = reference(
                arrays[0][of_query], arrays[1][of_query], arrays[0][of_gallery], arrays[1][of_gallery], own=i == j
            )
            assert pair.scores == pytest.approx(expected, rel=1e-12)
            assert (pair.queries, pair.lone) == (queries, lone)
    assert report.overall == retrieval(rows, labels)
    assert report.unmatched == ["oil_to_oil", "chalk_to_chalk"]
    assert report.pairs["ink", "chalk"].lone == 40


def test_names_say_what_was_looked_up_where() -> None:
    report = retrieval_report(*in_domains(), NAMES)
    named = report.named()
    pairs = [f"{a}_to_{b}" for a in NAMES for b in NAMES if a != b or a == "ink"]
    assert set(named) == {
        *SCORES,
        *(f"{score}/across_domains" for score in SCORES),
        *(f"{score}/{pair}" for score in ("recall_at_1", "map_at_r") for pair in pairs),
    }
    across = [named[f"map_at_r/{pair}"] for pair in pairs if pair != "ink_to_ink"]
    assert named["map_at_r/across_domains"] == pytest.approx(np.mean(across))
    assert named["recall_at_5"] == report.overall.recall_at_5


def test_a_single_domain_has_no_pairs() -> None:
    rows, labels, domains = in_domains()
    for report in (retrieval_report(rows, labels), retrieval_report(rows, labels, torch.zeros_like(domains), ["ink"])):
        assert report == RetrievalReport(retrieval(rows, labels), {})
        assert set(report.named()) == set(SCORES)


def test_a_domain_without_images_has_pairs_without_scores() -> None:
    rows, labels, domains = in_domains()
    report = retrieval_report(rows, labels, domains, [*NAMES, "pencil"])
    assert "ink_to_pencil" in report.unmatched
    assert "pencil_to_ink" in report.unmatched
    assert report.named() == retrieval_report(rows, labels, domains, NAMES).named()


def test_without_a_match_between_domains_their_mean_is_nan_under_its_name() -> None:
    rows, labels = draw(torch.arange(8)).repeat(2, 1), torch.arange(8).repeat_interleave(2)
    named = retrieval_report(rows, labels, labels % 2, ["ink", "oil"]).named()
    assert set(named) == {*SCORES, *(f"{s}/across_domains" for s in SCORES)} | {
        f"{s}/{a}_to_{a}" for s in ("recall_at_1", "map_at_r") for a in ("ink", "oil")
    }
    assert math.isnan(named["map_at_r/across_domains"])
    assert not math.isnan(named["map_at_r"])


# --- distances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "measure"),
    [
        (lambda: None, "cosine"),
        (distances.CosineSimilarity, "cosine"),
        (distances.LpDistance, "cosine"),
        (lambda: distances.LpDistance(normalize_embeddings=False), "euclidean"),
        (lambda: distances.DotProductSimilarity(normalize_embeddings=False), "dot"),
        (lambda: distances.LpDistance(p=1), None),
        (lambda: distances.LpDistance(power=2, normalize_embeddings=False), None),
        (lambda: distances.DotProductSimilarity(power=2), None),
        (distances.SNRDistance, None),
    ],
)
def test_a_distance_orders_the_gallery_as_its_own_matrix_does(make: Any, measure: str | None) -> None:
    rows, queries = draw(torch.arange(30), width=8), draw(torch.arange(9), width=8, seed=1)
    distance = make()
    found = measure_of(distance)
    assert found == measure if measure else callable(found)
    own = distance or distances.CosineSimilarity()
    matrix = own(queries.double(), rows.double()) * (1 if own.is_inverted else -1)
    assert torch.equal(Gallery(rows, found).nearest(queries, 6), matrix.argsort(dim=1, descending=True)[:, :6])


def test_what_is_no_distance_is_refused() -> None:
    with pytest.raises(
        FinetuneBNError, match="distance: got 'CosineSimilarity'; allowed: a distance of pytorch-metric"
    ):
        measure_of(torch.nn.CosineSimilarity())


# --- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)), r"labels of embeddings: got 'int64 \[2\]'"),
        (
            (torch.zeros(3, 2), torch.zeros(3)),
            r"labels of embeddings: got 'float32 \[3\]'; allowed: whole numbers \[3\]",
        ),
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64)), r"embeddings: got 'float32 \[3\]'"),
        ((torch.full((2, 2), torch.nan), torch.zeros(2, dtype=torch.int64)), "embeddings: got '2 of 2 rows with NaN"),
        ((torch.ones(2, 2), torch.arange(2), torch.ones(3, 2), torch.arange(2)), "labels of gallery"),
        ((torch.ones(2, 2), torch.arange(2), torch.ones(2, 3), torch.arange(2)), r"queries: got \[2, 2\]; .*\[n, 3\]"),
    ],
)
def test_embeddings_and_labels_that_do_not_fit_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(BadData, match=message):
        retrieval(*arguments)


@pytest.mark.parametrize("domains", [torch.tensor([0, 2]), torch.tensor([-1, 0]), torch.zeros(3, dtype=torch.int64)])
def test_a_domain_without_a_name_is_refused(domains: Tensor) -> None:
    with pytest.raises(BadData, match=r"domains: got .*; allowed: one number from 0 to 1 an image, \[2\]"):
        retrieval_report(torch.ones(2, 2), torch.arange(2), domains, ["ink", "oil"])


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    gone = lambda name, *args: None if name == "pytorch_metric_learning" else find(name, *args)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", gone)
    with pytest.raises(MissingDependency, match="Run: pip install pytorch-metric-learning"):
        retrieval(torch.ones(2, 2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(MissingDependency):
        measure_of(distances.LpDistance())


def test_no_faiss_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def without_faiss(name: str, *args: Any, **kwargs: Any) -> Any:
        assert not name.startswith("faiss")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    assert retrieval(torch.eye(2), torch.tensor([0, 0])).recall_at_1 == 1


def test_a_measure_can_be_sent_to_another_process() -> None:
    found = pickle.loads(pickle.dumps(measure_of(distances.LpDistance(p=1))))
    queries = draw(torch.arange(4))
    assert torch.equal(found(queries, queries), -distances.LpDistance(p=1)(queries, queries))


@pytest.mark.gpu
@pytest.mark.parametrize("measure", ["cosine", "euclidean", "dot"])
def test_a_gpu_finds_the_neighbors_of_the_cpu(measure: Any) -> None:
    labels = uneven(500, 60)
    rows = draw(labels, width=33)
    own = torch.arange(500)
    found = Gallery(rows.cuda(), measure).nearest(rows.cuda(), 20, own.cuda())
    assert torch.equal(found.cpu(), Gallery(rows, measure).nearest(rows, 20, own))
    assert retrieval(rows.cuda(), labels.cuda(), measure=measure).scores == pytest.approx(
        retrieval(rows, labels, measure=measure).scores, rel=1e-12
    )


# --- size and processes ---------------------------------------------------------------------------------------------


def test_memory_is_that_of_a_chunk_and_not_of_all_pairs() -> None:
    """By counting what torch allocates at a time: 1,000 images have a million pairs, 8 MB in float64."""
    labels = torch.arange(1000) // 4
    rows = draw(labels, width=16)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    with Watch():
        found = retrieval(rows, labels, chunk_bytes=2**21)
    assert 0 < largest <= 2**21
    assert found.scores == pytest.approx(retrieval(rows, labels).scores, rel=1e-12)


def test_alone_gathering_returns_the_rows_themselves() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows


def gather_in_process(rank: int, file: str, counts: list[int], results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=len(counts))
    rows = torch.arange(counts[rank] * 2).view(-1, 2) + 100 * rank
    results[rank] = gather_rows(rows).tolist()
    torch.distributed.barrier()  # who leaves before the others have connected breaks their connection
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("counts", [[2, 3], [0, 2], [2, 2]])
def test_rows_of_uneven_processes_come_in_the_order_of_ranks(tmp_path: Any, counts: list[int]) -> None:
    context = torch.multiprocessing.get_context("fork")
    results = context.Manager().dict()
    file = str(tmp_path / "store")
    torch.multiprocessing.start_processes(
        gather_in_process, args=(file, counts, results), nprocs=len(counts), start_method="fork"
    )
    expected = [[100 * rank + 2 * i, 100 * rank + 2 * i + 1] for rank, n in enumerate(counts) for i in range(n)]
    assert [results[rank] for rank in range(len(counts))] == [expected] * len(counts)


# Over processes


def _look_up(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/at", rank=rank, world_size=world)
    labels = uneven(60, 12)
    embeddings, domains = draw(labels), torch.arange(60) % 2
    results = {}
    for half in (False, True):
        report = retrieval_report(embeddings, labels, domains, ["ink", "oil"], half=half, over_processes=True)
        results[str(half)] = report.named()
    few = retrieval(embeddings[:2], torch.zeros(2, dtype=torch.int64), over_processes=True)  # a rank without a query
    results["few"] = few.scores

    def measure(queries: Tensor, gallery: Tensor) -> Tensor:
        if rank == 1:
            raise MemoryError("no room")
        return queries @ gallery.T

    try:
        retrieval(embeddings, labels, measure=measure, over_processes=True)
    except (MemoryError, OtherProcessFailed) as error:
        results["error"] = f"{type(error).__name__}: {error}"
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_queries_cut_over_processes_give_the_figures_of_one(tmp_path: Path, world: int) -> None:
    mp.start_processes(_look_up, (world, str(tmp_path)), nprocs=world, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(world)]
    labels = uneven(60, 12)
    embeddings, domains = draw(labels), torch.arange(60) % 2
    for half in (False, True):
        expected = retrieval_report(embeddings, labels, domains, ["ink", "oil"], half=half).named()
        assert all(found[str(half)] == pytest.approx(expected, rel=1e-12, nan_ok=True) for found in ranks)
        assert not half or expected["recall_at_1"] == pytest.approx(ranks[0]["False"]["recall_at_1"], abs=0.05)
    assert all(found["few"]["recall_at_1"] == 1.0 for found in ranks)
    # One that fails tells the others, who would wait for ever.
    assert ranks[1]["error"] == "MemoryError: no room"
    assert all("OtherProcessFailed: rank 1 failed" in found["error"] for found in (ranks[0], *ranks[2:]))
