"""How curved a loss is: the largest eigenvalue of its Hessian, by power iteration on Hessian-vector products.

Gradient descent with a learning rate above 2 / lambda grows in the direction of that eigenvector; with momentum beta
above 2 (1 + beta) / lambda (Polyak 1964). For Adam it is the Hessian between square roots of the preconditioner, and
(2 + 2 beta1) / ((1 - beta1) lambda), 38 / lambda at beta1 = 0.9 (Cohen et al. 2022, arXiv 2207.14484).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[], Tensor]
# A random vector has to turn into the direction before the estimate means anything: so many products at least, and an
# estimate that still moves by more than this share of itself is none.
_LEAST, _NEARLY = 4, 0.2
# With the most negative one taken off, eigenvalues lie closer to each other: so many times as many products.
_SHIFTED = 3


def top_eigenvalue(
    loss: Loss,
    parameters: Sequence[Tensor],
    *,
    scale: Sequence[Tensor] | None = None,
    iterations: int = 20,
    tolerance: float = 0.02,
    until: float = math.inf,
    seed: int = 0,
) -> float | None:
    """Return the largest eigenvalue of the Hessian of a loss, None where its graph does not reach the parameters.

    Power iteration finds the eigenvalue of the largest size; where that is negative, the iteration is repeated on the
    Hessian with it taken off, whose largest is the one asked for.

    Args:
        loss: computes the loss, the same each time.
        parameters: what it is differentiated by; each requires a gradient.
        scale: what the Hessian is multiplied by on both sides, one tensor a parameter; None: nothing.
        iterations: products at most, each way.
        tolerance: stop where the estimate moves by less than this share of itself.
        until: stop at this time (`time.perf_counter`); NaN where the estimate was far from settled then.
        seed: of the vector to begin with.
    """
    gradients = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
    used = [i for i, gradient in enumerate(gradients) if gradient is not None and gradient.requires_grad]
    if not used:
        return None
    of = [gradients[i] for i in used]
    by = [parameters[i] for i in used]
    factors = None if scale is None else [scale[i] for i in used]

    def product(vector: list[Tensor]) -> list[Tensor]:
        scaled = vector if factors is None else [v * f for v, f in zip(vector, factors, strict=True)]
        found = torch.autograd.grad(of, by, scaled, retain_graph=True, allow_unused=True)
        whole = [torch.zeros_like(v) if f is None else f for v, f in zip(vector, found, strict=True)]
        return whole if factors is None else [w * f for w, f in zip(whole, factors, strict=True)]

    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p) for p in by]
    value = _iterate(product, start, 0.0, iterations, tolerance, until)
    if value < 0:
        value += _iterate(product, start, value, _SHIFTED * iterations, tolerance, until)
    return value


def _iterate(
    product: Callable[[list[Tensor]], list[Tensor]],
    vector: list[Tensor],
    shift: float,
    iterations: int,
    tolerance: float,
    until: float,
) -> float:
    """Return the Rayleigh quotient that power iteration on the Hessian less `shift` settles at."""
    value = settled = math.nan
    for count in range(iterations):
        norm = float(torch.stack([v.double().square().sum() for v in vector]).sum().sqrt())
        if not norm or not math.isfinite(norm):
            return 0.0 if not norm else math.nan
        vector = [v / norm for v in vector]
        image = product(vector)
        image = image if not shift else [w - shift * v for w, v in zip(image, vector, strict=True)]
        before, value = value, float(sum((v.double() * w.double()).sum() for v, w in zip(vector, image, strict=True)))
        # By the eigenvalue itself: less the shift, a vector that still points anywhere looks settled.
        settled = abs(value - before) / max(abs(value + shift), torch.finfo(torch.float64).tiny)
        if settled <= tolerance and count >= _LEAST:
            return value
        if time.perf_counter() > until and count >= _LEAST:
            return value if settled <= _NEARLY else math.nan
        vector = image
    return value if settled <= _NEARLY else math.nan


def adam_scale(losses: Sequence[Loss], parameters: Sequence[Tensor], eps: float = 1e-8) -> list[Tensor]:
    """Return 1 / sqrt(preconditioner) of Adam at the beginning: from the mean of squared gradients of some batches."""
    squares = [torch.zeros_like(p) for p in parameters]
    for loss in losses:
        for square, gradient in zip(squares, torch.autograd.grad(loss(), parameters, allow_unused=True), strict=True):
            if gradient is not None:
                square.addcmul_(gradient, gradient, value=1 / len(losses))
    return [(square.sqrt() + eps).rsqrt() for square in squares]


def lr_bound(eigenvalue: float, momentum: float = 0.0, *, adam: bool = False) -> float:
    """Return the learning rate from which steps grow in the steepest direction; infinite where nothing curves up.

    Args:
        eigenvalue: of the Hessian, or for Adam of the preconditioned one.
        momentum: that of the optimizer; for Adam its beta1.
        adam: whether the optimizer is of Adam's kind.
    """
    if eigenvalue <= 0:
        return math.inf
    factor = (2 + 2 * momentum) / (1 - momentum) if adam else 2 * (1 + momentum)
    return factor / eigenvalue
