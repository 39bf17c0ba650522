"""The results store of the scripts: nothing measured is lost, nothing foreign goes unmarked, nothing local leaks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import store as store_module
from store import Store, clean


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "study.json"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_row_is_on_disk_when_add_returns_and_a_new_store_goes_on_from_it(path: Path) -> None:
    store = Store(path, "python scripts/study.py", seeds=[1, 0])
    store.add({"arm": "live", "batch": 4, "accuracy": 0.5})
    assert [row["accuracy"] for row in read(path)["rows"]] == [0.5]
    again = Store(path, "python scripts/study.py", seeds=[2])
    assert again.done({"arm": "live", "batch": 4})
    assert not again.done({"arm": "live", "batch": 16})
    assert not again.done({"arm": "live", "lr": None})  # a key that the row lacks is not an entry of None
    again.add({"arm": "live", "batch": 16, "accuracy": 0.6})
    again.finish({"best": "live"})
    found = read(path)
    assert list(found) == ["command", "device", "versions", "seeds", "rows", "summary"]
    assert [row["batch"] for row in found["rows"]] == [4, 16]
    assert found["seeds"] == [0, 1, 2]
    assert found["summary"] == {"best": "live"}
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]  # without the build
    assert "core" in found["device"] or torch.cuda.is_available()


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(path, "x")
    store.add({"cell": 1})
    before = path.read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store.add({"cell": 2})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_rows_of_other_versions_are_kept_marked_and_warned_of_by_name(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_module, "versions", lambda: {"python": "3.11.1", "torch": "2.11.0"})
    Store(path, "x").add({"cell": 1})
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(store_module, "versions", lambda: {"python": "3.11.1", "torch": "2.14.1"})
    store = Store(path, "x")
    store.add({"cell": 2})
    assert store.done({"cell": 2})
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert store.done({"cell": 1})
    warning = capsys.readouterr().err
    assert warning.count("1 of 2 rows") == 1
    assert "other versions: torch 2.11.0 (now 2.14.1)." in warning
    assert [row.get("versions", {}).get("torch") for row in read(path)["rows"]] == ["2.11.0", None]
    # The mark survives another run, and goes where the versions are those of the row again.
    Store(path, "x").add({"cell": 3})
    monkeypatch.setattr(store_module, "versions", lambda: {"python": "3.11.1", "torch": "2.11.0"})
    Store(path, "x").finish({})
    assert [row.get("versions", {}).get("torch") for row in read(path)["rows"]] == [None, "2.14.1", "2.14.1"]


def test_rows_of_another_device_are_marked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "device_name", lambda device: "a GPU")
    Store(path, "x").add({"cell": 1})
    monkeypatch.setattr(store_module, "device_name", lambda device: "a CPU")
    Store(path, "x").add({"cell": 2})
    assert [row.get("device") for row in read(path)["rows"]] == ["a GPU", None]


def test_the_latest_row_is_found_and_dropped_rows_are_measured_again(path: Path) -> None:
    store = Store(path, "x")
    for ok in (False, True):
        store.add({"cell": 1, "ok": ok})
    assert store.find(cell=1) == {"cell": 1, "ok": True}
    assert store.drop({"cell": 1, "ok": False}) == 1
    assert store.done({"cell": 1})
    assert store.drop({"cell": 1}) == 1
    assert not store.done({"cell": 1})


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("failed in /one/two/three.py, line 3", "failed in three.py, line 3"),
        ('File "/one/two.py"', 'File "two.py"'),
        ("--data=/one/two/set", "--data=set"),
        ("24 images/s, train/val, https://x.org/a/b, 1/2", "24 images/s, train/val, https://x.org/a/b, 1/2"),
        ({"path": Path("/one/two/x.json")}, {"path": "x.json"}),
        ([float("nan"), float("inf"), 0.5], [None, None, 0.5]),
        (torch.tensor(0.5), 0.5),
        ((1, {"b", "a"}), [1, ["a", "b"]]),
    ],
)
def test_what_is_stored_is_plain_json_without_absolute_paths(given: object, stored: object) -> None:
    assert clean(given) == stored


def test_a_key_of_any_spelling_finds_its_own_row(path: Path) -> None:
    store = Store(path, "x")
    key = {"file": Path("/one/two/x.pth"), "lr": torch.tensor(0.25), "size": (3, 64, 64)}
    store.add(key)
    assert store.done(key)
    assert Store(path, "x").done(key)


def test_a_value_that_is_no_result_is_refused(path: Path) -> None:
    with pytest.raises(TypeError, match="a number, a text or a container"):
        Store(path, "x").add({"cell": object()})
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": [{"cell"'])
def test_a_file_that_is_no_results_file_is_refused_and_left_as_it_is(path: Path, text: str) -> None:
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="no results file"):
        Store(path, "x")
    assert path.read_text(encoding="utf-8") == text
