"""What the recipes print: runs each as its page says and writes results/recipes/NAME.md, which the pages copy.

    python scripts/make_recipe_transcripts.py [NAME ...]     # then: python scripts/update_tables.py

Two CPU cores: three minutes for all. A recipe whose packages are not there is left as it is, and named.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from make_transcript import NOISE, NOTICE

from finetune_bn.utilities.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "recipes"
COMMANDS = {
    "segmentation": [""],
    "detection": ["", "--detector retinanet"],
    "self_supervised": [""],
    "video": ["", "--net r3d_18 --steps 12"],
    "lora": [""],
    "robot_learning": ["", "--norm group_norm"],
    "private": [""],
    "stream": [""],
}
MISSING = "This recipe needs "
# What other packages say of themselves while a recipe runs.
OTHERS = ("LeafSpec", "`Trainer.fit` stopped", "Trainer already configured", "💡", "bottleneck", "fewer than")


def line_of(name: str, arguments: str) -> str:
    """Return the command as it stands on the page."""
    return f"python scripts/recipes/{name}.py {arguments}".strip()


def shown(output: str) -> str:
    """Return what a recipe printed, without colors, progress bars, notices of other packages and long lines' ends."""
    lines = [line.rstrip() for line in NOISE.sub("", output).splitlines() if line.strip()]
    kept = [line for line in lines if not NOTICE.search(line) and not any(word in line for word in OTHERS)]
    return "\n".join(line if len(line) <= 120 else line[:117] + "..." for line in kept)


def transcript(name: str) -> str | None:
    """Return the block of a recipe, None where it lacks a package; one that fails ends the script."""
    parts = []
    for arguments in COMMANDS[name]:
        command = line_of(name, arguments)
        environment = os.environ | {"COLUMNS": "110", "PYTHONPATH": os.pathsep.join([str(ROOT), *_extra()])}
        words = [sys.executable, "-W", "ignore::UserWarning:lightning", *command.split()[1:]]
        done = subprocess.run(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{command} ended with {done.returncode}:\n{done.stdout}")
        if done.stdout.startswith(MISSING):
            return None
        parts.append(f"$ {command}\n{shown(done.stdout)}")
    return "```console\n" + "\n".join(parts) + "\n```\n"


def _extra() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def main() -> None:
    """Run the recipes that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *COMMANDS], help="recipes to run (default: all)")
    RESULTS.mkdir(exist_ok=True)
    for name in parser.parse_args().names or COMMANDS:
        text = transcript(name)
        if text is None:
            print(f"{name}: a package is missing, left as it was", flush=True)
            continue
        write_atomically(RESULTS / f"{name}.md", text)
        print(f"{name}: written", flush=True)


if __name__ == "__main__":
    main()
