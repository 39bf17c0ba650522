"""Copy the tables that the scripts wrote into README.md and docs/, so that these quote no figure of their own.

A block `<!-- table: NAME -->` ... `<!-- end -->` in a page holds `results/NAME.md`. With `--check`, only tell whether
all blocks are up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w/]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages(root: Path) -> list[Path]:
    """Return the README and every page of the documentation."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def updated(text: str, results: Path) -> str:
    """Return a page's text with each block replaced by the table it names."""

    def table(match: re.Match[str]) -> str:
        content = (results / f"{match['name']}.md").read_text(encoding="utf-8").strip()
        return f"{match[1]}\n{content}\n\n{match[3]}"

    return BLOCK.sub(table, text)


def main() -> None:
    """Update the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table is out of date")
    old = {path: path.read_text(encoding="utf-8") for path in pages(ROOT)}
    changed = {path: new for path, text in old.items() if (new := updated(text, ROOT / "results")) != text}
    names = ", ".join(str(path.relative_to(ROOT)) for path in changed)
    if parser.parse_args().check:
        sys.exit(f"{names}: a table is out of date; run: python scripts/update_tables.py" if changed else 0)
    for path, text in changed.items():
        write_atomically(path, text)
    print(f"Updated: {names or 'nothing'}")


if __name__ == "__main__":
    main()
