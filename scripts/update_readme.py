"""Copy the tables that the scripts wrote into the README, so that it quotes no figure of its own.

A block `<!-- table: NAME -->` ... `<!-- end -->` in README.md holds `results/NAME.md`. With `--check`, only tell
whether all blocks are up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w/]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str, results: Path) -> str:
    """Return the README's text with each block replaced by the table it names."""

    def table(match: re.Match[str]) -> str:
        content = (results / f"{match['name']}.md").read_text(encoding="utf-8").strip()
        return f"{match[1]}\n{content}\n\n{match[3]}"

    return BLOCK.sub(table, text)


def main() -> None:
    """Update the README, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table is out of date")
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = updated(old, ROOT / "results")
    if parser.parse_args().check:
        sys.exit("README.md: a table is out of date; run: python scripts/update_readme.py" if new != old else 0)
    write_atomically(readme, new)


if __name__ == "__main__":
    main()
