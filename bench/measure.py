"""What the tables of single steps and kernels measure with: a device's bandwidth, one call, a steady step."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.command import timed
from emssd_compile import OptimizedModel
from emssd_compile.runtime.engine import Request

_COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Large against any cache."""


def copy_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second that `device` reads and writes in copying a large tensor: the median of `repeats` copies."""
    source = torch.ones(_COPIED_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = [timed(lambda: target.copy_(source), device)[1] for _ in range(repeats + 1)][1:]
    return 2 * _COPIED_BYTES[device.type] / statistics.median(seconds)


def call_seconds(work: Callable[[], object], device: torch.device, least_seconds: float = 0.02) -> float:
    """Seconds of one call of `work` among as many as take `least_seconds` together, the first left out.

    On CUDA the calls are captured as one graph where that is possible, as a step is: launches then cost nothing.
    """
    work()
    iterations = max(1, int(least_seconds / max(timed(work, device)[1], 1e-7)))

    def loop() -> None:
        for _ in range(iterations):
            work()

    replay = _captured(loop) if device.type == "cuda" else loop
    if replay is not loop:
        replay()
    return timed(replay, device)[1] / iterations


def _captured(loop: Callable[[], None]) -> Callable[[], None]:
    """`loop` as a CUDA graph; `loop` itself if something in it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loop()
    except RuntimeError:
        return loop
    return graph.replay


def steady_step_seconds(fast: OptimizedModel, batch: int, context: int, steps: int) -> float:
    """Seconds of one decoding step of `batch` rows that hold `context` tokens, and more after each step.

    No prompt is read: the rows go on over whatever finite numbers the KV cache holds. Two runs that differ by `steps`
    new tokens are timed and subtracted, so what a run costs besides its steps is out, as are the last steps of a row,
    which verify fewer drafts.
    """
    prompts = [[0] * context] * batch
    least = fast.drafter.num_draft_tokens + 2
    short, long = (resume(fast, prompts, most) for most in (least, least + steps))
    return (long.seconds - short.seconds) / (long.num_steps - short.num_steps)


@dataclass(frozen=True)
class Run:
    """What `resume` did.

    Attributes:
        tokens: new tokens of each row.
        seconds: from prompts in to tokens out.
        num_steps: launches of the step.
        num_row_steps: decoding steps of all rows together.
        num_tokens: tokens that went through the model, padding included.
    """

    tokens: list[list[int]]
    seconds: float
    num_steps: int
    num_row_steps: int
    num_tokens: int


def resume(fast: OptimizedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Run:
    """Decode, without EOS, as if all but the last token of every prompt had been read.

    What the KV cache holds is taken for theirs. It is, if the last call of `fast.generate` had the same prompts, not
    more than rows, in the same order: row b keeps what it read.
    """
    engine = fast._engine
    engine.counters()
    requests = [
        Request(row, torch.tensor(prompt), max_new_tokens, num_read=len(prompt) - 1)
        for row, prompt in enumerate(prompts)
    ]
    _, seconds = timed(lambda: deque(engine.run(requests), maxlen=0), fast.device)
    counts = engine.counters()[0]
    return Run(
        [request.output for request in requests],
        seconds,
        num_steps=counts["num_steps"],
        num_row_steps=counts["num_row_steps"],
        num_tokens=counts["num_fed_tokens"] + counts["num_padding_tokens"],
    )
