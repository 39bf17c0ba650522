"""Norm-only fine-tuning in a Trainer: what moves, what does not, and the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning

import finetune_bn as fbn
from finetune_bn.callbacks import BatchNormConversion, TrainOnly
from finetune_bn.errors import FinetuneBNError
from tests.callbacks.test_conversion import Foreign, loader, trainer


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("affine", ["original", "merged"])
def test_norm_layers_and_head_move_and_nothing_else_and_the_file_says_it_all(
    where: str, first: bool, affine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, start = Foreign(where), Foreign()
    order = [TrainOnly(path="part.safetensors"), BatchNormConversion(fbn.Freeze(affine))]  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        run = trainer(tmp_path, *(order if first else order[::-1]), epochs=1)
        run.fit(model, loader())
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    moved = {name for name, p in model.named_parameters() if id(p) in held}
    assert moved == {f"backbone.{i}.{name}" for i in (1, 4) for name in ("weight", "bias")} | {
        "head.weight", "head.bias"
    }  # fmt: skip
    assert torch.equal(model.backbone[0].weight, start.backbone[0].weight)
    assert not torch.equal(model.head.weight, start.head.weight)
    assert "TrainOnly: 6 parameters are trained, 41 of " in caplog.text
    assert "configure_optimizers" not in vars(model)
    fbn.apply_trained(start, tmp_path / "part.safetensors")
    x = next(iter(loader()))[0]
    torch.testing.assert_close(start.eval()(x), model.eval()(x))


def test_a_validation_alone_freezes_nothing(tmp_path: Path) -> None:
    model = Foreign()
    trainer(tmp_path, TrainOnly(path="part.safetensors")).validate(model, loader(), verbose=False)
    assert all(p.requires_grad for p in model.parameters())
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_part_is_chosen_from_by_its_path_and_the_rest_is_trained_as_before(tmp_path: Path) -> None:
    model, start = Foreign(), Foreign()
    only = TrainOnly("affine", module="backbone")
    trainer(tmp_path, only, BatchNormConversion(fbn.Freeze("original")), epochs=1).fit(model, loader())
    assert torch.equal(model.backbone[0].weight, start.backbone[0].weight)
    assert not torch.equal(model.head.weight, start.head.weight)
    assert not list(tmp_path.glob("*.safetensors"))


def test_constants_are_an_error_before_the_training_and_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    model = Foreign()
    with pytest.raises(FinetuneBNError, match=r"convert with Freeze\('original'\)"):
        trainer(tmp_path, TrainOnly(), BatchNormConversion(fbn.Freeze("none"))).fit(model, loader())
    assert "configure_optimizers" not in vars(model)


def test_in_several_processes_no_parameter_is_waited_for_that_gets_no_gradient(tmp_path: Path) -> None:
    only = TrainOnly(path="part.safetensors")
    run = trainer(tmp_path, only, BatchNormConversion(fbn.Freeze("original")), epochs=1, devices=2, strategy="ddp_fork")
    run.fit(Foreign("configure_model"), loader())
    start = Foreign()
    before = start.head.weight.detach().clone()
    fbn.apply_trained(start, tmp_path / "part.safetensors")
    assert not torch.equal(start.head.weight, before)


def test_beside_a_callback_that_sets_free_what_is_left_out_it_is_an_error(tmp_path: Path) -> None:
    # The convolutions were trained from the epoch of the unfreezing on, and nobody said so.
    callbacks = [BatchNormConversion(fbn.Freeze("original")), TrainOnly(), BackboneFinetuning(1)]
    with pytest.raises(FinetuneBNError, match="allowed: one of TrainOnly and BackboneFinetuning"):
        trainer(tmp_path, *callbacks).fit(Foreign(), loader())
