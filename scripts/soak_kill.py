"""Kill the command at random moments (`kill -9`), resume it, and compare with the run that nobody disturbed.

For every config that comes with the package, on a tiny net and a few images: `fit` (calibration and recalibration
inside a run included) is killed one to three times, resumed each time from the newest checkpoint that is there, and
runs to its end; `recalibrate` and `export` are killed and run again. After every kill each checkpoint, report and JSON
file in the folder must be whole. At the end everything must be as in the undisturbed run, bit for bit: weights,
statistics, optimizer, schedule, place of the loader, random generators, log, report; the written files of the others.

    python scripts/soak_kill.py --kills 60        # goes on until so many kills are in results/soak_kill.json

Result (2 CPU cores, seeds 0 to 2): 105 kills in 58 cells of every config, nothing lost. On the way one fault was found
and mended: the report lacked a value that BatchNormSchedule had logged before the kill, once in the epoch.

Processes are forked from one that has imported everything, so that kills hit the work and not the imports. A moment is
drawn uniformly from the processor time that the undisturbed run took. Linux only. Table: results/soak_kill.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from store import Store

ROOT = Path(__file__).resolve().parents[1]
# What is put on top of each other, as in tests/cli/test_configs.py; between them they name every config.
QUICK = [
    (), ("batch_norm/live",), ("batch_norm/shift",), ("batch_norm/merged",), ("batch_norm/original",),
    ("batch_norm/group_norm",), ("with/adapted_test",), ("with/ema",), ("batch_norm/live", "with/recalibrated"),
    ("with/recalibrated_first",), ("batch_norm/live", "with/schedule"), ("with/step_limit",), ("with/train_norm_only",),
]  # fmt: skip
METRIC = [(), ("batch_norm/live",), ("batch_norm/ghost",), ("batch_norm/renorm",), ("with/recalibrated_first",)]
FITS = [("quickstart", *more) for more in QUICK] + [("metric_learning", *more) for more in METRIC] + [("image_folder",)]
OTHERS = [
    ("recalibrate", ("quickstart", "batch_norm/live")),
    ("export", ("quickstart",)),
    ("export onnx", ("quickstart",)),
]
# Epochs of 7 and 9 steps: a checkpoint each 4 steps is never the last of one.
OVERLAY = """
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  limit_val_batches: 1
  limit_test_batches: 1
  default_root_dir: {root}
  callbacks+:
    class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {{ dirpath: {saved}, filename: "{{step}}", every_n_train_steps: 4, save_top_k: -1 }}
"""
ENDS = """
trainer:
  callbacks+:
    class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args: {{ dirpath: {saved}, filename: "{{epoch}}", save_top_k: -1 }}
"""


class Failed(Exception):
    """A run that was not killed did not come to its end."""


class Soak:
    """One folder for each cell of the log, and the processes that work in it.

    Args:
        folder: where everything is written.
        rng: draws the moments.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.pictures = folder / "pictures"
        for label in ("cat", "dog"):
            (self.pictures / label).mkdir(parents=True)
            for number in range(21):
                pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(self.pictures / label / f"{number}.png")

    def fit(self, configs: tuple[str, ...], workers: int, kills: int) -> dict[str, Any]:
        """Fit undisturbed, and with kills; return a row of the log."""
        whole, cut = (self._place(name) for name in ("whole", "cut"))
        seconds = self._run(self._fit_arguments(configs, whole, workers, None), whole / "0.log")
        done, resumed, faults = 0, [], []
        while done < kills:
            start = newest(cut / "saved")
            arguments = self._fit_arguments(configs, cut, workers, start)
            left = 1 - (steps_of(start) / steps_of(newest(whole / "saved")) if start else 0)
            moment = self.rng.uniform(0.0, 0.2 * seconds + 0.8 * left * seconds)
            if not self._kill(arguments, cut / f"{done}.log", moment):
                break  # it came to its end before its turn
            done += 1
            faults += broken(cut)
            resumed.append(start.stem if start else "beginning")
        start = newest(cut / "saved")
        resumed.append(start.stem if start else "beginning")
        self._run(self._fit_arguments(configs, cut, workers, start), cut / "last.log")
        faults += broken(cut)
        faults += differences(state_of(cut), state_of(whole))
        return {"kills": done, "resumed_from": resumed, "faults": faults, "seconds": round(seconds, 2)}

    def other(self, what: str, configs: tuple[str, ...], kills: int) -> dict[str, Any]:
        """Run `recalibrate` or `export` undisturbed, and killed and started again; return a row of the log."""
        whole, cut = (self._place(name) for name in ("whole", "cut"))
        trained = self._place("trained")
        self._run(self._fit_arguments(configs, trained, 0, None), trained / "0.log")
        checkpoint = newest(trained / "saved")
        assert checkpoint is not None
        before = digest(checkpoint)
        verb, _, _ = what.partition(" ")
        name = {"recalibrate": "out.ckpt", "export": "out.pt2", "export onnx": "out.onnx"}[what]

        def arguments(place: Path) -> list[str]:
            own = [verb, *self._options(configs, place, 0), "--ckpt_path", str(checkpoint)]
            return [*own, "--output", str(place / name)]

        seconds = self._run(arguments(whole), whole / "0.log")
        done, faults = 0, []
        for number in range(kills):
            if not self._kill(arguments(cut), cut / f"{number}.log", self.rng.uniform(0.0, seconds)):
                break
            done += 1
            faults += broken(cut)
            if digest(checkpoint) != before:
                faults.append("the checkpoint that was read has changed")
        self._run(arguments(cut), cut / "last.log")
        faults += broken(cut)
        if name == "out.ckpt":
            faults += differences(
                *(torch.load(place / name, weights_only=True)["state_dict"] for place in (cut, whole))
            )
        elif name == "out.onnx":
            faults += [] if digest(cut / name) == digest(whole / name) else ["another file was written"]
        else:
            ours, theirs = (torch.export.load(place / name).state_dict for place in (cut, whole))
            faults += differences(dict(ours), dict(theirs))
        return {"kills": done, "resumed_from": [], "faults": faults, "seconds": round(seconds, 2)}

    def _place(self, name: str) -> Path:
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place

    def _options(self, configs: tuple[str, ...], place: Path, workers: int) -> list[str]:
        overlays = []
        for name, text in (("overlay", OVERLAY), ("ends", ENDS)):
            overlays.append(place / f"{name}.yaml")
            overlays[-1].write_text(text.format(root=place, saved=place / "saved"))
        options = [part for name in (*configs, *map(str, overlays)) for part in ("--config", name)]
        options += ["--model.weights", "none", "--model.backbone", "test_efficientnet", "--data.image_size", "32"]
        options += ["--data.num_workers", str(workers)]
        if configs[0] == "quickstart":
            return [*options, "--data.train_size", "28"]
        if configs[0] == "metric_learning":
            return [*options, "--data.subcategories", "[zodiac,game]", "--data.batch_size", "8"]
        return [*options, "--data.root", str(self.pictures), "--data.batch_size", "4"]

    def _fit_arguments(self, configs: tuple[str, ...], place: Path, workers: int, checkpoint: Path | None) -> list[str]:
        own = ["fit", *self._options(configs, place, workers)]
        return own if checkpoint is None else [*own, "--ckpt_path", str(checkpoint)]

    def _run(self, arguments: list[str], log: Path) -> float:
        """Run a process to its end; return the seconds of work that it took."""
        _, status, usage = os.wait4(start(arguments, log), 0)
        if status:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
            raise Failed(f"{log.parent.name}/{log.stem} of {arguments[0]} failed: {' '.join(last)[:300]}")
        return usage.ru_utime + usage.ru_stime

    def _kill(self, arguments: list[str], log: Path, moment: float) -> bool:
        """Start a process and kill it after so many seconds of work; return whether it was still at work."""
        pid = start(arguments, log)
        end = time.monotonic() + 30 * moment + 5  # where it waits for workers
        while worked(pid) < moment and time.monotonic() < end:
            time.sleep(0.01)
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                return False
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        return os.WIFSIGNALED(status)


def worked(pid: int) -> float:
    """Return the seconds of processor time that a process had: a busy machine changes little in them."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(arguments: list[str], log: Path) -> int:
    """Fork a process that runs the command, with what it prints in a file; return its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(log.parent)
        sys.argv = ["finetune-bn"]
        from finetune_bn.cli import main

        main(arguments)
        code = 0
    except SystemExit as end:
        code = 0 if end.code in (None, 0) else 1
        print(end.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of the most steps; where two have equally many, the one behind the validation."""
    found = []
    for path in folder.glob("*.ckpt"):
        found.append((steps_of(path), path.stem.startswith("epoch"), path))
    return max(found)[2] if found else None


def steps_of(checkpoint: Path | None) -> int:
    """Return the number of steps behind a checkpoint."""
    return 0 if checkpoint is None else int(torch.load(checkpoint, weights_only=True)["global_step"])


def broken(folder: Path) -> list[str]:
    """Return what is not whole of the files that a user would read."""
    faults = []
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or not path.is_file():
            continue  # written aside, to be renamed: nobody reads it
        try:
            if path.suffix == ".ckpt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".html" and not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
                raise ValueError("no end")
            elif path.suffix == ".pt2":
                torch.export.load(path)
            elif path.suffix == ".onnx":
                import onnx

                onnx.checker.check_model(onnx.load(path))
        except Exception as error:
            faults.append(f"{path.name} is broken: {type(error).__name__}: {error}"[:200])
    return faults


def state_of(place: Path) -> dict[str, Any]:
    """Return what the last checkpoint of a run and its report hold, without names of files."""
    checkpoint = torch.load(place / "saved" / "epoch=2.ckpt", weights_only=True)
    callbacks = {k: v for k, v in checkpoint["callbacks"].items() if not k.startswith("ModelCheckpoint")}
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "finetune_bn_run")
    loops = checkpoint["loops"]["fit_loop"]
    state = {name: checkpoint[name] for name in kept} | {"callbacks": callbacks}
    state["loader"] = loops["state_dict"].get("combined_loader")
    for report in sorted(place.rglob("report.json")):
        state["report"] = {k: v for k, v in json.loads(report.read_text()).items() if k in ("history", "results")}
    return state


def differences(ours: Any, theirs: Any, name: str = "") -> list[str]:
    """Return in which entries two nested values differ, bit for bit."""
    return list(_differences(ours, theirs, name))[:5]


def _differences(ours: Any, theirs: Any, name: str) -> Iterator[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            yield f"{name}: keys {sorted(map(str, ours.keys() ^ theirs.keys()))}"
        for key in ours.keys() & theirs.keys():
            yield from _differences(ours[key], theirs[key], f"{name}/{key}")
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from _differences(a, b, f"{name}/{number}")
    elif isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if ours.dtype != theirs.dtype or not torch.equal(ours.nan_to_num(), theirs.nan_to_num()):
            yield f"{name} is another tensor"
    elif ours != theirs and not (ours != ours and theirs != theirs):
        yield f"{name}: {ours!r} instead of {theirs!r}"[:200]


def digest(path: Path) -> str:
    """Return a hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cells(seed: int) -> Iterator[dict[str, Any]]:
    """Yield what is done with a seed: each config, with workers where the seed is odd, and the other verbs."""
    for configs in FITS:
        yield {"what": "fit", "configs": " ".join(configs), "workers": seed % 2, "seed": seed}
    for what, configs in OTHERS:
        yield {"what": what, "configs": " ".join(configs), "workers": 0, "seed": seed}


def measure(cell: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Carry a cell out and return its row."""
    rng = random.Random(f"{cell['what']}/{cell['configs']}/{cell['seed']}")
    soak = Soak(folder, rng)
    kills = 1 + rng.randrange(3)
    configs = tuple(cell["configs"].split())
    done = (
        soak.fit(configs, cell["workers"], kills) if cell["what"] == "fit" else soak.other(cell["what"], configs, kills)
    )
    return cell | done


def table(rows: list[dict[str, Any]]) -> str:
    """Return kills and faults for each verb and config, as Markdown."""
    lines = ["| command | configs | kills | nothing lost in |", "|---|---|---|---|"]
    keys = dict.fromkeys((row["what"], row["configs"]) for row in rows)
    for what, configs in keys:
        own = [row for row in rows if (row["what"], row["configs"]) == (what, configs)]
        whole = sum(not row["faults"] for row in own)
        lines.append(f"| {what} | {configs} | {sum(row['kills'] for row in own)} | {whole} of {len(own)} |")
    kills = sum(row["kills"] for row in rows)
    lines.append(f"| all | | {kills} | {sum(not row['faults'] for row in rows)} of {len(rows)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run cells until there are enough kills; return how many have a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="stop when so many are logged")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "soak_kill.json")
    parser.add_argument("--only", default="", help="cells whose command and configs hold this text")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in ("finetune_bn.cli.commands", "finetune_bn.diagnosis.figures", "torch._dynamo", "torch.export"):
        importlib.import_module(name)  # before the forks

    store = Store(options.output, "python scripts/soak_kill.py", device="cpu")
    seed = 0
    while sum(row["kills"] for row in store.rows) < options.kills and seed < options.kills:
        for cell in cells(seed):
            if store.done(cell) or options.only not in f"{cell['what']} {cell['configs']}":
                continue
            with tempfile.TemporaryDirectory(prefix="soak") as folder:
                try:
                    row = measure(cell, Path(folder))
                except Failed as error:
                    row = cell | {"kills": 0, "resumed_from": [], "faults": [str(error)], "seconds": None}
            store.add(row)
            print(
                f"{cell['what']} {cell['configs']}: {row['kills']} kills, {row['faults'] or 'nothing lost'}", flush=True
            )
            if sum(row["kills"] for row in store.rows) >= options.kills:
                break
        seed += 1
    faulty = sum(bool(row["faults"]) for row in store.rows)
    store.seeds = sorted({row["seed"] for row in store.rows})
    store.finish({"kills": sum(row["kills"] for row in store.rows), "cells": len(store.rows), "faulty": faulty})
    options.output.with_suffix(".md").write_text(table(store.rows))
    return faulty


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
