"""The step benchmark: fair turns, a true floor, failures as rows, and memory limits found without a GPU at hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

pytest.importorskip("timm")
pytest.importorskip("torchvision")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = ("bench_step", "step_clock", "step_tables", "step_variants", "store")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import bench_step

        yield bench_step
    for name in MODULES:
        sys.modules.pop(name, None)


def test_each_round_has_every_contestant_once_and_starts_with_another(bench: Any) -> None:
    turns: list[str] = []
    contestants = {name: SimpleNamespace(step=lambda name=name: turns.append(name)) for name in "abcd"}
    seconds = bench.race(contestants, 4, "cpu", 1)
    rounds = [turns[i : i + 4] for i in range(0, 16, 4)]
    assert all(sorted(turn) == list("abcd") for turn in rounds)
    assert sorted(turn[0] for turn in rounds) == list("abcd")
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abcd", 4)


def test_ratios_are_those_of_one_round_not_of_medians(bench: Any) -> None:
    # The machine is three times as slow in the second round; in each the contestant takes twice the floor's time.
    found = bench.ratios([2.0, 6.0, 2.2], [1.0, 3.0, 1.0])
    assert found["time"] == 2.0
    assert found["time_low"] <= 2.0 <= found["time_high"] <= 2.2


def test_the_floor_has_no_norm_layers_and_computes_the_frozen_function_where_convs_feed_them(bench: Any) -> None:
    import step_variants as variants

    base = variants.base_network("test_resnet", 32)
    x = torch.randn(2, 3, 32, 32)
    floor = variants.build(variants.FLOOR, base, x)
    assert not any("Norm" in type(module).__name__ for module in floor.modules())
    with torch.no_grad():
        assert_close(floor(x), base.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_variant_that_computes_another_function_is_not_timed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import step_variants as variants

    base = variants.base_network("test_resnet", 32)
    x = torch.randn(2, 3, 32, 32)
    monkeypatch.setitem(variants.VARIANTS, variants.EVAL, lambda model, x: model)  # in training mode
    with pytest.raises(ValueError, match="it computes another function"):
        variants.build(variants.EVAL, base, x)
    variants.build(variants.LIVE, base, x)


def test_a_cell_has_a_row_for_each_variant_and_a_failure_says_why(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import step_variants as variants
    from step_tables import write_tables
    from store import Store

    def fail(model: nn.Module, x: Tensor) -> nn.Module:
        raise RuntimeError("no such trick")

    monkeypatch.setitem(variants.VARIANTS, variants.TUNE, fail)
    names = [variants.LIVE, variants.TUNE, variants.ours("original", "always"), variants.FLOOR]
    store = Store(tmp_path / "bench_step.json", "command", device="cpu")
    work = bench.Bench(store, "cpu", 1)
    cell = bench.Cell("test_resnet", 32, 2, channels_last=True)
    rows = {row["variant"]: row for row in work.measure(cell, names, 2)}
    assert list(rows) == names
    assert rows[variants.TUNE]["error"] == "RuntimeError: no such trick"
    assert rows[variants.FLOOR]["time"] == rows[variants.FLOOR]["saved"] == 1
    assert rows[variants.LIVE]["saved"] > rows[variants.ours("original", "always")]["saved"] > 0.99
    for row in rows.values():
        store.add(row)
    assert store.done(work.key(cell) | {"variant": variants.FLOOR})
    summary = write_tables(store, names, variants.FLOOR, {"": [("net", work.key(cell))]})
    text = (tmp_path / "bench_step.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert f"| {variants.TUNE} | fails |" in text
    assert "`fails`: bn.eval(), mmengine Tune mode on test_resnet (RuntimeError: no such trick)." in text
    assert summary["bench_step"]["net"][variants.FLOOR]["time"] == 1


@pytest.mark.parametrize("most", [1, 3, 16, 100, 777])
def test_the_largest_batch_is_found_to_a_sixteenth(bench: Any, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    fraction = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fraction.append)
    for name in ("empty_cache", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)

    def make(batch: int) -> Any:
        def step() -> None:
            if batch > most:
                raise torch.OutOfMemoryError

        return SimpleNamespace(step=step)

    found = bench.largest_batch(make, 25)
    assert most - max(1, most // 16) < found <= most
    assert fraction[0] == 0.25
    assert fraction[-1] == 1.0


def test_every_cell_of_the_tables_is_measured_and_the_floor_comes_last(bench: Any) -> None:
    for device in ("cpu", "cuda"):
        races = bench.races(device)
        cells = [cell for cell, _, _ in races]
        assert len(set(cells)) == len(cells)
        shown = [cell for columns in bench.columns(device).values() for _, cell in columns]
        assert set(shown) == set(cells)
        assert all(variants[-1] == bench.FLOOR for _, variants, _ in races)


def test_without_a_gpu_the_gpu_run_ends_in_one_line() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(SCRIPTS / "bench_step.py"), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=SCRIPTS.parent)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "bench_step.py: --device cuda: there is no CUDA device here"
