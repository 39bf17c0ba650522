"""The README's figures come from the scripts' results, its code runs, its files exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield
    sys.modules.pop("update_readme", None)


def test_each_table_is_the_one_that_its_script_wrote(scripts: None) -> None:
    from update_readme import BLOCK, updated

    assert len(BLOCK.findall(README)) >= 3
    assert updated(README, ROOT / "results") == README, "run: python scripts/update_readme.py"


def test_a_table_out_of_date_is_noticed(scripts: None, tmp_path: Path) -> None:
    from update_readme import updated

    (tmp_path / "x.md").write_text("| new |\n", encoding="utf-8")
    old = "a\n<!-- table: x -->\n\n| old |\n\n<!-- end -->\nb"
    assert updated(old, tmp_path) == "a\n<!-- table: x -->\n\n| new |\n\n<!-- end -->\nb"


def test_every_python_block_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_every_file_that_is_linked_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
