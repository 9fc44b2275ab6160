"""How prompts are continued: options that commands share, and what decoding came to."""

from __future__ import annotations

import argparse
from typing import Any

from rich.table import Table

from emssd_compile.cli.models import add_backend, finite, positive
from emssd_compile.errors import OptionError
from emssd_compile.stats import Stats

_DRAWING = ("top_k", "top_p", "seed")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Chats, lengths, stops, how tokens are drawn, and the backend."""
    parser.add_argument("--chat", action="store_true", help="texts are what a user says: use the model's chat template")
    parser.add_argument("--max-new-tokens", metavar="N", type=positive, default=128, help="default: %(default)s")
    parser.add_argument("--stop", metavar="TEXT", action="append", help="ends a text where it comes; may be repeated")
    parser.add_argument("--temperature", metavar="T", type=finite, help="draw tokens (default: greedy)")
    parser.add_argument("--top-k", metavar="K", type=positive, help="draw among the K likeliest only")
    parser.add_argument("--top-p", metavar="P", type=finite, help="draw among those that make up P together")
    parser.add_argument("--seed", metavar="N", type=int, help="of what is drawn")
    add_backend(parser)


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of `generate` that say how tokens are drawn."""
    given = {name: value for name in _DRAWING if (value := getattr(arguments, name)) is not None}
    if arguments.temperature is None:
        if given:
            name = "--" + next(iter(given)).replace("_", "-")
            raise OptionError(f"{name} is for tokens that are drawn; pass --temperature as well, such as 1.0")
        return {}
    return {"do_sample": True, "temperature": arguments.temperature, **given}


def stats_table(stats: Stats, seconds: float) -> Table:
    """What decoding came to in so many seconds."""
    table = Table(title="decoding", show_header=False)
    for name, value in {
        "seconds": f"{seconds:.2f}",
        "tokens": f"{stats.num_emitted_tokens}",
        "tokens/s": f"{stats.num_emitted_tokens / seconds:.1f}",
        "steps": f"{stats.num_steps}",
        "tokens a row and step": f"{stats.mean_acceptance_length:.2f}",
        "drafts accepted": f"{stats.num_accepted_draft_tokens} of {stats.num_draft_tokens}",
        "padding tokens": f"{stats.num_padding_tokens}",
    }.items():
        table.add_row(name, value)
    return table
