"""Tokens per second of every way to decode the demo model, side by side in one process.

    python -m bench.speedup
    python -m bench.speedup --batches 1 8 --tokens 128 --repeats 5 --json bench/results/speedup_cpu.json

Every row emits exactly `--tokens` tokens (no EOS). Seconds include reading the prompts. Candidates alternate; figures
are medians. Each candidate's tokens are compared with the model's own greedy decoding of each prompt alone.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from bench.baselines import hf_assisted, hf_generate, vanilla_padded
from bench.baselines.common import BaselineResult
from bench.ours import ours
from bench.timing import Comparison, compare
from emssd_compile.drafters import Drafter, DraftModel, PromptLookup

DEMO_MODEL = Path(__file__).parents[1] / "examples" / "demo_model"
Run = Callable[[list[list[int]]], BaselineResult]


def main() -> None:
    """Compile, time, print, save."""
    options = parse_arguments()
    console = Console()
    target, draft = load("target"), load("draft")
    prompts = read_prompts()
    runs = dict(candidates(console, target, draft, prompts, options))
    with console.status("decoding each prompt alone, for comparison"):
        expected = [hf_generate.run(target, [p], max_new_tokens=options.tokens).tokens[0] for p in prompts]
    tables = []
    for batch in options.batches:
        chosen = spread(len(prompts), batch)
        rows, right = [prompts[i] for i in chosen], [expected[i] for i in chosen]
        with console.status(f"timing batch {batch}"):
            comparison = compare({name: partial(run, rows) for name, run in runs.items()}, options.repeats)
        results = {name: run(rows) for name, run in runs.items()}
        console.print(comparison.table(f"demo model, batch {batch}, {options.tokens} new tokens"))
        report(console, results, right)
        tables.append(summary(batch, comparison, results, right))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"command": "python -m bench.speedup", "tables": tables}, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8], help="rows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each candidate (default: %(default)s)")
    parser.add_argument("--lookup-tokens", type=int, nargs="+", default=[4, 7], help="K of prompt lookup")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[4], help="K of the draft model")
    parser.add_argument("--backend", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args()


def load(name: str) -> PreTrainedModel:
    """One of the shipped models, in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(DEMO_MODEL / name, dtype=torch.float32)
    return model.eval()


def read_prompts() -> list[list[int]]:
    """The shipped prompts: parts of modules that the models were not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL / "target")
    texts = [prompt["text"] for prompt in json.loads((DEMO_MODEL / "prompts.json").read_text())]
    ids: list[list[int]] = tokenizer(texts)["input_ids"]
    return ids


def spread(count: int, batch: int) -> list[int]:
    """`batch` of `count` indices, evenly spread."""
    return [index * count // batch for index in range(batch)]


def candidates(
    console: Console,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: list[list[int]],
    options: argparse.Namespace,
) -> Iterator[tuple[str, Run]]:
    """Every way to decode, the reference first."""
    tokens = options.tokens
    yield "hf_generate", partial(hf_generate.run, target, max_new_tokens=tokens)
    lookup = partial(hf_assisted.run, target, max_new_tokens=tokens, prompt_lookup_num_tokens=7)
    yield "hf_assisted, lookup (batch 1 loop)", lookup
    padded = partial(vanilla_padded.run, target, max_new_tokens=tokens, num_draft_tokens=7)
    yield "vanilla_padded, lookup K=7", padded
    drafters: dict[str, str | Drafter] = {
        "none": "none",
        **{f"lookup K={k}": PromptLookup(k) for k in options.lookup_tokens},
        **{f"draft model K={k}": DraftModel(draft, k) for k in options.draft_tokens},
    }
    for name, drafter in drafters.items():
        with console.status(f"compiling ours, {name}"):
            run = ours(
                target,
                drafter,
                max_new_tokens=tokens,
                max_batch=max(options.batches),
                max_length=max(map(len, prompts)) + tokens,
                backend=options.backend,
            )
        yield f"ours, {name}", run


def report(console: Console, results: dict[str, BaselineResult], expected: list[list[int]]) -> None:
    """What the table of times does not say."""
    for name, result in results.items():
        identical = "yes" if result.tokens == expected else "NO"
        accepted = result.stats.get("mean_acceptance_length")
        length = "" if accepted is None else f", {accepted:.2f} tokens a row and step"
        console.print(f"  {name}: same tokens as each prompt alone: {identical}{length}", highlight=False)


def summary(
    batch: int, comparison: Comparison, results: dict[str, BaselineResult], expected: list[list[int]]
) -> dict[str, object]:
    """One batch size, for the JSON file."""
    return {
        "batch": batch,
        "hardware": comparison.hardware,
        "candidates": [
            {
                "name": timing.name,
                "median_seconds": timing.median_seconds,
                "seconds": timing.seconds,
                "tokens_per_second": timing.num_tokens / timing.median_seconds,
                "speedup": timing.speedup,
                "tokens_identical": results[timing.name].tokens == expected,
                "stats": results[timing.name].stats,
            }
            for timing in comparison.timings
        ],
    }


if __name__ == "__main__":
    main()
