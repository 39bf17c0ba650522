"""The command `finetune-bn`."""

from finetune_bn.cli.commands import FinetuneBNCLI, main, readable

__all__ = ["FinetuneBNCLI", "main", "readable"]
