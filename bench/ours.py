"""The compiled model as a candidate."""

from collections.abc import Callable
from functools import partial

from torch import nn

import emssd_compile
from bench.baselines.common import BaselineResult
from bench.command import timed
from emssd_compile.optimized_model import OptimizedModel


def compile_ours(
    model: nn.Module,
    drafter: str | nn.Module,
    *,
    max_batch: int,
    max_length: int,
    layout: str = "auto",
    backend: str = "inductor",
    kv_dtype: str | None = None,
) -> OptimizedModel:
    """`model` compiled with `drafter`, warmed up. The arguments are those of `emssd_compile.optimize`."""
    fast = emssd_compile.optimize(
        model,
        drafter,
        max_batch=max_batch,
        max_length=max_length,
        layout=layout,
        backend=backend,
        kv_dtype=kv_dtype,
    )
    fast.warmup()
    return fast


def decode(fast: OptimizedModel, prompts: list[list[int]], *, max_new_tokens: int) -> BaselineResult:
    """Greedy continuations of all prompts, without end of sequence.

    Returns:
        The result, with the stats `mean_acceptance_length` and `num_padding_tokens` of `emssd_compile`.
    """
    fast.stats.reset()
    rows, seconds = timed(lambda: fast.generate(prompts, max_new_tokens=max_new_tokens, eos_token_id=None), fast.device)
    new = [list(row[len(prompt) :]) for row, prompt in zip(rows, prompts, strict=True)]
    stats = {
        "mean_acceptance_length": fast.stats.mean_acceptance_length,
        "num_padding_tokens": fast.stats.num_padding_tokens,
    }
    return BaselineResult(new, seconds, stats=stats)


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
    fast = compile_ours(model, drafter, max_batch=max_batch, max_length=max_length, backend=backend)
    return partial(decode, fast, max_new_tokens=max_new_tokens)
