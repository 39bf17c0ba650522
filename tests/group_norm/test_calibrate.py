"""The sequential fit of GroupNorm to images: against numpy, and what must not matter to it."""

from __future__ import annotations

import copy
import json
import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import finetune_bn as fbn
from finetune_bn.errors import BadData, FinetuneBNError, NoBatchNormMatched
from finetune_bn.functional.group_norm import group_statistics
from finetune_bn.group_norm.fit import EPS_CANDIDATES
from finetune_bn.group_norm.twin import batch_norm_twin
from finetune_bn.layers import GroupNorm
from finetune_bn.layers.group_norm import CENTERED
from tests import group_references as reference
from tests.models import NETS, build, settle
from tests.references import as_array


def images(shape: tuple[int, ...], number: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(number, *shape[1:], generator=generator, dtype=dtype)
    return x + torch.randn(number, *[1] * (len(shape) - 1), generator=generator, dtype=dtype)


def converted(net: str = "plain", **arguments: Any) -> tuple[nn.Module, Tensor, nn.Module]:
    """Return a network with GroupNorm, images, and the BatchNorm network."""
    model, x = build(net)
    before = copy.deepcopy(model).eval()
    arguments.setdefault("groups", 1)
    return fbn.convert(model, fbn.ToGroupNorm(**arguments), example_input=x).eval(), images(x.shape), before


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))


@pytest.mark.parametrize("groups", [1, 2])
def test_each_layer_gets_the_moment_match_of_numpy_measured_behind_the_layers_fitted_before(groups: int) -> None:
    net = settle(two_layers()).double().eval()
    x = images((1, 3, 6, 6), dtype=torch.float64)
    first, second = copy.deepcopy(net[:2]), copy.deepcopy(net)
    fbn.convert(net, fbn.ToGroupNorm(groups=groups, eps=1e-3))
    record = fbn.calibrate_group_norm(net, [x], balance=False)
    with torch.no_grad():
        for i, part in ((1, first), (4, second)):
            z = reference.normalized(as_array(net[:i](x)), groups, 1e-3)
            y = as_array(part(x))
            weight, bias = reference.moment_match(z, y, as_array(torch.sign(net[i].source.weight)))
            torch.testing.assert_close(net[i].weight.detach(), torch.from_numpy(weight), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(net[i].bias.detach(), torch.from_numpy(bias), rtol=1e-6, atol=1e-6)
            off = reference.error(as_array(net[: i + 1](x)), y)
            assert record.rows[0 if i == 1 else 1].error == pytest.approx(off, rel=1e-5)


@pytest.mark.parametrize("net", NETS)
def test_every_kind_comes_nearer_to_its_batch_norm_network(net: str) -> None:
    model, x, before = converted(net)
    with torch.no_grad():
        y, far = before(x), model(x)
        record = fbn.calibrate_group_norm(model, [x])
        near = model(x)
    assert (near - y).square().mean() < (far - y).square().mean()
    assert all(row.error <= row.error_before + 1e-6 for row in record.rows)
    assert not record.left_alone


def test_the_result_does_not_depend_on_how_the_images_are_cut_and_a_run_is_repeated_bit_for_bit() -> None:
    results = []
    for size in (24, 24, 7, 1):
        model, x, _ = converted()
        fbn.calibrate_group_norm(model, x.split(size))
        results.append([value.clone() for value in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for other in results[2:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_auto_takes_the_number_of_groups_with_the_smallest_error_and_a_file_brings_it_back() -> None:
    """Channels in two halves of very different size: one group drowns the small half, two do not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).eval()
    with torch.no_grad():
        net[0].weight[4:] *= 100
    x = images((1, 4, 5, 5), 64)
    x[:, :2] *= torch.rand(64, 1, 1, 1) + 0.5
    fbn.recalibrate(net, [x])
    errors = {}
    for groups in (1, 2, 4):
        model = fbn.convert(copy.deepcopy(net), fbn.ToGroupNorm(groups=groups))
        errors[groups] = fbn.calibrate_group_norm(model, [x]).rows[0].error
    auto = fbn.convert(copy.deepcopy(net), fbn.ToGroupNorm(groups="auto"))
    row = fbn.calibrate_group_norm(auto, [x]).rows[0]
    assert row.error <= min(errors.values()) + 1e-6
    assert auto[1].num_groups == row.groups  # type: ignore[index]
    loaded = fbn.convert(copy.deepcopy(net), fbn.ToGroupNorm(groups="auto"))
    loaded.load_state_dict(auto.state_dict())
    assert torch.equal(loaded(x), auto(x))
    again = fbn.convert(auto, fbn.ToGroupNorm(groups="auto"))
    assert again[1].num_groups == row.groups  # type: ignore[index]


def contrasts() -> tuple[nn.Module, Tensor]:
    """Return a network and images of very different contrast, which GroupNorm removes and BatchNorm keeps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)).eval()
    x = torch.randn(64, 4, 5, 5) * torch.linspace(0.1, 3, 64)[:, None, None, None]
    fbn.recalibrate(net, [x])
    return net, x


def variance(layer: nn.Module, factors: Tensor | float = 1.0) -> float:
    """Return the variance that a BatchNorm of eight channels predicts for a group of four."""
    return float(group_statistics(layer.running_mean * factors, layer.running_var * factors**2, 2)[1].mean())


def test_normalize_takes_the_eps_up_to_the_variance_with_the_smallest_error_and_a_file_brings_it_back() -> None:
    net, x = contrasts()
    errors = {}
    for share in EPS_CANDIDATES:
        eps = 1e-5 + share * variance(net[1])
        one = fbn.convert(copy.deepcopy(net), fbn.ToGroupNorm(groups=2, eps=eps))
        errors[eps] = fbn.calibrate_group_norm(one, [x], balance=False).rows[0].error
    fitted = fbn.convert(copy.deepcopy(net), fbn.ToGroupNorm(groups=2, eps="normalize"))
    assert fitted[1].eps == 1e-5, "until images tell, it is the BatchNorm's"
    row = fbn.calibrate_group_norm(fitted, [x], balance=False).rows[0]
    assert (row.eps_before, row.eps) == pytest.approx((1e-5, min(errors, key=lambda eps: errors[eps])))
    assert row.error == pytest.approx(min(errors.values()))
    assert row.error < 0.7 * errors[1e-5]
    assert row.contrast == pytest.approx(0.5, abs=1e-3)
    loaded = fbn.convert(copy.deepcopy(net), fbn.ToGroupNorm(groups=2))
    loaded.load_state_dict(fitted.state_dict())
    assert torch.equal(loaded(x), fitted(x))


def test_center_is_nearer_still_since_it_normalizes_nothing_and_the_record_says_so() -> None:
    net, x = contrasts()
    found = {}
    for eps in ("own", "normalize", "center"):
        model = fbn.convert(copy.deepcopy(net), fbn.ToGroupNorm(groups=2, eps=eps))
        found[eps] = fbn.calibrate_group_norm(model, [x]), model
    errors = {eps: record.rows[0].error for eps, (record, _) in found.items()}
    assert errors["center"] < errors["normalize"] < errors["own"]
    record, model = found["center"]
    factors = model[1].balance[1]
    assert model[1].eps == record.rows[0].eps == pytest.approx(1e-5 + CENTERED * variance(net[1], factors))
    assert record.rows[0].contrast == pytest.approx(1, abs=1e-3)
    assert "hardly normalizing: 1 of 1 layers (1) let pass more than half" in str(record)
    assert "100 %" in str(record)
    for eps in ("own", "normalize"):
        assert "hardly normalizing" not in str(found[eps][0])
    assert found["own"][0].rows[0].contrast < 1e-3


def test_a_number_of_groups_and_an_eps_asked_for_are_kept() -> None:
    model, x, _ = converted(groups=2, eps=0.5)
    fbn.calibrate_group_norm(model, [x])
    assert {(m.num_groups, m.eps) for m in model.modules() if isinstance(m, GroupNorm)} == {(2, 0.5)}


def test_modes_hooks_gradients_and_all_other_tensors_are_left_as_they_were() -> None:
    model, x, _ = converted()
    model.train()
    calls: list[int] = []
    layer = next(m for m in model.modules() if isinstance(m, GroupNorm))
    layer.register_forward_hook(lambda *_: calls.append(1))
    others = {n: p.clone() for n, p in model.named_parameters() if "conv" in n}
    state = torch.get_rng_state()
    fbn.calibrate_group_norm(model, [x], balance=False)
    assert all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in others.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert "forward" not in vars(layer)


def test_affine_false_is_fitted_too_and_stays_constant() -> None:
    torch.manual_seed(0)
    net = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))).eval()
    model = fbn.convert(net, fbn.ToGroupNorm())
    row = fbn.calibrate_group_norm(model, [images((1, 3, 6, 6))]).rows[0]
    assert row.error < row.error_before
    assert not list(model[1].parameters())  # type: ignore[index]


def test_layers_that_are_not_group_norm_and_those_not_reached_are_left_alone() -> None:
    net = settle(two_layers()).eval()
    net.add_module("idle", settle(nn.BatchNorm2d(3)))
    net.forward = lambda x: net[4](net[3](net[2](net[1](net[0](x)))))  # type: ignore[method-assign]
    fbn.convert(net, fbn.Rules([("1", fbn.ToGroupNorm()), ("idle", fbn.ToGroupNorm()), ("4", fbn.Freeze())]))
    frozen = {name: value.clone() for name, value in net[4].state_dict().items()}
    record = fbn.calibrate_group_norm(net, [images((1, 3, 6, 6))])
    assert [row.names for row in record.rows] == [("1",)]
    assert record.left_alone == ("idle",)
    assert all(torch.equal(value, frozen[name]) for name, value in net[4].state_dict().items())


@pytest.mark.parametrize("bad", ["nan", "few", "none"])
def test_bad_images_are_one_error_and_change_nothing(bad: str) -> None:
    model, x, _ = converted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if bad == "nan":
        x[3, 0, 0, 0] = float("nan")
    batches = {"nan": [x], "few": [x[:3]], "none": []}[bad]
    with pytest.raises(BadData, match="NaN or infinite" if bad == "nan" else "at least 8 images"):
        fbn.calibrate_group_norm(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.source and m.eps == m.source.eps for m in model.modules() if isinstance(m, GroupNorm))


def test_a_network_without_converted_layers_and_a_wrong_number_are_named() -> None:
    with pytest.raises(NoBatchNormMatched, match="ToGroupNorm"):
        fbn.calibrate_group_norm(build("plain")[0], [torch.randn(8, 3, 9, 9)])
    model, x, _ = converted()
    with pytest.raises(FinetuneBNError, match="max_samples: got 2"):
        fbn.calibrate_group_norm(model, [x], max_samples=2)


def test_max_samples_takes_the_first_images() -> None:
    models = [converted()[0] for _ in range(2)]
    x = images((1, 3, 9, 9), 40)
    assert fbn.calibrate_group_norm(models[0], x.split(9), max_samples=16).images == 16
    fbn.calibrate_group_norm(models[1], [x[:16]])
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_twin_is_the_batch_norm_network_and_shares_nothing() -> None:
    model, x, before = converted()
    twin = batch_norm_twin(model)
    assert torch.equal(twin(x), before(x))
    assert not {t.data_ptr() for t in twin.parameters()} & {t.data_ptr() for t in model.parameters()}
    assert isinstance(next(m for m in model.modules() if isinstance(m, GroupNorm)).source, nn.BatchNorm2d)


def test_the_record_is_a_table_and_plain_data() -> None:
    model, x, _ = converted(groups="auto")
    record = fbn.calibrate_group_norm(model, [x])
    assert "error before" in str(record)
    assert json.loads(json.dumps(record.to_dict()))["images"] == 24


def _rank(rank: int, sizes: list[int], port: int, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=len(sizes))
    model, x, _ = converted(groups="auto")
    fbn.calibrate_group_norm(model, x.split(sizes)[rank].split(5))
    fitted = [value.tolist() for value in model.state_dict().values()]
    record = fbn.distil(model, x.split(sizes)[rank], lr=1e-3)
    results[rank] = fitted, [value.tolist() for value in model.state_dict().values()], record.steps
    torch.distributed.destroy_process_group()


def test_processes_fit_to_the_images_of_all_and_distil_in_step() -> None:
    sizes = [16, 8]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(_rank, (sizes, port, results), nprocs=len(sizes))
    assert results[0] == results[1], "the processes have the same network, and made the same number of steps"
    alone, x, _ = converted(groups="auto")
    fbn.calibrate_group_norm(alone, [x])
    for value, other in zip(alone.state_dict().values(), results[0][0], strict=True):
        torch.testing.assert_close(value, torch.tensor(other, dtype=value.dtype), rtol=1e-4, atol=1e-5)
