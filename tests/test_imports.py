"""A file imports from lower levels only, and the core needs torch alone: the package's `import` lines, read as text."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "finetune_bn"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# The order in which the files build on each other: a file may import what stands on a lower level than itself, so the
# files of one level do not know each other. The whole numbers are the floors of the house, the decimals say who may
# look down on whom on one floor. "" is the package's own face, finetune_bn/__init__.py.
LEVELS: dict[str, float] = {
    # 0: the standard library
    "errors": 0,
    "files": 0,
    # 1: pure tensor maths
    "functional": 1,
    "moments": 1,
    "lockstep": 1,
    "live_memory": 1,
    "progress": 1,
    "samplers": 1,
    "neighbors": 1,
    "batch_functional": 1.1,
    "fold_functional": 1.2,
    "fold_gradients": 1.1,
    "act_functional": 1.1,
    "design_effect": 1.1,
    "group_functional": 1.1,
    "balance_functional": 1.1,
    "sampling_error": 1.1,
    "ranks": 1.1,
    # 2: layers
    "layers.frozen": 2.0,
    "layers.fold": 2.1,
    "layers.folded": 2.2,
    "layers.live": 2.1,
    "layers.tracking": 2.1,
    "layers.ghost": 2.2,
    "layers.group_norm": 2.2,
    "layers.noise": 2.2,
    "layers.renorm": 2.2,
    "layers.stochastic": 2.2,
    "layers.norm_act": 2.3,
    "layers.folds": 2.4,
    "layers.statistics": 2.8,
    "layers": 2.9,
    # 3: what is in the model, and what may happen to it
    "probe": 3.0,
    "sites": 3.1,
    "pairs": 3.2,
    "policies": 3.2,
    "inspection": 3.3,
    "refusals": 3.3,
    "feeding": 3.0,
    "stock": 3.1,
    "membership": 3.1,
    # 4: what will happen, and the doing of it
    "plans": 4.0,
    "folding": 4.05,
    "proofs": 4.0,
    "convert": 4.1,
    "collecting": 4.0,
    "measuring": 4.1,
    "recalibration_record": 4.0,
    "recalibrate": 4.2,
    "balancing": 4.0,
    "calibration_record": 4.0,
    "fitting": 4.2,
    "calibrate": 4.3,
    "distil": 4.3,
    "twins": 4.1,
    "leakage": 4.2,
    "memory": 4.2,
    "merging": 4.2,
    "banks": 4.1,
    "": 4.9,
    # 5: what stands around a converted model
    "report": 5.0,
    "export": 5.0,
    "training_report": 5.1,
    "optim": 5.0,
    "step_limit": 5.0,
    "retrieval": 5.0,
    "advice": 5.0,
    "weights": 5.0,
    "backbones": 5.1,
    # 6: Lightning
    "data.checks": 6.00,
    "data.splits": 6.00,
    "data.transforms": 6.00,
    "data.order": 6.01,
    "data.label_batches": 6.02,
    "data.images": 6.02,
    "data.base": 6.03,
    "data.emoji": 6.04,
    "data.image_folder": 6.04,
    "data.torchvision_data": 6.04,
    "data": 6.09,
    "callbacks.collapse": 6.10,
    "callbacks.capture": 6.10,
    "callbacks.iid": 6.10,
    "callbacks.statistics": 6.10,
    "callbacks.strategies": 6.09,
    "callbacks.conversion": 6.11,
    "callbacks.reload": 6.11,
    "callbacks.report": 6.12,
    "callbacks.group_norm": 6.12,
    "callbacks.recalibration": 6.12,
    "callbacks.schedule": 6.13,
    "callbacks.checkpoint": 6.13,
    "callbacks.monitor": 6.13,
    "callbacks.sampling": 6.10,
    "callbacks.step_limit": 6.10,
    "callbacks": 6.19,
    "tasks.checks": 6.20,
    "tasks.collected": 6.20,
    "tasks.losses": 6.20,
    "tasks.base": 6.21,
    "tasks.classification": 6.22,
    "tasks.metric_learning": 6.22,
    "tasks": 6.29,
    # 7: the command
    "cli": 7,
}
TORCH_ALONE_BELOW = 5  # below this level torch is the only package from outside
LAZY_BELOW = 6  # below this level everything but torch is imported inside functions
KNOWS = {"timm": {"layers.norm_act", "sites"}, "rich": {"progress"}}  # the exceptions to TORCH_ALONE_BELOW


@dataclass(frozen=True)
class Import:
    """One imported name: the file's module, its line, the absolute dotted name, and whether a function imports it."""

    module: str
    line: int
    name: str
    lazy: bool

    def __str__(self) -> str:
        return f"{self.module or '__init__'}, line {self.line}: {self.name}"

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def target(self, levels: dict[str, float]) -> str:
        """Return the module of this package that the name lies in: the longest prefix that the table lists."""
        inner = self.name.removeprefix(PACKAGE).removeprefix(".")
        while inner and inner not in levels:
            inner = inner.rpartition(".")[0]
        return inner


def module_of(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, root: Path) -> list[Import]:
    """Return every name that a file imports, at its top or inside a function, relative ones made absolute."""
    module = module_of(path, root)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
                depth = node.level - (path.name == "__init__.py")
                base = ".".join([*here[: len(here) - depth], *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [Import(module, node.lineno, name, id(node) in inside_functions) for name in names]
    return found


def all_imports(root: Path) -> list[Import]:
    return [found for path in sorted(root.rglob("*.py")) for found in imports_of(path, root)]


def upward(root: Path, levels: dict[str, float]) -> list[str]:
    """Return, in words, every import of this package that does not point to a lower level."""
    return [
        f"{found} is on level {levels[found.target(levels)]}, not below {levels[found.module]}"
        for found in all_imports(root)
        if found.package == PACKAGE and found.module in levels
        if levels[found.target(levels)] >= levels[found.module]
    ]


def plant(root: Path, file: str, text: str) -> Path:
    """Write a package of one file and return its folder."""
    path = root / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    return root / PACKAGE


def test_every_file_has_a_level_and_every_level_a_file() -> None:
    files = {module_of(path, ROOT) for path in ROOT.rglob("*.py")}
    unknown, gone = sorted(files - LEVELS.keys()), sorted(LEVELS.keys() - files)
    assert not unknown, f"give {unknown} a level in LEVELS ({__file__}): above all it imports, below all that import it"
    assert not gone, f"take {gone} out of LEVELS ({__file__}): there is no such file"


def test_a_file_imports_from_lower_levels_only() -> None:
    assert upward(ROOT, LEVELS) == []


@pytest.mark.parametrize(
    "line",
    [
        "from finetune_bn.convert import convert",
        "from finetune_bn import convert",
        "import finetune_bn.convert",
        "import finetune_bn as fbn",
        "from ..convert import convert",
        "from .. import convert",
        "from . import norm_act",
        "from .frozen import FrozenBatchNorm",
        "def late():\n    from finetune_bn.convert import convert",
    ],
)
def test_a_planted_import_that_points_upward_or_sideways_is_caught(tmp_path: Path, line: str) -> None:
    root = plant(tmp_path, "layers/frozen.py", f"from finetune_bn.errors import complaint\n{line}\n")
    assert len(upward(root, LEVELS)) == 1


@pytest.mark.parametrize("line", ["from finetune_bn.errors import complaint", "from ..errors import complaint"])
def test_a_planted_import_that_points_downward_passes(tmp_path: Path, line: str) -> None:
    assert upward(plant(tmp_path, "layers/frozen.py", line), LEVELS) == []


def test_relative_imports_of_an_init_file_start_at_its_own_package(tmp_path: Path) -> None:
    root = plant(tmp_path, "layers/__init__.py", "from .frozen import FrozenBatchNorm\nfrom ..cli import main")
    assert [found.name for found in all_imports(root)] == [
        "finetune_bn.layers.frozen.FrozenBatchNorm",
        "finetune_bn.cli.main",
    ]


def outsiders(root: Path) -> list[Import]:
    return [
        found
        for found in all_imports(root)
        if found.package not in {*sys.stdlib_module_names, PACKAGE, "torch"} and found.module in LEVELS
        if LEVELS[found.module] < LAZY_BELOW
    ]


def test_errors_needs_the_standard_library_alone() -> None:
    assert {found.package for found in imports_of(ROOT / "errors.py", ROOT)} <= sys.stdlib_module_names


def test_the_core_knows_no_package_but_torch_and_in_named_places_timm_and_rich() -> None:
    core = [found for found in outsiders(ROOT) if LEVELS[found.module] < TORCH_ALONE_BELOW]
    assert [str(found) for found in core if found.module not in KNOWS.get(found.package, ())] == []


def test_below_lightning_other_packages_are_imported_inside_functions() -> None:
    assert [str(found) for found in outsiders(ROOT) if not found.lazy] == []


def test_among_the_layers_only_norm_act_names_timms_modules() -> None:
    """A module can also be named in a string: `sys.modules["timm.layers"]`, `import_module("timm")`."""
    naming = set()
    for path in (ROOT / "layers").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        if any(found.package == "timm" for found in imports_of(path, ROOT)) or any(
            text == "timm" or (text.startswith("timm.") and " " not in text) for text in strings
        ):
            naming.add(path.name)
    assert naming == {"norm_act.py"}


def test_importing_the_package_loads_torch_and_none_of_the_extras() -> None:
    extras = ["lightning", "timm", "jsonargparse", "matplotlib", "torchvision", "rich", "torchmetrics", "PIL"]
    code = f"import sys, finetune_bn; print(*[name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
