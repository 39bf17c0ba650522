"""A folder imports from lower floors only, and the core needs torch alone: the `import` lines, read as text."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import finetune_bn

PACKAGE = "finetune_bn"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# The floors of the house: a folder (or a file at the top) imports from lower floors only, and within a folder there is
# no circle. "" is finetune_bn/__init__.py, which hands out the names of face.py.
FLOORS: dict[str, int] = {
    "errors": 0,
    "functional": 1,
    "utilities": 2,
    "layers": 3,
    "metric_learning": 4,
    "optim": 4,
    "conversion": 5,
    "recalibration": 6,
    "data": 6,
    "group_norm": 7,
    "diagnosis": 7,
    "backbones": 8,
    "comparison": 8,
    "": 9,
    "callbacks": 10,
    "tasks": 11,
    "cli": 12,
}
# The other files at the top, and whose floor they are on.
AT_THE_TOP = {"face": "", "policies": "", "__main__": "cli"}
WITH_EXTRAS = {"data", "callbacks", "tasks", "cli"}  # other packages may be imported at the top here; elsewhere lazily
TORCH_ALONE = {"errors", "functional", "utilities", "layers", "conversion", "recalibration"}
KNOWS = {
    "timm": {"layers.norm_act", "layers.sites"},
    "rich": {"utilities.progress"},
    "PIL": {"utilities.images"},
    "matplotlib": {"utilities.rendering"},
    "numpy": {"utilities.images"},
    "onnxruntime": {"conversion.export"},
    "opacus": {"conversion.private"},
}  # the exceptions to TORCH_ALONE


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

    @property
    def inner(self) -> str:
        """The name without the package: `layers.frozen.FrozenBatchNorm`."""
        return self.name.removeprefix(PACKAGE).removeprefix(".")


def floor_of(dotted: str) -> str:
    """Return the row of FLOORS that a dotted name without the package lies in: its first part, or the face's."""
    first = dotted.partition(".")[0]
    return AT_THE_TOP.get(first, first if first in FLOORS else "")


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


def upward(root: Path) -> list[str]:
    """Return, in words, every import that points to a folder on the own floor or a higher one, or to the own face."""
    return [
        f"{found} is on floor {FLOORS[floor_of(found.inner)]}, not below {FLOORS[floor_of(found.module)]}"
        for found in all_imports(root)
        if found.package == PACKAGE
        if floor_of(found.inner) != floor_of(found.module)
        and FLOORS[floor_of(found.inner)] >= FLOORS[floor_of(found.module)]
    ]


def circles(root: Path) -> list[str]:
    """Return files of one folder that import each other in a circle; none where there is no circle."""
    files = {module_of(path, root) for path in root.rglob("*.py")}
    needs: dict[str, set[str]] = {file: set() for file in files}
    for found in all_imports(root):
        target = found.inner
        while target and target not in files:
            target = target.rpartition(".")[0]
        if found.package == PACKAGE and target and floor_of(target) == floor_of(found.module):
            needs[found.module].add(target)
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def plant(root: Path, file: str, text: str) -> Path:
    """Write a package of one file and return its folder."""
    path = root / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    return root / PACKAGE


def test_every_folder_has_a_floor_and_every_floor_a_folder() -> None:
    rooms = {module_of(path, ROOT).partition(".")[0] for path in ROOT.rglob("*.py")} - AT_THE_TOP.keys()
    unknown, gone = sorted(rooms - FLOORS.keys()), sorted(FLOORS.keys() - rooms)
    assert not unknown, f"give {unknown} a floor in FLOORS ({__file__}): above all it imports, below all that import it"
    assert not gone, f"take {gone} out of FLOORS ({__file__}): there is no such folder"


def test_a_folder_imports_from_lower_floors_only() -> None:
    assert upward(ROOT) == []


def test_within_a_folder_files_do_not_import_each_other_in_a_circle() -> None:
    assert circles(ROOT) == []


def test_a_planted_circle_is_caught_also_through_the_face_of_the_folder(tmp_path: Path) -> None:
    root = plant(tmp_path, "layers/frozen.py", "from finetune_bn.layers import Ghost\n")
    (root / "layers" / "__init__.py").write_text("from .ghost import Ghost\n", encoding="utf-8")
    (root / "layers" / "ghost.py").write_text("def late():\n    from .frozen import f\n", encoding="utf-8")
    assert set(circles(root)) == {"layers", "layers.ghost", "layers.frozen"}


@pytest.mark.parametrize(
    "line",
    [
        "from finetune_bn.conversion.convert import convert",
        "from finetune_bn.conversion import convert as convert",
        "import finetune_bn.conversion.convert",
        "import finetune_bn as fbn",
        "from ..conversion.convert import convert",
        "from .. import convert",
        "def late():\n    from finetune_bn.conversion.convert import convert",
    ],
)
def test_a_planted_import_that_points_upward_is_caught(tmp_path: Path, line: str) -> None:
    root = plant(tmp_path, "layers/frozen.py", f"from finetune_bn.errors import complaint\n{line}\n")
    assert len(upward(root)) == 1


@pytest.mark.parametrize("line", ["from finetune_bn.errors import complaint", "from ..errors import complaint"])
def test_a_planted_import_that_points_downward_passes(tmp_path: Path, line: str) -> None:
    assert upward(plant(tmp_path, "layers/frozen.py", line)) == []


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
        if found.package not in {*sys.stdlib_module_names, PACKAGE, "torch"}
        if floor_of(found.module) not in WITH_EXTRAS
    ]


def test_errors_needs_the_standard_library_alone() -> None:
    assert {found.package for found in imports_of(ROOT / "errors.py", ROOT)} <= sys.stdlib_module_names


def test_the_core_knows_no_package_but_torch_and_in_named_places_timm_and_rich() -> None:
    core = [found for found in outsiders(ROOT) if floor_of(found.module) in TORCH_ALONE]
    assert [str(found) for found in core if found.module not in KNOWS.get(found.package, ())] == []


def test_below_lightning_other_packages_are_imported_inside_functions() -> None:
    assert [str(found) for found in outsiders(ROOT) if not found.lazy] == []


def test_among_the_layers_only_norm_act_and_sites_name_timms_modules() -> None:
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
    assert naming == {"norm_act.py", "sites.py"}


def loaded_by(code: str) -> set[str]:
    """Return the top packages that a fresh interpreter has imported after a line of code."""
    command = [sys.executable, "-c", f"import sys; {code}; print(*sorted(sys.modules))"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


EXTRAS = {"lightning", "timm", "jsonargparse", "matplotlib", "torchvision", "rich", "torchmetrics", "PIL"}


def test_the_public_names_need_torch_and_none_of_the_extras() -> None:
    loaded = loaded_by("from finetune_bn import *; convert")
    assert "torch" in loaded
    assert loaded & EXTRAS == set()


def test_the_bare_import_does_not_even_wait_for_torch() -> None:
    assert loaded_by("import finetune_bn; finetune_bn.__version__") & (EXTRAS | {"torch", "numpy"}) == set()


def test_every_public_name_is_on_the_package_and_an_unknown_one_is_an_attribute_error() -> None:
    from finetune_bn import face

    assert finetune_bn.__all__ == face.__all__
    for name in face.__all__:
        assert getattr(finetune_bn, name) is getattr(face, name)
    assert set(face.__all__) <= set(dir(finetune_bn))
    with pytest.raises(AttributeError, match="module 'finetune_bn' has no attribute 'convrt'"):
        finetune_bn.convrt  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'convrt'"):
        from finetune_bn import convrt  # noqa: F401


def test_no_module_is_shadowed_by_a_function_or_class() -> None:
    """`import finetune_bn.conversion.convert as c` gives the module, however much was imported before."""
    files = sorted({module_of(path, ROOT) for path in ROOT.rglob("*.py")} - {""})
    modules = [f"{PACKAGE}.{file}" for file in files if not file.endswith("__main__")]
    assert len(modules) > 80
    for module in list(modules):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if str(error.name).startswith(PACKAGE):
                raise
            modules.remove(module)  # an extra is not installed
    assert "finetune_bn.conversion.convert" in modules
    for module in modules:
        found: object = finetune_bn
        for part in module.split(".")[1:]:
            found = getattr(found, part)
        assert found is sys.modules[module], f"{module} is {found!r}"
