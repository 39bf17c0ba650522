"""Where the command starts: what needs no torch is answered at once, and every error ends in one line."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from finetune_bn import __version__
from finetune_bn.cli import configs
from finetune_bn.cli.help import help_text
from finetune_bn.errors import FinetuneBNError

# Of the extra `demo`; `import finetune_bn` does without.
EXTRAS = (
    "lightning",
    "jsonargparse",
    "timm",
    "torchmetrics",
    "torchvision",
    "PIL",
    "numpy",
    "yaml",
    "typing_extensions",
)


def main(args: Any = None) -> None:
    """Run the command; a mistake in the config, the data or a file ends in one line, not in a traceback.

    Args:
        args: what is typed behind `finetune-bn`, as a list; by default that of this process.
    """
    try:
        given = sys.argv[1:] if args is None else args
        if not isinstance(given, list) or not _at_once(given):
            _answer(args, given if isinstance(given, list) else [])
    except KeyboardInterrupt as stop:
        print(f"\nfinetune-bn: interrupted. {stop}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except FinetuneBNError as error:
        _end(str(error))


def _at_once(args: list[str]) -> bool:
    """Do what needs neither torch nor Lightning; tell whether that was all."""
    if not args or args == ["-h"] or args == ["--help"]:
        print(help_text())
        sys.exit(0 if args else 2)
    if args == ["--version"]:
        print(__version__)
        return True
    if args[0] == "configs":
        if set(args[1:]) - {"-h", "--help"}:
            raise FinetuneBNError(f"configs: it takes no arguments, got {' '.join(args[1:])}")
        print(configs.listing())
        return True
    return False


def _answer(args: Any, given: list[str]) -> None:
    """Do the rest, which needs torch and, but for a model file's predictions, Lightning."""
    try:
        if names_a_model_file(given):
            from finetune_bn.backbones.predict_command import predict_command

            predict_command(given[1:])
        elif given[:1] == ["init"]:
            from finetune_bn.cli.init import init_from

            init_from(given[1:])
        else:
            _run(args)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        _end(f'the command needs the package {error.name}. Run: pip install "finetune-bn[demo]"')
    except Exception as error:
        from finetune_bn.cli import messages

        line = messages.for_the_user(error)
        if line is None:
            raise
        _end(line)


def _run(args: Any) -> None:
    from finetune_bn.cli.commands import FinetuneBNCLI

    FinetuneBNCLI(args)


def names_a_model_file(args: list[str]) -> bool:
    """Tell whether `predict --model FILE images ...` was typed, and not `predict` with a config and a class.

    Args:
        args: what is typed behind `finetune-bn`.
    """
    if args[:1] != ["predict"] or any(arg.startswith("--config") for arg in args):
        return False
    values = [after for before, after in pairwise(args) if before == "--model"]
    values += [arg.partition("=")[2] for arg in args if arg.startswith("--model=")]
    return any(value.endswith(".safetensors") or Path(value).exists() for value in values)


def _end(message: str) -> NoReturn:
    sys.exit(f"finetune-bn: error: {' '.join(message.split())}")
