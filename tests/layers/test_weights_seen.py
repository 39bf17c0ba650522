"""Frozen layers remember the weights that their statistics were measured with, and tell when those were trained."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.layers.weights_seen import trained_since
from tests.models import Plain, settle

POLICIES = ["none", "shift", "merged", "original"]


def images(number: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(number, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def net() -> Plain:
    torch.manual_seed(0)
    return settle(Plain()).train()  # type: ignore[return-value]


def converted(affine: Any) -> nn.Module:
    return fbn.convert(net(), fbn.Freeze(affine), example_input=images(2))


def train(model: nn.Module, lr: float = 1e-2, only: str = "") -> None:
    parameters = [p for name, p in model.named_parameters() if name.startswith(only)]
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images(8, step)), torch.arange(8) % 5).backward()
        optimizer.step()


def told(model: nn.Module, **options: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = fbn.recalibrate(model, images(32).split(8), **options)
    return [w for w in record.warnings if "were trained while the statistics" in w]


@pytest.mark.parametrize("affine", POLICIES)
def test_a_network_that_was_trained_with_frozen_layers_is_warned_of_with_the_remedy(affine: Any) -> None:
    model = converted(affine)
    train(model)
    assert len(trained_since(model)) == 2
    (warning,) = told(model)
    assert "bn1, bn2" in warning
    assert "Pass source=" in warning
    assert "how='preserve'" in warning


@pytest.mark.parametrize("affine", POLICIES)
def test_a_pretrained_one_is_not(affine: Any) -> None:
    assert told(net()) == []
    assert told(converted(affine)) == []
    model = converted("none")
    assert told(fbn.convert(model, fbn.Freeze(affine), example_input=images(2))) == []


def test_neither_with_a_trained_head_alone_nor_where_the_source_is_given_or_the_function_preserved() -> None:
    model = converted("none")
    train(model, only="head")
    assert told(model) == []
    train(model)
    assert told(copy.deepcopy(model), source=images(32, 3).split(8)) == []
    assert told(copy.deepcopy(model), how="preserve") == []


def test_after_a_recalibration_that_preserves_the_function_the_layers_may_be_given_others() -> None:
    model = converted("original")
    train(model)
    assert told(model, how="preserve") == []
    assert told(model) == []
    train(model)
    assert len(told(model)) == 1


def test_training_of_gamma_and_beta_alone_counts_for_the_layers_behind() -> None:
    model = converted("original")
    train(model, lr=0.1, only="bn1")
    (warning,) = told(model)
    assert "1 layers (bn2)" in warning


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: m.double().float(), lambda m: m.bfloat16().float()])
def test_a_copy_and_another_dtype_remember(copied: Any) -> None:
    model = converted("original")
    assert told(copied(copy.deepcopy(model))) == []
    train(model)
    assert len(told(copied(model))) == 1


def test_a_pickled_network_remembers() -> None:
    model, buffer = converted("shift"), io.BytesIO()
    train(model)
    torch.save(model, buffer)
    buffer.seek(0)
    assert len(told(torch.load(buffer, weights_only=False))) == 1


def test_a_checkpoint_of_the_training_loaded_into_a_converted_network_is_warned_of() -> None:
    trained = converted("original")
    train(trained)
    model = converted("original")
    model.load_state_dict(trained.state_dict())
    assert len(told(model)) == 1


def test_turned_back_to_batch_norm_it_is_warned_of_until_it_was_trained_live() -> None:
    model = converted("none")
    train(model)
    model = fbn.revert(model, example_input=images(2))
    assert len(told(copy.deepcopy(model))) == 1
    train(model)
    assert told(model) == []
    assert told(fbn.revert(converted("merged"), example_input=images(2))) == []


def test_nothing_of_it_is_in_the_state_dict() -> None:
    assert converted("none").state_dict().keys() == net().state_dict().keys()
