"""Where the command starts: what needs no torch is answered at once, and every error ends in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

from finetune_bn import __version__
from finetune_bn.cli import configs
from finetune_bn.cli.help import help_text
from finetune_bn.errors import FinetuneBNError


def main(args: Any = None) -> None:
    """Run the command; a mistake in the config, the data or a file ends in one line, not in a traceback.

    Args:
        args: what is typed behind `finetune-bn`, as a list; by default that of this process.
    """
    try:
        given = sys.argv[1:] if args is None else args
        if not isinstance(given, list) or not _at_once(given):
            _run(args)
    except KeyboardInterrupt as stop:
        print(f"\nfinetune-bn: interrupted. {stop}".rstrip(), file=sys.stderr)
        sys.exit(130)
    except FinetuneBNError as error:
        _end(str(error))


def _at_once(args: list[str]) -> bool:
    """Do what needs neither config nor Lightning; tell whether that was all."""
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
    if args[0] == "init":
        from finetune_bn.cli.init import init_from

        init_from(args[1:])
        return True
    if args[0] == "predict" and _names_a_model_file(args[1:]):
        from finetune_bn.backbones.predict_command import predict_command

        predict_command(args[1:])
        return True
    return False


def _names_a_model_file(args: list[str]) -> bool:
    """Tell whether `predict` is asked of a model file and images, and not of a config with a model class and data."""
    given = [
        arg.partition("=")[2] or following
        for arg, following in zip(args, [*args[1:], ""], strict=False)
        if arg.partition("=")[0] == "--model"
    ]
    return not any(arg.startswith("--config") for arg in args) and any(
        Path(name).suffix == ".safetensors" or Path(name).is_file() for name in given
    )


def _run(args: Any) -> None:
    try:
        from finetune_bn.cli import commands, messages
    except ModuleNotFoundError as error:
        _end(f'the command needs the package {error.name}. Run: pip install "finetune-bn[demo]"')
    try:
        commands.FinetuneBNCLI(args)
    except Exception as error:
        line = messages.for_the_user(error)
        if line is None:
            raise
        _end(line)


def _end(message: str) -> NoReturn:
    sys.exit(f"finetune-bn: error: {' '.join(message.split())}")
