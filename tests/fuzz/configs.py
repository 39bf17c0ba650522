"""Configs changed at random, before the command: it does what it is told, or says in one line what is wrong."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from finetune_bn.cli import configs, main

NAMES = tuple(configs.packaged())
# None of these makes a program that is bad to run: small numbers, and no path that leads away.
VALUES = (None, True, False, 0, 1, -1, 2, 7, 0.5, -0.5, 1e-30, 300, float("nan"), float("inf"), "", "abc", "none")
VALUES += ("1", "x" * 300, "é猫\u202e", [], {}, [1, "a"], {"class_path": "Freeze"}, {"a": {"b": 1}}, [[]], "1.0.0")
CLASSES = ("Freeze", "Keep", "Ghost", "Rules", "ToGroupNorm", "finetune_bn.Renorm", "Nothing", "torch.nn.Linear")
CLASSES += ("ImageClassification", "MetricLearning", "EmojiData", "ImageFolderData", "no.such.module", "", "Freeze.x")
CLASSES += ("lightning.pytorch.callbacks.EarlyStopping", "finetune_bn.callbacks.BatchNormMonitor", "1", "TimmTask")
KEYS = ("polcy", "policy", "init_args", "class_path", "", "trainer", "lr", "batch_size", "a.b", "__init__", "help", "1")

Change = tuple[Any, ...]


@cache
def tree(name: str) -> Any:
    """Return a packaged config, made small: a tiny net, a few images."""
    data = yaml.safe_load(configs.packaged()[name].read_text(encoding="utf-8"))
    if "/" not in name:
        data["model"]["init_args"] |= {"backbone": "test_resnet", "weights": None}
        data["data"]["init_args"] |= {"image_size": 32}
        if name == "image_folder":
            data["data"]["init_args"] |= {"root": "images", "augment": "light"}
        elif name == "quickstart":
            data["data"]["init_args"]["train_size"] = 24
        data["trainer"]["logger"] = False
    return data


def places(data: Any) -> list[tuple[Any, ...]]:
    """Return the path to every value of a tree of dicts and lists."""
    keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    return [path for key in keys for path in ((key,), *((key, *rest) for rest in places(data[key])))]


def changes() -> st.SearchStrategy[Change]:
    """Draw what is done to a tree, or to its text."""
    place, value = st.floats(0, 0.999), st.sampled_from(VALUES)
    return st.one_of(
        st.tuples(st.just("value"), place, value),
        st.tuples(st.just("value"), place, value),
        st.tuples(st.just("class"), place, st.sampled_from(CLASSES)),
        st.tuples(st.just("delete"), place),
        st.tuples(st.just("rename"), place, st.sampled_from(KEYS)),
        st.tuples(st.just("add"), place, st.sampled_from(KEYS), value),
        st.tuples(st.just("swap"), place, place),
        st.tuples(st.just("cut"), place),
        st.tuples(
            st.just("letter"),
            place,
            st.sampled_from(["\t", "{", "}", ":", "- ", "\x00", "&", "*", "!", "'", "\n", "é"]),
        ),
        st.tuples(st.just("lose"), place, st.integers(1, 12)),
        st.tuples(st.just("bytes"), place, st.binary(min_size=1, max_size=6)),
        st.just(("none",)),
    )


def runs() -> st.SearchStrategy[tuple[list[str], list[Change], int]]:
    """Draw the configs of a run, what is done to the last of them, and a number that picks the verb."""
    whole = st.sampled_from([name for name in NAMES if "/" not in name])
    overlay = st.sampled_from([name for name in NAMES if "/" in name])
    both = st.one_of(whole.map(lambda name: [name]), st.tuples(whole, overlay).map(list))
    return st.tuples(both, st.lists(changes(), min_size=1, max_size=3), st.integers(0, 99))


def changed(data: Any, changes: list[Change]) -> bytes:
    """Return a config as a file, after the changes; those of the tree come before those of the text."""
    data, text_changes = copy.deepcopy(data), []
    for kind, *how in changes:
        if kind in ("cut", "letter", "lose", "bytes"):
            text_changes.append((kind, *how))
            continue
        found = places(data)
        if kind == "class":
            found = [path for path in found if path[-1] == "class_path"]
        if not found or kind == "none":
            continue
        *way, last = found[int(how[0] * len(found))]
        owner = data
        for key in way:
            owner = owner[key]
        if kind in ("value", "class"):
            owner[last] = how[1]
        elif kind == "delete":
            del owner[last]
        elif kind == "rename" and isinstance(owner, dict):
            owner[how[1]] = owner.pop(last)
        elif kind == "add" and isinstance(owner, dict):
            owner[how[1]] = how[2]
        elif kind == "swap":
            other = found[int(how[1] * len(found))]
            value = data
            for key in other:
                value = value[key]
            owner[last] = copy.deepcopy(value)
    content = yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode()
    for kind, place, *rest in text_changes:
        at = int(place * len(content))
        if kind == "cut":
            content = content[:at]
        elif kind == "letter":
            content = content[:at] + rest[0].encode() + content[at:]
        elif kind == "lose":
            content = content[:at] + content[at + rest[0] :]
        else:
            content = content[:at] + rest[0] + content[at:]
    return content


def run(names: list[str], changes: list[Change], number: int, folder: Path) -> Counter[str]:
    """Run the command on a changed config; assert that it does so or ends in one line.

    Args:
        names: packaged configs; the last one is changed.
        changes: see `changes`.
        number: below 4 the config is trained with for a batch, else planned.
        folder: the current folder, with a folder `images`; all that is written lies in it.
    """
    args = ["fit" if number < 4 else "plan"]
    for i, name in enumerate(names):
        path = folder / f"{i}.yaml"
        last = i == len(names) - 1
        path.write_bytes(changed(tree(name), changes if last else []))
        args += ["--config", str(path)]
    if number < 4:  # whatever the config says: here, at once, and in one process
        args += ["--trainer.fast_dev_run", "true", "--trainer.devices", "1", "--trainer.num_nodes", "1"]
        args += ["--trainer.strategy", "auto", "--trainer.accelerator", "cpu"]
    out, err = io.StringIO(), io.StringIO()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            warnings.simplefilter("ignore")
            main(args)
    except SystemExit as stop:
        line = str(stop.code)
        assert line.startswith("finetune-bn: error: "), f"it ended with {stop.code!r}: {err.getvalue()[-300:]}"
        assert "\n" not in line
        assert re.search(r"\w{3,}", line.removeprefix("finetune-bn: error: ")), "an error without a word"
        assert "Traceback" not in err.getvalue()
        return Counter({f"{args[0]}: refused in one line": 1})
    finally:
        logging.disable(level)
        torch.set_default_dtype(torch.float32)
    return Counter({f"{args[0]}: carried out": 1})
