"""Files are there as a whole or not at all, and are what they were: links, modes, devices; JSON is plain."""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_bn.errors import FinetuneBNError
from finetune_bn.utilities.files import check_output, to_json, write_atomically


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_written_with_its_folders_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "report.txt"
    write_atomically(path, "old")
    write_atomically(path, "new é".encode())
    assert path.read_text(encoding="utf-8") == "new é"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.txt"
    write_atomically(path, "old")

    def full_disk(*args: Any) -> Any:
        raise OSError("no space left on device")

    class HalfWritten:
        def __init__(self, handle: int) -> None:
            self.file = os.fdopen(handle, "r+b")

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def fileno(self) -> int:
            return self.file.fileno()

        def write(self, content: bytes) -> None:
            self.file.write(content[:2])
            raise OSError("no space left on device")

    real = os.fdopen
    if call == "write":
        monkeypatch.setattr(os, "fdopen", lambda handle, how: HalfWritten(handle) if how == "wb" else real(handle, how))
    elif call == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    else:
        monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new and longer")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_it_takes_the_name_and_the_name_after_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "report.txt", []
    sync, replace = os.fsync, Path.replace

    def record(handle: int) -> None:
        info = os.fstat(handle)
        events.append("folder" if stat.S_ISDIR(info.st_mode) else f"{info.st_size} bytes")
        sync(handle)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomically(path, "12345")
    assert events == ["5 bytes", "rename", "folder"]


@pytest.mark.parametrize("secret", [0o600, 0o640, 0o755])
def test_a_file_that_was_there_keeps_its_mode_and_is_never_more_open_on_the_way(
    secret: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "weights.ckpt", []
    path.write_text("old", encoding="utf-8")
    path.chmod(secret)
    opened = os.open

    def watch(name: Any, flags: int, how: int = 0o777) -> int:
        handle = opened(name, flags, how)
        if flags & os.O_CREAT:
            seen.append(stat.S_IMODE(os.fstat(handle).st_mode))
        return handle

    monkeypatch.setattr(os, "open", watch)
    write_atomically(path, "new")
    assert (mode(path), path.read_text(encoding="utf-8")) == (secret, "new")
    assert seen == [0o600]


def test_a_new_file_gets_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "report.txt", "text")
    finally:
        os.umask(before)
    assert mode(tmp_path / "report.txt") == 0o640


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("chain", [1, 2])
def test_a_link_stays_one_and_the_file_that_it_leads_to_is_written(tmp_path: Path, dangling: bool, chain: int) -> None:
    target, link = tmp_path / "store" / "real.txt", tmp_path / "link.txt"
    target.parent.mkdir()
    if not dangling:
        target.write_text("old", encoding="utf-8")
    last = target
    for i in range(chain - 1):
        (tmp_path / f"hop{i}").symlink_to(last)
        last = tmp_path / f"hop{i}"
    link.symlink_to(os.path.relpath(last, tmp_path))
    write_atomically(link, "new")
    assert link.is_symlink()
    assert not target.is_symlink()
    assert target.read_text(encoding="utf-8") == "new"
    assert [path.name for path in target.parent.iterdir()] == ["real.txt"]


def test_a_pipe_and_the_null_device_are_written_to_and_stay_what_they_are(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, "text")
    reader.join(10)
    assert got == [b"text"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    write_atomically("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_and_a_file_that_may_not_be_written_to_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, "text")
    path = tmp_path / "protected.txt"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(os, "access", lambda name, how: False)  # root may write to all
    with pytest.raises(PermissionError):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"


def test_a_long_name_and_two_threads_at_once_get_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 120 + ".txt")  # 244 of the 255 bytes that a name may have
    texts = [str(i) * 1000 for i in range(4)]
    threads = [threading.Thread(target=write_atomically, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text(encoding="utf-8") in texts
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_later_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    path = tmp_path / "net [1].ckpt"
    old, new = tmp_path / ".net [1].ckpt.0123abcd.tmp", tmp_path / ".net [1].ckpt.89ab0000.tmp"
    others = [tmp_path / ".net [1].ckpt.tmp", tmp_path / "net [1].ckpt.0123abcd.tmp"]
    for other in (old, new, *others):
        other.write_text("half", encoding="utf-8")
    for other in (old, *others):
        os.utime(other, (0, 0))
    write_atomically(path, memoryview(b"whole"))
    assert sorted(tmp_path.iterdir()) == sorted([path, new, *others])


def test_what_cannot_be_written_is_known_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "real.txt")
    for name in ("new.txt", "sub/new.txt"):
        check_output("output", tmp_path / name)
    for name in ("sub", "gone/new.txt", "link"):
        with pytest.raises(FinetuneBNError, match=r"^report: got .*; allowed: a file in a folder that there is"):
            check_output("report", tmp_path / name)
    (tmp_path / "old.txt").write_text("old", encoding="utf-8")
    for place, name in ((tmp_path / "sub", "sub/new.txt"), (tmp_path / "old.txt", "old.txt")):
        monkeypatch.setattr(os, "access", lambda path, how, no=place: path != no)  # root may write to all
        with pytest.raises(FinetuneBNError, match=f"a file that can be written. {place} may not be written to"):
            check_output("output", tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["link", "old.txt", "sub"]


def test_json_keeps_six_digits_and_writes_what_is_not_finite_as_null() -> None:
    data = {"a": 0.1 + 0.2, "b": [math.nan, math.inf], "c": torch.tensor([[1, 2], [3, 4]]), "d": ("x", None, True)}
    assert json.loads(to_json(data)) == {"a": 0.3, "b": [None, None], "c": [[1, 2], [3, 4]], "d": ["x", None, True]}


def test_json_puts_a_row_of_numbers_on_one_line_and_leaves_texts_alone() -> None:
    text = to_json({"rows": [[1, 2.5], [-3, 1e-9]], "text": "[\n  1,\n  2\n]", "texts": ["[", "1", "]"]})
    assert "[1, 2.5]" in text
    assert "[-3, 1e-09]" in text
    assert json.loads(text) == {"rows": [[1, 2.5], [-3, 1e-9]], "text": "[\n  1,\n  2\n]", "texts": ["[", "1", "]"]}
