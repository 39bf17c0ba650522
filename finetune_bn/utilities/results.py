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
        lead: lines between it and the table.
        header: names of the columns of its table; none where there is no table.
        rows: their cells.
        notes: lines below the table.
        right: numbers of the columns that are aligned on the right.
        line: whether a line lies below the header, in plain text.
        code: a text whose lines stay as they are, below the notes.
        more: what follows, with tables of its own.
    """

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    right: Sequence[int] = ()
    line: bool = True
    lead: Sequence[str] = ()
    code: str = ""
    more: Sequence[Shown] = ()

    def as_text(self) -> str:
        """Return it for `print`."""
        table = text_table(self.header, self.rows, right=self.right, line=self.line) if self.header else []
        lines = [self.title, *self.lead, *([""] if self.lead and table else []), *table, *self.notes]
        lines += ["", self.code] if self.code else []
        return "\n".join([*lines, *(f"\n{other.as_text()}" for other in self.more)])

    def as_html(self) -> str:
        """Return it for a notebook; a long table scrolls in a frame of its own."""
        parts = [f"<p>{html.escape(self.title)}</p>", _listed(self.lead)]
        if self.rows:
            texts = [i for i in range(len(self.header)) if i not in self.right]
            parts.append(
                f'<div style="max-height: 24em; overflow: auto" tabindex="0" role="region" '
                f'aria-label="table: {html.escape(", ".join(self.header))}">'
                f"{html_table(self.header, self.rows, texts)}</div>"
            )
        parts += [_listed(self.notes), f"<pre>{html.escape(self.code)}</pre>" if self.code else ""]
        return "".join([*parts, *(other.as_html() for other in self.more)])


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
        return self.shown().as_text()

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return f'<div class="finetune-bn">{_STYLE}{self.shown().as_html()}</div>'


_STYLE = "<style>.finetune-bn .text { text-align: left }</style>"  # notebooks set all cells flush right


def _listed(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""
