"""Change the code of the package in one place at a time, and see whether the tests notice.

A mutant is one operator, comparison, constant, condition, keyword or returned value that is another one. It is killed
where the mirrored tests fail (tests/<folder>/test_<file>.py, and those named in `TESTS`), and survives where they pass.
A sample of all the mutants there are is drawn with a fixed seed, so that the figure means something and a second run
goes on where the first one was stopped.

    python scripts/mutate.py                    # the sample of `COUNT` mutants
    python scripts/mutate.py --show 17          # the difference that a mutant makes

Survivors are listed in results/mutation.md, each with the verdict of somebody who looked at it (`VERDICTS`).
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from store import Store

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
COUNT, SEED = 200, 0
TIMEOUT = 900  # seconds; a mutant that runs for ever is killed
PARTS = ("functional", "conversion/convert.py", "recalibration")
# Where the mirrored test file is not called after the file, or more than it looks at the code.
TESTS = {
    "functional/fold.py": ["tests/conversion/test_merge.py"],
    "functional/eager_step.py": ["tests/functional/test_shared_backward.py"],
    "functional/moments.py": ["tests/functional/test_moments.py", "tests/recalibration/test_recalibrate.py"],
    "functional/group_norm.py": ["tests/functional/test_group_norm.py", "tests/layers/test_group_norm.py"],
    "functional/frozen.py": ["tests/functional/test_frozen.py", "tests/layers/test_frozen.py"],
    "functional/batch.py": ["tests/functional/test_batch.py", "tests/layers/test_renorm.py"],
    "functional/balancing.py": ["tests/functional/test_balancing.py", "tests/group_norm/test_calibrate.py"],
    "conversion/convert.py": [
        "tests/conversion/test_convert.py",
        "tests/conversion/test_convert_group_norm.py",
        "tests/conversion/test_convert_tracking.py",
    ],
    "recalibration/settings.py": ["tests/recalibration/test_settings.py", "tests/recalibration/test_recalibrate.py"],
    "recalibration/measured_layer.py": ["tests/recalibration/test_recalibrate.py"],
    "recalibration/measurement.py": [
        "tests/recalibration/test_measurement.py",
        "tests/recalibration/test_recalibrate.py",
    ],
    "recalibration/collector.py": ["tests/recalibration/test_collector.py", "tests/recalibration/test_recalibrate.py"],
    "recalibration/rehearsal.py": ["tests/recalibration/test_rehearsal.py", "tests/recalibration/test_batch_kinds.py"],
}
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip
# What somebody who looked at a survivor says of it, by file and text of the change.
VERDICTS: dict[tuple[str, str], str] = {}


@dataclass(frozen=True)
class Mutant:
    """One change: the n-th of a file, in walking order."""

    file: str
    number: int
    line: int
    change: str


def candidates(tree: ast.Module) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Yield (node, what is changed, the node in its place) for each change that there is."""
    skipped = _not_code(tree)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        for what, change in _changes(node):
            yield node, what, change


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        assert isinstance(new, ast.Compare)
        new.ops[0] = COMPARE[type(node.ops[0])]()
        yield "comparison", new
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        assert isinstance(new, ast.BinOp)
        new.op = ARITHMETIC[type(node.op)]()
        yield "arithmetic", new
    elif isinstance(node, ast.BoolOp):
        assert isinstance(new, ast.BoolOp)
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "boolean", new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "negation", copy.deepcopy(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield "constant", ast.copy_location(ast.Constant(value), node)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, (ast.Compare, ast.BoolOp)):
        assert isinstance(new, (ast.If, ast.IfExp, ast.While))
        new.test = ast.UnaryOp(ast.Not(), copy.deepcopy(node.test))
        yield "condition", new


def _not_code(tree: ast.Module) -> set[int]:
    """Return the ids of nodes whose change no test can or need see: annotations, and blocks for type checkers."""
    found: set[int] = set()

    def leave_out(node: ast.AST | None) -> None:
        if node is not None:
            found.update(id(each) for each in ast.walk(node))

    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            leave_out(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            leave_out(node.returns)
        elif isinstance(node, ast.AnnAssign):
            leave_out(node.annotation)
        elif isinstance(node, ast.Assert) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            leave_out(node)
    return found


def mutated(source: str, number: int) -> tuple[str, str, int]:
    """Return the source with its n-th change, the change in words and its line."""
    tree = ast.parse(source)
    node, what, new = list(candidates(tree))[number]
    before = ast.unparse(node).splitlines()[0]
    line = node.lineno  # type: ignore[attr-defined]

    class Put(ast.NodeTransformer):
        def visit(self, each: ast.AST) -> ast.AST:
            return new if each is node else self.generic_visit(each)

    changed = ast.unparse(ast.fix_missing_locations(Put().visit(tree)))
    return changed, f"{what}: `{before}` -> `{ast.unparse(new).splitlines()[0]}`", line


def files() -> list[str]:
    """Return the files that are changed, from the package's folder."""
    package = ROOT / "finetune_bn"
    found: list[Path] = []
    for part in PARTS:
        path = package / part
        found += [path] if path.suffix == ".py" else sorted(path.glob("*.py"))
    return [path.relative_to(package).as_posix() for path in found if path.name != "__init__.py"]


def sample(count: int, seed: int) -> list[Mutant]:
    """Return so many mutants of all that there are, in an order drawn by the seed."""
    every = []
    for file in files():
        source = (ROOT / "finetune_bn" / file).read_text(encoding="utf-8")
        every += [(file, number) for number in range(sum(1 for _ in candidates(ast.parse(source))))]
    random.Random(seed).shuffle(every)
    chosen = []
    for file, number in every[:count]:
        _, change, line = mutated((ROOT / "finetune_bn" / file).read_text(encoding="utf-8"), number)
        chosen.append(Mutant(file, number, line, change))
    return chosen


def tests_of(file: str) -> list[str]:
    """Return the test files that look at a file of the package."""
    if file in TESTS:
        return TESTS[file]
    folder, _, name = file.rpartition("/")
    mirrored = f"tests/{folder}/test_{name}"
    return [mirrored] if (ROOT / mirrored).exists() else [f"tests/{folder}"]


def verdict(mutant: Mutant, copy_of: Path) -> str:
    """Run the tests on a mutant, in a copy of the checkout; return `killed`, `survived` or `timeout`."""
    path = copy_of / "finetune_bn" / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutated(original, mutant.number)[0], encoding="utf-8")
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *tests_of(mutant.file)]
    environment = os.environ | {"PYTHONPATH": str(copy_of), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(command, cwd=copy_of, env=environment, capture_output=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        path.write_text(original, encoding="utf-8")
    return "survived" if run.returncode == 0 else "killed"


def table(rows: list[dict[str, object]]) -> str:
    """Return the figures and the survivors as markdown."""
    count, killed = len(rows), sum(row["verdict"] != "survived" for row in rows)
    kinds = Counter(str(row["change"]).partition(":")[0] for row in rows)
    of = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common())
    lines = [
        "# Do the tests notice a change of the code?",
        "",
        f"From `python scripts/mutate.py`: {killed} of {count} mutants killed ({killed / count:.0%}). Drawn with",
        f"seed {SEED} from all changes of {', '.join(PARTS)}: {of}.",
        "",
        "| survivor | change | what it is |",
        "|---|---|---|",
    ]
    for row in rows:
        if row["verdict"] == "survived":
            change = str(row["change"]).replace("|", "\\|")
            said = VERDICTS.get((str(row["file"]), str(row["change"])), "not looked at yet")
            lines.append(f"| {row['file']}:{row['line']} | {change} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing of the sample."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--show", type=int, help="print a mutant of the sample, and run nothing")
    parser.add_argument("--again", action="store_true", help="run survivors once more")
    parser.add_argument("--output", default=str(ROOT / "results" / "mutation.json"))
    args = parser.parse_args()
    mutants = sample(args.count, SEED)
    if args.show is not None:
        print(mutants[args.show])
        return
    store = Store(args.output, "python scripts/mutate.py", seeds=[SEED], device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "copy"
        place.mkdir()
        listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True).stdout
        for name in filter(None, listed.decode().split("\0")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((ROOT / name).read_bytes())
        for mutant in mutants:
            key = {"file": mutant.file, "number": mutant.number, "change": mutant.change}
            known = store.find(**key)
            if known is not None and not (args.again and known["verdict"] == "survived"):
                continue
            began = time.monotonic()
            found = verdict(mutant, place)
            store.drop(key)
            store.add(key | {"line": mutant.line, "verdict": found, "seconds": round(time.monotonic() - began, 1)})
            print(found, f"{mutant.file}:{mutant.line}", mutant.change, flush=True)
    rows = [store.find(file=m.file, number=m.number, change=m.change) for m in mutants]
    done = [row for row in rows if row is not None]
    killed = sum(row["verdict"] != "survived" for row in done)
    store.finish({"mutants": len(done), "killed": killed, "share": round(killed / len(done), 3)})
    write_atomically(Path(args.output).with_suffix(".md"), table(done))


if __name__ == "__main__":
    main()
