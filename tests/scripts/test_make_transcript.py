"""The transcript of the documentation: the page is what the script makes, its output cleaned and cut."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import make_transcript as transcript


def test_the_page_has_the_commands_of_the_script_in_their_order() -> None:
    shown = re.findall(r"^\$ (.*)$", transcript.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    patterns = [re.sub(r"\\\{\w+\\\}", r"\\S+", re.escape(step.command)) for step in transcript.STEPS]
    assert len(shown) == len(patterns)
    assert [line for line, pattern in zip(shown, patterns, strict=True) if not re.fullmatch(pattern, line)] == []


def test_the_page_names_no_folder_of_the_machine_that_made_it() -> None:
    text = transcript.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.])/(?:tmp|work|root|home)/\S*", text) == []


def test_colors_progress_bars_notices_and_temporary_folders_are_left_out(tmp_path: Path) -> None:
    output = (
        "Seed set to 0\n\x1b[31mred\x1b[0m\n10 %\r100 %\r\ndone\n"
        f"{tmp_path}/project/runs/x.ckpt\n{tmp_path}/environment/lib/site-packages/lightning/a.py:3: a notice\n"
    )
    assert transcript.cleaned(output, tmp_path).splitlines() == ["red", "100 %", "done", "runs/x.ckpt"]


def test_of_a_long_output_the_ends_are_shown_and_what_is_left_out_is_counted() -> None:
    step = transcript.Step("", "", head=2, tail=1)
    assert transcript.shown(step, "a\n\nb\nc") == "a\nb\nc"
    assert transcript.shown(step, "a\nb\nc\nd\ne") == "a\nb\n[... 2 lines]\ne"
