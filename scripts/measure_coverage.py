"""Measure which lines and branches of the package the tests run, folder by folder, so that it can be cut off and go on.

    python scripts/measure_coverage.py              # all folders of tests/ that results/coverage.json does not have yet
    python scripts/measure_coverage.py --only functional conversion

The data of every folder is kept in `.coverage.<folder>` and joined at the end. A folder counts when all its tests
passed, its data is there, and neither the package nor a file of its tests has changed since. Test files that are new or
changed are run by themselves and added; a changed package starts all anew, for its line numbers are others.

Code that runs in other processes (ranks, workers, the command as a program) counts where they end by themselves. What
only a GPU or `-m slow` runs does not. What is left out altogether is named in `[tool.coverage]` of pyproject.toml.
Table: results/coverage.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
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


def data_of(part: str) -> Path:
    """Return the file that holds what a folder's tests ran."""
    return ROOT / f".coverage.{part.replace('.', 'top')}"


def test_files(part: str) -> list[Path]:
    """Return a folder's test files."""
    tests = ROOT / "tests"
    return sorted(tests.glob("test_*.py") if part == "." else (tests / part).rglob("test_*.py"))


def digest(paths: Iterable[Path]) -> str:
    """Return a name for the content of files."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def state(part: str) -> dict[str, Any]:
    """Return what a folder's data depends on: the package, and each of its test files."""
    tests = {path.relative_to(ROOT / "tests").as_posix(): digest([path]) for path in test_files(part)}
    return {"package": digest((ROOT / "finetune_bn").rglob("*.py")), "files": tests}


def to_run(store: Store, part: str) -> tuple[list[Path], bool]:
    """Return the test files of a folder that are to be run, and whether what they run is added to its data."""
    now, files = state(part), test_files(part)
    row = store.find(tests=part, status=0, package=now["package"])
    if row is None or not data_of(part).exists() or row["files"].keys() - now["files"].keys():
        return files, False
    return [path for path in files if digest([path]) not in row["files"].values()], True


def run(part: str, tests: list[Path], add: bool) -> int:
    """Run test files under coverage, and join what their processes ran to the folder's data; return pytest's status."""
    data = data_of(part)
    for old in [*ROOT.glob(f"{data.name}.*"), *([] if add else [data])]:
        old.unlink(missing_ok=True)
    command = [sys.executable, "-m", "coverage", "run", f"--data-file={data}"]
    command += ["-m", "pytest", "-q", "-p", "no:xdist", *(str(path.relative_to(ROOT)) for path in tests)]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    # The last part of a name is a hash, once the file is whole; a process of multiprocessing's may outlive pytest.
    found = [str(path) for path in ROOT.glob(f"{data.name}.*") if path.suffix.startswith(".H")]
    joined = [sys.executable, "-m", "coverage", "combine", "-q", "--append", f"--data-file={data}", *found]
    subprocess.run(joined, cwd=ROOT, check=True)
    return status


def account(parts: list[str]) -> dict[str, Any]:
    """Return coverage's account of these folders of tests, joined."""
    os.chdir(ROOT)  # the data names files from here
    joined = coverage.Coverage(data_file=None, config_file=str(ROOT / "pyproject.toml"))
    joined.combine([str(data_of(part)) for part in parts], keep=True)
    with tempfile.TemporaryDirectory() as folder:
        joined.json_report(outfile=str(Path(folder) / "report.json"))
        report: dict[str, Any] = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    return report


def shares(summary: dict[str, Any]) -> tuple[float, float]:
    """Return the shares of lines and branches in percent."""
    lines, branches = summary["num_statements"], summary["num_branches"]
    of_lines = 100.0 * summary["covered_lines"] / lines if lines else 100.0
    return of_lines, 100.0 * summary["covered_branches"] / branches if branches else 100.0


def table(report: dict[str, Any], done: list[str], missing: list[str]) -> str:
    """Return the figures, and the files below what they should reach, as markdown."""
    lines, branches = shares(report["totals"])
    text = [
        "# What the tests run of the package",
        "",
        f"From `python scripts/measure_coverage.py`: {lines:.1f} % of the lines and {branches:.1f} % of",
        f"the branches. Folders of tests that were run: {', '.join(done)}.",
        *([f"Not run, or failed, and so not counted: {', '.join(missing)}."] if missing else []),
        "",
        f"| below {LINES:.0f} % or {BRANCHES:.0f} % | lines | branches | lines that no test runs |",
        "|---|---|---|---|",
    ]
    for name, file in sorted(report["files"].items()):
        of_lines, of_branches = shares(file["summary"])
        if of_lines < LINES or of_branches < BRANCHES:
            unseen = ", ".join(map(str, file["missing_lines"][:12])) + (", ..." if file["missing_lines"][12:] else "")
            text.append(f"| {name} | {of_lines:.1f} | {of_branches:.1f} | {unseen} |")
    return "\n".join(text) + "\n"


def main() -> int:
    """Run what is missing, join and write the table; return 1 where a folder's tests fail."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=parts(), default=parts())
    parser.add_argument("--output", default=str(ROOT / "results" / "coverage.json"))
    args = parser.parse_args()
    store = Store(args.output, "python scripts/measure_coverage.py", device="cpu")
    for part in args.only:
        tests, add = to_run(store, part)
        if tests:
            before, began = state(part), time.monotonic()
            status = run(part, tests, add)
            store.drop({"tests": part})
            seconds = round(time.monotonic() - began, 1)
            store.add({"tests": part, "status": status, "seconds": seconds, **before})
    done = [part for part in parts() if not to_run(store, part)[0]]
    failed = [part for part in args.only if part not in done]
    if failed:
        print(f"not counted, for their tests do not pass: {', '.join(failed)}", file=sys.stderr)
    if done:
        report = account(done)
        lines, branches = shares(report["totals"])
        store.finish({"lines": round(lines, 1), "branches": round(branches, 1), "files": len(report["files"])})
        missing = [part for part in parts() if part not in done]
        write_atomically(Path(args.output).with_suffix(".md"), table(report, done, missing))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
