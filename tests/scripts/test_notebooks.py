"""Notebooks in the documentation: the cells run, and the page shows what they printed and returned."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from notebooks import as_markdown, read, run

ROOT = Path(__file__).resolve().parents[2]
QUICK = 'backbone, weights, images, side = "test_efficientnet", None, 48, 32'


def write(folder: Path, *sources: str, **first: Any) -> Path:
    """Write a notebook of code cells, behind a cell of text; the first of them has the tag."""
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "text"]}]
    for source in sources:
        cells.append({"cell_type": "code", "metadata": {"alt": "a dot"}, "outputs": [], "source": [source]})
    cells[1] |= {"metadata": {"tags": ["parameters"]}} | first
    path = folder / "tiny.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


def test_a_page_shows_code_what_was_printed_and_what_the_last_line_returned(tmp_path: Path) -> None:
    table = "class T:\n    def _repr_html_(self): return '<p>one</p>\\n\\n<p>two</p>'\nT()"
    picture = "class P:\n    def _repr_png_(self): return b'png'\nP()"
    path = write(tmp_path, "x = 1", "print('a <b>\\n\\nc')\nx + 1", table, picture, "y = 3")
    text, pictures = as_markdown(run(read(path)), "tiny")
    assert text.startswith("# Title\ntext\n\n```python\nx = 1\n```\n\n```python\nprint(")
    assert '<pre class="output">a &lt;b&gt;&#10;&#10;c</pre>\n\n<pre class="output">2</pre>' in text
    assert '<div class="output"><p>one</p>\n<p>two</p></div>' in text  # no blank line, which would end it
    assert "![a dot](figures/tiny-4.png)" in text
    assert pictures == {"tiny-4.png": b"png"}
    assert text.endswith("```python\ny = 3\n```\n")


def test_a_cell_that_raises_is_an_error_that_names_it_and_nothing_is_left_behind(tmp_path: Path) -> None:
    before = Path.cwd()
    path = write(tmp_path, "x = 1", "open('left.txt', 'w').close()\nraise ValueError('this cell is wrong')")
    with pytest.raises(RuntimeError, match="cell 2 raised ValueError: this cell is wrong"):
        run(read(path))
    assert Path.cwd() == before
    assert not Path("left.txt").exists()


def test_parameters_are_replaced_and_old_outputs_and_a_missing_tag_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "x = 1", "x")
    assert run(read(path, "x = 7"))[-1].value == 7
    with pytest.raises(ValueError, match="holds outputs"):
        read(write(tmp_path, "x = 1", outputs=[{"output_type": "stream"}]))
    with pytest.raises(ValueError, match="has 0 cells with the tag"):
        read(write(tmp_path, "x = 1", metadata={}))


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.ipynb")), ids=lambda path: path.name)
def test_every_cell_of_a_notebook_runs_on_a_small_network_and_shows_something(path: Path) -> None:
    pytest.importorskip("timm")
    pytest.importorskip("lightning.pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = run(read(path, QUICK))
    shown = [cell for cell in cells if cell.value is not None]
    assert len(shown) >= 5
    assert all(hasattr(cell.value, "_repr_html_") or cell.value._repr_png_()[:4] == b"\x89PNG" for cell in shown)
    assert [cell.text for cell in shown if hasattr(cell.value, "_repr_png_") and not cell.alt] == []
