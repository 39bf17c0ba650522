"""Parts of a self-contained HTML page about an experiment: no file or host beside it, all texts escaped.

It is readable at 390 pixels and at 1,280, in light and in dark, by keyboard and by screen reader, and without its
script, which sorts tables and says what is under the pointer in a plot. Its policy lets a browser run that script
alone, and fetch nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from finetune_bn.utilities.tables import html_table as bare_table

TALL = 16  # rows; a longer table scrolls in a frame of its own


def html_page(title: str, sections: Iterable[tuple[str, str]], subtitle: str = "") -> str:
    """Return the whole page.

    Args:
        title: of the page, plain text.
        sections: pairs of a heading (plain text, may be empty) and what stands below it (HTML, as the functions
            below return it); a section without contents is left out.
        subtitle: plain text under the title.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f'<p class="subtitle">{html.escape(subtitle)}</p>'] if subtitle else []
    for heading, content in sections:
        top = f"<h2>{html.escape(heading)}</h2>\n" if heading else ""
        body += [f"<section>\n{top}{content}\n</section>"] if content else []
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f"\n</main>\n<script>{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def html_verdict(figure: str, text: str, kind: str = "good") -> str:
    """Return what the page says in one glance: a figure or a word, and a sentence.

    Args:
        figure: plain text, set large.
        text: plain text behind it.
        kind: `good`, `note` or `bad`.
    """
    return f'<p class="verdict {kind}"><strong>{html.escape(figure)}</strong> {html.escape(text)}</p>'


def html_table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    texts: Iterable[int] = (0,),
    bars: Mapping[int, Sequence[float | None]] | None = None,
    sortable: bool = True,
) -> str:
    """Return a table of plain texts and numbers, which sorts, and scrolls where the page is narrower. "" without rows.

    Args:
        header: names of the columns.
        rows: their cells.
        texts: numbers of the columns that hold texts, which are set flush left and sorted by the alphabet.
        bars: for a column number, the shares, 0 to 1, that its cells are filled to; None leaves one empty.
        sortable: whether a click on a head sorts the rows.
    """
    lines = list(rows)
    if not lines:
        return ""
    cells = {
        (row, column): "" if share is None else f' class="bar" style="--share: {100 * min(1.0, max(0.0, share)):.1f}%"'
        for column, shares in (bars or {}).items()
        for row, share in enumerate(shares)
    }
    table = bare_table(header, lines, set(texts), cells)
    # Who has no pointer scrolls by the keys, and so needs to get there.
    kind = f"wide{' tall' if len(lines) > TALL else ''}{'' if sortable else ' fixed'}"
    label = html.escape(", ".join(header))
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="table: {label}">{table}</div>'


def html_code(text: str) -> str:
    """Return a block of code."""
    return f"<pre><code>{html.escape(text)}</code></pre>"


def html_figures(figures: Iterable[tuple[str, str, float, bool]]) -> str:
    """Return figures beside each other, or one below another where the page is narrow. "" without figures.

    Args:
        figures: an `<svg>` element as `rendering.svg` returns it, what it shows (plain text), its width in inches, and
            whether it scrolls rather than shrinks where there is less room.
    """
    parts = []
    for picture, description, inches, scrolls in figures:
        size = f"max-width: {5.6 * inches:.4g}rem" + (f"; min-width: {4.5 * inches:.4g}rem" if scrolls else "")
        whole = ' class="whole"' if scrolls and inches > 7.5 else ""
        label = html.escape(description)
        inner = f'<div style="{size}" role="img" aria-label="{label}">{picture}</div>'
        parts.append(f'<figure{whole}><div class="wide">{inner}</div></figure>')
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def html_list(items: Iterable[str], kind: str = "note") -> str:
    """Return plain texts as a list, framed by its `kind`: `note`, `good` or `error`. "" without items."""
    lines = "\n".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f'<ul class="{kind}">\n{lines}\n</ul>' if lines else ""


def html_findings(findings: Iterable[tuple[str, str, str, str]]) -> str:
    """Return findings as a list. "" without any.

    Args:
        findings: of each its kind (`good`, `note` or `bad`), the word for that, what was looked at, and what was found.
    """
    items = "\n".join(
        f'<li><span class="level {kind}">{html.escape(word)}</span> '
        f"<span><b>{html.escape(name)}</b>: {html.escape(said)}</span></li>"
        for kind, word, name, said in findings
    )
    return f'<ul class="findings">\n{items}\n</ul>' if items else ""


def html_text(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


@dataclass(frozen=True)
class Picture:
    """An image on a page.

    Attributes:
        data: a PNG or JPEG file.
        title: what is set below it, plain text.
        details: plain text below the title.
        alt: what it shows, for those who do not see it.
    """

    data: bytes
    title: str
    details: str
    alt: str


def html_images(pictures: Iterable[Picture]) -> str:
    """Return images side by side, held by the page itself. "" without images."""
    parts = []
    for picture in pictures:
        kind = "png" if picture.data.startswith(b"\x89PNG") else "jpeg"
        source = f"data:image/{kind};base64,{base64.b64encode(picture.data).decode('ascii')}"
        caption = f"{html.escape(picture.title)}<br><small>{html.escape(picture.details)}</small>"
        image = f'<img src="{source}" alt="{html.escape(picture.alt)}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="images">{"".join(parts)}</div>' if parts else ""


@functools.cache
def _asset(name: str) -> str:
    return resources.files("finetune_bn.diagnosis").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _policy() -> str:
    """Return what a browser may do with the page: show it, run the one script, and fetch nothing."""
    script = base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode("ascii")
    allowed = f"script-src 'sha256-{script}'; style-src 'unsafe-inline'; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
