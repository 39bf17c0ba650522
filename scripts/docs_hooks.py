"""What mkdocs adds to docs/ when it builds the site: the figures in results/, and figures that stay on one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).resolve().parent.parent / "results"


def on_files(files: Files, config: Any) -> Files:
    """Add results/*.png as figures/*.png."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep a mean and its spread on one line of a table, also on a narrow screen."""
    return markdown.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
