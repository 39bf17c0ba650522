"""The results of a script as one JSON file that grows row by row, so that a run which was cut off can go on.

    store = Store("results/study_x.json", command="python scripts/study_x.py", seeds=[0, 1, 2])
    for cell in cells:                                  # a cell: {"arm": "live", "batch": 4, "seed": 0}
        if not store.done(cell):
            store.add(cell | measure(**cell))           # on disk when `add` returns
    store.finish({"best_arm": ...})

Keys of the file: command, device, versions, seeds, rows (one dict per measured cell), summary.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune_bn.utilities.files import write_atomically

PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "timm": "timm",
    "lightning": "lightning",
    "finetune_bn": "finetune-bn",
}
# A path from the root of the file system, at least two names deep; the last name stays.
ABSOLUTE_PATH = re.compile(r"(?<![\w.~:/-])/(?:[\w.+@-]+/)+(?=[\w.+@-])")


class Store:
    """Rows of measured cells in a JSON file.

    Rows that the file holds already are kept. Those measured on another device or under other versions are kept too,
    each marked with where it comes from (`device`, `versions`), and warned of on stderr when one is first used.

    Args:
        path: the JSON file; its folder is made.
        command: how to run the script again, as the user types it.
        seeds: the random seeds in use.
        device: torch device that measures, "cpu" or "cuda"; None for the GPU where there is one.
    """

    def __init__(self, path: str | Path, command: str, seeds: Iterable[int] = (), device: str | None = None) -> None:
        self.path = Path(path)
        self.command = command
        self.seeds = sorted(set(seeds))
        self.device = device_name(device)
        self.versions = versions()
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self._warned = False
        if self.path.exists():
            self._load()

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the latest row that has all these entries, or None."""
        wanted = clean(key).items()
        row = next((r for r in reversed(self.rows) if all(k in r and r[k] == v for k, v in wanted)), None)
        if row is not None and not self._warned and ("versions" in row or "device" in row):
            self._warned = True
            self._warn()
        return row

    def done(self, key: Mapping[str, Any]) -> bool:
        """Tell whether there is a row with all the entries of `key`."""
        return self.find(**key) is not None

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row and write the file. NaN and infinities, which JSON lacks, are stored as null."""
        self.rows.append(clean(dict(row)))
        self._write()

    def drop(self, key: Mapping[str, Any]) -> int:
        """Remove the rows with all the entries of `key`, to measure them again; return how many there were."""
        wanted = clean(dict(key)).items()
        kept = [r for r in self.rows if not all(k in r and r[k] == v for k, v in wanted)]
        dropped = len(self.rows) - len(kept)
        self.rows = kept
        return dropped

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Set the figures that the README quotes, and write the file."""
        self.summary = clean(dict(summary))
        self._write()

    def _load(self) -> None:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            self.rows, old = list(found["rows"]), {k: found[k] for k in ("device", "versions")}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is no results file ({error!r}); move it away to start anew.") from error
        self.summary = dict(found.get("summary") or {})
        self.seeds = sorted({*self.seeds, *found.get("seeds", [])})
        for what, before in old.items():
            now = getattr(self, what)
            for row in self.rows:
                # A row that is marked already is older than the file's own entry.
                value = row.setdefault(what, before)
                if value == now:
                    del row[what]

    def _warn(self) -> None:
        for what in ("device", "versions"):
            now = getattr(self, what)
            foreign = [row[what] for row in self.rows if what in row]
            if foreign:
                print(
                    f"warning: {len(foreign)} of {len(self.rows)} rows in {self.path} were measured with other {what}: "
                    f"{'; '.join(sorted({_differences(value, now) for value in foreign}))}. They are kept; "
                    "move the file away to measure them again.",
                    file=sys.stderr,
                )

    def _write(self) -> None:
        content = {
            "command": clean(self.command),
            "device": self.device,
            "versions": self.versions,
            "seeds": self.seeds,
            "rows": self.rows,
            "summary": self.summary,
        }
        write_atomically(self.path, to_json(content))


def to_json(content: Mapping[str, Any]) -> str:
    """Return JSON with one line per row, so that a diff shows which cells changed."""
    parts = []
    for key, value in content.items():
        if key == "rows" and value:
            lines = ",\n    ".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in value)
            text = f"[\n    {lines}\n  ]"
        else:
            text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def clean(value: Any) -> Any:
    """Return `value` as plain JSON data without this machine's paths: the last name of an absolute path stays."""
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [clean(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, (str, Path)):
        return ABSOLUTE_PATH.sub("", str(value))
    if value is None or isinstance(value, (bool, int)):
        return value
    if hasattr(value, "item"):  # numbers of torch and numpy
        return clean(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(f"a result must be a number, a text or a container of them; got {type(value).__name__}: {value!r}")


def _differences(value: Any, now: Any) -> str:
    """Return a device, or those of the versions that differ from today's, in words."""
    if not isinstance(value, Mapping):
        return f"{value} (now {now})"
    differing = [name for name in {**now, **value} if value.get(name) != now.get(name)]
    return ", ".join(f"{name} {value.get(name, 'none')} (now {now.get(name, 'none')})" for name in differing)


def versions() -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name, distribution in PACKAGES.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit that is checked out where this file lies, with a plus behind it where files differ from it."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "..", ":!../results"], check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + "+" * bool(changed.returncode)


def device_name(device: str | None = None) -> str:
    """Return the GPU's name, or the CPU's with the number of cores that this process may use."""
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {cores} core{'s' if cores > 1 else ''}"
