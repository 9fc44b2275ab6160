"""What part of a model's next tokens it keeps in each precision, of weights and of keys and values.

    python -m bench.agreement
    python -m bench.agreement --precisions bfloat16 int8 --prompts 4 --json agreement.json

Each prompt is continued greedily by the model in float32. The compiled model of a precision is then led along that same
text, token by token, and asked at each place what it would have said: the top-1 agreement is how often that is the
token of float32. Unlike the number of tokens before the first that differs, it does not hang on where that one is. What
random weights say means little: the default is a trained model.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

import emssd_compile
from bench import command, precisions, shapes
from bench.precisions import PRECISIONS
from bench.speedup import alone
from emssd_compile.errors import OptionError

KV_DTYPES = (None, "int8")


@dataclass(frozen=True)
class Agreement:
    """One precision of weights and of keys and values.

    Attributes:
        precision: of the weights, a name of `PRECISIONS`.
        kv_dtype: that of `emssd_compile.optimize`; None for the model's own.
        tokens: how many were asked for.
        top1: what part of them is float32's.
    """

    precision: str
    kv_dtype: str | None
    tokens: int
    top1: float


class Teacher:
    """A logits processor of transformers that leads a row along a text, and notes what it would have said.

    Args:
        text: token ids, the prompt first.

    Attributes:
        choices: the model's own token behind each length of text that it was asked at.
    """

    def __init__(self, text: Sequence[int]) -> None:
        self.choices: dict[int, int] = {}
        self._text = text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits `[1, V]` that leave the next token of the text alone, behind ids `[1, n]`."""
        length = input_ids.shape[1]
        self.choices[length] = int(scores[0].argmax())
        led = torch.full_like(scores, -torch.inf)
        led[0, self._text[length]] = 0
        return led

    @property
    def agreed(self) -> int:
        """How many choices are the text's."""
        return sum(self._text[length] == choice for length, choice in self.choices.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Decode in float32, follow in each precision, print, save."""
    options = parse_arguments(arguments)
    console, tables = command.make_console(), []
    for name in options.models:
        with console.status(f"{name}, float32"):
            texts = reference(name, options)
        rows = []
        for precision in options.precisions:
            with console.status(f"{name}, {precision}"):
                try:
                    rows += follow(name, precision, texts, options)
                except OptionError as error:
                    console.print(f"{name}, {precision}: {error}")
        tables.append({"title": name, "rows": [*map(asdict, rows)]})
        console.print(table(name, rows))
    if options.json:
        command.save(options.json, "bench.agreement", tables)
    console.print(f"{command.describe(command.hardware())}\n{command.describe(command.versions())}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = command.argument_parser(__doc__, repeats=1)
    number = command.at_least(1)
    parser.add_argument("--models", nargs="+", choices=shapes.NAMES, default=[shapes.SMOLLM2], metavar="NAME")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS], metavar="NAME")
    parser.add_argument("--prompts", type=number, default=8, help="(%(default)s)")
    parser.add_argument("--tokens", type=number, default=64, help="of each prompt (%(default)s)")
    return command.parse(parser, arguments)


def reference(name: str, options: argparse.Namespace) -> list[tuple[int, list[int]]]:
    """How long each prompt is, and the text that float32 makes of it."""
    model = shapes.build(name, options.device)
    prompts = shapes.spread(shapes.prompts(name), options.prompts)
    return [(len(prompt), prompt + alone(model, prompt, options.tokens)) for prompt in prompts]


def follow(
    name: str, precision: str, texts: Sequence[tuple[int, list[int]]], options: argparse.Namespace
) -> list[Agreement]:
    """The agreement of one precision with each kind of cache. Raises OptionError if it needs what is not installed."""
    model, rows = precisions.build(name, precision, options.device), []
    longest = max(len(text) for _, text in texts)
    for kv_dtype in KV_DTYPES:
        fast = emssd_compile.optimize(
            model, "none", max_batch=1, max_length=longest, backend="eager", kv_dtype=kv_dtype
        )
        teachers = []
        for length, text in texts:
            teachers.append(Teacher(text))
            fast.generate(
                [text[:length]],
                max_new_tokens=len(text) - length,
                eos_token_id=None,
                logits_processor=[teachers[-1]],
            )
        tokens = sum(len(teacher.choices) for teacher in teachers)
        rows.append(Agreement(precision, kv_dtype, tokens, sum(each.agreed for each in teachers) / tokens))
    return rows


def table(title: str, rows: Sequence[Agreement]) -> Table:
    """For `rich`."""
    made = Table("weights", "keys and values", "tokens", "top-1 agreement", title=title)
    for row in rows:
        made.add_row(row.precision, row.kv_dtype or "the model's", str(row.tokens), f"{row.top1:.3f}")
    return made


if __name__ == "__main__":
    main()
