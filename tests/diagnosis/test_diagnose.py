"""A diagnosis: what it measures against a reference, what it calls i.i.d., what it leaves behind, and bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.diagnosis.diagnose import Diagnosis, diagnose
from finetune_bn.errors import BadData, FinetuneBNError
from tests.models import Plain, settle
from tests.tools import untouched

pytest.importorskip("timm")
pytest.importorskip("lightning")

from finetune_bn.data import EmojiData

QUICK: dict[str, Any] = {"curvature": False, "memory": False}


def batches(number: int = 4, size: int = 8, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number * size).reshape(number, size) % 5
    return [(torch.randn(size, 3, 12, 12, generator=generator), labels[i]) for i in range(number)]


def model() -> nn.Module:
    torch.manual_seed(0)
    return settle(Plain())


@pytest.fixture(scope="module")
def whole() -> Diagnosis:
    """All there is, of a small net."""
    return diagnose(model(), batches(), optimizer="adamw", lr=1e-3, policy=fbn.Freeze("none"))


def test_shift_and_variance_are_those_of_the_formula_in_float64(whole: Diagnosis) -> None:
    net, seen = model(), []
    net.get_submodule("bn1").register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double().numpy()))
    net.eval()
    with torch.no_grad():
        for images, _ in batches():
            net(images)
    x = np.concatenate(seen)
    bn: Any = net.get_submodule("bn1")
    stored = bn.running_var.double().numpy() + bn.eps
    shift = np.abs(x.mean((0, 2, 3)) - bn.running_mean.double().numpy()) / np.sqrt(stored)
    ratio = np.log((x.var((0, 2, 3)) + bn.eps) / stored)
    row = whole.layers[0]
    assert row.names == ("bn1",)
    assert row.shift_mean == pytest.approx(shift.mean(), rel=1e-5)
    assert row.log_var_ratio == pytest.approx(ratio.mean(), rel=1e-4)
    assert row.log_var == pytest.approx(np.abs(ratio).mean(), rel=1e-4)
    assert row.values_per_channel == 8 * 100
    assert whole.shift == pytest.approx(np.median([layer.shift_mean for layer in whole.layers]))


def test_a_whole_diagnosis_has_curvature_memory_and_text(whole: Diagnosis) -> None:
    assert whole.left_out == ()
    assert whole.curvature is not None
    assert whole.curvature.lr_bound_frozen is not None
    assert whole.curvature.lr == 1e-3
    by_policy = {row.policy: row for row in whole.memory}
    assert by_policy["freeze, affine=none"].bytes_per_image < by_policy["keep"].bytes_per_image
    assert all((row.launches or 0) > 0 for row in whole.memory)
    assert all(row.largest_batch for row in whole.memory)
    assert not any(layer.by_batch for layer in whole.layers)  # under the policy that is planned
    assert "Plain" in str(whole)
    assert "<table" in whole._repr_html_()
    assert whole.plot() is not None


def test_the_model_is_left_as_it_was_to_the_last_bit() -> None:
    net = model().train()
    net.get_submodule("bn2").eval()
    generator_state = np.random.get_state()[1].tolist()
    with untouched(net):
        diagnose(net, batches(2), optimizer="sgd", lr=0.1, memory=False)
    assert np.random.get_state()[1].tolist() == generator_state
    assert all(parameter.grad is None for parameter in net.parameters())


def emoji(seed: int, images_per_label: int | None) -> Any:
    data = EmojiData(
        image_size=32, target="identity", batch_size=32, images_per_label=images_per_label, seed=seed, augment="none",
        num_workers=0, mean=(0.5,) * 3, std=(0.5,) * 3,
    )  # fmt: skip
    data.setup("fit")
    return data.train_dataloader()


def check_batches_are_told_apart(seed: int) -> None:
    """16 labels x 2 images are found, one by one they are not, with the same images and network."""
    sorted_ones = diagnose(model(), emoji(seed, 2), max_images=512, **QUICK)
    assert sorted_ones.batches.iid is False
    assert min(sorted_ones.batches.p_value or 1.0, sorted_ones.batches.label_p_value or 1.0) < 0.01
    assert (sorted_ones.batches.deff or 0.0) > 1.2
    assert (sorted_ones.batches.leakage or 0.0) > 0.0
    found = sorted_ones.finding("i.i.d.")
    assert found is not None
    assert found.level == "warning"
    clean = diagnose(model(), emoji(seed, None), max_images=512, **QUICK)
    assert clean.batches.iid is True
    assert (clean.batches.deff or 1.0) < 1.1
    found = clean.finding("i.i.d.")
    assert found is not None
    assert found.level == "ok"


def test_p_x_k_batches_are_flagged_and_iid_ones_are_clean() -> None:
    check_batches_are_told_apart(0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_p_x_k_batches_are_flagged_and_iid_ones_are_clean_at_any_seed(seed: int) -> None:
    check_batches_are_told_apart(seed)


def test_images_with_nan_are_left_out_counted_and_named() -> None:
    given = batches()
    given[1][0][3, 0, 0, 0] = float("nan")
    found = diagnose(model(), given, **QUICK)
    assert found.images == 31
    finding = found.finding("not finite")
    assert finding is not None
    assert finding.level == "problem"
    assert "image 3 of batch 1" in finding.sentence
    given = [(torch.full_like(x, float("nan")), y) for x, y in batches(2)]
    with pytest.raises(BadData, match="loader: got 'NaN or infinite values in all 16 images'"):
        diagnose(model(), given, **QUICK)


def test_one_class_is_a_problem_and_no_crash() -> None:
    found = diagnose(model(), [(x, torch.zeros_like(y)) for x, y in batches(2)], memory=False)
    assert found.worst == "problem"
    assert found.finding("one label") is not None


def test_no_data_a_wrong_size_and_no_gpu_are_refused_in_a_line() -> None:
    with pytest.raises(BadData, match="loader: got 'no batches'"):
        diagnose(model(), [], **QUICK)
    with pytest.raises(FinetuneBNError, match=r"loader: got \[\(2, 5, 12, 12\)\]; allowed: images that Plain.forward"):
        diagnose(model(), [torch.randn(2, 5, 12, 12)], **QUICK)
    with pytest.raises(FinetuneBNError, match=r"loader: got \[\(2, 3, 2, 2\)\]"):
        diagnose(model(), [torch.randn(2, 3, 2, 2)], **QUICK)
    if not torch.cuda.is_available():
        with pytest.raises(FinetuneBNError, match=r"device: got 'cuda'; allowed: a device of this machine"):
            diagnose(model(), batches(1), device="cuda", **QUICK)


@pytest.mark.parametrize(
    ("name", "value"),
    [("loader", 3), ("devices", 0), ("lr", -1.0), ("optimizer", 7), ("policy", "freeze"), ("seconds", 0.0)],
)
def test_a_wrong_argument_is_named(name: str, value: Any) -> None:
    arguments = {"loader": batches(1), **QUICK} | {name: value}
    with pytest.raises(FinetuneBNError, match=f"{name}: got"):
        diagnose(model(), **arguments)


def test_a_model_without_batch_norm_is_told_so_and_has_nothing_to_treat() -> None:
    found = diagnose(nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), batches(2))
    assert found.layers == ()
    assert found.finding("no BatchNorm") is not None
    assert "nothing" in fbn.advise(found).title


def test_batches_that_are_no_pairs_give_what_they_can() -> None:
    found = diagnose(model(), [x for x, _ in batches()], **QUICK)
    assert found.classes is None
    assert found.batches.label_p_value is None
    assert found.batches.p_value is not None
    assert found.layers[0].deff is None


def test_a_batch_of_one_image_with_one_position_is_a_problem_with_live_layers_only() -> None:
    class Pooled(Plain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.bn1(self.conv1(x)))
            return self.head(self.bn2(self.conv2(x).mean((2, 3), keepdim=True)).flatten(1))

    torch.manual_seed(0)
    net = settle(Pooled())
    one = [(x[:1], y[:1]) for x, y in batches(3)]
    live = diagnose(net, one, **QUICK)
    assert live.batches.single_value_layers == ("bn2",)
    found = live.finding("single value")
    assert found is not None
    assert found.level == "problem"
    assert diagnose(net, one, policy=fbn.Freeze("none"), **QUICK).finding("single value") is None
    advice = fbn.advise(live)
    assert advice.arm not in ("live", "scheduled", "recalibrated")


def test_training_is_judged_too() -> None:
    found = diagnose(
        model(), batches(2), accumulate=4, devices=2, steps=50, ema=(0.999, 0), lr=1e9, optimizer="sgd", memory=False
    )
    levels = {finding.name: finding.level for finding in found.findings}
    assert levels["gradient accumulation"] == levels["devices"] == levels["averaged weights"] == "warning"
    assert levels["learning rate"] == "warning"
    late = diagnose(model(), batches(2), steps=50, ema=(0.9, 50), **QUICK).finding("averaged weights")
    assert late is not None
    assert late.level == "problem"
    frozen = diagnose(model(), batches(2), accumulate=4, policy=fbn.Freeze("none"), **QUICK)
    assert {f.level for f in frozen.findings if f.name == "gradient accumulation"} == {"ok"}


def test_a_loader_is_read_no_further_than_needed() -> None:
    read = 0

    def loader() -> Iterator[Tensor]:
        nonlocal read
        while True:
            read += 1
            yield torch.randn(8, 3, 12, 12)

    assert diagnose(model(), loader(), max_images=24, **QUICK).images == 24
    assert read == 3
