"""The tensor maths, against float64 numpy, against PyTorch's own kernel, and under every transform of autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_bn.functional.frozen import (
    TOLERANCE,
    at_least_float32,
    canonical_statistics,
    canonicalize,
    eval_backward,
    frozen_batch_norm,
    is_canonical,
    scale_shift,
    solve_affine,
)
from tests.references import Values, as_array
from tests.tools import saved_bytes

SHAPES = {"2d": (6, 5), "3d": (4, 5, 7), "4d": (3, 5, 4, 4), "5d": (2, 5, 3, 2, 2)}
EPS_OF_TIMM = (1e-5, 1e-3, 1e-7, 1e-6)


def statistics(dtype: torch.dtype = torch.float64, channels: int = 5) -> tuple[Tensor, ...]:
    """Return (weight, bias, running_mean, running_var)."""
    weight, bias = torch.randn(channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    mean, var = torch.randn(channels, dtype=torch.float64), torch.rand(channels, dtype=torch.float64) * 2 + 0.1
    return tuple(t.to(dtype) for t in (weight, bias, mean, var))


@pytest.fixture(params=list(itertools.product((True, False), repeat=2)), ids=["wb", "w", "b", "neither"])
def present(request: pytest.FixtureRequest) -> tuple[bool, bool]:
    """Whether there is a weight, and whether there is a bias."""
    return request.param


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_is_the_formula(shape: tuple[int, ...], present: tuple[bool, bool]) -> None:
    weight, bias, mean, var = statistics()
    weight, bias = weight if present[0] else None, bias if present[1] else None
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    reference = Values(*(None if t is None else as_array(t) for t in (weight, bias, mean, var)), 1e-3)
    y = frozen_batch_norm(x, mean, var, weight, bias, 1e-3)
    torch.testing.assert_close(y, torch.from_numpy(reference.output(as_array(x))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_forward_is_batch_norm_in_eval_mode_bit_for_bit(
    dtype: torch.dtype, recording: bool, present: tuple[bool, bool]
) -> None:
    bn = nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        for tensor, value in zip((bn.weight, bn.bias, bn.running_mean, bn.running_var), statistics(), strict=True):
            tensor.copy_(value)
    for name, there in zip(("weight", "bias"), present, strict=True):
        if not there:
            bn.register_parameter(name, None)
    bn = bn.to(dtype).requires_grad_(False)
    x = torch.randn(3, 5, 4, 4).to(dtype).requires_grad_()
    with torch.set_grad_enabled(recording):
        y = frozen_batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
        expected = bn(x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    assert y.requires_grad == recording


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_act_on_half_precision_in_float32(dtype: torch.dtype) -> None:
    weight, bias, mean, var = statistics(torch.float32)
    x = torch.randn(3, 5, 4, 4).to(dtype).requires_grad_()
    y = frozen_batch_norm(x, mean, var, weight, bias, 1e-5)
    # The exact result, rounded once at the end.
    reference = Values(*(as_array(t) for t in (weight, bias, mean, var)), 1e-5).output(as_array(x))
    assert y.dtype == dtype
    off = (y.double() - torch.from_numpy(reference)).abs() / torch.from_numpy(reference).abs().clamp_min(1e-3)
    assert off.max() <= torch.finfo(dtype).eps * 0.55


@pytest.mark.parametrize("trained", list(itertools.product((True, False), repeat=3)), ids=str)
def test_gradients_are_the_formula(trained: tuple[bool, bool, bool]) -> None:
    x_trained, weight_trained, bias_trained = trained
    weight, bias, mean, var = statistics()
    x = torch.randn(3, 5, 4, 2, dtype=torch.float64, requires_grad=x_trained)
    weight.requires_grad_(weight_trained)
    bias.requires_grad_(bias_trained)
    y = frozen_batch_norm(x, mean, var, weight, bias, 1e-3)
    assert y.requires_grad == any(trained)
    if not y.requires_grad:
        return
    upstream = torch.randn_like(y)
    y.backward(upstream)
    values = Values(*(as_array(t) for t in (weight, bias, mean, var)), 1e-3)
    reference = values.gradients(as_array(x), as_array(upstream))
    for name, tensor, wanted in (("x", x, x_trained), ("weight", weight, weight_trained), ("bias", bias, bias_trained)):
        assert (tensor.grad is not None) == wanted, name
        if wanted:
            torch.testing.assert_close(tensor.grad, torch.from_numpy(reference[name]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_keep_their_dtypes_and_are_as_near_float64_as_those_of_batch_norm(dtype: torch.dtype) -> None:
    weight, bias, mean, var = statistics(torch.float32)
    x, upstream = torch.randn(4, 5, 8, 8).to(dtype), torch.randn(4, 5, 8, 8).to(dtype)
    reference = Values(*(as_array(t) for t in (weight, bias, mean, var)), 1e-5)
    exact = reference.gradients(as_array(x), as_array(upstream))
    errors: list[list[float]] = []
    for apply in (
        lambda x, bias: frozen_batch_norm(x, mean, var, weight, bias, 1e-5),
        lambda x, bias: F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-5),
    ):
        inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
        apply(*inputs).backward(upstream)
        assert [t.grad.dtype for t in inputs] == [dtype, torch.float32]
        references = (torch.from_numpy(exact[name]) for name in ("x", "bias"))
        errors.append([float((t.grad - r).norm() / r.norm()) for t, r in zip(inputs, references, strict=True)])
    # The scale is rounded to the dtype of x once more than in PyTorch's kernel; sums are added up in another order.
    for ours, torchs, rounding in zip(*errors, (torch.finfo(dtype).eps, torch.finfo(torch.float32).eps), strict=True):
        assert ours <= torchs + rounding


@pytest.mark.parametrize("trained", ["", "bias", "weight, bias"])
def test_gradients_can_be_differentiated_again(trained: str) -> None:
    weight, bias, mean, var = statistics()
    weight.requires_grad_("weight" in trained)
    bias.requires_grad_("bias" in trained)
    x = torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    inputs = [t for t in (x, weight, bias) if t.requires_grad]

    def apply(*tensors: Tensor) -> Tensor:
        given = iter(tensors)
        x_, weight_, bias_ = (next(given) if t.requires_grad else t for t in (x, weight, bias))
        return frozen_batch_norm(x_, mean, var, weight_, bias_, 1e-3).square()

    assert torch.autograd.gradcheck(apply, inputs)
    assert torch.autograd.gradgradcheck(apply, inputs)


@pytest.mark.parametrize("weight_trained", [True, False])
def test_per_sample_gradients_by_vmap_of_grad_are_those_of_a_loop(weight_trained: bool) -> None:
    weight, bias, mean, var = statistics()
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)

    def loss(weight: Tensor, bias: Tensor, sample: Tensor) -> Tensor:
        fixed = weight if weight_trained else weight.detach()
        return frozen_batch_norm(sample[None], mean, var, fixed, bias, 1e-3).pow(3).sum()

    together = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(None, None, 0))(weight, bias, x)
    for i, sample in enumerate(x):
        alone = torch.func.grad(loss, argnums=(0, 1, 2))(weight, bias, sample)
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[i], one)
    assert together[2].abs().sum() > 0


def test_hessian_by_reverse_over_reverse_is_that_of_the_formula() -> None:
    weight, bias, mean, var = statistics(channels=3)
    x = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    hessian = torch.autograd.functional.hessian(
        lambda x: frozen_batch_norm(x, mean, var, weight, bias, 1e-3).square().sum(), x
    )
    scale = torch.from_numpy(Values(*(as_array(t) for t in (weight, bias, mean, var)), 1e-3).scale)
    torch.testing.assert_close(hessian.reshape(6, 6), torch.diag(2 * scale.square().repeat(2)))


def test_forward_mode_is_exact_also_where_something_is_trained() -> None:
    weight, bias, mean, var = statistics()
    x, tangent = torch.randn(2, 2, 5, 3, 3, dtype=torch.float64)

    def apply(x: Tensor, bias: Tensor = bias) -> Tensor:
        return frozen_batch_norm(x, mean, var, weight, bias, 1e-3)

    scale = torch.from_numpy(Values(*(as_array(t) for t in (weight, bias, mean, var)), 1e-3).scale)
    for given in (bias, bias.clone().requires_grad_()):
        _, moved = torch.func.jvp(lambda x, given=given: apply(x, given), (x,), (tangent,))
        torch.testing.assert_close(moved, tangent * scale.view(1, -1, 1, 1))


@pytest.mark.parametrize("trained", ["", "bias", "weight, bias"])
def test_compiles_without_a_graph_break_to_the_same_numbers(trained: str) -> None:
    weight, bias, mean, var = statistics(torch.float32)
    weight.requires_grad_("weight" in trained)
    bias.requires_grad_("bias" in trained)
    x = torch.randn(2, 5, 3, 3, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(frozen_batch_norm, backend="aot_eager", fullgraph=True)
    inputs = [t for t in (x, weight, bias) if t.requires_grad]
    results = []
    for apply in (compiled, frozen_batch_norm):
        y = apply(x, mean, var, weight, bias, 1e-5)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("trained", ["", "bias", "weight, bias"])
def test_buffers_may_be_written_between_forward_and_backward(trained: str) -> None:
    weight, bias, mean, var = statistics()
    weight.requires_grad_("weight" in trained)
    bias.requires_grad_("bias" in trained)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    y = frozen_batch_norm(x, mean, var, weight, bias, 1e-3)
    inputs = [t for t in (x, weight, bias) if t.requires_grad]
    expected = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    mean.fill_(9.0)
    var.fill_(9.0)
    for now, before in zip(torch.autograd.grad(y.sum(), inputs), expected, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("trained", ["", "bias"])
def test_backward_keeps_one_number_a_channel_unless_the_weight_is_trained(trained: str) -> None:
    weight, bias, mean, var = statistics(torch.float32)
    bias.requires_grad_("bias" in trained)
    x = torch.randn(2, 5, 16, 16, requires_grad=True)
    tensors = nn.Module()
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "mean": mean, "var": var}.items():
        tensors.register_buffer(name, tensor)

    def run(weight: Tensor) -> Callable[[], Tensor]:
        return lambda: frozen_batch_norm(x.clone(), mean, var, weight, bias, 1e-5)

    assert saved_bytes(tensors, run(weight)) == 4 * 5
    assert saved_bytes(tensors, run(weight.requires_grad_())) > x.nbytes


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("weight_trained", [True, False])
def test_memory_format_is_kept_forward_and_backward(memory_format: torch.memory_format, weight_trained: bool) -> None:
    weight, bias, mean, var = statistics(torch.float32)
    x = torch.randn(2, 5, 3, 4).to(memory_format=memory_format).requires_grad_()
    y = frozen_batch_norm(x, mean, var, weight.requires_grad_(weight_trained), bias, 1e-5)
    assert y.is_contiguous(memory_format=memory_format)
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert grad.is_contiguous(memory_format=memory_format)


def test_an_empty_batch_gives_an_empty_batch() -> None:
    weight, bias, mean, var = statistics(torch.float32)
    x = torch.empty(0, 5, 3, 3, requires_grad=True)
    y = frozen_batch_norm(x, mean, var, weight, bias, 1e-5)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


@pytest.mark.parametrize("eps", EPS_OF_TIMM)
def test_scale_and_shift_are_the_formula_and_solving_undoes_them(eps: float, present: tuple[bool, bool]) -> None:
    weight, bias, mean, var = statistics()
    given = weight if present[0] else None, bias if present[1] else None
    scale, shift = scale_shift(*given, mean, var, eps)
    reference = Values(*(None if t is None else as_array(t) for t in (*given, mean, var)), eps)
    torch.testing.assert_close(scale, torch.from_numpy(reference.scale), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(shift, torch.from_numpy(reference.shift), rtol=1e-13, atol=1e-13)
    back = solve_affine(scale, shift, mean, var, eps)
    expected = weight if present[0] else torch.ones_like(mean), bias if present[1] else torch.zeros_like(mean)
    for solved, original in zip(back, expected, strict=True):
        torch.testing.assert_close(solved, original, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_scale_and_shift_are_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in scale_shift(*statistics(dtype), 1e-5)} == {wide}
    assert at_least_float32(torch.ones(1, dtype=dtype)).dtype == wide


def test_scale_and_shift_pass_gradients_to_weight_and_bias() -> None:
    weight, bias, mean, var = (t.requires_grad_(i < 2) for i, t in enumerate(statistics()))
    assert torch.autograd.gradcheck(lambda w, b: scale_shift(w, b, mean, var, 1e-3), (weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [*EPS_OF_TIMM, 0.0, 1e-12, 0.1])
def test_under_canonical_statistics_weight_is_the_scale_to_the_last_bit(eps: float, dtype: torch.dtype) -> None:
    weight, bias, mean, var = statistics(dtype)
    canonical = canonical_statistics(mean, var, eps)
    scale, shift = scale_shift(weight, bias, *canonical, eps)
    assert torch.equal(scale, weight)
    assert torch.equal(shift, bias)
    assert is_canonical(*canonical, eps)
    assert not is_canonical(mean, var, eps)
    assert not is_canonical(canonical[0], canonical[1] * 1.01, eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", EPS_OF_TIMM)
def test_canonical_form_is_the_same_function_in_the_same_dtype_and_twice_is_once(
    eps: float, dtype: torch.dtype
) -> None:
    given = statistics(dtype)
    once = canonicalize(*given, eps)
    assert {t.dtype for t in once} == {dtype}
    assert is_canonical(*once[2:], eps)
    expected, actual = scale_shift(*given, eps), scale_shift(*once, eps)
    # Rounded once, to the dtype that the numbers are stored in.
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert all(torch.equal(one, other) for one, other in zip(canonicalize(*once, eps), once, strict=True))


def test_the_table_of_tolerances_covers_every_dtype_a_network_runs_in_and_narrows_with_it() -> None:
    order = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
    assert list(TOLERANCE) == order
    assert [TOLERANCE[dtype] for dtype in order] == sorted(TOLERANCE.values())
    assert all(TOLERANCE[dtype] > torch.finfo(dtype).eps for dtype in order)


def test_of_an_empty_batch_the_gradients_are_zeros_in_their_shapes() -> None:
    x, weight = torch.zeros(0, 3, 4, 5), torch.ones(3)
    of_x, of_weight, of_bias = eval_backward(x, x, weight, weight, weight, 1e-5, (True, True, True))
    assert of_x is not None
    assert of_x.shape == x.shape
    for found in (of_weight, of_bias):
        assert found is not None
        assert torch.equal(found, torch.zeros(3))
