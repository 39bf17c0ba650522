"""Check what `python -m build` made: one wheel and one source archive, their metadata, and that nothing is missing.

python -m build --no-isolation && python scripts/check_package.py dist
"""

from __future__ import annotations

import argparse
import re
import sys
import tarfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]


def version() -> str:
    """Return the version that the package says of itself."""
    text = (ROOT / "finetune_bn" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "(.+)"$', text, flags=re.MULTILINE)
    assert found, "finetune_bn/__init__.py has no __version__"
    return found[1]


def expected() -> set[str]:
    """Return the files of the package that have to be in the wheel."""
    suffixes = (".py", ".typed", ".zip", ".md", ".css", ".js")
    package = [path for path in (ROOT / "finetune_bn").rglob("*") if path.suffix in suffixes]
    configs = [ROOT / "finetune_bn" / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")]
    return {path.relative_to(ROOT).as_posix() for path in package + configs}


def faults(folder: Path) -> list[str]:
    """Return what is wrong with the archives in a folder, in words; nothing where all is well."""
    wheels, archives = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if (len(wheels), len(archives)) != (1, 1):
        return [f"{folder} holds {len(wheels)} wheels and {len(archives)} source archives, not one of each"]
    found: list[str] = []
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = set(wheel.namelist())
        meta = next(name for name in names if name.endswith(".dist-info/METADATA"))
        texts = {wheels[0].name: wheel.read(meta)}
        scripts = wheel.read(meta.replace("METADATA", "entry_points.txt")).decode()
    with tarfile.open(archives[0]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
        info = archive.extractfile(
            next(name for name in archive.getnames() if name.count("/") == 1 and "PKG-INFO" in name)
        )
        assert info is not None
        texts[archives[0].name] = info.read()
    for name, text in texts.items():
        try:
            data = Metadata.from_email(text, validate=True)
        except Exception as error:  # a group of errors, one for each field
            found.append(f"{name}: {error}: {getattr(error, 'exceptions', '')}")
            continue
        if data.version != Version(version()):
            found.append(f"{name} is version {data.version}, finetune_bn.__version__ is {version()}")
        if data.description_content_type != "text/markdown" or not (data.description or "").startswith("# "):
            found.append(f"{name}: its description is not the README")
        plain = [r.name for r in data.requires_dist or [] if r.marker is None]
        if plain != ["torch"]:
            found.append(f"{name} asks for {plain}, not for torch alone")
        unmarked = Requirement("lightning!=2.6.2,!=2.6.3").specifier
        if not all(unmarked & r.specifier == r.specifier for r in data.requires_dist or [] if r.name == "lightning"):
            found.append(f"{name} allows lightning 2.6.2 and 2.6.3")
    found += [f"{wheels[0].name} lacks {name}" for name in sorted(expected() - names)]
    found += [f"{wheels[0].name} holds {name}" for name in sorted(names) if not re.match(r"finetune_bn[/-]", name)]
    found += [f"{wheels[0].name} lacks the licence {name}" for name in ("LICENSE", "NOTICE") if not _has(names, name)]
    if "finetune-bn = finetune_bn.cli:main" not in scripts:
        found.append(f"{wheels[0].name} has no command finetune-bn")
    wanted = {"pyproject.toml", "setup.py", "README.md", "configs/quickstart.yaml"}
    return found + [f"{archives[0].name} lacks {name}" for name in sorted(wanted - inside)]


def _has(names: set[str], licence: str) -> bool:
    return any(name.endswith(f".dist-info/licenses/{licence}") for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("dist"), help="where the archives are")
    found = faults(parser.parse_args().folder)
    if found:
        sys.exit("\n".join(found))
    print(f"finetune-bn {version()}: wheel and source archive are whole, their metadata is valid")


if __name__ == "__main__":
    main()
