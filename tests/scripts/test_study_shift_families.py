"""The study of shifts in two families: images that nothing was trained on, gains taken seed by seed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
pytest.importorskip("rich")
import advice_pictures
import study_shift_families as study
from store import Store


def numbered(monkeypatch: pytest.MonkeyPatch, emoji: int = 1200) -> None:
    """Let each emoji's drawings be of one gray, and small."""
    numbers = torch.arange(emoji).view(-1, 1, 1, 1, 1)
    vendors = torch.arange(3).view(1, -1, 1, 1, 1)
    pixels = torch.cat([numbers // 256, numbers % 256, 0 * numbers], 2).expand(-1, 3, -1, 4, 4).clone()
    pixels[:, :, 2] = vendors[:, :, 0]
    monkeypatch.setattr(advice_pictures, "all_emoji", lambda: (pixels.to(torch.uint8), torch.arange(emoji) % 9))


def names(family: str, x: torch.Tensor) -> set[int]:
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in study.normalizes_by(family))
    raw = ((x * std + mean) * 255).round().long()[:, :, 0, 0]
    return set((256 * raw[:, 0] + raw[:, 1]).tolist())


@pytest.mark.parametrize("shift", ["none", "other vendor"])
def test_images_of_the_target_are_of_emoji_that_are_not_tested_on(shift: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbered(monkeypatch)
    for family in study.FAMILIES:
        target, x, y = study.images(family, 0, shift)
        assert len(target) == max(study.SIZES)
        assert len(x) == len(y)
        assert not names(family, target) & names(family, x)
    trained = advice_pictures.emoji("same", 400, 0, pairs=False)[0][0]
    (all_of_them, _), _, _ = advice_pictures.emoji("same", 400 + max(study.SIZES), 0, pairs=False)
    assert torch.equal(all_of_them[:400], trained)  # so those behind were not trained on
    vendor = (study.images("lite0", 0, shift)[0] * 0.5 + 0.5).mul(255).round()[:, 2, 0, 0].unique().tolist()
    assert vendor == ([2.0] if shift == "other vendor" else [0.0, 1.0])


def test_gains_are_taken_seed_by_seed_and_over_the_shifts_of_a_group(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.json", "python x.py", device="cpu")
    for seed, source in enumerate((40.0, 50.0, 60.0)):
        figures: dict[str, Any] = {"source": source}
        figures |= {
            f"n {n}, prior {prior}": source + (5.0 if n > 8 else -seed) for n in study.SIZES for prior in (0, 128)
        }
        by_shift = dict.fromkeys(study.SHIFTS, figures)
        store.add({"family": "lite0", "seed": seed, "by_shift": by_shift, "source": source, "seconds": 1.0})
    lines = study.summarize(store)
    assert [(line["family"], line["shift"], line["source"]) for line in lines] == [
        ("lite0", group, 50.0) for group in study.GROUPS
    ]
    text = study.markdown(lines)
    assert "| lite0 | none | 50.0 | -1.0 (-3.5 to +1.5): undecided |" in text
    assert text.count("**+5.0 (+5.0 to +5.0)**") == 3 * 4
