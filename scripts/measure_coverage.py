"""Measure which lines and branches of the package the tests run, folder by folder, so that it can be cut off and go on.

    python scripts/measure_coverage.py              # all folders of tests/ that results/coverage.json does not have yet
    python scripts/measure_coverage.py --only functional conversion

The data of every folder is kept in `.coverage.<folder>` and joined at the end. Code that runs in other processes
(ranks, workers, the command as a program) is not counted, so the figure is a lower bound. Table: results/coverage.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import coverage
from store import Store

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
LINES, BRANCHES = 95.0, 90.0  # what a file should reach


def parts() -> list[str]:
    """Return the folders of tests, and `.` for the files beside them."""
    folders = [path.name for path in sorted((ROOT / "tests").iterdir()) if list(path.glob("test_*.py"))]
    return [*folders, "."]


def run(part: str) -> int:
    """Run a folder's tests under coverage; return pytest's exit status."""
    paths = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("test_*.py"))
    tests = paths if part == "." else [f"tests/{part}"]
    command = [sys.executable, "-m", "coverage", "run", "--branch", "--source=finetune_bn"]
    command += [f"--data-file=.coverage.{part.replace('.', 'top')}", "-m", "pytest", "-q", "-p", "no:xdist", *tests]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def measured() -> dict[str, Any]:
    """Return coverage's account of all parts that were run, joined."""
    joined = coverage.Coverage(data_file=None, branch=True, source=["finetune_bn"])
    joined.combine([str(path) for path in ROOT.glob(".coverage.*")], keep=True)
    with tempfile.TemporaryDirectory() as folder:
        joined.json_report(outfile=str(Path(folder) / "report.json"))
        report: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    return report


def shares(summary: dict[str, Any]) -> tuple[float, float]:
    """Return the shares of lines and branches in percent."""
    lines, branches = summary["num_statements"], summary["num_branches"]
    of_lines = 100.0 * summary["covered_lines"] / lines if lines else 100.0
    return of_lines, 100.0 * summary["covered_branches"] / branches if branches else 100.0


def table(report: dict[str, Any], done: list[str]) -> str:
    """Return the figures, and the files below what they should reach, as markdown."""
    lines, branches = shares(report["totals"])
    text = [
        "# What the tests run of the package",
        "",
        f"From `python scripts/measure_coverage.py`: {lines:.1f} % of the lines and {branches:.1f} % of",
        f"the branches. Folders of tests that were run: {', '.join(done)}.",
        "",
        f"| below {LINES:.0f} % or {BRANCHES:.0f} % | lines | branches | lines that no test runs |",
        "|---|---|---|---|",
    ]
    for name, file in sorted(report["files"].items()):
        of_lines, of_branches = shares(file["summary"])
        if of_lines < LINES or of_branches < BRANCHES:
            missing = ", ".join(map(str, file["missing_lines"][:12])) + (", ..." if file["missing_lines"][12:] else "")
            text.append(f"| {name} | {of_lines:.1f} | {of_branches:.1f} | {missing} |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Run what is missing, join and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=parts(), default=parts())
    parser.add_argument("--output", default=str(ROOT / "results" / "coverage.json"))
    args = parser.parse_args()
    store = Store(args.output, "python scripts/measure_coverage.py", device="cpu")
    for part in args.only:
        if not store.done({"tests": part}):
            store.add({"tests": part, "status": run(part)})
    report = measured()
    lines, branches = shares(report["totals"])
    store.finish({"lines": round(lines, 1), "branches": round(branches, 1), "files": len(report["files"])})
    write_atomically(Path(args.output).with_suffix(".md"), table(report, [str(row["tests"]) for row in store.rows]))


if __name__ == "__main__":
    main()
