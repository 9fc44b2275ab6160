"""Decode held-out prompts with the shipped model: Hugging Face, then ours without drafts and with each drafter.

    python examples/01_demo.py
    python examples/01_demo.py --batch 1 --tokens 64 --backend eager

Every row emits exactly `--tokens` tokens. Each run's tokens are compared with the model's own greedy decoding of each
prompt alone. Times are medians of alternating repeats after a warm-up and include reading the prompts.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[1]))  # bench/ is not part of the installed package
from bench import timing
from bench.baselines import hf_generate
from bench.baselines.common import BaselineResult
from bench.ours import ours

DEMO_MODEL = Path(__file__).parent / "demo_model"
LINES_SHOWN = 6


@dataclass
class Checked:
    """A candidate whose every run is compared with `expected`; callable, as `timing.compare` wants it.

    Args:
        run: decodes all prompts once.
        expected: the right new tokens of each row.
    """

    run: Callable[[], BaselineResult]
    expected: list[list[int]]
    identical: bool = True

    def __call__(self) -> BaselineResult:
        """One run; its result is kept as `last`."""
        self.last = self.run()
        self.identical &= self.last.tokens == self.expected
        return self.last


def main() -> None:
    """Compile, check, time, print."""
    arguments = parse_arguments()
    console = Console()
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(DEMO_MODEL / "target")
    target, draft = load("target"), load("draft")
    texts = read_prompts(arguments.batch)
    prompts: list[list[int]] = tokenizer(texts)["input_ids"]
    lengths = ", ".join(str(len(prompt)) for prompt in prompts)
    console.print(f"{len(prompts)} held-out prompts of {lengths} tokens, {arguments.tokens} new tokens each")

    drafters = {"without drafts": "none", "prompt lookup": "prompt-lookup", "draft model": draft}
    runs = {"Hugging Face generate": hugging_face(target, prompts, arguments.tokens)}
    for name, drafter in drafters.items():
        with console.status(f"compiling: {name}"):
            started = time.perf_counter()
            decode = ours(
                target,
                drafter,
                max_new_tokens=arguments.tokens,
                max_batch=len(prompts),
                max_length=max(map(len, prompts)) + arguments.tokens,
                backend=arguments.backend,
            )
            runs[f"ours, {name}"] = partial(decode, prompts)
        console.print(f"compiled ({arguments.backend}): {name}, {time.perf_counter() - started:.1f} s")
    with console.status("decoding each prompt alone, for comparison"):
        expected = [hf_generate.run(target, [p], max_new_tokens=arguments.tokens).tokens[0] for p in prompts]
    candidates = {name: Checked(run, expected) for name, run in runs.items()}
    with console.status("timing"):
        comparison = timing.compare(candidates, arguments.repeats)
    console.print(results_table(comparison, candidates))
    console.print(", ".join(f"{key} {value}" for key, value in comparison.hardware.items() if value is not None))
    show_text(console, texts[0], tokenizer.decode(candidates["ours, draft model"].last.tokens[0]))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each row (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="prompts, at most 32 (default: %(default)s)")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor", help="eager skips the compiler")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each candidate (default: %(default)s)")
    return parser.parse_args()


def load(name: str) -> PreTrainedModel:
    """One of the shipped models, in float32: there exactness is promised, and there every CPU is at home."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(DEMO_MODEL / name, dtype=torch.float32)
    return model.eval()


def read_prompts(count: int) -> list[str]:
    """`count` of the shipped prompts, spread over the held-out modules."""
    texts = [prompt["text"] for prompt in json.loads((DEMO_MODEL / "prompts.json").read_text())]
    if not 1 <= count <= len(texts):
        raise SystemExit(f"--batch {count}: there are 1 to {len(texts)} prompts to choose from")
    return [texts[index * len(texts) // count] for index in range(count)]


def hugging_face(model: PreTrainedModel, prompts: list[list[int]], tokens: int) -> Callable[[], BaselineResult]:
    """Plain `generate` on the left-padded batch."""
    widest = max(map(len, prompts))

    def run() -> BaselineResult:
        result = hf_generate.run(model, prompts, max_new_tokens=tokens)
        result.stats["num_padding_tokens"] = sum(widest - len(prompt) for prompt in prompts)
        return result

    return run


def results_table(comparison: timing.Comparison, candidates: Mapping[str, Checked]) -> Table:
    """A line for each candidate."""
    table = Table("decoding")
    for heading in ("seconds", "tokens/s", "ratio", "tokens a row\nand step", "padding\ntokens", "tokens\nidentical"):
        table.add_column(heading, justify="right")
    for result in comparison.timings:
        checked = candidates[result.name]
        table.add_row(
            result.name,
            f"{result.median_seconds:.2f}",
            f"{result.num_tokens / result.median_seconds:.0f}",
            f"{result.speedup:.2f}",
            f"{checked.last.stats.get('mean_acceptance_length', 1.0):.2f}",
            f"{checked.last.stats['num_padding_tokens']:.0f}",
            "yes" if checked.identical else "NO",
        )
    return table


def show_text(console: Console, prompt: str, continuation: str) -> None:
    """The end of a prompt, dimmed, and the beginning of what the model made of it."""
    console.print("\nThe first prompt's end, and its continuation:\n")
    end = "\n".join(prompt.splitlines()[-LINES_SHOWN // 2 :])
    beginning = "\n".join(continuation.split("\n")[:LINES_SHOWN])
    console.print(Text.assemble((end, "dim"), (beginning, "green")), soft_wrap=True)


if __name__ == "__main__":
    main()
