"""Tables as plain text: for `print`, logs and files."""

from __future__ import annotations

from collections.abc import Container, Sequence


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
