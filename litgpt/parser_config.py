"""LitGPT's names for the commands, and for writing down how one was called."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from litgpt.utils import CLI


def parser_commands() -> list[str]:
    """Names of all commands."""
    from litgpt.__main__ import COMMANDS

    return list(COMMANDS)


def save_hyperparameters(
    function: Callable[..., Any], checkpoint_dir: Path, known_commands: Sequence[str] | None = None
) -> None:
    """Write the command line's values of the arguments of `function`, which is not called, to `hyperparameters.yaml`.

    A first word that is one of `known_commands` (default: those of this package and of LitGPT) is passed over.
    """
    from jsonargparse import capture_parser

    commands = [*parser_commands(), *_OTHERS] if known_commands is None else known_commands
    args = sys.argv[2:] if sys.argv[1:2] and sys.argv[1] in commands else sys.argv[1:]
    parser = capture_parser(lambda: CLI(function))
    parser.save(parser.parse_args(args), Path(checkpoint_dir) / "hyperparameters.yaml", overwrite=True)


_OTHERS = (
    "finetune",
    "finetune_full",
    "finetune_lora",
    "finetune_adapter",
    "finetune_adapter_v2",
    "pretrain",
    "evaluate",
    "serve",
)
