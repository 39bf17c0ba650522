"""The embeddings of all processes in one batch, with gradients, so that a loss has the negatives of all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.metric_learning.retrieval import gather_rows
from finetune_bn.utilities.processes import Ranks


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ranks = Ranks(None, rows.device)
        counts = [int(count) for count in ranks.gather(torch.tensor([len(rows)], device=rows.device))]
        rank = torch.distributed.get_rank()
        ctx.own = sum(counts[:rank]), counts[rank]
        return gather_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Each process has a loss of its own of the same rows: what they say of our rows is added up. Averaged over the
        # processes afterwards, as DistributedDataParallel does, it is the gradient of the mean of the losses.
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.narrow(0, *ctx.own)


def gather_batch(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the embeddings [M, D] and labels [M] of all processes, those of rank 0 first; alone, what was given.

    Gradients flow back to the process that an embedding is from: where each process computes a loss of what is
    returned, and `DistributedDataParallel` averages the gradients of the parameters, they are those of one process
    with the whole batch (for BatchNorm layers that are frozen, or synchronized). All processes must call it, with
    embeddings of one dtype; their batches may differ in size. Two collectives forward, and one backward of M x D.

    Args:
        embeddings: float [N, D].
        labels: one for each, [N].

    Raises:
        FinetuneBNError: the labels are not as many as the embeddings.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        given = f"{list(embeddings.shape)} and {list(labels.shape)}"
        raise FinetuneBNError(complaint("embeddings, labels", given, "[N, D] and [N]"))
    if Ranks(None, embeddings.device).world == 1:
        return embeddings, labels
    gathered: Tensor = _GatherRows.apply(embeddings)
    return gathered, gather_rows(labels)
