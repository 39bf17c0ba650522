"""Parts of a self-contained HTML page about an experiment: no script, no file or host beside it, all texts escaped.

It is readable at 390 pixels and at 1,280, in light and in dark, by keyboard and by screen reader.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


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
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def html_verdict(figure: str, text: str, kind: str = "good") -> str:
    """Return what the page says in one glance: a figure or a word, and a sentence.

    Args:
        figure: plain text, set large.
        text: plain text behind it.
        kind: `good` or `bad`.
    """
    return f'<p class="verdict {kind}"><strong>{html.escape(figure)}</strong> {html.escape(text)}</p>'


def html_table(header: Sequence[str], rows: Iterable[Sequence[object]], texts: Iterable[int] = (0,)) -> str:
    """Return a table of plain texts and numbers, which scrolls where the page is narrower. "" without rows.

    Args:
        header: names of the columns.
        rows: their cells.
        texts: numbers of the columns that hold texts, which are set flush left.
    """
    left = set(texts)
    marks = [' class="text"' if i in left else "" for i in range(len(header))]
    lines = [
        "".join(f"<td{mark}>{html.escape(str(cell))}</td>" for mark, cell in zip(marks, row, strict=True))
        for row in rows
    ]
    if not lines:
        return ""
    top = "".join(f'<th scope="col"{mark}>{html.escape(c)}</th>' for mark, c in zip(marks, header, strict=True))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    # Who has no pointer scrolls by the keys, and so needs to get there.
    frame = f'<div class="wide" tabindex="0" role="region" aria-label="table: {html.escape(", ".join(header))}">'
    return f"{frame}<table>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"


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
    """Return plain texts as a list, framed by its `kind`: `note` or `error`. "" without items."""
    lines = "\n".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f'<ul class="{kind}">\n{lines}\n</ul>' if lines else ""


def html_text(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5a626c; --page: #fff; --panel: #f3f5f7; --line: #d5dae0;
  --good: #006a4e; --bad: #a83200; --note: #0072b2; --badpanel: #fdf0e8; --shadow: #0003; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #a2abb5; --page: #14171a; --panel: #1f2429; --line: #3b434b;
    --good: #4fc79c; --bad: #ff9b6b; --note: #6cb6ea; --badpanel: #33211a; --shadow: #fff4; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: clamp(1.3rem, 4.5vw, 1.8rem); line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.subtitle { color: var(--soft); margin: .3rem 0 1rem; }
.verdict { border-left: 5px solid var(--good); padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }
.verdict strong { font-size: 1.9rem; line-height: 1.2; margin-right: .4rem; color: var(--good); }
.verdict.bad { border-color: var(--bad); }
.verdict.bad strong { color: var(--bad); }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem;
  margin: 1rem 0; align-items: start; }
.whole { grid-column: 1 / -1; }
/* A shadow at the side where there is more to scroll to. */
.wide { overflow-x: auto; max-width: 100%; background: linear-gradient(to right, var(--page) 30%, transparent),
  linear-gradient(to left, var(--page) 30%, transparent) 100% 0, linear-gradient(to right, var(--shadow), transparent),
  linear-gradient(to left, var(--shadow), transparent) 100% 0; background-repeat: no-repeat;
  background-size: 3rem 100%, 3rem 100%, .7rem 100%, .7rem 100%; background-attachment: local, local, scroll, scroll; }
.wide:focus-visible { outline: 2px solid var(--note); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .94rem; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { border-bottom: 2px solid var(--soft); }
.text { text-align: left; white-space: normal; overflow-wrap: break-word; }
td.text:first-child, th.text:first-child { position: sticky; left: 0; background: var(--page); }
td:first-child, th:first-child { padding-left: 0; }
pre { background: var(--panel); padding: .8rem .9rem; line-height: 1.4; font-size: .85rem; margin: .5rem 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
ul { padding: .6rem 1rem .6rem 1.8rem; margin: 0; }
ul.note { background: var(--panel); border-left: 4px solid var(--note); }
ul.error { background: var(--badpanel); border-left: 4px solid var(--bad); }
@media (max-width: 32rem) {
  table { font-size: .82rem; }
  th, td { padding: .25rem .3rem; }
  th { white-space: normal; vertical-align: bottom; }
}
@media print { main { max-width: none; } .wide { overflow: visible; } }
"""
