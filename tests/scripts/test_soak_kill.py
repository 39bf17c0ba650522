"""The soak script: two kills of a real run lose nothing, and what is lost or half written would be found."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch")
pytest.importorskip("jsonargparse")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import soak_kill

        import finetune_bn.cli.commands  # noqa: F401  (once for all forks)

        yield soak_kill
    for name in ("soak_kill", "store"):
        sys.modules.pop(name, None)


class Early(random.Random):
    """Draws a moment before the middle of what is left."""

    def uniform(self, a: float, b: float) -> float:
        return a + 0.4 * (b - a)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_run_that_is_killed_twice_ends_like_the_undisturbed_one(
    soak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    row = soak.Soak(tmp_path, Early()).fit(("quickstart", "batch_norm/live"), workers=0, kills=2)
    assert row["kills"] == 2
    assert len(row["resumed_from"]) == 3
    assert row["faults"] == []
    # The comparison is of something: another run is not the same.
    cut, whole = soak.state_of(tmp_path / "cut"), soak.state_of(tmp_path / "whole")
    assert whole["loader"]
    assert len(whole["report"]["history"]) == 3
    cut["state_dict"][next(iter(cut["state_dict"]))].view(-1)[0] += 1e-6
    assert "state_dict" in soak.differences(cut, whole)[0]


def test_every_config_of_the_package_is_soaked(soak: Any) -> None:
    from finetune_bn.cli import configs

    cells = list(soak.cells(0))
    assert {name for cell in cells for name in cell["configs"].split()} == configs.packaged().keys()
    assert {cell["what"] for cell in cells} == {"fit", "recalibrate", "export", "export onnx"}
    assert {cell["workers"] for seed in (0, 1) for cell in soak.cells(seed)} == {0, 1}


@pytest.mark.parametrize("name", ["a.ckpt", "report.json", "report.html"])
def test_a_half_written_file_is_found(soak: Any, tmp_path: Path, name: str) -> None:
    file = tmp_path / "deep" / name
    file.parent.mkdir()
    if name == "a.ckpt":
        torch.save({"x": torch.zeros(1000)}, file)
    else:
        file.write_text("<html>\n</html>\n" if name.endswith("html") else '{"history": []}')
    assert soak.broken(tmp_path) == []
    file.write_bytes(file.read_bytes()[:-9])
    assert [fault.split()[0] for fault in soak.broken(tmp_path)] == [name]
    file.rename(file.with_name(f".{name}.1.tmp"))
    assert soak.broken(tmp_path) == []


def test_lost_entries_are_told(soak: Any) -> None:
    whole = {"a": torch.tensor([1.0, float("nan")]), "b": [{"c": 1}], "d": 2.0}
    assert soak.differences(whole, {**whole}) == []
    assert soak.differences({**whole, "d": 2.5}, whole) == ["/d: 2.5 instead of 2.0"]
    assert soak.differences({**whole, "b": [{"c": 3}]}, whole) == ["/b/0/c: 3 instead of 1"]
    assert soak.differences({"a": whole["a"], "b": whole["b"]}, whole) == [": keys ['d']"]
    assert soak.differences({**whole, "a": torch.zeros(2)}, whole) == ["/a is another tensor"]
