"""Models, drafters and sizes given on the command line."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import emssd_compile
from emssd_compile.checkpoints import CONFIG
from emssd_compile.cli.flags import Noted, NotedTrue
from emssd_compile.decoder import Decoder
from emssd_compile.drafters import DRAFTERS, Drafter, DraftModel, head_kind
from emssd_compile.errors import OptionError
from emssd_compile.export import manifest
from emssd_compile.export.tokenizer import load_tokenizer as load_tokenizer_of_artifact
from emssd_compile.layouts import LAYOUTS
from emssd_compile.lowering import BACKENDS
from emssd_compile.options import KV_DTYPES, MEMORY

PROGRAM = "emssd-compile"

_CHOSEN = (
    *("drafter", "num_draft_tokens", "dtype", "max_batch", "max_length", "layout", "deterministic"),
    *("memory", "kv_tokens", "kv_dtype", "prefix_cache", "backend", "warmup"),
)
"""What a compiled model is made for: of an artifact, no option any more."""

_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def positive(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


positive.__name__ = "positive integer"  # what argparse calls it in "invalid positive integer value: 'x'"


def finite(text: str) -> float:
    """A number that is neither NaN nor infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


finite.__name__ = "number"


def add_command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """A parser for a command, with examples under its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.register("action", None, Noted)
    parser.register("action", "store_true", NotedTrue)
    parser.set_defaults(given=frozenset())
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model and who drafts for it."""
    parser.add_argument(
        "--model", metavar="DIR", type=Path, required=True, help="folder of a Hugging Face causal LM (save_pretrained)"
    )
    parser.add_argument(
        "--drafter",
        metavar="WHO",
        default="prompt-lookup",
        help=f"{', '.join(DRAFTERS)}, or the folder of a draft head or a smaller causal LM (default: %(default)s)",
    )
    parser.add_argument("--num-draft-tokens", metavar="K", type=positive, help="tokens drafted a row and step")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights; exactness is promised for float32 (default: %(default)s)",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    """What runs the step."""
    parser.add_argument(
        "--backend", choices=BACKENDS, default="inductor", help="eager starts at once (default: %(default)s)"
    )


def add_sizes(parser: argparse.ArgumentParser, *, max_length: str) -> None:
    """Rows, tokens of a row, and the layout; `max_length` says what its default is."""
    parser.add_argument(
        "--max-batch",
        metavar="B",
        type=positive,
        default=8,
        help="prompts at a time; others wait (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length", metavar="C", type=positive, help=f"tokens a row can hold (default: {max_length})"
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="auto", help="auto drafts only where that is faster (default: %(default)s)"
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="size steps without a clock: half precision repeats to the bit"
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Where keys and values are."""
    parser.add_argument(
        "--memory",
        choices=MEMORY,
        default="auto",
        help="of keys and values: auto is a window in layers that see no more, slabs where they fit, else paged",
    )
    parser.add_argument(
        "--kv-tokens", metavar="N", type=positive, help="tokens that paged memory holds (default: half of what is free)"
    )
    parser.add_argument(
        "--kv-dtype", choices=KV_DTYPES, help="keep keys and values in 8 bits, which is lossy (default: as computed)"
    )
    parser.add_argument(
        "--prefix-cache",
        action="store_true",
        help="keep what was read for prompts to come that begin in the same way; asks for paged memory",
    )


def optimize(model: nn.Module, arguments: argparse.Namespace) -> emssd_compile.OptimizedModel:
    """Compile with the options of the command line."""
    return emssd_compile.optimize(
        model,
        _make_drafter(arguments),
        max_batch=arguments.max_batch,
        max_length=arguments.max_length,
        backend=arguments.backend,
        layout=arguments.layout,
        deterministic=arguments.deterministic,
        memory=arguments.memory,
        kv_tokens=arguments.kv_tokens,
        prefix_cache=arguments.prefix_cache,
        kv_dtype=arguments.kv_dtype,
    )


def open_decoder(arguments: argparse.Namespace) -> Decoder:
    """The artifact that `--model` names, or the model there, compiled."""
    if is_artifact(arguments.model):
        return emssd_compile.load(arguments.model)
    return optimize(load_model(arguments.model, arguments.dtype, "--model"), arguments)


def _make_drafter(arguments: argparse.Namespace) -> str | nn.Module:
    choice, count = arguments.drafter, arguments.num_draft_tokens
    options: dict[str, Any] = {} if count is None else {"num_draft_tokens": count}
    if choice in DRAFTERS:
        made = DRAFTERS[choice]
        if options and not _takes(made, options):
            raise OptionError(f"--num-draft-tokens with --drafter {choice}, which takes none; leave one of them out")
        return made(**options)
    if not Path(choice).is_dir():
        raise OptionError(f"--drafter {choice} is neither a folder nor one of {', '.join(DRAFTERS)}")
    return _load_drafter(Path(choice), arguments.dtype, options)


def _takes(made: Callable[..., Drafter], options: dict[str, Any]) -> bool:
    return options.keys() <= inspect.signature(made).parameters.keys()


def _load_drafter(folder: Path, dtype: str, options: dict[str, Any]) -> Drafter:
    """A draft head, or a smaller causal LM."""
    if (folder / CONFIG).is_file() and (kind := head_kind(folder)) is not None:
        if not _takes(kind, options):
            raise OptionError(f"--num-draft-tokens: {folder} holds a {kind.__name__}, which takes none")
        return kind.from_pretrained(folder, **options)
    return DraftModel(load_model(folder, dtype, "--drafter"), **options)


def load_model(folder: Path, dtype: str, option: str) -> nn.Module:
    """A causal LM from a folder, in eval mode."""
    model: nn.Module = _load("AutoModelForCausalLM", folder, option, dtype=getattr(torch, dtype))
    return model.eval()


def tokenizer_beside(folder: Path) -> Any:
    """The tokenizer beside a model; None if there are no files of one. Raises OptionError if it cannot be loaded."""
    return load_tokenizer(folder) if any((folder / name).is_file() for name in _TOKENIZERS) else None


def load_config(folder: Path) -> Any:
    """A model's configuration."""
    return _load("AutoConfig", folder, "--model")


def is_artifact(folder: Path) -> bool:
    """Whether a folder is one that an export wrote."""
    return (folder / manifest.NAME).is_file()


def check_not_chosen(arguments: argparse.Namespace) -> None:
    """Raises OptionError if a flag says how to compile what is an artifact already."""
    given = [name for name in _CHOSEN if name in arguments.given]
    if given and is_artifact(arguments.model):
        flag = "--" + given[0].replace("_", "-")
        raise OptionError(f"{flag} was chosen when {arguments.model} was written; leave it out, or export again")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside a model, or that of an artifact."""
    if is_artifact(folder):
        return load_tokenizer_of_artifact(folder)
    return _load("AutoTokenizer", folder, "--model")


def _load(auto_class: str, folder: Path, option: str, **options: Any) -> Any:
    """What one of transformers' auto classes makes of `folder`, and nothing but that folder: no download."""
    if not (folder / "config.json").is_file():
        raise OptionError(
            f"{option} {folder}: there is no config.json; pass a folder that save_pretrained wrote"
            if folder.is_dir()
            else f"{option} {folder}: there is no such folder"
        )
    try:
        import transformers
    except ImportError as error:
        raise OptionError('the command line needs transformers: pip install "emssd_compile[hf]"') from error
    try:
        return getattr(transformers, auto_class).from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # damaged files end in errors of any kind
        told = f"{type(error).__name__}: {error}"
        raise OptionError(f"{option} {folder}: {auto_class} cannot load it: {told}") from error
