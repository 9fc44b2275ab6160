"""What the tables of single steps and kernels measure with: a device's bandwidth, one call, a steady step."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.command import timed
from emssd_compile import OptimizedModel
from emssd_compile.runtime.requests import Request

_MOVED_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Large against any cache."""


def memory_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second that `device` moves at best: the faster of reading a large tensor and copying one, each a median.

    Which is faster depends: a GPU may lose time when it turns from reading to writing, and summing on a few CPU cores
    may not keep the memory busy.
    """
    size = _MOVED_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    ways: list[tuple[int, Callable[[], object]]] = [(size, source.sum), (2 * size, lambda: target.copy_(source))]
    return max(moved / statistics.median(call_seconds(work, device) for _ in range(repeats)) for moved, work in ways)


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


@dataclass(frozen=True)
class SteadyStep:
    """What `steady_step` measured.

    Attributes:
        seconds: of one step.
        context: tokens of each row whose keys and values the step reads, in the mean; without its drafts.
    """

    seconds: float
    context: float


def steady_step(fast: OptimizedModel, batch: int, context: int, steps: int) -> SteadyStep:
    """One decoding step of `batch` rows that begin with `context` tokens and emit one each a step.

    No prompt is read: the rows go on over whatever finite numbers the KV cache holds. Two runs that differ by `steps`
    new tokens are timed and subtracted, so what a run costs besides its steps is out, as are the last steps of a row,
    which verify fewer drafts.
    """
    prompts = [[0] * context] * batch
    least = fast.drafter.num_draft_tokens + 2
    short, long = (resume(fast, prompts, most) for most in (least, least + steps))
    seconds = (long.seconds - short.seconds) / (long.num_steps - short.num_steps)
    # The step that emits a row's i-th token, counted from 0, reads context + i; the long run has i = least, ... more.
    return SteadyStep(seconds, context + least + (steps - 1) / 2)


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
