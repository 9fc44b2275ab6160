"""Decoding beside C++ runtimes from PyPI: speed, tokens, memory, seconds to start.

    python -m bench.peers --install openvino onnxruntime llama_cpp ctranslate2
    python -m bench.peers --models demo llama-134m --dtypes float32 bfloat16 --json peers.json

Each way runs in a process of its own, that of a peer in an environment of its own; a peer that is not installed is
left out and said so. Models are converted here, from the same weights. All processes get the same prompts as token ids,
read them each time, know no end of sequence, and take turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from transformers import AutoTokenizer

from bench import command, shapes
from bench.peers import registry
from bench.peers.comparison import Contender, Speed, speeds, table
from bench.peers.registry import INSTALLABLE, PEERS, WAYS
from bench.peers.worker import Worker, WorkerError, convert, serving
from emssd_compile.errors import OptionError

DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> None:
    """Install, or convert, start, decode, print, save."""
    options = parse_arguments(arguments)
    if options.install:
        for name in options.install:
            try:
                registry.install(name)
            except OptionError as error:
                sys.exit(str(error))
        return
    console, tables = command.make_console(), []
    for model in options.models:
        for dtype in options.dtypes:
            contenders, figures = measure(model, dtype, options, console)
            title = f"{model}, {dtype}"
            console.print(table(title, contenders, figures, options.batches))
            ways = [{"way": way.name, **_facts(way)} for way in contenders]
            tables.append({"title": title, "ways": ways, "rows": [*map(asdict, figures)]})
            if options.json:
                command.save(options.json, "bench.peers", tables, threads=options.threads)
    console.print(f"{command.describe(command.hardware())}\n{command.describe(command.versions())}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    number = command.at_least(1)
    parser.add_argument("--install", nargs="+", choices=INSTALLABLE, metavar="PEER", help="install these, and end")
    parser.add_argument("--models", nargs="+", choices=shapes.NAMES, default=["demo", "llama-134m"], metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], metavar="NAME", help="(%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="NAME", help="(%(default)s)")
    parser.add_argument("--batches", nargs="+", type=number, default=[1, 4, 8], metavar="B", help="(%(default)s)")
    parser.add_argument("--tokens", type=number, default=64, help="new tokens a row (%(default)s)")
    parser.add_argument("--threads", type=number, default=2, help="of each process (%(default)s)")
    parser.add_argument("--lookup-tokens", type=number, default=7, help="drafts of a step (%(default)s)")
    parser.add_argument("--max-ngram", type=number, default=3, help="longest n-gram looked up (%(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor", help="ours (%(default)s)")
    parser.add_argument("--repeats", type=number, default=5, help="timed runs of each, in turn (%(default)s)")
    parser.add_argument("--least-seconds", type=command.at_least(0), default=0, help="of all repeats (%(default)s)")
    parser.add_argument("--time-limit", type=number, default=600, help="seconds for a start or run (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write figures, hardware and versions there")
    return parser.parse_args(arguments)


def measure(
    model: str, dtype: str, options: argparse.Namespace, console: Console
) -> tuple[list[Contender], list[Speed]]:
    """All ways with one model in one dtype."""
    prompts = shapes.prompts(model)
    by_batch = [shapes.spread(prompts, batch) for batch in options.batches]
    settings: dict[str, Any] = {
        "dtype": dtype,
        "threads": options.threads,
        "max_batch": max(options.batches),
        "max_length": max(map(len, chain(*by_batch))) + options.tokens,
        "max_ngram": options.max_ngram,
        "backend": options.backend,
    }
    figures: list[Speed] = []
    with ExitStack() as stack:
        cache, scratch = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        stack.enter_context(patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=str(cache)))
        with console.status(f"{model}, {dtype}: saving"):
            vocabulary = save_model(model, dtype, scratch / "source")
        asked = set(chain(*chain(*by_batch)))
        settings["unused_token"] = next(token for token in reversed(range(vocabulary)) if token not in asked)
        contenders = [Contender(name) for name in options.ways]
        for each in contenders:
            stack.callback(each.close)
            with console.status(f"{model}, {dtype}: {each.name} starts"):
                enter(each, scratch, settings, options)
        for rows in by_batch:
            with console.status(f"{model}, {dtype}: batch {len(rows)}"):
                figures += speeds(contenders, rows, options.tokens, options.repeats, options.least_seconds)
    return contenders, figures


def save_model(name: str, dtype: str, folder: Path) -> int:
    """In float32, which all converters read, with values that `dtype` can hold. Returns the size of the vocabulary."""
    model = shapes.build(name, dtype=getattr(torch, dtype)).float()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(shapes.tokenizer_folder(name)).save_pretrained(folder)
    return int(model.config.vocab_size)


def enter(contender: Contender, scratch: Path, settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Convert the model in `scratch`, once for each peer, and start the way; or say why it does not take part."""
    way = WAYS[contender.name]
    peer, folder = PEERS[way.peer], scratch / way.peer
    try:
        python = registry.interpreter(way.peer)
        if not folder.exists():
            convert(python, peer.worker, scratch / "source", folder, settings["dtype"])
    except (OptionError, WorkerError) as error:
        contender.failure = str(error)
        return
    own = {"lookup": options.lookup_tokens if way.lookup else 0, "way": way.candidate}
    serve = serving(python, peer.worker, folder, {**settings, **own})
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    contender.start(partial(Worker, serve, environment, options.time_limit))


def _facts(way: Contender) -> dict[str, object]:
    return {"failure": way.failure, "version": way.version, "ready_seconds": way.ready_seconds}


if __name__ == "__main__":
    main()
