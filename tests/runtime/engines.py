"""Engines of one compiled model that launch in different ways, and what their steps did."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.buckets import StepSizes, decode_buckets
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.launch import GraphLauncher
from emssd_compile.step.state import COUNTERS
from tests.exactness.compiled import rechunked
from tests.runtime.tape import TapeDevice


def graph_engine(fast: OptimizedModel, prefill_chunk: int, device: TapeDevice) -> Engine:
    """As on a CUDA device: steps are captured per bucket, for all rows, and the host is one step behind."""
    step = fast._step.suited(fast._step.used, drafts_for_few=False)
    engine = rechunked(OptimizedModel(fast.model, step, fast.options), prefill_chunk)._engine
    direct = engine.launcher
    buckets = decode_buckets(engine.num_rows, engine.num_draft_tokens, engine.max_depth)
    engine.launcher = GraphLauncher(direct.variant, direct.tensors, device, buckets)
    engine.lag = 1
    return engine


@dataclass(frozen=True)
class ObservedStep:
    """One launch.

    Attributes:
        sizes: what the host asked for.
        active: rows that took part.
        pending: their tokens that they knew and had not read.
        drafts: drafts that the device had chosen for them.
        wanted: their tokens and drafts together, row by row.
        verified: drafts that were verified.
        idle: rows that took part and read nothing.
    """

    sizes: StepSizes
    active: int
    pending: int
    drafts: int
    wanted: list[int]
    verified: int
    idle: int


def watch(engine: Engine) -> list[ObservedStep]:
    """The steps that the engine launches from now on, as they come."""
    steps: list[ObservedStep] = []
    launch, tensors = engine.launcher.launch, engine.tensors
    counter = COUNTERS.index("num_draft_tokens")

    def masked(name: str, active: Tensor) -> Tensor:
        return tensors[name].clone() * active

    def watched(sizes: StepSizes):
        active = tensors["active"].clone()
        lengths, known = masked("lengths", active), masked("known", active)
        drafts, before = masked("draft_lengths", active), int(tensors["counters"][counter])
        report = launch(sizes)
        verified = int(tensors["counters"][counter]) - before
        idle = int(((tensors["lengths"] == lengths) & active).sum())
        pending, wanted = int((known - lengths).sum()), (known - lengths + drafts).tolist()
        steps.append(ObservedStep(sizes, int(active.sum()), pending, int(drafts.sum()), wanted, verified, idle))
        return report

    engine.launcher.launch = watched  # type: ignore[method-assign]
    return steps
