"""The watch for collapse: which layer it looks at, when, and that it ends no training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import finetune_bn as fbn
from finetune_bn.diagnosis import collapse
from finetune_bn.diagnosis.collapse import CollapseWatch
from finetune_bn.errors import FinetuneBNError
from tests.models import settle


class Net(nn.Module):
    """Two stages of different widths and a head; the first stage may be checkpointed."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.one, self.two):
            if self.use_reentrant is None or not self.training:
                x = stage(x)
            else:
                x = checkpoint(stage, x, use_reentrant=self.use_reentrant)
        return self.head(x.mean((2, 3)))


def net(policy: fbn.Policy | None = None, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return fbn.convert(settle(Net(**kwargs)), policy or fbn.Freeze("none"), verify=False)


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def steps(watch: CollapseWatch, model: nn.Module, *batches: Tensor, step: Any = None) -> None:
    for i, x in enumerate(batches):
        watch.before_batch(model, i, (x, torch.zeros(len(x))))
        (step or (lambda x: model(x).square().mean().backward()))(x)
        watch.after_batch()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_it_looks_at_the_last_layer_also_where_the_backward_pass_runs_the_others_again(
    use_reentrant: bool | None, said: list[str]
) -> None:
    # timm's set_grad_checkpointing: "stack expects each tensor to be equal size", the recomputation fired the hooks.
    watch, model = CollapseWatch(1, said.append), net(use_reentrant=use_reentrant)
    steps(watch, model, *[images(4, i) for i in range(4)])
    assert watch.layer == "two.1"
    assert watch.spread is not None
    assert watch.spread > 0.01
    assert said == []


def test_a_collapse_is_said_once_with_the_layer_and_the_remedy(said: list[str]) -> None:
    watch, model = CollapseWatch(1, said.append), net()
    nn.init.zeros_(model.two[0].weight)
    steps(watch, model, *[images(4, i) for i in range(3)])
    assert watch.collapsed
    assert len(said) == 1
    assert "last frozen layer (two.1) are the same for all images" in said[0]
    assert "learning rate about 5 times smaller" in said[0]
    watch.reset()
    assert not watch.collapsed


def test_a_teacher_defined_last_is_not_the_network_that_is_watched(said: list[str]) -> None:
    student, teacher = net(), net(fbn.Freeze("none"))
    nn.init.zeros_(teacher.two[0].weight)
    both = nn.ModuleDict({"student": student, "teacher": teacher})

    def step(x: Tensor) -> None:
        with torch.no_grad():
            wanted = teacher(x.detach())
        (student(x) - wanted).square().mean().backward()

    watch = CollapseWatch(1, said.append)
    steps(watch, both, *[images(4, i) for i in range(4)], step=step)
    assert watch.layer == "student.two.1"
    assert said == []


def test_of_several_calls_in_a_step_the_first_is_looked_at(said: list[str]) -> None:
    model = net()

    def step(x: Tensor) -> None:  # two crops of different sizes, and one more batch of another number of images
        (model(x).mean() + model(x[:, :, :5, :5]).mean() + model(x[:1]).mean()).backward()

    watch = CollapseWatch(1, said.append)
    steps(watch, model, images(4), images(3, 1), step=step)
    assert watch.spread is not None
    assert said == []


def test_several_heads_of_different_widths_do_not_mix(said: list[str]) -> None:
    model = nn.ModuleDict({"body": net(), "a": net(), "b": nn.Sequential(nn.Conv2d(3, 9, 3), nn.BatchNorm2d(9))})
    fbn.convert(model.b, fbn.Freeze("none"), verify=False)

    def step(x: Tensor) -> None:
        name = "a" if len(x) % 2 else "b"
        (model.body(x).mean() + model[name](x).mean()).backward()

    watch = CollapseWatch(1, said.append)
    steps(watch, model, images(3), images(4, 1), images(3, 2), images(4, 3), step=step)
    assert watch.layer == "a.two.1"
    assert said == []


def test_an_empty_last_batch_and_one_that_calls_nothing_are_passed_over(said: list[str]) -> None:
    watch, model = CollapseWatch(1, said.append), net()
    steps(watch, model, images(4), images(0), step=lambda x: model(x).sum().backward())
    before = watch.spread
    steps(watch, model, images(4), step=lambda x: None)
    assert watch.spread == before
    assert said == []


def test_a_last_gamma_of_zero_hides_nothing(said: list[str]) -> None:
    model = net(fbn.Freeze("original"))
    nn.init.zeros_(model.two[1].weight)
    watch = CollapseWatch(1, said.append)
    steps(watch, model, *[images(4, i) for i in range(3)])
    assert watch.layer == "one.1"
    assert said == []


def test_one_image_over_and_over_is_no_collapse_and_equal_features_of_other_images_are(said: list[str]) -> None:
    # Trainer(overfit_batches=1) with one image in a batch.
    watch, model = CollapseWatch(1, said.append), net()
    steps(watch, model, images(1), images(1), images(1))
    assert said == []
    nn.init.zeros_(model.two[0].weight)
    steps(watch, model, images(1), images(1))
    assert said == []
    steps(watch, model, *[images(1, i) for i in range(20)])
    assert len(said) == 1


def test_a_network_of_which_the_head_alone_is_trained_is_watched_too(said: list[str]) -> None:
    watch, model = CollapseWatch(1, said.append), net()
    model.one.requires_grad_(False)
    model.two.requires_grad_(False)
    steps(watch, model, *[images(4, i).detach() for i in range(4)])
    assert watch.layer == "two.1"


def test_without_frozen_layers_it_stops_looking(said: list[str]) -> None:
    watch, model = CollapseWatch(1, said.append), settle(Net())
    steps(watch, model, images(4), images(4))
    assert watch.every_n_steps == 0
    watch.reset()
    assert watch.every_n_steps == 1


@pytest.mark.parametrize("where", ["between_image_spread", "_per_image", "_in_backward"])
def test_a_fault_of_its_own_ends_the_looks_and_not_the_training(
    where: str, said: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("a fault")

    watch, model = CollapseWatch(1, said.append), net()
    monkeypatch.setattr(collapse, where, fails)
    steps(watch, model, images(4), images(4))
    assert "no more looks for signs of collapse: ZeroDivisionError: a fault" in caplog.text
    assert caplog.text.count("no more looks") == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_between_its_turns_and_before_the_backward_pass_there_is_no_hook(said: list[str]) -> None:
    watch, model = CollapseWatch(2, said.append), net()

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    steps(watch, model, images(4))
    assert watch.layer == "two.1"
    watch.before_batch(model, 1)
    assert hooks() == 0
    watch.before_batch(model, 2)
    assert hooks() == 1  # on the one layer: one that is looked at is not folded in that step
    watch.detach()
    assert hooks() == 0


@pytest.mark.parametrize("every", [-1, 2.5, "50", None])
def test_a_wrong_interval_is_one_clear_error(every: Any) -> None:
    with pytest.raises(FinetuneBNError, match=r"watch_every_n_steps: got .*; allowed: a whole number from 0 up"):
        CollapseWatch(every)
