"""Walk through folders of images: each real folder and file once, whatever links lead there, and regular files only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from finetune_bn.errors import BadData, complaint

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)

Identity = tuple[int, int]


def visible(folder: Path) -> list[Path]:
    """Return what is directly in a folder, in a fixed order, without hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def subfolders(folder: Path) -> list[Path]:
    """Return the visible folders directly in a folder, links to folders included; none where it is no folder."""
    return [path for path in visible(folder) if path.is_dir()] if folder.is_dir() else []


class Walk:
    """One look through a data set: what was found already is not found again by another way.

    Attributes:
        left_out: what was not looked at, each with the reason.

    Args:
        root: the folder of the data set.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: list[str] = []
        self._found: dict[Identity, tuple[Path, str, bool]] = {}

    def files(self, folder: Path, group: str) -> list[Path]:
        """Return all visible files below a folder, in a fixed order; links to folders are followed, but in no circle.

        Args:
            folder: where to look.
            group: what the files are for (split and class, in words): a folder or file may come again for the same,
                and is then left out, but not for anything else.

        Raises:
            BadData: a folder or file was found for another group already, or a name is no text.
        """
        above: list[Identity] = []
        for path in (folder, *folder.parents):
            status = path.stat()
            above.append((status.st_dev, status.st_ino))
            if path == self.root:
                break
        return self._files(folder, group, above)

    def _files(self, folder: Path, group: str, above: list[Identity]) -> list[Path]:
        if not self._is_new(folder, _status(folder), group):
            return []
        found: list[Path] = []
        for path in visible(folder):
            check_name(path)
            status = _status(path)
            if status is None:
                found.append(path)  # a link that leads nowhere: who reads it will say so
            elif stat.S_ISDIR(status.st_mode):
                identity = status.st_dev, status.st_ino
                if identity in above:
                    self.left_out.append(f"{path} (a link to a folder above it, {path.resolve()})")
                else:
                    found += self._files(path, group, [*above, identity])
            elif not stat.S_ISREG(status.st_mode):
                kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "of another kind")
                self.left_out.append(f"{path} ({kind}, no file)")
            elif self._is_new(path, status, group):
                found.append(path)
        return found

    def _is_new(self, path: Path, status: os.stat_result | None, group: str) -> bool:
        """Return whether a folder or file was not found by another name; two hard links are two files."""
        if status is None:
            return True
        linked = path.is_symlink()
        first, for_what, first_linked = self._found.setdefault(
            (status.st_dev, status.st_ino), (path, group, linked or stat.S_ISDIR(status.st_mode))
        )
        if (first == path and for_what == group) or not (linked or first_linked):
            return True
        if for_what != group:
            allowed = "every folder and linked file in one class of one split"
            remedy = f"Remove one of them: {first} ({for_what}) is the same."
            raise BadData(complaint("root", f"{path} ({group})", allowed, remedy))
        self.left_out.append(f"{path} (the same as {first})")
        return False


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def check_name(path: Path) -> None:
    """Raise `BadData` where a name is no text: reports and lists of predictions could not hold it."""
    try:
        path.name.encode("utf-8")
    except UnicodeEncodeError as error:
        allowed = "names in UTF-8, so that they can be printed and saved"
        raise BadData(complaint("file name", os.fsencode(path), allowed, "Rename it.")) from error
