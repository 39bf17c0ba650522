"""Change the code of the package in one place at a time, and see whether the tests notice.

A mutant is one operator, comparison, constant, condition, keyword or returned value that is another one. It is killed
where the mirrored tests fail (tests/<folder>/test_<file>.py, and those named in `TESTS`), and survives where they pass.
Each test file is run on the unchanged code first: one that fails there can kill nothing, and the script stops.
A sample of all the mutants there are is drawn with a fixed seed, so that the figure means something and a second run
goes on where the first one was stopped. Once tests are written for the survivors of a sample, its figure says little of
the rest: another seed draws others, none of them in the samples of the seeds before it.

    python scripts/mutate.py                    # the sample of `COUNT` mutants
    python scripts/mutate.py --seed 1           # others, for which no test was written
    python scripts/mutate.py --show 17          # the difference that a mutant makes

Survivors are listed in results/mutation.md, each with the verdict of somebody who looked at it, from
scripts/mutant_verdicts.py.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import hashlib
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mutant_verdicts import SAME, VERDICTS
from store import Store
from warm_tests import WarmTests

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
COUNT = 200
TIMEOUT = 600  # seconds; a mutant that runs for ever is killed
PARTS = ("functional", "conversion/convert.py", "recalibration")
# Where the mirrored test file is not called after the file, or more than it looks at the code; the quickest first.
TESTS = {
    "functional/shared_backward.py": [
        "tests/functional/test_shared_backward.py",
        "tests/layers/test_norm_act.py",
        "tests/layers/test_observers.py",
    ],
    "functional/image_spread.py": [
        "tests/functional/test_image_spread.py",
        "tests/recalibration/test_iid_test.py",
        "tests/recalibration/test_measurement.py",
    ],
    "functional/frozen_act.py": ["tests/functional/test_frozen_act.py", "tests/layers/test_norm_act.py"],
    "functional/fold.py": ["tests/conversion/test_merge.py"],
    "functional/eager_step.py": ["tests/functional/test_eager_step.py", "tests/functional/test_shared_backward.py"],
    "functional/moments.py": [
        "tests/functional/test_moments.py",
        "tests/recalibration/test_recalibrate.py",
        "tests/recalibration/test_collector.py",
        "tests/recalibration/test_measurement.py",
        "tests/functional/test_image_spread.py",
    ],
    "functional/group_norm.py": ["tests/functional/test_group_norm.py", "tests/layers/test_group_norm.py"],
    "functional/frozen.py": ["tests/functional/test_frozen.py", "tests/layers/test_frozen.py"],
    "functional/batch.py": ["tests/functional/test_batch.py", "tests/layers/test_renorm.py"],
    "functional/balancing.py": ["tests/functional/test_balancing.py", "tests/group_norm/test_calibrate.py"],
    "conversion/convert.py": [
        "tests/conversion/test_convert_group_norm.py",
        "tests/conversion/test_convert.py",
        "tests/conversion/test_convert_tracking.py",
        "tests/conversion/test_plan.py",
        "tests/conversion/test_training_run.py",
    ],
    "recalibration/settings.py": [
        "tests/recalibration/test_settings.py",
        "tests/recalibration/test_recalibrate.py",
        "tests/recalibration/test_measurement.py",
    ],
    "recalibration/nearest.py": ["tests/recalibration/test_bank.py"],
    "recalibration/measured_layer.py": ["tests/recalibration/test_recalibrate.py"],
    "recalibration/measurement.py": [
        "tests/recalibration/test_measurement.py",
        "tests/recalibration/test_stateful.py",
        "tests/recalibration/test_batch_kinds.py",
        "tests/recalibration/test_recalibrate.py",
    ],
    "recalibration/collector.py": [
        "tests/recalibration/test_collector.py",
        "tests/recalibration/test_rehearsal.py",
        "tests/recalibration/test_recalibrate.py",
        "tests/recalibration/test_batch_kinds.py",
        "tests/recalibration/test_stateful.py",
        "tests/recalibration/test_threads.py",
    ],
    "recalibration/recalibrate.py": [
        "tests/recalibration/test_stateful.py",
        "tests/recalibration/test_recalibrate.py",
    ],
    "recalibration/rehearsal.py": [
        "tests/recalibration/test_rehearsal.py",
        "tests/recalibration/test_batch_kinds.py",
        "tests/recalibration/test_stateful.py",
    ],
}
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of a file; `nth` counts those of the same text, `number` all of the file, in walking order."""

    file: str
    number: int
    line: int
    change: str
    nth: int = 0


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


def in_words(node: ast.AST, what: str, new: ast.AST) -> str:
    """Return a change as one line."""
    return f"{what}: `{ast.unparse(node).splitlines()[0]}` -> `{ast.unparse(new).splitlines()[0]}`"


@functools.cache
def mutants_of(file: str, source: str) -> tuple[Mutant, ...]:
    """Return all changes of a file."""
    found, seen = [], Counter[str]()
    for number, (node, what, new) in enumerate(candidates(ast.parse(source))):
        change = in_words(node, what, new)
        found.append(Mutant(file, number, node.lineno, change, seen[change]))  # type: ignore[attr-defined]
        seen[change] += 1
    return tuple(found)


def mutated(source: str, number: int) -> str:
    """Return the source with its n-th change."""
    tree = ast.parse(source)
    node, _, new = list(candidates(tree))[number]

    class Put(ast.NodeTransformer):
        def visit(self, each: ast.AST) -> ast.AST:
            return new if each is node else self.generic_visit(each)

    return ast.unparse(ast.fix_missing_locations(Put().visit(tree)))


def files() -> list[str]:
    """Return the files that are changed, from the package's folder."""
    package = ROOT / "finetune_bn"
    found: list[Path] = []
    for part in PARTS:
        path = package / part
        found += [path] if path.suffix == ".py" else sorted(path.glob("*.py"))
    return [path.relative_to(package).as_posix() for path in found if path.name != "__init__.py"]


def sample(count: int, seed: int) -> list[Mutant]:
    """Return so many mutants of all that there are, in an order drawn by the seed; none that a lower seed draws.

    The draw goes by the text of a change: where code is edited, the other mutants stay in the sample, in their order.
    """
    taken = {mutant for earlier in range(seed) for mutant in sample(COUNT, earlier)}
    every = [m for file in files() for m in mutants_of(file, (ROOT / "finetune_bn" / file).read_text(encoding="utf-8"))]

    def drawn(mutant: Mutant) -> bytes:
        return hashlib.sha256(f"{seed} {mutant.file} {mutant.change} {mutant.nth}".encode()).digest()

    return sorted((mutant for mutant in every if mutant not in taken), key=drawn)[:count]


def tests_of(file: str) -> list[str]:
    """Return the test files that look at a file of the package."""
    if file in TESTS:
        return TESTS[file]
    folder, _, name = file.rpartition("/")
    mirrored = f"tests/{folder}/test_{name}"
    return [mirrored] if (ROOT / mirrored).exists() else [f"tests/{folder}"]


def verdict(mutant: Mutant, tests: WarmTests) -> str:
    """Run the tests on a mutant, in a copy of the checkout; return `killed`, `survived` or `timeout`."""
    path = tests.checkout / "finetune_bn" / mutant.file
    original = path.read_text(encoding="utf-8")
    path.write_text(mutated(original, mutant.number), encoding="utf-8")
    try:
        status = tests.run(tests_of(mutant.file), TIMEOUT)
    finally:
        path.write_text(original, encoding="utf-8")
    return "timeout" if status is None else "survived" if status == 0 else "killed"


def control(store: Store, files: list[str], tests: WarmTests) -> None:
    """Run test files on the unchanged code, once each; raise where one fails."""
    for file in files:
        if not store.done({"control": file}):
            began = time.monotonic()
            if (status := tests.run([file], TIMEOUT)) != 0:
                raise RuntimeError(f"{file} fails on the unchanged code (pytest's status: {status}).")
            store.add({"control": file, "seconds": round(time.monotonic() - began, 1)})


def table(rows: list[dict[str, object]], of: int, seed: int = 0) -> str:
    """Return the figures and the survivors as markdown; `of` is how many mutants the seed's sample has."""
    count, killed = len(rows), sum(row["verdict"] != "survived" for row in rows)
    first = sum(row.get("at_first", row["verdict"]) != "survived" for row in rows)
    same = sum(row["verdict"] == "survived" and said_of(row).startswith(SAME) for row in rows)
    counts = Counter(str(row["change"]).partition(":")[0] for row in rows)
    kinds = ", ".join(f"{n} x {kind}" for kind, n in counts.most_common())
    files_hit = Counter(str(row["file"]) for row in rows)
    killed_in = Counter(str(row["file"]) for row in rows if row["verdict"] != "survived")
    lines = [
        "# Do the tests notice a change of the code?",
        "",
        f"From `{command(seed)}`: {killed} of {count} mutants killed ({killed / count:.0%}). Drawn with",
        f"seed {seed} from all changes of {', '.join(PARTS)}: {kinds}.",
        *([f"At first, before tests were written for its survivors, {first}."] if first < killed else []),
        *([f"{same} of the survivors change no result: without them {killed / (count - same):.0%}."] if same else []),
        *([f"They are the first {count} of a sample of {of}, in its order."] if count < of else []),
        "",
        "| file | mutants | killed |",
        "|---|---|---|",
        *(f"| {file} | {n} | {killed_in[file]} |" for file, n in sorted(files_hit.items())),
        "",
        "| survivor | change | what it is |",
        "|---|---|---|",
    ]
    for row in rows:
        if row["verdict"] == "survived":
            change = str(row["change"]).replace("|", "\\|")
            lines.append(f"| {row['file']}:{row['line']} | {change} | {said_of(row)} |")
    return "\n".join(lines) + "\n"


def said_of(row: dict[str, object]) -> str:
    """Return the verdict of somebody who looked at a survivor."""
    return VERDICTS.get((str(row["file"]), str(row["change"]), int(str(row["nth"]))), "not looked at yet")


def checkout(folder: Path) -> Path:
    """Copy the files that git knows of into a folder of this name; return it."""
    place = folder / "copy"
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], check=True, capture_output=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((ROOT / name).read_bytes())
    return place


def report(store: Store, mutants: list[Mutant], output: Path, seed: int) -> None:
    """Write the figures of the mutants that were run, as far as there are any."""
    rows = [found | {"line": m.line} for m in mutants if (found := store.find(**key_of(m))) is not None]
    if rows:
        killed = sum(row["verdict"] != "survived" for row in rows)
        store.finish({"mutants": len(rows), "killed": killed, "share": round(killed / len(rows), 3)})
        write_atomically(output.with_suffix(".md"), table(rows, len(mutants), seed))


def command(seed: int) -> str:
    """Return how a sample is run."""
    return "python scripts/mutate.py" + f" --seed {seed}" * bool(seed)


def key_of(mutant: Mutant) -> dict[str, object]:
    """Return what names a mutant in the results."""
    return {"file": mutant.file, "change": mutant.change, "nth": mutant.nth}


def main() -> None:
    """Run what is missing of the sample, in its order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--seed", type=int, default=0, help="of the sample; from 1 on, none of the samples before")
    parser.add_argument("--show", type=int, help="print a mutant of the sample, and run nothing")
    parser.add_argument("--again", action="store_true", help="run survivors once more, those without a verdict")
    parser.add_argument("--report-only", action="store_true", help="write the table anew, and run nothing")
    parser.add_argument("--output", type=Path, help="default: results/mutation.json, mutation_1.json for seed 1")
    args = parser.parse_args()
    output = args.output or ROOT / "results" / f"mutation{f'_{args.seed}' * bool(args.seed)}.json"
    mutants = sample(args.count, args.seed)
    if args.show is not None:
        print(mutants[args.show])
        return
    store = Store(output, command(args.seed), seeds=[args.seed], device="cpu")
    missing = []
    for mutant in mutants:
        known = store.find(**key_of(mutant))
        judged = (mutant.file, mutant.change, mutant.nth) in VERDICTS
        if known is None or (args.again and known["verdict"] == "survived" and not judged):
            missing.append(mutant)
    if missing and not args.report_only:
        with tempfile.TemporaryDirectory() as folder, WarmTests(checkout(Path(folder))) as tests:
            for mutant in missing:
                control(store, tests_of(mutant.file), tests)
                known, began = store.find(**key_of(mutant)), time.monotonic()
                found = verdict(mutant, tests)
                store.drop(key_of(mutant))
                seconds = round(time.monotonic() - began, 1)
                row = key_of(mutant) | {"line": mutant.line, "verdict": found, "seconds": seconds}
                store.add(row | ({"at_first": known["verdict"]} if known else {}))
                print(found, f"{mutant.file}:{mutant.line}", mutant.change, f"{seconds} s", flush=True)
    report(store, mutants, output, args.seed)


if __name__ == "__main__":
    main()
