"""The trainings of a comparison that are done, as one file in a folder, so that one that was cut off can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from finetune_bn.comparison.training import Outcome, Trial
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.files import write_atomically

FILE = "trainings.json"


class Store:
    """Outcomes by training; on the disk as soon as they are added, where there is a folder.

    Args:
        folder: where the file lies; None keeps outcomes in memory alone.
        identity: what the outcomes depend on, as plain data; that of the file has to be the same.

    Attributes:
        chosen: what was found out once and has to stay, such as the lengths that a time budget led to.

    Raises:
        FinetuneBNError: the folder holds another comparison, or a file that is none.
    """

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]) -> None:
        self.path = None if folder is None else Path(folder) / FILE
        self.identity = json.loads(json.dumps(identity))  # as it will be read
        self.chosen: dict[str, Any] = {}
        self._outcomes: dict[Trial, Outcome] = {}
        if self.path is not None and Path(folder or "").exists() and not Path(folder or "").is_dir():
            raise FinetuneBNError(complaint("folder", str(folder), "a folder, or a name for a new one"))
        if self.path is not None and self.path.exists():
            self._load(self.path)

    def find(self, trial: Trial) -> Outcome | None:
        """Return the outcome of a training; None where it is still to be done."""
        return self._outcomes.get(trial)

    def add(self, trial: Trial, outcome: Outcome) -> None:
        """Keep an outcome; it is on the disk when this returns."""
        self._outcomes[trial] = outcome
        self._write()

    def choose(self, **values: Any) -> None:
        """Keep what was found out once."""
        self.chosen |= values
        self._write()

    def __len__(self) -> int:
        return len(self._outcomes)

    def _write(self) -> None:
        if self.path is None:
            return
        rows = [asdict(trial) | asdict(outcome) for trial, outcome in self._outcomes.items()]
        lines = ",\n    ".join(json.dumps(row) for row in rows)
        text = (
            f'{{\n  "identity": {json.dumps(self.identity)},\n  "chosen": {json.dumps(self.chosen)},\n  "trainings": ['
        )
        write_atomically(self.path, f"{text}\n    {lines}\n  ]\n}}\n")

    def _load(self, path: Path) -> None:
        allowed = "a folder of this comparison, or a new one"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            identity, self.chosen = found["identity"], dict(found["chosen"])
            for row in found["trainings"]:
                trial = Trial(row["arm"], row["lr"], row["seed"], row["steps"])
                losses = tuple((int(step), float(value)) for step, value in row["losses"])
                self._outcomes[trial] = Outcome(row["score"], losses, row["seconds"], row["failed"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{path.name} in it cannot be read ({type(error).__name__}: {error})."
            raise FinetuneBNError(complaint("folder", str(path.parent), allowed, why)) from error
        other = [name for name in self.identity if identity.get(name) != self.identity[name]]
        if other:
            words = "; ".join(
                f"{name}: {_short(identity.get(name))} there, {_short(self.identity[name])} here" for name in other
            )
            why = f"It belongs to another one ({words}). Name another folder, or remove this one."
            raise FinetuneBNError(complaint("folder", str(path.parent), allowed, why))


def fingerprint(values: Iterable[Any]) -> str:
    """Return a short text that differs where any tensor, number or text among the values does."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(list(values)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(_bytes(leaf))
        else:
            digest.update(repr(leaf).encode() if isinstance(leaf, (str, int, float, bool, bytes)) else b"?")
    return digest.hexdigest()[:16]


def fingerprint_of(model: nn.Module) -> str:
    """Return a short text that differs where any name, parameter or buffer of a model does."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return fingerprint([list(state), list(state.values())])


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return b"" if not flat.numel() else flat.view(torch.uint8).numpy().tobytes()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
