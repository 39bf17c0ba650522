"""A notebook as a page of the documentation: run from its top, and shown with what it printed and returned.

The cells run in this process, one after the other, as `python` runs a file; what the last line of a cell returns is
shown as Jupyter shows it: a picture (`_repr_png_`), else HTML (`_repr_html_`), else its `repr`. A cell that raises
fails the build. No output is kept in the notebook's file, so that none is ever out of date. The cell with the tag
`parameters` may be replaced, for a run that takes seconds.
"""

from __future__ import annotations

import ast
import contextlib
import html
import io
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """A cell, and what came of it.

    Attributes:
        text: Markdown, or Python.
        code: whether it is Python.
        alt: words for the picture that it draws.
        printed: what it wrote to the standard output.
        value: what its last line returned.
    """

    text: str
    code: bool
    alt: str = ""
    printed: str = ""
    value: Any = None


def read(path: Path, parameters: str | None = None) -> list[Cell]:
    """Return the cells of a notebook (format 4).

    Args:
        path: the file.
        parameters: Python in place of the cell with that tag; None leaves it.

    Raises:
        ValueError: the file holds outputs, or not one cell with the tag.
    """
    cells, tagged = [], 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text, code = "".join(cell["source"]), cell["cell_type"] == "code"
        if cell.get("outputs"):
            raise ValueError(f"{path.name} holds outputs, which would be out of date: clear them")
        if "parameters" in cell["metadata"].get("tags", ()):
            tagged += 1
            text = text if parameters is None else parameters
        cells.append(Cell(text, code, cell["metadata"].get("alt", "")))
    if tagged != 1:
        raise ValueError(f"{path.name} has {tagged} cells with the tag `parameters`, not one")
    return cells


def run(cells: list[Cell]) -> list[Cell]:
    """Return the cells with what came of them, run in an empty folder.

    Raises:
        RuntimeError: a cell raised; it is named, and its error is the cause.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    done = []
    with tempfile.TemporaryDirectory() as folder, _inside(Path(folder)):
        for number, cell in enumerate(cells):
            if not cell.code:
                done.append(cell)
                continue
            output = io.StringIO()
            try:
                with contextlib.redirect_stdout(output):
                    value = _value(cell.text, f"cell {number}", names)
            except Exception as error:
                raise RuntimeError(f"cell {number} raised {type(error).__name__}: {error}\n{cell.text}") from error
            done.append(Cell(cell.text, True, cell.alt, output.getvalue(), value))
    return done


def as_markdown(cells: list[Cell], name: str) -> tuple[str, dict[str, bytes]]:
    """Return the page as Markdown, and its pictures by file name.

    Args:
        cells: as `read` or `run` return them.
        name: of the page, for the names of its pictures.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(cells):
        parts.append(f"```python\n{cell.text.rstrip()}\n```" if cell.code else cell.text)
        if cell.printed:
            parts.append(_text(cell.printed))
        if cell.value is None:
            continue
        if hasattr(cell.value, "_repr_png_"):
            file = f"{name}-{number}.png"
            pictures[file] = cell.value._repr_png_()
            parts.append(f"![{cell.alt}](figures/{file})")
        elif hasattr(cell.value, "_repr_html_"):
            # A blank line would end the block, for Markdown.
            shown = re.sub(r"\n\s*\n", "\n", cell.value._repr_html_())
            parts.append(f'<div class="output">{shown}</div>')
        else:
            parts.append(_text(repr(cell.value)))
    return "\n\n".join(parts) + "\n", pictures


def _value(code: str, name: str, names: dict[str, Any]) -> Any:
    """Run the lines of a cell, and return what the last one returns."""
    tree = ast.parse(code, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), names)


@contextlib.contextmanager
def _inside(folder: Path) -> Any:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _text(text: str) -> str:
    lines = html.escape(text.rstrip()).replace("\n", "&#10;")  # one line of Markdown
    return f'<pre class="output">{lines}</pre>'
