"""What every result has in common: text for `print`, a table for a notebook, plain data, JSON."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_bn.utilities.files import to_json
from finetune_bn.utilities.tables import html_table, text_table


@dataclass(frozen=True)
class Shown:
    """What a result shows of itself.

    Attributes:
        title: one sentence.
        header: names of the columns of its table; none where there is no table.
        rows: their cells.
        notes: lines below the table.
        right: numbers of the columns that are aligned on the right.
        line: whether a line lies below the header, in plain text.
    """

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    right: Sequence[int] = ()
    line: bool = True


class Result:
    """Base of what the verbs return: it has `shown` and `to_dict`, and gets the rest.

    A result with something to look at has `plot()` as well, which returns a matplotlib figure
    (`layer_figure` draws numbers by layer).
    """

    def shown(self) -> Shown:
        """Return title, table and notes."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        raise NotImplementedError

    def to_json(self) -> str:
        """Return the result as a JSON text: floats to six digits, null for NaN and infinity."""
        return to_json(self.to_dict())

    def __str__(self) -> str:
        shown = self.shown()
        table = text_table(shown.header, shown.rows, right=shown.right, line=shown.line) if shown.header else []
        return "\n".join([shown.title, *table, *shown.notes])

    def _repr_html_(self) -> str:
        """Return what a notebook shows; a long table scrolls in a frame of its own."""
        shown = self.shown()
        parts = [f"<p>{html.escape(shown.title)}</p>"]
        if shown.header:
            texts = [i for i in range(len(shown.header)) if i not in shown.right]
            parts.append(
                f'<div style="max-height: 24em; overflow: auto" tabindex="0" role="region" '
                f'aria-label="table: {html.escape(", ".join(shown.header))}">'
                f"{html_table(shown.header, shown.rows, texts)}</div>"
            )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in shown.notes)
        below = f"<ul>{notes}</ul>" if notes else ""
        return f'<div class="finetune-bn">{_STYLE}{"".join(parts)}{below}</div>'


_STYLE = "<style>.finetune-bn .text { text-align: left }</style>"  # notebooks set all cells flush right
