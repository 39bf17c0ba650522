"""How well embeddings find images of the same label: Recall@K and MAP@R, for all images and for pairs of domains.

The metrics are those of pytorch-metric-learning's `AccuracyCalculator` (MAP@R: Musgrave, Belongie and Lim 2020, "A
Metric Learning Reality Check", section 3.2). It is fed chunk by chunk with neighbors that are found here, so that no
faiss is needed, and memory does not grow with the square of the number of images.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune_bn.errors import BadData, FinetuneBNError, MissingDependency, complaint
from finetune_bn.metric_learning.neighbors import BYTES_OF_A_PAIR, CHUNK_BYTES, Gallery, Measure, check_embeddings
from finetune_bn.utilities.processes import Ranks

# The calculator's names, and ours.
_NAMES = {
    "precision_at_1": "recall_at_1",
    "recall_at_5": "recall_at_5",
    "recall_at_10": "recall_at_10",
    "mean_average_precision_at_r": "map_at_r",
}
SCORES = tuple(_NAMES.values())
PAIR_SCORES = ("recall_at_1", "map_at_r")
_NEIGHBORS = 10  # at least, for recall_at_10


@dataclass(frozen=True)
class Retrieval:
    """How well queries found their label in a gallery; shares from 0 to 1, NaN where no query counts.

    Attributes:
        recall_at_1: share of the queries whose nearest image has their label.
        recall_at_5: share of the queries that have an image of their label among the nearest 5.
        recall_at_10: the same among the nearest 10.
        map_at_r: mean average precision at R, where R is how many images of the query's label the gallery has.
        queries: how many queries have an image of their label in the gallery; the shares are of these.
        lone: how many have none, and do not count.
    """

    recall_at_1: float
    recall_at_5: float
    recall_at_10: float
    map_at_r: float
    queries: int
    lone: int

    @property
    def scores(self) -> dict[str, float]:
        """The four shares by name."""
        return {name: getattr(self, name) for name in SCORES}


@dataclass(frozen=True)
class RetrievalReport:
    """The retrieval of a data set in all the ways that its domains allow.

    Attributes:
        overall: each image looked up among all others, whatever their domains.
        pairs: each image of one domain looked up among those of another, or among the others of its own, by (domain of
            the queries, domain of the gallery); empty where there is one domain only.
    """

    overall: Retrieval
    pairs: Mapping[tuple[str, str], Retrieval]

    @property
    def across(self) -> dict[str, float]:
        """The mean of each score over the pairs of different domains that have one; empty without several domains."""
        pairs = [pair for (query, gallery), pair in self.pairs.items() if query != gallery]
        found = [pair.scores for pair in pairs if pair.queries]
        return {name: sum(s[name] for s in found) / len(found) if found else math.nan for name in SCORES if pairs}

    @property
    def unmatched(self) -> list[str]:
        """The pairs of domains in which no query has an image of its label in the gallery: they have no scores."""
        return [f"{query}_to_{gallery}" for (query, gallery), pair in self.pairs.items() if not pair.queries]

    def named(self) -> dict[str, float]:
        """Return the scores by the names they are logged under.

        `recall_at_1` is the overall one, `recall_at_1/across_domains` the mean over the pairs of different domains, and
        `recall_at_1/noto_to_fluent` that of queries of noto in the gallery of fluent. Of pairs only the scores of
        `PAIR_SCORES` have a name, or ten domains would have 400.
        """
        found = dict(self.overall.scores)
        found |= {f"{name}/across_domains": value for name, value in self.across.items()}
        for (query, gallery), pair in self.pairs.items():
            if pair.queries:
                found |= {f"{name}/{query}_to_{gallery}": pair.scores[name] for name in PAIR_SCORES}
        return found


def retrieval_report(
    embeddings: Tensor,
    labels: Tensor,
    domains: Tensor | None = None,
    names: Sequence[str] = (),
    *,
    measure: Measure = "cosine",
    chunk_bytes: int = CHUNK_BYTES,
    half: bool = False,
    over_processes: bool = False,
) -> RetrievalReport:
    """Return how well images of a label find each other: among all images, and for each pair of domains.

    Args:
        embeddings: one row an image, float [N, D].
        labels: the label of each image, whole numbers [N].
        domains: the domain of each image as its number in `names`, whole numbers [N]; None where there is one only.
        names: names of the domains.
        measure: see `neighbors.Gallery`, and `measure_of` for pytorch-metric-learning's distances.
        chunk_bytes: about how much memory may be used at a time, beside the embeddings.
        half: see `retrieval`.
        over_processes: see `retrieval`.

    Raises:
        BadData: the shapes do not fit, a number is not finite, or a domain has no name.
        MissingDependency: pytorch-metric-learning is not installed.
    """
    how: dict[str, Any] = {"measure": measure, "chunk_bytes": chunk_bytes}
    how |= {"half": half, "over_processes": over_processes}
    overall = retrieval(embeddings, labels, **how)
    if domains is None or len(names) < 2 or not len(labels):
        return RetrievalReport(overall, {})
    if domains.shape != labels.shape or int(domains.min()) < 0 or int(domains.max()) >= len(names):
        allowed = f"one number from 0 to {len(names) - 1} an image, [{len(labels)}]"
        raise BadData(complaint("domains", f"{list(domains.shape)}, {torch.unique(domains).tolist()}", allowed))
    parts = [(domains == number).nonzero()[:, 0] for number in range(len(names))]
    pairs = {}
    for query, rows in zip(names, parts, strict=True):
        for gallery, others in zip(names, parts, strict=True):
            looked_up = (embeddings[rows], labels[rows])
            # In another domain's images, or in the others of the same.
            among = (embeddings[others], labels[others]) if query != gallery else (None, None)
            pairs[query, gallery] = retrieval(*looked_up, *among, **how)
    return RetrievalReport(overall, pairs)


def retrieval(
    embeddings: Tensor,
    labels: Tensor,
    gallery: Tensor | None = None,
    gallery_labels: Tensor | None = None,
    *,
    measure: Measure = "cosine",
    chunk_bytes: int = CHUNK_BYTES,
    half: bool = False,
    over_processes: bool = False,
) -> Retrieval:
    """Return how well each image finds its label in a gallery, or, without one, among all other images.

    An image is never found by itself; another one that happens to have the same embedding may be. The result does not
    depend on `chunk_bytes`, but for the rounding of a mean.

    Args:
        embeddings: one row an image, float [N, D].
        labels: the label of each image, whole numbers [N].
        gallery: the embeddings of other images to look them up in, float [M, D].
        gallery_labels: their labels [M].
        measure: see `neighbors.Gallery`, and `measure_of` for pytorch-metric-learning's distances.
        chunk_bytes: about how much memory may be used at a time, beside the embeddings.
        half: keep the gallery in float16, a quarter of the memory; scores are still float64, of embeddings that are
            rounded to 3 digits, so images that are nearly as near may change places.
        over_processes: cut the queries over the processes of `torch.distributed`, which all call this with the same
            embeddings; all get the whole result.

    Raises:
        BadData: the shapes do not fit, or a number is not finite.
        OtherProcessFailed: another process raised.
        MissingDependency: pytorch-metric-learning is not installed.
    """
    check_rows("embeddings", embeddings, labels)
    among_themselves = gallery is None or gallery_labels is None
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = embeddings, labels
    check_rows("gallery", gallery, gallery_labels)
    # Numbered from 0: the calculator makes float32 of labels, which cannot tell large whole numbers apart.
    numbered = torch.unique(torch.cat([labels, gallery_labels]), return_inverse=True)[1].to(embeddings.device)
    wanted, known = numbered[: len(labels)], numbered[len(labels) :]
    in_gallery = torch.bincount(known, minlength=int(numbered.max()) + 1) if len(numbered) else known
    matches = in_gallery[wanted] - int(among_themselves)
    # By label, so that a chunk has few of them: the calculator looks at them one by one.
    queries = wanted.argsort(stable=True)
    queries = queries[matches[queries] > 0]

    def totals_of(part: Tensor) -> dict[str, float]:
        totals = dict.fromkeys(SCORES, 0.0)
        if not len(part):
            return totals
        place = Gallery(gallery, measure, chunk_bytes, half)
        for rows in torch.split(part, max(1, chunk_bytes // (BYTES_OF_A_PAIR * len(gallery)))):
            own = rows if among_themselves else None
            k = min(max(_NEIGHBORS, int(matches[rows].max())), len(gallery) - int(among_themselves))
            neighbors = place.nearest(embeddings[rows], k, own)
            for name, value in _calculate(wanted[rows], known, neighbors, own).items():
                totals[name] += value * len(rows)
        return totals

    ranks = Ranks(None, embeddings.device)
    totals = _over_ranks(ranks, queries, totals_of) if over_processes and ranks.world > 1 else totals_of(queries)
    shares = {name: total / len(queries) if len(queries) else math.nan for name, total in totals.items()}
    return Retrieval(**shares, queries=len(queries), lone=len(labels) - len(queries))


def _over_ranks(ranks: Ranks, queries: Tensor, totals_of: Callable[[Tensor], dict[str, float]]) -> dict[str, float]:
    """Return the totals of all queries, of which each process looks up its part."""
    try:
        own = totals_of(queries.tensor_split(ranks.world)[torch.distributed.get_rank()])
    except BaseException:
        ranks.fail(len(SCORES))
        raise
    columns = zip(*ranks.agree(*(own[name] for name in SCORES)), strict=True)
    return {name: sum(column) for name, column in zip(SCORES, columns, strict=True)}


def _calculate(wanted: Tensor, known: Tensor, neighbors: Tensor, own: Tensor | None) -> dict[str, float]:
    """Return the scores of queries, all of which have a match, by pytorch-metric-learning's calculator.

    Args:
        wanted: labels of the queries [n], from 0 up.
        known: labels of the gallery [M].
        neighbors: rows of the gallery, nearest first, [n, k].
        own: the rows that the queries themselves are [n], where they are in the gallery.
    """
    order = torch.arange(len(known), device=known.device)
    if own is not None:  # the calculator wants them to be the gallery's first
        others = torch.ones_like(known, dtype=torch.bool).index_fill_(0, own, False)
        order = torch.cat([own, others.nonzero()[:, 0]])
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    found = place[neighbors]
    calculator = _calculator_class()(
        include=tuple(_NAMES), k="max_bin_count", device=known.device, knn_func=lambda *_: (found, found)
    )
    # The embeddings are not needed any more, and would be copied; the calculator asks for their number alone.
    queries, gallery = (torch.zeros(len(labels), 1, device=known.device) for labels in (wanted, known))
    scores = calculator.get_accuracy(queries, wanted, gallery, known[order], own is not None)
    return {_NAMES[name]: float(value) for name, value in scores.items()}


def _calculator_class() -> Any:
    """Return the `AccuracyCalculator` with Recall@5 and Recall@10, which it lacks."""
    need_pytorch_metric_learning()
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator  # type: ignore[import-untyped]

    class Calculator(AccuracyCalculator):  # type: ignore[misc]
        def requires_knn(self) -> list[str]:
            return [*super().requires_knn(), "recall_at_5", "recall_at_10"]

        def calculate_recall_at_5(self, knn_labels: Tensor, query_labels: Tensor, **_: Any) -> float:
            return _recall(knn_labels[:, :5], query_labels)

        def calculate_recall_at_10(self, knn_labels: Tensor, query_labels: Tensor, **_: Any) -> float:
            return _recall(knn_labels[:, :10], query_labels)

    return Calculator


def _recall(found: Tensor, wanted: Tensor) -> float:
    return float((found == wanted[:, None]).any(dim=1).double().mean())


def measure_of(distance: Any) -> Measure:
    """Return how a distance of pytorch-metric-learning orders the gallery of a query, None for the cosine.

    Args:
        distance: a `BaseDistance`, such as the `distance` of a loss, or None.

    Raises:
        FinetuneBNError: it is none.
        MissingDependency: pytorch-metric-learning is not installed.
    """
    if distance is None:
        return "cosine"
    need_pytorch_metric_learning()
    from pytorch_metric_learning import distances  # type: ignore[import-untyped]

    if not isinstance(distance, distances.BaseDistance):
        allowed = "a distance of pytorch-metric-learning (pytorch_metric_learning.distances)"
        raise FinetuneBNError(complaint("distance", type(distance).__name__, allowed))
    compute, lengths = type(distance).compute_mat, distance.p == 2 and distance.power == 1
    dot = compute is distances.DotProductSimilarity.compute_mat and distance.power == 1
    if lengths and distance.normalize_embeddings and (dot or compute is distances.LpDistance.compute_mat):
        return "cosine"  # the angle orders normalized embeddings as their distance does
    if dot and not distance.normalize_embeddings:
        return "dot"
    if lengths and not distance.normalize_embeddings and compute is distances.LpDistance.compute_mat:
        return "euclidean"
    return _Nearness(distance)


@dataclass(frozen=True)
class _Nearness:
    """What a distance says, larger for nearer ones; a class, so that it can be sent to another process."""

    distance: Any

    def __call__(self, queries: Tensor, gallery: Tensor) -> Tensor:
        found: Tensor = self.distance(queries, gallery)
        return found if self.distance.is_inverted else -found


def need_pytorch_metric_learning() -> None:
    """Raise `MissingDependency` where pytorch-metric-learning is not installed."""
    if importlib.util.find_spec("pytorch_metric_learning") is None:
        raise MissingDependency(
            complaint(
                "pytorch-metric-learning", "not installed", "2.5 or newer", "Run: pip install pytorch-metric-learning"
            )
        )


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, those of rank 0 first; each may have any number of them, 0 too.

    Args:
        rows: [n, ...], with the same further dimensions and dtype on each process.
    """
    ranks = Ranks(None, rows.device)
    if ranks.world == 1:
        return rows
    counts = [int(count) for count in ranks.gather(torch.tensor([len(rows)], device=rows.device))]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    return torch.cat([part[:count] for part, count in zip(ranks.gather(padded), counts, strict=True)])


def check_rows(argument: str, embeddings: Tensor, labels: Tensor) -> None:
    """Raise `BadData` unless there is one label, a whole number, for each of the embeddings, which are finite."""
    check_embeddings(argument, embeddings)
    if labels.shape != embeddings.shape[:1] or labels.is_floating_point():
        given = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        raise BadData(complaint(f"labels of {argument}", given, f"whole numbers [{len(embeddings)}], one an image"))
