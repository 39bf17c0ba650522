"""A bank of statistics: keep, use, save, load, and what it refuses."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import FinetuneBNError
from finetune_bn.recalibration.bank import _FORMAT, StatisticsBank
from tests.models import Plain, settle
from tests.tools import assert_same_state, untouched


def net(affine: Any = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = settle(Plain()).eval()
    return model if affine is None else fbn.convert(model, fbn.Freeze(affine))


def domain(shift: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(int(shift))
    return list((torch.randn(32, 3, 9, 9, generator=generator) + shift).split(8))


def filled(model: nn.Module) -> StatisticsBank:
    bank = StatisticsBank()
    for name, shift in (("day", 1.0), ("night", -4.0)):
        with bank.restoring(model):
            fbn.recalibrate(model, domain(shift))
            bank.keep(name, model)
    return bank


@pytest.mark.parametrize("affine", [None, "none", "shift", "merged", "original"])
def test_using_a_domain_is_the_function_recalibrated_on_it_and_the_model_comes_back_bit_for_bit(affine: Any) -> None:
    model = net(affine)
    with untouched(model):
        bank = filled(model)
    assert bank.names == ("day", "night")
    for name, shift in (("day", 1.0), ("night", -4.0)):
        expected = net(affine)
        fbn.recalibrate(expected, domain(shift))
        x = domain(shift)[0]
        with untouched(model), bank.using(name, model):
            torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)


def test_gamma_and_beta_that_were_trained_since_stay_as_they_are() -> None:
    model = net("original")
    bank = filled(model)
    with torch.no_grad():
        model.bn1.weight.mul_(3)
    weight = model.bn1.weight.detach().clone()
    bank.use("night", model)
    assert torch.equal(model.bn1.weight, weight)


def test_an_exception_inside_the_block_gives_the_statistics_back() -> None:
    model = net()
    bank = filled(model)
    with untouched(model), pytest.raises(RuntimeError, match="evaluation"), bank.using("day", model):
        raise RuntimeError("evaluation")


def test_a_saved_bank_comes_back_and_fits_the_model_in_another_form(tmp_path: Path) -> None:
    model = net()
    bank = filled(model)
    bank.save(tmp_path / "bank.pt")
    again = StatisticsBank.load(tmp_path / "bank.pt")
    assert again.names == bank.names
    bank.use("night", model)
    other = net("none")
    again.use("night", other)
    assert_same_state(other.state_dict(), model.state_dict())


def test_unknown_domains_other_models_and_other_files_are_one_clear_error(tmp_path: Path) -> None:
    model = net()
    bank = filled(model)
    with untouched(model), pytest.raises(FinetuneBNError, match="name: got 'dusk'; allowed: 'day', 'night'"):
        bank.use("dusk", model)
    other = nn.Sequential(nn.BatchNorm2d(3))
    with untouched(other), pytest.raises(FinetuneBNError, match="layer 'bn1': there is none of that name"):
        bank.use("day", other)
    narrow = net()
    narrow.bn2 = nn.BatchNorm2d(3)
    with untouched(narrow), pytest.raises(FinetuneBNError, match="has 3 channels and not 8"):
        bank.use("day", narrow)
    wider = net()
    wider.more = nn.BatchNorm2d(4)
    with untouched(wider), pytest.raises(FinetuneBNError, match="the bank has no statistics of more'"):
        bank.use("day", wider)
    for count, told in ((3, "extra0, extra1, extra2'"), (4, r"extra0, extra1, extra2\.\.\.'")):
        wider = net()
        for i in range(count):
            wider.add_module(f"extra{i}", nn.BatchNorm2d(4))
        with untouched(wider), pytest.raises(FinetuneBNError, match=f"no statistics of {told}"):
            bank.use("day", wider)
    with pytest.raises(FinetuneBNError, match="name: got ''"):
        bank.keep("", model)
    with pytest.raises(FinetuneBNError, match="a model whose BatchNorm layers have statistics"):
        bank.keep("day", nn.Linear(2, 2))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    for path in (tmp_path / "other.pt", tmp_path / "missing.pt"):
        with pytest.raises(FinetuneBNError, match=r"a file that StatisticsBank\.save wrote"):
            StatisticsBank.load(path)


GOOD = (torch.zeros(6), torch.ones(6))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"format": "finetune_bn.StatisticsBank 1"}, ""),
        ({"format": "finetune_bn.StatisticsBank 1", "domains": [1]}, ""),
        ({"day": {}}, "'day' has no layers"),
        ({"day": {"bn1": GOOD}, "": {"bn1": GOOD}}, "'' is no name"),
        ({"day": {"bn1": torch.zeros(6)}}, "no pair of mean and variance for 'bn1'"),
        ({"day": {"bn1": (torch.zeros(6), 1.0)}}, "'bn1' that are no tensors"),
        ({"day": {"bn1": (torch.zeros(6).long(), torch.ones(6))}}, "'bn1' that are no tensors"),
        ({"day": {"bn1": (torch.zeros(6, 1), torch.ones(6, 1))}}, "'bn1' that are no tensors"),
        ({"day": {"bn1": (torch.zeros(6), torch.ones(5))}}, "6 means and 5 variances"),
        ({"day": {"bn1": GOOD, "bn2": (torch.zeros(6), -torch.ones(6))}}, "'bn2' that are NaN, infinite, or a var"),
        ({"day": {"bn1": (torch.zeros(6) * float("nan"), torch.ones(6))}}, "'bn1' that are NaN"),
        (b"no file of torch", ""),
        (b"", ""),
    ],
    ids=str,
)
def test_a_file_that_holds_no_sound_bank_is_one_clear_error(content: Any, why: str, tmp_path: Path) -> None:
    path = tmp_path / "bank.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content if "format" in content else {"format": _FORMAT, "domains": content}, path)
    with pytest.raises(FinetuneBNError, match=rf"path: got .*StatisticsBank\.save wrote.*{why}"):
        StatisticsBank.load(path)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"format": _FORMAT, "domains": Evil()}, tmp_path / "bank.pt")
    with pytest.raises(FinetuneBNError, match="path: got"):
        StatisticsBank.load(tmp_path / "bank.pt")
    assert not (tmp_path / "ran").exists()


def test_statistics_that_are_no_numbers_are_not_kept_and_the_older_ones_stay() -> None:
    model = net()
    bank = filled(model)
    model.bn1.running_var[2] = float("nan")
    with pytest.raises(FinetuneBNError, match="'bn1' that are NaN"):
        bank.keep("day", model)
    bank.use("day", model)
    assert torch.isfinite(model.bn1.running_var).all()


def test_a_bank_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    bank = filled(net())
    with pytest.raises(FinetuneBNError, match=r"path: got .*a file that can be written"):
        bank.save(tmp_path)


def test_a_restoring_that_is_called_off_leaves_the_new_statistics() -> None:
    model = net()
    with contextlib.ExitStack() as undo:
        undo.enter_context(StatisticsBank.restoring(model))
        fbn.recalibrate(model, domain(3.0))
        after = model.bn1.running_mean.clone()
        undo.pop_all()
    gc.collect()
    assert torch.equal(model.bn1.running_mean, after)


# Without labels of the domain


@pytest.mark.parametrize("affine", [None, "shift", "merged"])
def test_the_nearest_domain_of_a_batch_and_of_each_image_is_the_one_that_it_is_from(affine: Any) -> None:
    model = net(affine)
    bank = filled(model)
    mixed = torch.cat([domain(1.0)[1][:3], domain(-4.0)[1][:2]])
    model.train()
    with untouched(model):
        assert [bank.nearest(model, domain(shift)[0]) for shift in (1.0, -4.0)] == ["day", "night"]
        assert bank.nearest_each(model, (mixed, "labels")) == ["day"] * 3 + ["night"] * 2
        assert bank.nearest_each(model, {"x": mixed}, lambda m, b: m(b["x"])) == ["day"] * 3 + ["night"] * 2


def test_distances_are_those_of_the_activations_under_each_domain() -> None:
    model = net()
    bank = filled(model)
    images = domain(1.0)[0]
    expected = []
    for name in bank.names:
        seen: list[Tensor] = []
        with bank.using(name, model):
            for layer in (model.bn1, model.bn2):
                hook = layer.register_forward_pre_hook(lambda module, args, to=seen: to.append(args[0].double()))
                model(images)
                hook.remove()
            divergences = []
            for x, layer in zip(seen, (model.bn1, model.bn2), strict=True):
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0) + layer.eps
                old = layer.running_var.double() + layer.eps
                ratio, shift = var / old, (mean - layer.running_mean.double()).square() / old
                divergences.append(((ratio - 1 - ratio.log() + shift) / 2).mean())
        expected.append(torch.stack(divergences).mean())
    torch.testing.assert_close(bank.distances(model, images), torch.stack(expected), rtol=1e-5, atol=1e-7)


def test_an_empty_bank_another_model_and_activations_that_are_not_finite_are_refused() -> None:
    model = net()
    with pytest.raises(FinetuneBNError, match="bank: got 'no domain'"):
        StatisticsBank().nearest(model, domain(1.0)[0])
    bank = filled(model)
    with pytest.raises(FinetuneBNError, match="layer 'bn1': there is none of that name"):
        bank.nearest(nn.Sequential(nn.BatchNorm2d(3)), domain(1.0)[0])
    with untouched(model), pytest.raises(FinetuneBNError, match="activations with NaN or inf"):
        bank.nearest(model, torch.full((2, 3, 9, 9), torch.nan))
    with untouched(model), pytest.raises(FinetuneBNError, match="at least one image"):
        bank.nearest(model, torch.zeros(0, 3, 9, 9))


def test_a_layer_that_sees_an_image_as_several_rows_tells_of_a_batch_and_not_of_each_image() -> None:
    """Which rows are of which image nothing says; where it is the only layer, that is an error."""

    class Tokens(nn.Module):
        def __init__(self, image_layer: bool) -> None:
            super().__init__()
            self.first = nn.BatchNorm1d(8) if image_layer else nn.Identity()
            self.bn = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.first(x).transpose(1, 2).flatten(0, 1))

    def images(mean: float) -> Tensor:
        return mean + torch.randn(16, 8, 5, generator=torch.Generator().manual_seed(0))

    for image_layer in (True, False):
        model, bank = Tokens(image_layer).eval(), StatisticsBank()
        for name, mean in (("low", -3.0), ("high", 3.0)):
            fbn.recalibrate(model, images(mean).split(8))
            bank.keep(name, model)
        assert bank.nearest(model, images(3.0)) == "high"
        assert bank.nearest(model, images(-3.0)) == "low"
        if image_layer:
            assert bank.nearest_each(model, images(3.0)) == ["high"] * 16
        else:
            with pytest.raises(FinetuneBNError, match="images that reach a layer as rows"):
                bank.nearest_each(model, images(3.0))


def test_a_merged_layer_that_lost_its_statistics_takes_none_of_a_bank() -> None:
    model = net("merged")
    bank = filled(model)
    model.bn2.remember(None)
    with untouched(model), pytest.raises(FinetuneBNError, match="layer 'bn2'"):
        bank.nearest(model, domain(1.0)[0])
