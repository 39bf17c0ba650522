"""What mkdocs adds to docs/ when it builds the site: the figures in results/, so that there is one copy of each."""

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
