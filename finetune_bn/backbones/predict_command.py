"""`finetune-bn predict --model FILE images ...`: classes or embeddings of images, as CSV."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from finetune_bn.backbones.predict import Embedding, Prediction
from finetune_bn.backbones.saved import load
from finetune_bn.errors import FinetuneBNError, complaint
from finetune_bn.utilities.files import write_atomically


def predict_command(args: Sequence[str]) -> None:
    """Print what a model file says of images, or write it to a file.

    Args:
        args: what stands behind `predict` on the command line.

    Raises:
        FinetuneBNError: an argument is wrong, the model file or an image cannot be read, the output not be written.
    """
    options = _parser().parse_args(list(args))
    # What cannot be written should be known before an hour of computing.
    if options.output is not None and (
        Path(options.output).is_dir() or not Path(options.output).absolute().parent.is_dir()
    ):
        raise FinetuneBNError(complaint("output", options.output, "a file in a folder that there is"))
    model = load(options.model, options.device)
    answers = model.predict(
        list(options.images), options.batch_size, top=options.top, on_bad_image=options.on_bad_image
    )
    text = to_csv(answers)
    if options.output is None:
        print(text, end="")
        return
    try:
        write_atomically(options.output, text)
    except OSError as error:
        raise FinetuneBNError(complaint("output", options.output, "a file that can be written", f"{error}.")) from error
    print(f"Predictions for {len(answers)} images: {options.output}")


def to_csv(answers: Sequence[Prediction | Embedding]) -> str:
    """Return predictions as CSV: image, class, score, and so on for the next classes; or image and the vector."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    first = answers[0] if answers else None
    if isinstance(first, Embedding):
        table.writerow(["image", *range(len(first.vector))])
    else:
        numbers = range(1, 1 + len(first.classes)) if first else (1,)
        table.writerow(["image", *(name + (f"_{i}" if i > 1 else "") for i in numbers for name in ("class", "score"))])
    for answer in answers:
        cells: list[Any] = [answer.image]
        if isinstance(answer, Embedding):
            cells += [f"{value:.6g}" for value in answer.vector.tolist()]
        else:
            for name, score in zip(answer.classes, answer.scores, strict=True):
                cells += [name, f"{score:.6g}"]
        table.writerow(cells)
    return buffer.getvalue()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FinetuneBNError(f"predict: {message}. See `finetune-bn predict --model FILE --help`.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("finetune-bn predict", description="Classes or embeddings of images, as CSV.", allow_abbrev=False)
    parser.add_argument("images", nargs="+", help="images, or folders of images with all folders in them")
    parser.add_argument("--model", required=True, metavar="FILE", help="the model.safetensors beside a report")
    parser.add_argument("--output", metavar="FILE", help="a CSV file to write to instead of the terminal")
    parser.add_argument("--top", type=int, default=1, help="how many classes, best first (default: 1)")
    parser.add_argument("--batch_size", type=int, default=64, help="images that are computed together (default: 64)")
    parser.add_argument("--device", help="where to compute, as cuda (default: the CPU)")
    parser.add_argument(
        "--on_bad_image", choices=("error", "skip"), default="error", help="skip leaves out what cannot be read"
    )
    return parser
