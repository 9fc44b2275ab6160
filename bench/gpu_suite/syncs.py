"""How often the host waits for the GPU in a decoding step, apart from the report's event: it should be never.

    python -m bench.gpu_suite.syncs --device cuda

Two calls of `generate` that differ in length are run with `torch.cuda.set_sync_debug_mode`; their difference leaves out
what a call waits for besides its steps.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Sequence

import torch

import emssd_compile
from bench import shapes
from bench.command import argument_parser, parse, save
from emssd_compile import OptimizedModel

_TOKENS = (16, 48)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print, save; returns 1 if a step waits."""
    options = parse_arguments(arguments)
    if options.device.type != "cuda":
        return _finish(options, [], skipped="needs a CUDA GPU")
    model = shapes.build("demo", options.device, options.dtype)
    backend = "eager" if options.smoke else "inductor"
    fast = emssd_compile.optimize(model, "prompt-lookup", max_batch=4, max_length=512, backend=backend)
    fast.warmup()
    (short, short_steps), (long, long_steps) = (count(fast, tokens) for tokens in _TOKENS)
    places = long - short
    a_step = places.total() / (long_steps - short_steps)
    return _finish(options, [{"drafter": "prompt-lookup", "a_step": a_step, "places": dict(places)}])


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--smoke", action="store_true", help="do not compile")
    return parse(parser, arguments)


def count(fast: OptimizedModel, num_tokens: int) -> tuple[Counter[str], int]:
    """Where the host waited, and the number of steps, in the second of two equal calls."""
    prompts = shapes.demo_prompts()[:4]
    fast.generate(prompts, max_new_tokens=num_tokens, eos_token_id=None)
    fast.stats.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            fast.generate(prompts, max_new_tokens=num_tokens, eos_token_id=None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    return Counter(f"{w.filename}:{w.lineno}" for w in waits), fast.stats.num_steps


def _finish(options: argparse.Namespace, rows: list[dict[str, object]], **context: str) -> int:
    for line in [f"{row['drafter']}: {row['a_step']} a step, at {row['places']}" for row in rows] or context.values():
        print(line)
    if options.json:
        save(options.json, "bench.gpu_suite.syncs", [{"title": "synchronisations", "rows": rows}], **context)
    return int(any(row["a_step"] != 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
