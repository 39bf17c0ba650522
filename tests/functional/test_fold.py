"""When `fold="auto"` folds: by the shapes of the step at hand, the same at both ends, never for more memory than BN."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import NoBatchNormMatched
from finetune_bn.layers.fold_tie import Fold
from finetune_bn.layers.folds import folds_in, unfolded
from finetune_bn.layers.frozen import AFFINE_KINDS
from tests.conversion.test_folding import assert_close, step
from tests.models import settle
from tests.tools import saved_bytes

LEARNABLE, CONSTANT = "original", "shift"


def pair(affine: str, weights: int, fold: str = "auto") -> Fold:
    """Return the tie of a 1x1 convolution of so many weights and the layer behind it."""
    model = nn.Sequential(nn.Conv2d(weights // 4, 4, 1, bias=False), nn.BatchNorm2d(4))
    x = torch.randn(2, weights // 4, 2, 2)
    fbn.convert(settle(model), fbn.Freeze(affine, fold="always"), example_input=x)  # type: ignore[arg-type]
    (tie,) = folds_in(model)
    tie.always = fold == "always"
    tie.kept_alive = model  # type: ignore[attr-defined]
    return tie


@pytest.mark.parametrize(
    ("affine", "weights", "size", "pays"),
    [
        (LEARNABLE, 16, 2**17, True),
        (LEARNABLE, 16, 2**17 - 1, False),  # so few elements that keeping them costs next to nothing
        (LEARNABLE, 2**21, 2**18, True),
        (LEARNABLE, 2**21, 2**18 - 1, False),  # less than an eighth of the weight
        (CONSTANT, 16, 2**18, True),
        (CONSTANT, 16, 2**18 - 1, False),
        (CONSTANT, 2**18, 2**20, True),
        (CONSTANT, 2**18, 2**20 - 1, False),  # scaling the weight, twice, would take longer
    ],
)
def test_folding_pays_from_a_size_on_that_depends_on_weight_and_affine(
    affine: str, weights: int, size: int, pays: bool
) -> None:
    assert pair(affine, weights).pays(size) == pays
    assert pair(affine, weights, "always").pays(size)


def test_a_scale_trained_over_a_constant_weight_stays_in_activation_space() -> None:
    tie = pair(LEARNABLE, 16)
    assert tie.pays(2**20)
    tie.producer.weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    assert not tie.pays(2**20)  # else the weight's gradient would be computed for the scale alone
    tie.always = True
    assert tie.pays(2**20)


def net() -> nn.Module:
    """A network whose first layer has a large map and whose last one a large weight."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 8, 8, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(4096, 64, bias=False),
        nn.BatchNorm1d(64),
    )


def converted(affine: str, fold: str = "auto", x: Tensor | None = None) -> nn.Module:
    x = torch.randn(2, 3, 64, 64) if x is None else x
    model = settle(net()).to(x.dtype)
    return fbn.convert(model, fbn.Freeze(affine, fold=fold), example_input=x)  # type: ignore[arg-type]


def working(model: nn.Module, x: Tensor) -> list[str]:
    """Return the names of the layers whose affine is computed by the producer in front in a step on `x`."""
    before, names = {}, []
    handles = [m.register_forward_hook(lambda m, a, y: before.setdefault(m, y)) for m in model]  # type: ignore[union-attr]
    model(x)
    for handle in handles:
        handle.remove()
    for name, norm in model.named_children():
        if "FrozenBatchNorm" in type(norm).__name__ and before[norm] is before[norm._fold.producer]:  # type: ignore[union-attr]
            names.append(name)
    return names


def test_the_same_model_folds_in_large_batches_and_not_in_small_ones() -> None:
    assert working(converted(LEARNABLE), torch.randn(1, 3, 64, 64)) == ["1"]
    assert working(converted(LEARNABLE), torch.randn(32, 3, 64, 64)) == ["1", "4"]
    assert working(converted(LEARNABLE, "always"), torch.randn(2, 3, 64, 64)) == ["1", "4", "8"]


@pytest.mark.parametrize("affine", AFFINE_KINDS)
@pytest.mark.parametrize("batch", [2, 32])
def test_outputs_and_gradients_do_not_depend_on_what_is_folded(affine: str, batch: int) -> None:
    for dtype in (torch.float64, torch.float32):
        x = torch.randn(batch, 3, 64, 64, dtype=dtype)
        model = converted(affine, x=x[:2])
        with unfolded(model):
            expected = step(model, x)
        outcome = step(model, x)
        if dtype == torch.float64:  # in float32 rounding switches ReLUs
            assert_close(outcome, expected)
        torch.testing.assert_close(outcome[0], expected[0], rtol=1e-4, atol=1e-4)


def test_at_no_batch_size_is_more_kept_than_by_live_batch_norm_or_much_more_than_folded() -> None:
    live, always, auto = settle(net()), converted(LEARNABLE, "always"), converted(LEARNABLE)
    largest = max(fold.producer.weight.numel() for fold in folds_in(auto))  # type: ignore[union-attr, operator]
    for batch in (2, 3, 4, 8, 16, 32):
        x = torch.randn(batch, 3, 64, 64)
        kept = [saved_bytes(m, lambda m=m, x=x: m(x)) for m in (live, auto, always)]  # type: ignore[misc]
        assert kept[1] < kept[0]
        assert kept[1] <= kept[2] + 3 * 4 * max(2**17, largest // 8)  # of each layer what is not worth folding


@pytest.mark.parametrize("affine", [LEARNABLE, CONSTANT])
def test_compiled_code_folds_by_the_same_rule_without_a_graph_break(affine: str) -> None:
    model = converted(affine).double()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (2, 32, 5):
        x = torch.randn(batch, 3, 64, 64, dtype=torch.float64)
        expected = step(model, x)
        outcome, gradients = step(compiled, x)  # type: ignore[arg-type]
        assert_close((outcome, {name.removeprefix("_orig_mod."): g for name, g in gradients.items()}), expected)


@pytest.mark.parametrize("fold", ["auto", "always"])
def test_copies_go_by_the_same_rule(fold: str) -> None:
    model = converted(LEARNABLE, fold)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [tie.always for tie in folds_in(twin)] == [fold == "always"] * 3


def test_a_weight_that_was_parametrized_since_is_not_computed_to_decide() -> None:
    model = converted(LEARNABLE)
    nn.utils.parametrizations.spectral_norm(model[0])  # type: ignore[index]
    x = torch.randn(2, 3, 64, 64)
    model.eval()
    with unfolded(model):
        expected = step(model, x)
    torch.testing.assert_close(step(model, x)[0], expected[0], rtol=1e-4, atol=1e-4)


def test_convert_proves_pairs_also_where_the_probe_input_is_too_small_to_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    pays = Fold.pays
    monkeypatch.setattr(Fold, "pays", lambda fold, size: seen.append(fold.always) or pays(fold, size))
    model = converted(LEARNABLE)
    assert all(seen)
    assert not any(tie.always for tie in folds_in(model))


def test_without_batch_norm_there_is_nothing_to_fold() -> None:
    bare = nn.Sequential(nn.Conv2d(3, 4, 3))
    for fold in ("auto", "always"):
        with pytest.raises(NoBatchNormMatched):
            fbn.convert(bare, fbn.Freeze(fold=fold), example_input=torch.randn(1, 3, 8, 8))  # type: ignore[arg-type]
