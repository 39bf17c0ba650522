"""The configs that come with the package: where they are, what each is for, and which one a name means."""

from __future__ import annotations

import difflib
import shutil
import textwrap
from pathlib import Path

from finetune_bn.errors import FinetuneBNError, complaint

_PACKAGE = Path(__file__).resolve().parents[1]


def folder() -> Path:
    """Return the folder of the packaged configs: inside the installed package, or beside it in a checkout.

    Raises:
        FinetuneBNError: there is none; the installation is not whole.
    """
    for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs"):
        if (place / "quickstart.yaml").is_file():
            return place
    remedy = "Install the package again, from its wheel or a whole checkout."
    raise FinetuneBNError(complaint("config", str(_PACKAGE / "configs"), "a folder of configs", remedy))


def packaged() -> dict[str, Path]:
    """Return the packaged configs by name, whole files first: `quickstart`, `batch_norm/live`, ..."""
    place = folder()
    paths = sorted(place.rglob("*.yaml"), key=lambda path: (path.parent != place, path))
    return {path.relative_to(place).with_suffix("").as_posix(): path for path in paths}


def header(path: Path) -> str:
    """Return the comment that a config begins with, as one line."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(" ".join(lines).split())


def first_sentence(text: str) -> str:
    """Return a text up to its first full stop."""
    return text.partition(". ")[0].removesuffix(".") + "."


def listing() -> str:
    """Return what `finetune-bn configs` prints: each packaged config with the first sentence of its header."""
    configs = packaged()
    width, columns = max(map(len, configs)) + 4, min(120, shutil.get_terminal_size((120, 24)).columns)
    whole: list[str] = []
    overlays: list[str] = []
    for name, path in configs.items():
        start, hang = f"  {name}".ljust(width), " " * width
        line = textwrap.fill(first_sentence(header(path)), columns, initial_indent=start, subsequent_indent=hang)
        (overlays if "/" in name else whole).append(line)
    lines = ["Whole configs, to run or to copy (finetune-bn fit --config quickstart):", *whole]
    lines += ["", "To put on top of one (--config quickstart --config batch_norm/live):", *overlays]
    return "\n".join([*lines, "", f"They are in {folder()}; a local file of the name goes before them."])


def find(given: str) -> str:
    """Return the path of the config that the user means: a file of theirs, or else a packaged one of that name.

    Args:
        given: what was typed behind `--config`.

    Raises:
        FinetuneBNError: there is neither.
    """
    if ":" in given or "\n" in given:  # a config that was typed itself, an address, a path with a drive
        return given
    for path in (Path(given), Path(f"{given}.yaml")):
        if path.is_file():
            return _in_utf8(path)
    configs = packaged()
    name = given.removesuffix(".yaml")
    if name in configs:
        return str(configs[name])
    close = [known for known in configs if known.rpartition("/")[2] == name.rpartition("/")[2]]
    close = close or difflib.get_close_matches(name, configs, n=2)
    meant = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(configs)}."
    raise FinetuneBNError(complaint("config", given, "a YAML file, or the name of a packaged config", meant))


def _in_utf8(path: Path) -> str:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        remedy = f"Line {line} is not: save it as UTF-8 in your editor."
        raise FinetuneBNError(complaint("config", str(path), "a file in UTF-8", remedy)) from error
    return str(path)
