"""`batch`: continue all prompts of a file, however long that takes."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import secrets
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from emssd_compile.batch.lines import Line, Read, read_lines, survey
from emssd_compile.batch.local import Continuation, continued
from emssd_compile.batch.output import Output, fingerprint
from emssd_compile.chat import check_template
from emssd_compile.cli.decoding import add_decoding, sampling
from emssd_compile.cli.models import (
    PROGRAM,
    add_command,
    add_memory,
    add_model,
    add_sizes,
    check_not_chosen,
    is_artifact,
    load_config,
    load_tokenizer,
    open_decoder,
    positive,
)
from emssd_compile.cli.prompts import NO_CHAT, Prompt, check_prompt, parse_prompt
from emssd_compile.decoder import Decoder
from emssd_compile.errors import CapacityError, InvalidInputError, OptionError
from emssd_compile.export.folder import read_manifest
from emssd_compile.export.opening import check_kind
from emssd_compile.length import length_limit_of_config, text_config
from emssd_compile.progress import progress_bar, working
from emssd_compile.step.paging import BLOCK_SIZE

EXAMPLES = f"""
examples:
  {PROGRAM} batch --model llama/ --input prompts.jsonl --output out.jsonl
      when it was broken off, by whatever, the same command goes on where it was: each prompt is there once
  {PROGRAM} batch --model llama/ --input chats.jsonl --output out.jsonl --chat --max-batch 32 --skip-errors
      texts are what a user says; what is wrong with a line is its result
  {PROGRAM} batch --model llama/ --input prompts.jsonl --output out.jsonl --workers 2
      two processes on Ray, each with the model; one that dies is replaced, and its prompts are decoded again
  {PROGRAM} batch --model /shared/llama --input in.jsonl --output /shared/out.jsonl --workers 8 --ray-address auto
      on a cluster: the folders of the model and of the output are where all its machines see them

The input has a JSON value a line: a string, a list of token ids, or an object with "text", with "messages" for a chat,
or with "input_ids". Its "id" or "custom_id" tells which result is whose; without one that is the line's number.

The output has an object a line, in the order in which they are done: what the prompt came in, with "id", "completion",
"num_new_tokens" and "finish_reason" (eos, length, stop or error) added, for token ids "completion_ids", and "error"
where that is the reason. It is there when all are; until then FILE.partial is, and FILE.job says what all depends on.
"""


_OF_RESULTS = ("completion", "completion_ids", "num_new_tokens")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "batch", "continue all prompts of a file, each exactly once", EXAMPLES)
    add_model(parser)
    add_sizes(parser, max_length="what the longest prompt and its new tokens need")
    add_memory(parser)
    parser.add_argument("--input", metavar="FILE", type=Path, required=True, help="JSONL, see below")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="JSONL, see below")
    parser.add_argument(
        "--skip-errors", action="store_true", help="a line that is bad gets its error as result, and ends nothing"
    )
    parser.add_argument("--workers", metavar="N", type=positive, help="decode in so many processes, on Ray")
    parser.add_argument("--worker-cpus", metavar="N", type=positive, help="threads of each of them (default: 1)")
    parser.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a cluster that they run on (default: this machine)"
    )
    add_decoding(parser)


def run(arguments: argparse.Namespace, notes: Console) -> None:
    """Run the command."""
    how = sampling(arguments)
    check_not_chosen(arguments)
    if arguments.workers is None and (arguments.worker_cpus or arguments.ray_address):
        raise OptionError("--worker-cpus and --ray-address are for --workers N; pass that, too, or leave them out")
    if not arguments.input.is_file():
        raise OptionError(
            f"--input {arguments.input} is no file; prompts are read more than once, so write them to one"
        )
    decode = _here if arguments.workers is None else _on_ray
    tokenizer = load_tokenizer(arguments.model)
    if arguments.chat:
        check_template(tokenizer, NO_CHAT)
    read = _reader(arguments, tokenizer)
    drawn = {"--seed": secrets.randbits(32)} if how and arguments.seed is None else {}
    with contextlib.closing(Output(arguments.output, _job(arguments), drawn)) as output:
        if output.is_complete:
            notes.print(f"{arguments.output} is complete: nothing is left to do", soft_wrap=True)
            return
        with working("reading the prompts", shown=True):
            found = survey(arguments.input, read, skips_errors=arguments.skip_errors)
            done = output.resume(found.index)
        arguments.max_length = arguments.max_length or found.longest + arguments.max_new_tokens
        arguments.seed = output.job["--seed"]
        lines = (line for line in read_lines(arguments.input, read) if not found.index.is_done(line.key))
        options = _options(arguments, tokenizer, how)
        started, written = time.perf_counter(), done
        try:
            arguments.longest = None if arguments.skip_errors else found.longest
            for line, now in _shown(decode(lines, read, arguments, options, notes), done, found.count):
                if now.error and not arguments.skip_errors:
                    raise InvalidInputError(f"line {line.number}: {now.error}")
                if found.index.finish(line.key):
                    output.write(_result(line, now, tokenizer))
                    written += 1
        except KeyboardInterrupt:
            where = f"what is done is in {output.partial}; the same command goes on from there"
            notes.print(f"interrupted: {where}", soft_wrap=True)
            raise SystemExit(130) from None
        if written != found.count or fingerprint(arguments.input) != output.job["--input"]:
            raise InvalidInputError(
                f"--input {arguments.input} was changed while it was read; remove {output.partial} and begin anew"
            )
        output.finish()
    took = f"{found.count - done} prompts in {time.perf_counter() - started:.0f} s"
    notes.print(f"{arguments.output} is written: {took}", soft_wrap=True)


def _job(arguments: argparse.Namespace) -> dict[str, Any]:
    """What tokens depend on; sizes, drafts, layout and backend change none of them."""
    names = ("dtype", "chat", "max_new_tokens", "stop", "temperature", "top_k", "top_p", "seed")
    given = {"--" + name.replace("_", "-"): getattr(arguments, name) for name in names}
    return {"--input": fingerprint(arguments.input), "--model": fingerprint(arguments.model), **given}


def _reader(arguments: argparse.Namespace, tokenizer: Any) -> Read:
    limit: int | None
    if is_artifact(arguments.model):
        made = read_manifest(arguments.model)
        check_kind(arguments.model, made, None, "step")
        sizes = made.signature.sizes
        vocabulary, limit, arguments.max_batch = sizes.vocabulary, sizes.capacity, sizes.rows
    else:
        config = load_config(arguments.model)
        vocabulary, limit = text_config(config).vocab_size, arguments.max_length or length_limit_of_config(config)
    blocks = None if arguments.kv_tokens is None else -(-arguments.kv_tokens // BLOCK_SIZE)

    def read(entry: object, where: str) -> tuple[Prompt, list[int]]:
        prompt = parse_prompt(entry, where)
        check_prompt(prompt, where)
        prompt = prompt.as_chat() if arguments.chat else prompt
        try:
            tokens = prompt.tokens(tokenizer)
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}: {error}") from error
        unknown = [token for token in tokens if not 0 <= token < vocabulary]
        if unknown:
            raise InvalidInputError(f"{where}: token {unknown[0]} is not in the vocabulary of {vocabulary}")
        if limit is not None and len(tokens) + arguments.max_new_tokens > limit:
            whose = "--max-length" if arguments.max_length else "the model"
            raise CapacityError(
                f"{where}: its {len(tokens)} tokens and {arguments.max_new_tokens} new ones are more than the {limit} "
                f"of {whose}"
            )
        needed = -(-(len(tokens) + arguments.max_new_tokens) // BLOCK_SIZE)
        if blocks is not None and needed > blocks:
            raise CapacityError(
                f"{where}: its {len(tokens)} tokens and {arguments.max_new_tokens} new ones take {needed} blocks of "
                f"{BLOCK_SIZE} tokens, and the pool of kv_tokens={arguments.kv_tokens} has {blocks}"
            )
        return prompt, tokens

    return read


def _options(arguments: argparse.Namespace, tokenizer: Any, how: dict[str, Any]) -> dict[str, Any]:
    """Of `continued`."""
    given = {**how, "seed": arguments.seed if how else None, "max_new_tokens": arguments.max_new_tokens}
    if arguments.stop:
        from transformers import StopStringCriteria

        # One for all: making it reads the whole vocabulary.
        given["stopping_criteria"] = [StopStringCriteria(tokenizer, arguments.stop)]
    return given


def _here(
    lines: Iterator[Line], read: Read, arguments: argparse.Namespace, options: dict[str, Any], notes: Console
) -> Iterator[tuple[Line, Continuation]]:
    """Decode in this process."""
    with working("loading" if is_artifact(arguments.model) else "compiling", shown=True):
        fast = _opened(arguments)
    with fast.session(max_queue=arguments.max_batch) as session:
        _check_pool(session.capacity, arguments)
        yield from continued(session, lines, at_a_time=2 * arguments.max_batch, **options)


def _check_pool(capacity: int, arguments: argparse.Namespace) -> None:
    """Raises CapacityError, before any work, if there is a line that the pool that rows share has no room for."""
    needed = (arguments.longest or 0) + arguments.max_new_tokens
    if arguments.longest is not None and needed > capacity:
        raise CapacityError(
            f"the longest prompt has {arguments.longest} tokens, and with {arguments.max_new_tokens} new ones that is "
            f"more than the {capacity} that the pool of keys and values has room for; pass a larger kv_tokens"
        )


def _on_ray(
    lines: Iterator[Line], read: Read, arguments: argparse.Namespace, options: dict[str, Any], notes: Console
) -> Iterator[tuple[Line, Continuation]]:
    """Decode in processes on Ray; each loads and compiles the model."""
    import emssd_compile.ray

    own = argparse.Namespace(**{**vars(arguments), "model": arguments.model.resolve()})
    if Path(own.drafter).is_dir():
        own.drafter = str(Path(own.drafter).resolve())
    notes.print(f"starting {own.workers} processes")
    yield from emssd_compile.ray.continued(
        lines,
        read,
        partial(_opened, own),
        own.output.with_name(f"{own.output.name}.pending"),
        workers=own.workers,
        cpus=own.worker_cpus or 1,
        address=own.ray_address,
        at_a_time=8 * own.max_batch,
        **options,
    )


def _opened(arguments: argparse.Namespace) -> Decoder:
    """What decodes, ready for what the options of decoding ask for."""
    fast = open_decoder(arguments)
    drawing = {} if is_artifact(arguments.model) else sampling(arguments)  # an artifact has one form of the step
    fast.warmup(**{name: value for name, value in drawing.items() if name != "seed"})
    return fast


def _shown(
    continuations: Iterator[tuple[Line, Continuation]], done: int, count: int
) -> Iterator[tuple[Line, Continuation]]:
    """Show how many of `count` there are; some were `done` before."""
    first = next(continuations, None)  # compiles, which is shown in a way of its own
    if first is None:
        return
    with progress_bar(True, count, "prompts") as advance:
        advance(done)
        for each in itertools.chain([first], continuations):
            yield each
            advance(1)


def _result(line: Line, found: Continuation, tokenizer: Any) -> dict[str, Any]:
    """What is written of a line."""
    if found.error:
        entry = {name: value for name, value in line.entry.items() if name not in _OF_RESULTS}  # of an earlier try
        return {**entry, "id": line.id, "finish_reason": "error", "error": found.error}
    completed = line.prompt.completed(line.tokens, found.tokens, tokenizer)
    if line.entry.get("finish_reason") == "error":  # the result of an earlier try
        completed.pop("error", None)
    return {**completed, "id": line.id, "finish_reason": found.finish_reason}
