from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune_bn.errors import BadData, FinetuneBNError
from finetune_bn.metric_learning.neighbors import Gallery, largest
from tests.references import Array, as_array


def draw(n: int, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def reference_scores(queries: Array, gallery: Array, measure: str) -> Array:
    """Larger is nearer, in float64, from the definitions."""
    if measure == "euclidean":
        return -np.sqrt(((queries[:, None] - gallery[None]) ** 2).sum(-1))
    products = (queries[:, None] * gallery[None]).sum(-1)
    if measure == "dot":
        return products
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(gallery, axis=1)[None]
    return products / lengths


def reference_order(scores: Array, k: int, own: Array | None = None) -> Array:
    """The first k columns by falling score, of equal ones (to 9 digits) the first; a sort of Python's, not a topk."""
    order = []
    for row, of_row in enumerate(np.round(scores, 9)):
        columns = [c for c in range(len(of_row)) if own is None or c != own[row]]
        order.append(sorted(columns, key=lambda c: (-of_row[c], c))[:k])
    return np.array(order)


@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 2**29])
@pytest.mark.parametrize("measure", ["cosine", "euclidean", "dot"])
def test_neighbors_are_those_of_brute_force_whatever_the_chunk(measure: Any, chunk_bytes: int) -> None:
    queries, rows = draw(23, seed=1), draw(57) * torch.arange(1, 58)[:, None].sqrt()
    expected = reference_order(reference_scores(as_array(queries), as_array(rows), measure), 9)
    found = Gallery(rows, measure, chunk_bytes).nearest(queries, 9)
    np.testing.assert_array_equal(found, expected)


def test_the_measures_differ_so_that_a_mix_up_would_be_seen() -> None:
    rows = draw(57) * torch.arange(1, 58)[:, None].sqrt()
    orders = {m: tuple(Gallery(rows, m).nearest(draw(23, seed=1), 9).flatten().tolist()) for m in ("cosine", "dot")}
    orders["euclidean"] = tuple(Gallery(rows, "euclidean").nearest(draw(23, seed=1), 9).flatten().tolist())
    assert len(set(orders.values())) == 3


def test_a_query_is_not_its_own_neighbor_and_a_copy_of_it_is_the_nearest() -> None:
    rows = draw(20)
    rows[13] = rows[4]
    own = torch.arange(20)
    found = Gallery(rows).nearest(rows, 19, own)
    assert not (found == own[:, None]).any()
    assert [len(set(row)) for row in found.tolist()] == [19] * 20
    assert (found[4, 0], found[13, 0]) == (13, 4)


@pytest.mark.parametrize("chunk_bytes", [1, 5000, 2**29])
@pytest.mark.parametrize("measure", ["cosine", "euclidean", "dot"])
def test_equal_embeddings_are_ranked_by_their_row_number(measure: Any, chunk_bytes: int) -> None:
    generator = torch.Generator().manual_seed(3)
    kinds = draw(4, width=33)  # an odd width and many copies: matrix products round their last columns differently
    rows = kinds[torch.randint(4, (301,), generator=generator)]
    found = Gallery(rows, measure, chunk_bytes).nearest(rows, 120, torch.arange(301))
    expected = reference_order(reference_scores(as_array(rows), as_array(rows), measure), 120, np.arange(301))
    np.testing.assert_array_equal(found, expected)


def test_embeddings_that_are_all_equal_give_the_first_rows() -> None:
    found = Gallery(torch.ones(9, 5)).nearest(torch.ones(9, 5), 3, torch.arange(9))
    assert found.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3]] + [[0, 1, 2]] * 6
    assert Gallery(torch.zeros(4, 5)).nearest(torch.zeros(1, 5), 4).tolist() == [[0, 1, 2, 3]]


def test_distances_far_from_the_origin_keep_their_digits() -> None:
    queries, rows = draw(11, seed=1).double(), draw(40).double()
    near = Gallery(rows, "euclidean").nearest(queries, 5)
    far = Gallery(rows + 1e6, "euclidean").nearest(queries + 1e6, 5)
    assert torch.equal(near, far)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_embeddings_is_one_of_storage_alone(dtype: torch.dtype) -> None:
    queries, rows = draw(11, seed=1).to(dtype), draw(40).to(dtype)
    expected = reference_order(reference_scores(as_array(queries), as_array(rows), "cosine"), 5)
    np.testing.assert_array_equal(Gallery(rows).nearest(queries, 5), expected)


def test_a_measure_can_be_a_function_where_larger_is_nearer() -> None:
    def manhattan(queries: Tensor, gallery: Tensor) -> Tensor:
        assert queries.dtype == gallery.dtype == torch.float64
        return -(queries[:, None] - gallery).abs().sum(-1)

    queries, rows = draw(7, seed=1), draw(30)
    scores = -np.abs(as_array(queries)[:, None] - as_array(rows)[None]).sum(-1)
    np.testing.assert_array_equal(Gallery(rows, manhattan, 1).nearest(queries, 4), reference_order(scores, 4))


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_largest_are_ordered_by_value_then_by_column(k: int) -> None:
    scores = torch.tensor([[1.0, 3, 3, 0, 3, 1, 3, -torch.inf], [0.0] * 8, [7.0, 6, 5, 4, 3, 2, 1, 0]])
    expected = reference_order(scores.numpy(), k)
    np.testing.assert_array_equal(largest(scores, k), expected)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(3), r"gallery: got 'float32 \[3\]'; allowed: one row an image, float \[N, D\]"),
        (torch.zeros(3, 2, dtype=torch.int64), r"gallery: got 'int64 \[3, 2\]'"),
        (torch.zeros(0, 2), r"gallery: got \[0, 2\]; allowed: one row or more"),
        (torch.tensor([[1.0, torch.nan], [torch.inf, 0], [0, 0]]), "gallery: got '2 of 3 rows with NaN or inf'"),
    ],
)
def test_a_gallery_that_cannot_be_searched_is_refused(rows: Tensor, message: str) -> None:
    with pytest.raises(BadData, match=message):
        Gallery(rows)


def test_wrong_questions_are_refused() -> None:
    gallery = Gallery(draw(4))
    with pytest.raises(FinetuneBNError, match="k: got 5; allowed: 1 to 4"):
        gallery.nearest(draw(2), 5)
    with pytest.raises(FinetuneBNError, match="k: got 4; allowed: 1 to 3"):
        gallery.nearest(draw(2), 4, torch.tensor([0, 1]))
    with pytest.raises(FinetuneBNError, match="k: got 0"):
        gallery.nearest(draw(2), 0)
    with pytest.raises(BadData, match=r"queries: got \[2, 5\]; allowed: \[n, 6\]"):
        gallery.nearest(draw(2, width=5), 1)
    with pytest.raises(BadData, match="queries: got '1 of 1 rows with NaN"):
        gallery.nearest(torch.full((1, 6), torch.nan), 1)
    with pytest.raises(FinetuneBNError, match="measure: got 'angle'; allowed: cosine, euclidean, dot, or a function"):
        Gallery(draw(4), "angle")  # type: ignore[arg-type]


@pytest.mark.parametrize("chunk_bytes", [1, 2**29])
@pytest.mark.parametrize(("measure", "scale"), [("cosine", 1e6), ("euclidean", 1e6), ("euclidean", 1e-6), ("dot", 1e6)])
def test_a_gallery_in_half_precision_finds_what_is_nearest_to_its_rounding(
    measure: Any, scale: float, chunk_bytes: int
) -> None:
    """Numbers beyond what half precision can hold, and a center far from the origin, cost nothing more."""
    rows, queries = draw(300) * scale, draw(40, seed=1) * scale
    offset = 1000 * scale if measure == "euclidean" else 0.0
    gallery = Gallery(rows.double() + offset, measure, chunk_bytes, half=True)
    assert gallery._rows.dtype == torch.float16
    found = gallery.nearest(queries.double() + offset, 5)
    scores = torch.from_numpy(reference_scores(as_array(queries), as_array(rows), measure))
    best = scores.sort(dim=1, descending=True).values[:, :5]
    assert float((scores.gather(1, found) - best).abs().max() / scores.abs().max()) < 2e-3
    assert float((found[:, 0] == scores.argmax(dim=1)).double().mean()) > 0.9


def test_half_precision_is_refused_for_a_function() -> None:
    with pytest.raises(FinetuneBNError, match="half: got True; allowed: False, where the measure is none of cosine"):
        Gallery(draw(3), lambda a, b: a @ b.T, half=True)
