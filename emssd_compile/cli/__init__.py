"""The command line, `emssd-compile`. To add a command: one file with `add`, `run` and `EXAMPLES`, one line here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

import emssd_compile
from emssd_compile.cli import batch, explain, export, generate, inspect, train_drafter
from emssd_compile.cli.models import PROGRAM
from emssd_compile.errors import EmssdError

COMMANDS = {
    "generate": generate,
    "batch": batch,
    "explain": explain,
    "export": export,
    "inspect": inspect,
    "train-drafter": train_drafter,
}


def build_parser() -> argparse.ArgumentParser:
    """The arguments of all commands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Batched speculative decoding without padding. The tokens are the model's own.",
        epilog="The --help of each command shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"emssd_compile {emssd_compile.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for command in COMMANDS.values():
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, or 1 after an error that is explained on standard error."""
    arguments = build_parser().parse_args(argv)
    notes = Console(stderr=True)
    try:
        COMMANDS[arguments.command].run(arguments, notes)
    except (EmssdError, NotImplementedError) as error:
        notes.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        return 1
    return 0
