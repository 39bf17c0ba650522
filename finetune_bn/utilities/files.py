"""Write files so that a run which is cut off leaves nothing half written, and plain data as JSON."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_bn.errors import FinetuneBNError, complaint


def write_atomically(path: str | Path, content: str | bytes | memoryview) -> None:
    """Write a file so that, whatever happens, there is the old one or the whole new one; folders are made.

    Also after a power failure: the content is on the disk before it takes the old one's name. A link stays a link, and
    the file that it leads to is written; a file that was there keeps its mode and, where that may be done, its owner;
    what is no regular file (a pipe, `/dev/stdout`) is written to.

    Args:
        path: the file.
        content: what is in it; text as UTF-8.

    Raises:
        OSError: it cannot be written; a file that may not be written to is not replaced either.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.stat() if target.exists() else None
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if old is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if old is not None and not stat.S_ISREG(old.st_mode):
        target.write_bytes(data)
        return
    _forget_killed(target)
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.tmp")
    try:
        # A new file gets the mode that the user's umask leaves; what is secret is so from the first byte on.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if old is None else 0o600)
        with os.fdopen(handle, "wb") as file:
            if old is not None:
                _take_over(file.fileno(), old)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(data: Any) -> str:
    """Return plain data as JSON: floats to six digits, null for NaN and infinity, lists of numbers on one line."""
    text = json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[\s+(-?\d[-+\d.e,\s]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text) + "\n"


def check_output(argument: str, path: str | Path) -> None:
    """Raise where a file could not be written, so that it is known before what is to be in it is computed.

    Args:
        argument: name of the argument that names the file, for the message.
        path: the file; it need not be there, but its folder.

    Raises:
        FinetuneBNError: it is a folder, its folder is not there, or one of the two may not be written to.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir() or not target.parent.is_dir():
        raise FinetuneBNError(complaint(argument, str(path), "a file in a folder that there is"))
    for place in (target, target.parent):
        if place.exists() and not os.access(place, os.W_OK):
            why = f"{place} may not be written to."
            raise FinetuneBNError(complaint(argument, str(path), "a file that can be written", why))


def _forget_killed(target: Path) -> None:
    """Remove what writers of this file have left that were killed amid it; after an hour none is still at work."""
    for path in target.parent.glob(f".{glob.escape(target.name[:40])}.{'[0-9a-f]' * 8}.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def _take_over(handle: int, old: os.stat_result) -> None:
    """Give an open file owner and mode of the one that it is to replace."""
    if not hasattr(os, "fchown"):  # Windows has neither
        return
    with contextlib.suppress(OSError):  # only root may give files away
        os.fchown(handle, old.st_uid, old.st_gid)
    with contextlib.suppress(OSError):  # some file systems have no modes
        os.fchmod(handle, stat.S_IMODE(old.st_mode))


def _sync_folder(folder: Path) -> None:
    """Let the new name reach the disk, on systems where a folder can be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _plain(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if hasattr(data, "tolist"):  # tensors, and the arrays and numbers of numpy
        return _plain(data.tolist())
    if isinstance(data, float):
        return float(f"{data:.6g}") if math.isfinite(data) else None
    return data
