"""The exact nearest neighbors of embeddings, chunk by chunk, with ties that fall the same way every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune_bn.errors import BadData, FinetuneBNError, complaint

Measure = Literal["cosine", "euclidean", "dot"] | Callable[[Tensor, Tensor], Tensor]
MEASURES = ("cosine", "euclidean", "dot")
CHUNK_BYTES = 2**29
BYTES_OF_A_PAIR = 64  # of a query and a row of the gallery: scores, what topk copies of them, masks, ranks of ties
# Scores that differ by less than this share of the largest possible one are equal. Far above the rounding of float64
# sums, which depends on how the rows are cut into chunks, and below what float32 embeddings can tell.
GRID = 2.0**-32


class Gallery:
    """Embeddings in which others are looked up.

    Scores are computed in float64. Of rows with equal scores (see `GRID`; so are those of equal embeddings) the one
    with the lower number is nearer. The answer does not depend on how many queries are asked at a time, nor on
    `chunk_bytes`.

    Args:
        embeddings: one row an image, float [M, D], M at least 1.
        measure: cosine: the angle. euclidean: the distance. dot: the dot product. Or a function of queries [n, D] and
            gallery [M, D], both float64, that returns scores [n, M], larger for nearer ones; they are compared as
            float32.
        chunk_bytes: about how much memory a search may use, beside the embeddings and the answer.
        half: keep the rows in float16, a quarter of the memory. They are rounded to 3 digits, and scores computed in
            float64 of that; not for a function as the measure.

    Raises:
        BadData: `embeddings` is no such matrix, or holds NaN or infinite numbers.
        FinetuneBNError: `measure` is none of the allowed ones.
    """

    def __init__(
        self, embeddings: Tensor, measure: Measure = "cosine", chunk_bytes: int = CHUNK_BYTES, half: bool = False
    ) -> None:
        check_embeddings("gallery", embeddings)
        if not len(embeddings):
            raise BadData(complaint("gallery", list(embeddings.shape), "one row or more"))
        if not callable(measure) and measure not in MEASURES:
            raise FinetuneBNError(complaint("measure", measure, f"{', '.join(MEASURES)}, or a function"))
        if half and callable(measure):
            allowed = f"False, where the measure is none of {', '.join(MEASURES)}"
            raise FinetuneBNError(complaint("half", half, allowed))
        self.measure = measure
        self._center = embeddings.mean(dim=0, dtype=torch.float64)
        self._block = max(1, chunk_bytes // (2 * BYTES_OF_A_PAIR * embeddings.shape[1])) if half else len(embeddings)
        parts = torch.split(embeddings, self._block)
        # Half precision has numbers up to 65504 and few below 1e-7, so rows are kept as shares of the largest number.
        self._scale = max(float(self._widened(part).abs().max()) for part in parts) or 1.0 if half else None
        self._rows = torch.cat([self._kept(part) for part in parts])
        lengths = [
            torch.linalg.vector_norm(self._compared(part), dim=1).max() for part in torch.split(self._rows, self._block)
        ]
        self._norm = torch.stack(lengths).max()
        self._queries_at_once = max(1, chunk_bytes // (BYTES_OF_A_PAIR * len(embeddings)))

    def __len__(self) -> int:
        return len(self._rows)

    def nearest(self, queries: Tensor, k: int, own: Tensor | None = None) -> Tensor:
        """Return the numbers of the `k` nearest rows of the gallery, nearest first, int64 [n, k].

        Args:
            queries: float [n, D].
            k: how many; at most the length of the gallery, less 1 where `own` is given.
            own: the row of the gallery that each query itself is, int64 [n]; it is not among its neighbors.

        Raises:
            BadData: `queries` is no such matrix, or holds NaN or infinite numbers.
            FinetuneBNError: `k` is too large or too small.
        """
        check_embeddings("queries", queries)
        if queries.shape[1] != len(self._center):
            allowed = f"[n, {len(self._center)}], as many numbers a row as the gallery has"
            raise BadData(complaint("queries", list(queries.shape), allowed))
        most = len(self) - (own is not None)
        if not 1 <= k <= most:
            raise FinetuneBNError(complaint("k", k, f"1 to {most}, the number of rows that can be found"))
        found = torch.empty(len(queries), k, dtype=torch.int64, device=queries.device)
        for start in range(0, len(queries), self._queries_at_once):
            rows = slice(start, start + self._queries_at_once)
            scores = self._scores(queries[rows])
            if own is not None:
                scores.scatter_(1, own[rows][:, None], -torch.inf)
            found[rows] = largest(scores, k)
        return found

    def _kept(self, embeddings: Tensor) -> Tensor:
        """Return rows of the gallery as they are kept."""
        rows = self._widened(embeddings)
        return self._with_square(rows) if self._scale is None else (rows / self._scale).half()

    def _compared(self, kept: Tensor) -> Tensor:
        """Return kept rows as queries are multiplied with them, float64."""
        return kept if self._scale is None else self._with_square(kept.double() * self._scale)

    def _with_square(self, rows: Tensor) -> Tensor:
        if self.measure != "euclidean":
            return rows
        # -|q - r|^2 / 2 is q.r - |r|^2 / 2, but for what all r have in common.
        return torch.cat([rows, rows.square().sum(dim=1, keepdim=True) / -2], dim=1)

    def _widened(self, embeddings: Tensor) -> Tensor:
        wide = embeddings.double()
        if self.measure == "cosine":
            return F.normalize(wide, dim=1)
        return wide - self._center if self.measure == "euclidean" else wide

    def _scores(self, queries: Tensor) -> Tensor:
        wide = self._widened(queries)
        if callable(self.measure):
            return self.measure(wide, self._rows).float()
        prepared = F.pad(wide, (0, 1), value=1.0) if self.measure == "euclidean" else wide
        bound = torch.linalg.vector_norm(prepared, dim=1, keepdim=True) * self._norm
        tiny = torch.finfo(torch.float64).tiny
        scores = torch.cat([prepared @ self._compared(part).T for part in torch.split(self._rows, self._block)], dim=1)
        return scores.div_(bound.clamp_min(tiny) * GRID).round_()


def largest(scores: Tensor, k: int) -> Tensor:
    """Return the columns of the `k` largest scores of each row, largest first, of equal ones the first, int64 [n, k].

    `torch.topk` returns any of those that are equal.

    Args:
        scores: float [n, m] with m >= k, without NaN.
        k: how many.
    """
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    columns = columns[:, :k].sort(dim=1).values
    # Where the one behind the last is equal to it, topk has chosen among equals.
    crowded = (values[:, k - 1 : k] == values[:, k:]).any(dim=1)
    if crowded.any():
        rows, least = scores[crowded], values[crowded, k - 1 : k]
        above, tied = rows > least, rows == least
        first = tied.cumsum(dim=1) <= k - above.sum(dim=1, keepdim=True)
        columns[crowded] = (above | (tied & first)).nonzero()[:, 1].view(-1, k)
    return columns.gather(1, scores.gather(1, columns).argsort(dim=1, descending=True, stable=True))


def check_embeddings(argument: str, embeddings: Tensor) -> None:
    """Raise `BadData` unless `embeddings` is a float matrix of finite numbers."""
    given = f"{str(embeddings.dtype).removeprefix('torch.')} {list(embeddings.shape)}"
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise BadData(complaint(argument, given, "one row an image, float [N, D]"))
    wrong = int((~torch.isfinite(embeddings)).any(dim=1).sum())
    if wrong:
        remedy = "The network has diverged, or its numbers overflow in half precision."
        raise BadData(complaint(argument, f"{wrong} of {len(embeddings)} rows with NaN or inf", "finite ones", remedy))
