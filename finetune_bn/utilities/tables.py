"""Tables as plain text for `print`, logs and files, and as HTML for pages and notebooks."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Mapping, Sequence


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Container[int] = (), line: bool = True
) -> list[str]:
    """Return a table line by line: the header, a line below it, and the rows, columns as wide as what is in them.

    Args:
        header: names of the columns.
        rows: the cells, as many in a row as there are columns.
        right: numbers of the columns that are aligned on the right.
        line: whether a line lies below the header.
    """
    widths = [max(len(cells[i]) for cells in [header, *rows]) for i in range(len(header))]

    def aligned(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return "  ".join(c.rjust(width) if i in right else c.ljust(width) for i, (c, width) in pairs).rstrip()

    top = aligned(header)
    return [top, *(["-" * len(top)] if line else []), *map(aligned, rows)]


def html_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    texts: Container[int] = (0,),
    attributes: Mapping[tuple[int, int], str] | None = None,
) -> str:
    """Return the same as an HTML `<table>` of plain texts and numbers, each of them escaped; "" without rows.

    Args:
        header: names of the columns.
        rows: their cells.
        texts: numbers of the columns that hold texts, whose cells have the class `text`.
        attributes: by row and column, HTML attributes of a cell that holds no text.
    """
    marks = [' class="text"' if i in texts else "" for i in range(len(header))]
    special = attributes or {}
    lines = []
    for i, row in enumerate(rows):
        cells = enumerate(zip(marks, row, strict=True))
        lines.append(
            "".join(f"<td{mark or special.get((i, j), '')}>{html.escape(str(c))}</td>" for j, (mark, c) in cells)
        )
    if not lines:
        return ""
    top = "".join(f'<th scope="col"{mark}>{html.escape(c)}</th>' for mark, c in zip(marks, header, strict=True))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
