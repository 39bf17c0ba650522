"""Many weights shortened at once: the same as one by one, in few launches, whatever their layout."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import finetune_bn as fbn
from finetune_bn.optim.step_buckets import Bucket, step_factors
from finetune_bn.optim.step_limit import limit_steps

SHAPES = [(8, 3, 3, 3), (16, 8, 1, 1), (8, 1, 3, 3), (4, 16, 1, 1), (6, 2, 5), (3, 2, 2, 2, 2)]


class Launches(TorchDispatchMode):
    """Counts the operators that launch work: all but views, empty tensors and detaching."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        none = ("empty", "empty_like", "empty_strided", "detach", "alias")
        if not func.is_view and name not in none and not name.startswith("_record_function"):
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


def weights(layout: str, dtype: torch.dtype) -> list[tuple[nn.Parameter, int]]:
    torch.manual_seed(0)
    found = []
    for i, shape in enumerate(SHAPES):
        tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
        if layout == "channels_last" and tensor.dim() > 3:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            tensor = tensor.contiguous(memory_format=formats[tensor.dim()])
        if layout == "strided":
            tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
        found.append((nn.Parameter(tensor), int(layout == "transposed" and i % 2)))
    return found


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_each_weight_is_shortened_as_by_itself(layout: str, dtype: torch.dtype) -> None:
    pairs = weights(layout, dtype)
    old = [w.detach().clone() for w, _ in pairs]
    new = [w.detach() + 0.02 * i * torch.randn_like(w) for i, (w, _) in enumerate(pairs)]
    limits = {id(w): 0.005 * (1 + i) for i, (w, _) in enumerate(pairs)}
    buckets = Bucket.sort(pairs)
    with torch.no_grad():
        for bucket in buckets:
            bucket.remember()
        for (w, _), value in zip(pairs, new, strict=True):
            w.copy_(value)
        for bucket in buckets:
            bucket.shorten([limits[id(w)] for w in bucket.weights], floor=1e-2)
    shortened = 0
    for (w, dim), before, after in zip(pairs, old, new, strict=True):
        factors = step_factors(before, after, limits[id(w)], dim, 1e-2)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        expected = before.to(wide).lerp(after.to(wide), factors.to(wide)).to(dtype)
        torch.testing.assert_close(w.detach(), expected)
        same = (factors == 1).expand_as(w)
        assert torch.equal(w.detach()[same], after[same])  # to the last bit
        assert w.stride() == before.stride()
        shortened += int((factors < 1).sum())
    assert shortened > 10


def test_channels_of_as_many_weights_are_taken_by_one_operator() -> None:
    conv = [nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 6, 1, bias=False)]
    net = nn.Sequential(*[m for c in [*conv, nn.Conv2d(6, 9, 1, bias=False), nn.Conv2d(9, 4, 1, bias=False)]
                          for m in (c, nn.BatchNorm2d(c.out_channels))])  # fmt: skip
    fbn.convert(net, fbn.Freeze("none"), verify=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=True)
    limit_steps(optimizer, net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with Launches() as launches:
        optimizer.step()
    # Rows of 27, of 9 (two convolutions), of 4 and of 6 weights: four lengths.
    assert launches.counted == {
        "_foreach_add_": 1,  # SGD's own
        "_foreach_copy_": 4,
        "sub_": 1,
        "linalg_vector_norm": 4,
        "cat": 1,
        "clamp_min": 1,
        "mul_": 1,
        "div_": 1,
        "clamp_max_": 1,
        "lerp_": 4,
    }


@pytest.mark.parametrize("channels_last", [False, True])
def test_at_most_forty_launches_for_resnet50_beside_adamws_own(channels_last: bool) -> None:
    timm = pytest.importorskip("timm")
    net = fbn.convert(timm.create_model("resnet50", num_classes=3), fbn.Freeze("none", fold="never"), verify=False)
    if channels_last:
        net.to(memory_format=torch.channels_last)
    net.pretrained_cfg = {}  # by the order of definition: no forward pass
    counts = []
    for limited in (False, True):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, foreach=True)
        limit = limit_steps(optimizer, net) if limited else None
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        with Launches() as launches:
            optimizer.step()
        counts.append(sum(launches.counted.values()))
    assert limit is not None
    assert len(limit.limited) == 53
    assert counts[1] - counts[0] == 32


def test_no_value_is_read_where_the_learning_rate_is_a_tensor() -> None:
    class Refuses(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "is_nonzero"), "waits for the device"
            return func(*args, **(kwargs or {}))

    pairs = weights("contiguous", torch.float32)
    buckets = Bucket.sort(pairs)
    before = [w.detach().clone() for w, _ in pairs]
    limits: dict[int, Tensor] = {id(w): torch.tensor(1e-3 * (1 + i % 2)) for i, (w, _) in enumerate(pairs)}
    with torch.no_grad(), Refuses():
        for bucket in buckets:
            bucket.remember()
        torch._foreach_add_([w for w, _ in pairs], 1.0)
        for bucket in buckets:
            bucket.shorten([limits[id(w)] for w in bucket.weights], floor=1e-2)
    for (w, _), old in zip(pairs, before, strict=True):
        length = (w.detach() - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)
        torch.testing.assert_close(length, limits[id(w)].expand_as(length), rtol=1e-3, atol=0)


def test_it_compiles_without_a_break_to_the_same_steps() -> None:
    results = []
    for compiled in (False, True):
        pairs = weights("channels_last", torch.float32)
        buckets = Bucket.sort(pairs)

        @torch.no_grad()
        def run(buckets: list[Bucket] = buckets) -> None:
            for bucket in buckets:
                bucket.remember()
                torch._foreach_add_(bucket.weights, 0.1)
                bucket.shorten([1e-3] * len(bucket.weights), 1e-2)

        (torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run)()
        results.append([w.detach() for w, _ in pairs])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_weights_that_were_moved_to_another_memory_are_found_there() -> None:
    conv = nn.Conv2d(3, 4, 3, bias=False)
    (bucket,) = Bucket.sort([(conv.weight, 0)])
    for change in (lambda: None, lambda: conv.to(memory_format=torch.channels_last)):
        change()
        old = conv.weight.detach().clone()
        with torch.no_grad():
            bucket.remember()
            conv.weight.add_(1.0)
            bucket.shorten([1e-3], 1e-2)
        moved = (conv.weight.detach() - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)
        torch.testing.assert_close(moved, torch.full((4,), 1e-3), rtol=1e-3, atol=0)
