"""The compiled model as a candidate of `bench.timing.compare`."""

import time
from collections.abc import Callable

from torch import nn

import emssd_compile
from bench.baselines.common import BaselineResult


def ours(
    model: nn.Module,
    drafter: str | nn.Module,
    *,
    max_new_tokens: int,
    max_batch: int,
    max_length: int,
    backend: str = "inductor",
) -> Callable[[list[list[int]]], BaselineResult]:
    """Compile `model` with `drafter`, warm it up, and return what decodes a batch of prompts without EOS."""
    fast = emssd_compile.optimize(model, drafter, max_batch=max_batch, max_length=max_length, backend=backend)
    fast.warmup()

    def run(prompts: list[list[int]]) -> BaselineResult:
        fast.stats.reset()
        started = time.perf_counter()
        rows = fast.generate(prompts, max_new_tokens=max_new_tokens, eos_token_id=None)
        seconds = time.perf_counter() - started
        new = [list(row[len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]
        stats = {
            "mean_acceptance_length": fast.stats.mean_acceptance_length,
            "num_padding_tokens": fast.stats.num_padding_tokens,
        }
        return BaselineResult(new, seconds, stats=stats)

    return run
