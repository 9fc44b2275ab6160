"""Engines of one compiled model that launch in different ways."""

from __future__ import annotations

from emssd_compile.optimize import OptimizedModel
from emssd_compile.runtime.buckets import decode_buckets
from emssd_compile.runtime.engine import Engine
from emssd_compile.runtime.launch import GraphLauncher
from tests.exactness.compiled import rechunked
from tests.runtime.tape import TapeDevice


def graph_engine(fast: OptimizedModel, prefill_chunk: int, device: TapeDevice) -> Engine:
    """As on a CUDA device: steps are captured per bucket, and the host is one step behind."""
    engine = rechunked(fast, prefill_chunk)._engine
    direct = engine.launcher
    buckets = decode_buckets(engine.num_rows, engine.num_draft_tokens)
    engine.launcher = GraphLauncher(direct.step, direct.input_names, direct.tensors, device, buckets)
    engine.lag = 1
    return engine
