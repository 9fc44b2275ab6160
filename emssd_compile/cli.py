"""The command line: `generate` continues prompts with a saved model, `explain` shows what the compiler makes of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import emssd_compile
from emssd_compile.drafters import DRAFTERS, DraftModel, PromptLookup
from emssd_compile.errors import EmssdError, InvalidInputError, OptionError
from emssd_compile.layouts import LAYOUTS
from emssd_compile.lowering import BACKENDS
from emssd_compile.stats import Stats

_PROGRAM = "python -m emssd_compile"

_GENERATE_EXAMPLES = f"""
examples:
  {_PROGRAM} generate --model llama/ --prompt "def fibonacci(n):"
      drafts by prompt lookup: copies what followed the newest words earlier in the same text
  {_PROGRAM} generate --model llama/ --drafter small-llama/ --num-draft-tokens 5 --prompt-file prompts.json
      a smaller model of the same vocabulary drafts; all prompts are decoded together, none is padded
  {_PROGRAM} generate --model llama/ --drafter none --backend eager --prompt-file essay.txt
      no drafts and no compilation: slower, and the same text

prompt files:
  *.json     a list of prompts, each a string or an object with "text"
  *.jsonl    one such prompt a line
  others     the whole file is one prompt

The text goes to standard output, everything else to standard error.
"""

_EXPLAIN_EXAMPLES = f"""
examples:
  {_PROGRAM} explain --model llama/
      what each pass changed, what it left alone and why, and which ops the fused step holds
  {_PROGRAM} explain --model llama/ --drafter none --dump stages/
      also write the graph before and after each pass as readable code: stages/NN_<pass>.before.py and .after.py

A model that cannot be compiled exactly is refused, with the node, its op and its module.
"""


def build_parser() -> argparse.ArgumentParser:
    """The arguments of both commands."""
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Batched speculative decoding without padding. The tokens are the model's own.",
        epilog="`generate --help` and `explain --help` show examples.",
    )
    parser.add_argument("--version", action="version", version=f"emssd_compile {emssd_compile.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{generate,explain}")
    _add_generate(commands)
    _add_explain(commands)
    return parser


def _add_generate(commands: Any) -> None:
    parser = _add_command(commands, "generate", "continue prompts greedily", _GENERATE_EXAMPLES)
    parser.add_argument("--prompt", metavar="TEXT", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        action="append",
        default=[],
        type=Path,
        help="see below; may be repeated",
    )
    parser.add_argument("--max-new-tokens", metavar="N", type=_positive, default=128, help="default: %(default)s")
    parser.add_argument(
        "--max-batch",
        metavar="B",
        type=_positive,
        default=8,
        help="prompts at a time; others wait (default: %(default)s)",
    )
    parser.add_argument(
        "--max-length",
        metavar="C",
        type=_positive,
        help="tokens a row can hold (default: what the longest prompt and its new tokens need)",
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="inductor", help="eager starts at once (default: %(default)s)"
    )
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="auto", help="auto drafts only where that is faster (default: %(default)s)"
    )


def _add_explain(commands: Any) -> None:
    parser = _add_command(commands, "explain", "show what the compiler does with a model", _EXPLAIN_EXAMPLES)
    parser.add_argument("--dump", metavar="DIR", type=Path, help="write every stage of the graph there")
    # The passes do the same whatever the sizes are; these are small so that a large model's KV cache is.
    parser.set_defaults(max_batch=1, max_length=64, backend="eager", layout="auto")


def _add_command(commands: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", metavar="DIR", type=Path, required=True, help="folder of a Hugging Face causal LM (save_pretrained)"
    )
    parser.add_argument(
        "--drafter",
        metavar="WHO",
        default="prompt-lookup",
        help=f"{', '.join(DRAFTERS)}, or the folder of a smaller causal LM (default: %(default)s)",
    )
    parser.add_argument("--num-draft-tokens", metavar="K", type=_positive, help="tokens drafted a row and step")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights; exactness is promised for float32 (default: %(default)s)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


_positive.__name__ = "positive integer"  # what argparse calls it in "invalid positive integer value: 'x'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, or 1 after an error that is explained on standard error."""
    arguments = build_parser().parse_args(argv)
    notes = Console(stderr=True)
    try:
        (_generate if arguments.command == "generate" else _explain)(arguments, notes)
    except (EmssdError, NotImplementedError) as error:
        notes.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        return 1
    return 0


def _generate(arguments: argparse.Namespace, notes: Console) -> None:
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    model = _load_model(arguments.model, arguments.dtype, "--model")
    tokenizer = _load_tokenizer(arguments.model)
    ids: list[list[int]] = tokenizer(prompts)["input_ids"]
    arguments.max_length = arguments.max_length or max(map(len, ids)) + arguments.max_new_tokens
    with notes.status("compiling"):
        fast = _optimize(model, arguments)
        fast.warmup()
    with notes.status("decoding"):
        started = time.perf_counter()
        rows = fast.generate(ids, max_new_tokens=arguments.max_new_tokens)
        seconds = time.perf_counter() - started
    for index, (prompt, row) in enumerate(zip(ids, rows, strict=True)):
        if len(ids) > 1:
            print(f"=== prompt {index + 1} ===")
        # Not through rich, which expands tabs and drops control characters.
        print(prompts[index] + tokenizer.decode(row[len(prompt) :], skip_special_tokens=True))
    notes.print(_stats_table(fast.stats, seconds))


def _explain(arguments: argparse.Namespace, notes: Console) -> None:
    model = _load_model(arguments.model, arguments.dtype, "--model")
    with emssd_compile.dump(arguments.dump) if arguments.dump else contextlib.nullcontext():
        fast = _optimize(model, arguments)
    # As a string: its tables keep their width when the output is a file or a narrow terminal.
    sys.stdout.write(str(fast.explain()))
    if arguments.dump:
        notes.print(f"stages written to {arguments.dump}; summary.txt lists them")


def _optimize(model: nn.Module, arguments: argparse.Namespace) -> emssd_compile.OptimizedModel:
    return emssd_compile.optimize(
        model,
        _make_drafter(arguments),
        max_batch=arguments.max_batch,
        max_length=arguments.max_length,
        backend=arguments.backend,
        layout=arguments.layout,
    )


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """The prompts given as texts, then those of the files in order.

    A `.json` file is a list of prompts, a `.jsonl` file has one a line, each a string or an object with `"text"`; any
    other file is one prompt.

    Raises:
        OptionError: no prompt was given, or a file cannot be read.
        InvalidInputError: a prompt is empty or no text; says which.
    """
    prompts = list(texts)
    for file in files:
        prompts += _read_file(file)
    if not prompts:
        raise OptionError("no prompt: pass --prompt TEXT or --prompt-file FILE")
    if "" in prompts:
        raise InvalidInputError(f"prompt {prompts.index('') + 1} of {len(prompts)} is empty; give it at least one word")
    return prompts


def _read_file(file: Path) -> list[str]:
    try:
        content = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            entries = json.loads(content)
        elif file.suffix == ".jsonl":
            entries = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            return [content]
    except (OSError, ValueError) as error:
        raise OptionError(f"--prompt-file {file} cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise InvalidInputError(f'{file} holds no list; write ["a prompt", ...] or [{{"text": "a prompt"}}, ...]')
    prompts: list[str] = []
    for index, entry in enumerate(entries):
        prompt = entry.get("text") if isinstance(entry, dict) else entry
        if not isinstance(prompt, str):
            raise InvalidInputError(f'{file}, entry {index}: neither a string nor an object with a string "text"')
        prompts.append(prompt)
    return prompts


def _make_drafter(arguments: argparse.Namespace) -> str | nn.Module:
    choice, count = arguments.drafter, arguments.num_draft_tokens
    options = {} if count is None else {"num_draft_tokens": count}
    if choice == "prompt-lookup":
        return PromptLookup(**options)
    if choice == "none":
        if options:
            raise OptionError("--num-draft-tokens with --drafter none: nobody drafts; leave one of them out")
        return "none"
    if not Path(choice).is_dir():
        raise OptionError(f"--drafter {choice} is neither a folder nor one of {', '.join(DRAFTERS)}")
    return DraftModel(_load_model(Path(choice), arguments.dtype, "--drafter"), **options)


def _load_model(folder: Path, dtype: str, option: str) -> nn.Module:
    model: nn.Module = _load("AutoModelForCausalLM", folder, option, dtype=getattr(torch, dtype))
    return model.eval()


def _load_tokenizer(folder: Path) -> Any:
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
    except (OSError, ValueError) as error:
        raise OptionError(f"{option} {folder}: {auto_class} cannot load it: {error}") from error


def _stats_table(stats: Stats, seconds: float) -> Table:
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
