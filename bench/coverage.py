"""Which causal LM types of transformers compile, and are their tokens right?

    python -m bench.coverage [--types llama,gpt2] [--json results.json] [--markdown table.md] [--jobs 2] [--resume]

Every type is built at toy size with random weights, captured, compiled, and asked for the greedy continuations of
ragged prompts, which are compared with the model's own: one prompt at a time, a full forward per token, no cache. The
only good outcomes are *exact* and *refused*. Each type has a process of its own: a crash or a hang is an outcome too.

A type whose forward changes at some length (sparse attention over the best keys, say) is refused for longer rows; it is
then tried again with rows as short as the refusal asks for, and what became of that stands beside the refusal.

Results are written as they come. `--resume` takes those of an earlier run out of the JSON file and does the others.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import re
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim
from transformers import GenerationConfig

import emssd_compile
from bench.command import hardware, versions
from emssd_compile.errors import UnsupportedModelError
from tests.zoo import MODEL_TYPES, UNAVAILABLE, VOCABULARY, toy_model

TIME_LIMIT = 120  # seconds of CPU per type: how busy the machine is does not matter
PATIENCE = 10  # times that, on the wall: a type that waits for ever uses no CPU
MEMORY_LIMIT = 8 << 30  # bytes of address space per type
PROMPT_LENGTHS = (1, 9, 37)
NEW_TOKENS = 24
MAX_LENGTH = 96
EXAMPLE_TOKENS = 11


class Outcome(StrEnum):
    """What became of a type."""

    EXACT = "exact"
    REFUSED = "refused"
    WRONG_TOKEN = "WRONG TOKEN"
    RAW_EXCEPTION = "RAW EXCEPTION"
    TIMEOUT = "TIMEOUT"
    NO_TOY = "no toy model"

    @property
    def is_defect(self) -> bool:
        """A model may be refused, but never crash, hang or get wrong tokens."""
        return self in (Outcome.WRONG_TOKEN, Outcome.RAW_EXCEPTION, Outcome.TIMEOUT)


@dataclass(frozen=True)
class Verdict:
    """The outcome for one type.

    Args:
        model_type: transformers' name.
        export: "symbolic" when `torch.export` takes the plain forward as it comes and keeps the number of tokens
            symbolic, otherwise what went wrong.
        outcome: of compiling and generating.
        detail: the refusal, the exception, or where the first wrong token is.
        seconds: wall time of everything, the reference included.
    """

    model_type: str
    export: str
    outcome: Outcome
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Continuation:
    """Greedy tokens of one prompt, each with the gap between the two largest logits it was chosen by."""

    tokens: list[int]
    margins: list[float]


class _Logits(nn.Module):
    """`ids[1, T] -> logits[1, T, V]`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def prompts() -> list[list[int]]:
    """Ragged prompts of a repeated random motif, so that prompt lookup finds something to draft."""
    generator = torch.Generator().manual_seed(1)
    motifs = [torch.randint(3, VOCABULARY, (7,), generator=generator).tolist() for _ in PROMPT_LENGTHS]
    return [(motif * 6)[:length] for motif, length in zip(motifs, PROMPT_LENGTHS, strict=True)]


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int]) -> Continuation:
    """The model's own greedy decoding of a prompt alone: one full forward per token."""
    logits_of = _Logits(model)
    tokens: list[int] = []
    margins: list[float] = []
    for _ in range(NEW_TOKENS):
        best = logits_of(torch.tensor([prompt + tokens]))[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
    return Continuation(tokens, margins)


@torch.no_grad()
def exportability(model: nn.Module) -> str:
    """See `Verdict.export`."""
    example = torch.arange(3, 3 + EXAMPLE_TOKENS)[None]
    longer = torch.arange(3, 3 + 2 * EXAMPLE_TOKENS + 7)[None]
    try:
        program = torch.export.export(_Logits(model), (example,), dynamic_shapes=({1: Dim.AUTO},), strict=False)
        program.module()(longer)  # a length that export took for granted shows up as a guard that fails
    except Exception as error:
        return _describe(error)
    return "symbolic"


def check_tokens(model: nn.Module, max_length: int = MAX_LENGTH) -> tuple[Outcome, str]:
    """Compile, generate, compare."""
    batch = [prompt for prompt in prompts() if len(prompt) + NEW_TOKENS <= max_length]
    try:
        fast = emssd_compile.optimize(
            model, drafter="prompt-lookup", max_batch=4, max_length=max_length, backend="eager"
        )
        rows: Any = fast.generate(batch, max_new_tokens=NEW_TOKENS)
    except UnsupportedModelError as error:
        return Outcome.REFUSED, " ".join(str(error).split())
    except Exception as error:
        return Outcome.RAW_EXCEPTION, _describe(error)
    return _compare(model, batch, rows)


def check_as_long_as_it_goes(model: nn.Module) -> tuple[Outcome, str]:
    """`check_tokens`, and once more with shorter rows if the refusal says that these would do."""
    outcome, detail = check_tokens(model)
    shorter = re.search(r"pass max_length=(\d+) or less", detail)
    if outcome is not Outcome.REFUSED or shorter is None or int(shorter[1]) <= NEW_TOKENS:
        return outcome, detail
    outcome, then = check_tokens(model, int(shorter[1]))
    return outcome, f"{detail}; with max_length={shorter[1]}: {then or outcome}"


def _compare(model: nn.Module, batch: list[list[int]], rows: Sequence[Sequence[int]]) -> tuple[Outcome, str]:
    for row, prompt in zip(rows, batch, strict=True):
        expected = greedy(model, prompt)
        tokens = [int(token) for token in row][len(prompt) :]
        if tokens != expected.tokens:
            return Outcome.WRONG_TOKEN, _first_difference(tokens, expected, len(prompt))
    return Outcome.EXACT, ""


def _first_difference(tokens: list[int], expected: Continuation, prompt_length: int) -> str:
    place = next((i for i, (a, b) in enumerate(zip(tokens, expected.tokens, strict=False)) if a != b), len(tokens))
    where = f"prompt of {prompt_length}, new token {place} of {NEW_TOKENS}"
    if place in (len(tokens), len(expected.tokens)):
        return f"{where}: {len(tokens)} tokens instead of {len(expected.tokens)}"
    return f"{where}: {tokens[place]} instead of {expected.tokens[place]}, margin {expected.margins[place]:.2e}"


def check(model_type: str) -> Verdict:
    """The verdict on one type, in this process."""
    if model_type in UNAVAILABLE:
        return Verdict(model_type, "no toy model", Outcome.NO_TOY, UNAVAILABLE[model_type])
    start = time.perf_counter()
    model = toy_model(model_type)
    model.generation_config = GenerationConfig()  # some types store beam search or a forced EOS; here it is greedy
    export = exportability(model)
    outcome, detail = check_as_long_as_it_goes(model)
    detail = re.sub(r"\S*site-packages/", "", detail)  # where this machine keeps them is nobody's business
    return Verdict(model_type, export, outcome, detail, time.perf_counter() - start)


def check_isolated(model_type: str) -> Verdict:
    """The verdict on one type, from a process with a time and a memory limit."""
    receiver, sender = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_send_verdict, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(TIME_LIMIT * PATIENCE):
            return Verdict(model_type, "unknown", Outcome.TIMEOUT, f"killed after {TIME_LIMIT * PATIENCE} s")
        verdict: Verdict = receiver.recv()
        return verdict
    except EOFError:
        process.join()
        if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
            return Verdict(model_type, "unknown", Outcome.TIMEOUT, f"killed after {TIME_LIMIT} s of CPU", TIME_LIMIT)
        return Verdict(model_type, "unknown", Outcome.RAW_EXCEPTION, f"process died with code {process.exitcode}")
    finally:
        process.join(timeout=1)
        process.kill()


def _send_verdict(model_type: str, sender: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    spent = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (spent + TIME_LIMIT, spent + TIME_LIMIT + 1))
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sender.send(check(model_type))


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def sweep(model_types: Iterable[str], jobs: int) -> Iterator[Verdict]:
    """Verdicts in the order of the types, `jobs` at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(check_isolated, model_types)


def report(verdicts: list[Verdict]) -> Table:
    """Everything that is not exact, then the counts."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    exportable = sum(verdict.export == "symbolic" for verdict in verdicts)
    summary = ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome])
    table = Table("type", "torch.export", "outcome", "detail", title=f"{len(verdicts)} types: {summary}")
    table.caption = f"{exportable} types are exportable as they come; exact ones are not listed"
    for verdict in verdicts:
        if verdict.outcome is not Outcome.EXACT:
            style = "red" if verdict.outcome.is_defect else None
            table.add_row(verdict.model_type, verdict.export, verdict.outcome, verdict.detail, style=style)
    return table


def markdown(verdicts: list[Verdict], about: dict[str, object]) -> str:
    """The table as it is committed: every type and, where it is not exact, the reason."""
    counts = Counter(verdict.outcome for verdict in verdicts)
    lines = [
        f"# {len(verdicts)} causal LM types of transformers",
        "",
        ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome])
        + f". {', '.join(f'{name} {value}' for name, value in about.items())}.",
        "",
        "| type | outcome | reason |",
        "|---|---|---|",
    ]
    for verdict in sorted(verdicts, key=lambda verdict: verdict.model_type):
        reason = " ".join(verdict.detail.split()).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {verdict.model_type} | {verdict.outcome} | {reason} |")
    return "\n".join(lines) + "\n"


def _earlier(path: Path | None) -> list[Verdict]:
    """Verdicts of an earlier run, if there was one."""
    if path is None or not path.exists():
        return []
    record = json.loads(path.read_text())
    return [Verdict(**{**verdict, "outcome": Outcome(verdict["outcome"])}) for verdict in record["verdicts"]]


def main() -> int:
    """Returns 1 if there was a defect, as an exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.coverage", description=__doc__)
    parser.add_argument("--types", type=lambda text: text.split(","), default=MODEL_TYPES, help="comma-separated")
    parser.add_argument("--json", type=Path, help="write the verdicts, the hardware and the versions to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--jobs", type=int, default=1, help="types at a time")
    parser.add_argument("--resume", action="store_true", help="go on where the run that wrote the JSON file ended")
    arguments = parser.parse_args()
    console = Console()
    verdicts = _earlier(arguments.json) if arguments.resume else []
    known = {verdict.model_type for verdict in verdicts}
    todo = [model_type for model_type in arguments.types if model_type not in known]
    for verdict in track(sweep(todo, arguments.jobs), "checking", len(todo), console=console):
        verdicts.append(verdict)
        if verdict.outcome.is_defect:
            console.print(f"{verdict.model_type}: {verdict.outcome}: {verdict.detail}", style="red", markup=False)
        if arguments.json:
            record = {"hardware": hardware() | versions(), "verdicts": [asdict(verdict) for verdict in verdicts]}
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    console.print(report(verdicts))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(verdicts, dict(versions())))
    return min(sum(verdict.outcome.is_defect for verdict in verdicts), 1)


_PROCESSES = multiprocessing.get_context("forkserver")  # imports torch once; no thread is alive when it forks
_PROCESSES.set_forkserver_preload(["emssd_compile", "tests.zoo"])

if __name__ == "__main__":
    sys.exit(main())
