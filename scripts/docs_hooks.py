"""What mkdocs adds to docs/ when it builds the site: figures, notebooks, and figures that stay on one line."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]

import notebooks  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Add results/*.png as figures/*.png, and each notebook docs/NAME.ipynb as the page NAME.md."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(File.generated(config, f"figures/{path.name}", abs_src_path=str(path)))
    for path in sorted(Path(config.docs_dir).glob("*.ipynb")):
        # The tests run the cells in their own process, and build the site without.
        quick = os.environ.get("FINETUNE_BN_NOTEBOOKS") == "not run"
        cells = notebooks.read(path)
        text, pictures = notebooks.as_markdown(cells if quick else notebooks.run(cells), path.stem)
        files.append(File.generated(config, f"{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"figures/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep a mean and its spread on one line of a table, also on a narrow screen."""
    return markdown.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
