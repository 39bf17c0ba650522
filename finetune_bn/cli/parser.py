"""The parser of the command: configs by name, and a help in which a command's own options come first."""

from __future__ import annotations

import argparse
from typing import Any

from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser
from typing_extensions import override

from finetune_bn.cli import configs

# The groups that the short help shows behind a command's own options; their titles are docstrings of Lightning's.
_SHOWN = {"model": "the network and how it learns", "data": "the images", "batch_norm": "the BatchNorm layers"}
_USAGE = "finetune-bn {verb} --config NAME_OR_FILE [--config ...] [options]"
_MORE = """
--model.help NAME, --data.help NAME, --batch_norm.policy.help NAME and --trainer.callbacks.help NAME explain a class and
its arguments. The options of the Trainer, such as --trainer.max_epochs, and all others: finetune-bn {verb} --help.all
"""


class ConfigByName(ActionConfigFile):
    """`--config`: a file, or the name of a packaged config."""

    @override
    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        self.apply_config(parser, cfg, self.dest, configs.find(values) if isinstance(values, str) else values)


class HelpForAll(argparse.Action):
    """`--help.all`: every option there is."""

    def __init__(self, option_strings: Any, dest: Any = argparse.SUPPRESS, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    @override
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        parser.verb = None
        parser.print_help()
        parser.exit()


class Parser(LightningArgumentParser):
    """Lightning's parser with a help to read: `verb` is the command whose options it has."""

    verb: str | None = None

    @override
    def format_help(self, formatter: Any = None) -> str:
        if self.verb is None:
            text: str = super().format_help(formatter)
            return text
        groups, usage, epilog = self._action_groups, self.usage, self.epilog
        try:
            self._action_groups = self._short()
            self.usage, self.epilog = _USAGE.format(verb=self.verb), None
            return f"{super().format_help(formatter)}{_MORE.format(verb=self.verb)}"
        finally:
            self._action_groups, self.usage, self.epilog = groups, usage, epilog

    def _short(self) -> list[Any]:
        """Return the groups of the short help: the command's own options, the sections of a config, what is general."""
        by_name: dict[str, Any] = {}
        for group in self._action_groups:
            for action in group._group_actions:
                by_name.setdefault(action.dest.partition(".")[0] if action.dest else "", group)
        own = by_name.get("ckpt_path")
        general = by_name["config"]
        sections = [by_name[name] for name in _SHOWN if name in by_name]
        for name, group in zip(_SHOWN, sections, strict=False):
            group.title, group.description = f"{name}: {_SHOWN[name]}", None
        general.title = "general"
        if own is not None:
            own.title, own.description = f"options of {self.verb}", None
        return [group for group in (own, *sections, general) if group is not None]
