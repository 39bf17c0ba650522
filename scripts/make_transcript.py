"""From `pip install` of the wheel to the class of an image, in an empty folder: writes docs/transcript.md.

Every command of the page is run as it stands there, in this order, and its output is what it printed. The wheel is
built from this checkout and installed into an environment of its own. That environment also sees the packages of the
one that runs this script, so that torch and the others are not downloaded again; finetune_bn itself comes from the
wheel alone, which is checked. The images are emoji of the packaged set, written as files.

    python scripts/make_transcript.py            # two CPU cores: about two minutes
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "transcript.md"
CLASSES = ("animals_nature", "food_drink", "travel_places")
IMAGES = 40  # of each class
NOISE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n]*\r(?!\n)")  # colors, and what a progress bar wrote over
# What Lightning and pip say of the machine and of themselves.
NOTICE = re.compile(r"^WARNING: Location|^Looking in|site-packages/lightning|^(GPU|TPU) available|Tip: |^Seed set to")


@dataclass(frozen=True)
class Step:
    """A command of the page, with a sentence in front of it and the number of lines that are shown of its output."""

    says: str
    command: str
    head: int = 12
    tail: int = 8


STEPS = (
    Step(
        "The wheel, with what the command needs (which was there already).",
        'pip install "{wheel}[demo]"',
        head=0,
        tail=1,
    ),
    Step("The configs that come with it.", "finetune-bn configs", head=9, tail=3),
    Step(
        "A config that fits a folder of images, one sub-folder for each class. It asks nothing and says what it chose.",
        "finetune-bn init my_images.yaml --data photos --backbone tf_efficientnet_lite0",
        head=30,
    ),
    Step("What would happen to each layer.", "finetune-bn plan --config my_images.yaml", head=8, tail=3),
    Step(
        "Train, test the best checkpoint, write the report and the model file. Two epochs, for this page.",
        "finetune-bn fit --config my_images.yaml --trainer.max_epochs 2 "
        "--trainer.enable_progress_bar false --trainer.enable_model_summary false",
        head=2,
        tail=24,
    ),
    Step("What it left.", "find runs -type f | sort", head=20, tail=0),
    Step("Use it: from the command,", "finetune-bn predict --model {model} photos/{image}", head=6, tail=2),
    Step(
        "and from Python. Nothing is unpickled, and Lightning is not needed.",
        "python -c \"import finetune_bn; print(finetune_bn.load('{model}').predict('photos/{image}'))\"",
        head=6,
        tail=2,
    ),
)


def main() -> None:
    """Run the steps and write the page, all of it or nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE, help="the page to write (default: docs/transcript.md)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="transcript") as name:
        folder = Path(name).resolve()
        text = page(run_all(folder))
    write_atomically(args.output, text)
    print(f"Wrote {args.output}")


def run_all(folder: Path) -> list[tuple[Step, str, str]]:
    """Return each step with the command as it was run and what it printed."""
    build = folder / "dist"
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(build), str(ROOT)], folder)
    (wheel,) = build.glob("*.whl")
    here = folder / "project"
    here.mkdir()
    wheel = wheel.rename(here / wheel.name)
    write_images(here / "photos")
    bin_folder = environment(folder / "environment")
    known = {"wheel": wheel.name, "image": f"{CLASSES[0]}/00.png"}
    done = []
    for step in STEPS:
        if "{model}" in step.command and "model" not in known:
            known["model"] = model_file(here)
        command = step.command.format(**known)
        print(f"$ {command}", flush=True)
        output = run(["bash", "-c", command], here, bin_folder)
        done.append((step, command, cleaned(output, folder)))
        if step is STEPS[0]:
            check_origin(here, bin_folder, folder)
    return done


def environment(folder: Path) -> Path:
    """Make a virtual environment that also sees this one's packages, and return its folder of commands."""
    venv.create(folder, with_pip=True)
    (libraries,) = folder.glob("lib/python*/site-packages")
    (libraries / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    return folder / "bin"


def run(command: list[str], folder: Path, bin_folder: Path | None = None) -> str:
    """Return what a command printed on both streams; one that fails ends the script with it."""
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}" if bin_folder else os.environ["PATH"]
    settings = {"PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore", "COLUMNS": "110"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=keep | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def check_origin(folder: Path, bin_folder: Path, above: Path) -> None:
    """End the script where the package that is imported is not that of the wheel."""
    where = run(["python", "-c", "import finetune_bn; print(finetune_bn.__file__)"], folder, bin_folder).strip()
    if not Path(where).is_relative_to(above / "environment"):
        sys.exit(f"finetune_bn is imported from {where}, not from the wheel")


def write_images(folder: Path) -> None:
    """Write emoji as PNG files, a sub-folder for each class."""
    from finetune_bn.data import EmojiData

    data = EmojiData(target="category", image_size=64, num_workers=0)
    images = data.image_set("train")
    names = {slug(name): number for number, name in enumerate(data.class_names)}
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        chosen = [i for i, label in enumerate(images.labels) if int(label) == names[name]][:IMAGES]
        for number, i in enumerate(chosen):
            images.source.open(images.indices[i]).convert("RGB").save(folder / name / f"{number:02}.png")


def slug(name: str) -> str:
    """Return a class name as the name of a folder."""
    return re.sub(r"[^a-z]+", "_", name.lower()).strip("_")


def model_file(folder: Path) -> Path:
    """Return the file that the training left for use, relative to the folder."""
    found = sorted(folder.glob("runs/**/*.safetensors"))
    if len(found) != 1:
        sys.exit(f"one model file was expected below runs, found: {', '.join(map(str, found)) or 'none'}")
    return found[0].relative_to(folder)


def cleaned(output: str, folder: Path) -> str:
    """Return output without colors, progress bars, notices of other packages and names of temporary folders."""
    text = NOISE.sub("", output)
    text = text.replace(str(folder / "project") + "/", "").replace(str(folder / "environment"), ".venv")
    return "\n".join(line.rstrip() for line in text.splitlines() if not NOTICE.search(line))


def shown(step: Step, output: str) -> str:
    """Return the first and last lines of an output, with a mark where lines are left out."""
    lines = [line for line in output.splitlines() if line.strip()]
    if len(lines) <= step.head + step.tail:
        return "\n".join(lines)
    last = lines[len(lines) - step.tail :]
    return "\n".join([*lines[: step.head], f"[... {len(lines) - step.head - step.tail} lines]", *last])


def page(done: list[tuple[Step, str, str]]) -> str:
    """Return the page."""
    parts = [
        "# From install to prediction",
        "Every command from the wheel to the class of an image, in an empty folder, with what it printed. The folder\n"
        f"`photos` holds {len(CLASSES)} sub-folders of {IMAGES} emoji each.\n"
        "Made by `python scripts/make_transcript.py`; one run, notices of Lightning and pip left out. The names: [the\n"
        "command](use/command.md), [API](api/index.md).",
    ]
    for step, command, output in done:
        parts.append(f"{step.says}\n\n```console\n$ {command}\n{shown(step, output)}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
