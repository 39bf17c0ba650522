"""What `predict` found, as a CSV file: one line an image, with its class and scores or its embedding."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.files import write_atomically


def check_output(output: str | None) -> None:
    """Raise where the file cannot be written, before anything is computed.

    Raises:
        FinetuneBNError: it is a folder, or in a folder that there is not.
    """
    if output is not None and (Path(output).is_dir() or not Path(output).absolute().parent.is_dir()):
        raise FinetuneBNError(complaint("output", output, "a file in a folder that there is"))


def write_predictions(path: Path, model: pl.LightningModule, loaders: Any, predictions: Sequence[Any]) -> int:
    """Write the predictions of a Trainer to a CSV file and return for how many images.

    The columns are `file` (the name of the image, else the number of its loader and its place in it), `domain` where
    there are several loaders, and `class`, `score` and the score of each class where the model has `class_names`, else
    the numbers `0`, `1`, ... of what it returns for an image.

    Args:
        path: the file, overwritten if it is there.
        model: the module that predicted.
        loaders: the loaders, in the order of the predictions.
        predictions: what `Trainer.predict` returned.

    Raises:
        FinetuneBNError: the predictions are no tensors of one row an image, or the file cannot be written.
    """
    loaders = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
    by_loader = [predictions] if len(loaders) == 1 else predictions
    names: list[str] | None = getattr(model, "class_names", None)
    rows: list[list[Any]] = []
    columns: list[str] = []
    for number, (loader, batches) in enumerate(zip(loaders, by_loader, strict=True)):
        values = _values(batches)
        files = list(getattr(getattr(loader, "dataset", None), "names", []))
        domains = list(getattr(getattr(loader, "dataset", None), "domains", []))
        scores = names is not None and len(names) == values.shape[1]
        columns = ["class", "score", *names] if scores and names else [str(i) for i in range(values.shape[1])]
        for i, row in enumerate(values.tolist()):
            file = files[i] if i < len(files) else f"{number}/{i}"
            domain = [domains[i] if i < len(domains) else str(number)] if len(loaders) > 1 else []
            best = max(range(len(row)), key=row.__getitem__)
            shown = [f"{value:.6g}" for value in row]
            head = [names[best], shown[best]] if scores and names else []
            rows.append([file, *domain, *head, *shown])
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *(["domain"] if len(loaders) > 1 else []), *columns])
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))  # file names may be any bytes
    return len(rows)


def _values(batches: Sequence[Any]) -> Tensor:
    """Return the predictions of one loader as [images, values]."""
    if not batches or not all(isinstance(batch, Tensor) and batch.ndim >= 1 for batch in batches):
        given = sorted({type(batch).__name__ for batch in batches})
        remedy = "Write others yourself: a callback that derives from Lightning's BasePredictionWriter."
        raise FinetuneBNError(complaint("predict_step", given, "one tensor with a row for each image", remedy))
    return torch.cat(
        [
            batch.detach().float().cpu().flatten(1) if batch.ndim > 1 else batch.float().cpu()[:, None]
            for batch in batches
        ]
    )
