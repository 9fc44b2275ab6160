"""The command line, `emssd-compile`. To add a command: one file with `add`, `run` and `EXAMPLES`, one line here."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

import emssd_compile
from emssd_compile.cli import batch, explain, export, generate, inspect, serve, train_drafter
from emssd_compile.cli.flags import in_flags
from emssd_compile.cli.models import PROGRAM
from emssd_compile.errors import EmssdError

COMMANDS = {
    "generate": generate,
    "batch": batch,
    "explain": explain,
    "export": export,
    "inspect": inspect,
    "serve": serve,
    "train-drafter": train_drafter,
}


CLOSED_PIPE = 141
"""The status that a shell gives a command that SIGPIPE has ended: `head` has read enough."""
INTERRUPTED = 130
"""The same of SIGINT: Ctrl-C."""


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
    """Run a command; returns its exit status.

    0, or 1 after an error that is explained on standard error, or `CLOSED_PIPE` where nobody reads what it writes, or
    `INTERRUPTED`.
    """
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")  # on standard error
    notes = Console(stderr=True)
    try:
        COMMANDS[arguments.command].run(arguments, notes)
        sys.stdout.flush()  # here and not when Python ends, where it could no longer be told
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there when Python ends
        return CLOSED_PIPE
    except UnicodeEncodeError as error:
        notes.print(f"error: standard output cannot hold the text: {error}; set PYTHONIOENCODING=utf-8", soft_wrap=True)
        return 1
    except (EmssdError, NotImplementedError) as error:
        notes.print(Text.assemble(("error: ", "bold red"), in_flags(str(error), vars(arguments))), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
