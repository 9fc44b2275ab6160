"""From a model and the parts of a step to the step: captured, compared, fused."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace

from torch import nn

from emssd_compile import keywords
from emssd_compile.capture import check_model, check_weights, device_of
from emssd_compile.captured_graphs import CapturedGraph
from emssd_compile.compiler import CompiledModel, CompiledStep, compile_step, rewrite
from emssd_compile.decoder import Decoder
from emssd_compile.errors import PartError, ProbeError, ProcessorError, UnsupportedModelError
from emssd_compile.layouts import LAYOUTS
from emssd_compile.length import length_limit
from emssd_compile.logits import LogitsProcessor
from emssd_compile.options import CompileOptions
from emssd_compile.passes import PassRecord
from emssd_compile.selfcheck import check_against
from emssd_compile.step.acceptance import Rule
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import Drafter, tree_nodes
from emssd_compile.step.parts import merge_options
from emssd_compile.step.probe import Probe, check_readings, merge_readings


def compile_compared(model: nn.Module, batch: BatchShape, taps: tuple[int, ...] = ()) -> CompiledModel:
    """The model at level L2, compared with itself; captured, unless that was done on an earlier start.

    Args:
        model, batch, taps: as for `compiler.compile_model`.

    Raises:
        InvalidInputError, UnsupportedModelError, OptionError: as `compiler.compile_model` and `check_against`.
    """
    captured = CapturedGraph(model, batch.capacity)
    if captured.was_kept:
        with suppress(UnsupportedModelError):  # whatever it is, a graph of this moment is the one to say so
            return _rewritten(model, captured, batch, taps)
        captured = CapturedGraph(model, batch.capacity, fresh=True)
    compiled = _rewritten(model, captured, batch, taps)
    captured.keep()
    return compiled


def _rewritten(model: nn.Module, captured: CapturedGraph, batch: BatchShape, taps: tuple[int, ...]) -> CompiledModel:
    count = len(captured.graph_module.graph.nodes)
    notes = ("read: it was captured on an earlier start",) if captured.was_kept else ()
    record = PassRecord("capture", "L0", 0, count, count, captured.seconds, notes)
    compiled = rewrite(captured.graph_module, batch, taps, [record])
    check_against(model, compiled, captured.code)
    return compiled


def compile_checked(
    model: nn.Module,
    rule: Rule,
    drafter: Drafter,
    options: CompileOptions,
    processors: tuple[LogitsProcessor, ...],
    probes: tuple[Probe, ...],
) -> tuple[CompiledStep, tuple[CompiledModel, ...]]:
    """The step, and the models that were captured for it, each compared with what it was captured of.

    Raises:
        InvalidInputError, UnsupportedModelError, CapacityError, OptionError: as `optimize`.
        ProcessorError, ProbeError, PartError: options of the parts do not go together, or have names that are taken.
    """
    batch = BatchShape(options.max_batch, options.max_length, tree_nodes(drafter))
    captured: list[CompiledModel] = []

    def compiled_one(source: nn.Module, batch: BatchShape, taps: tuple[int, ...] = ()) -> CompiledModel:
        captured.append(compiled := compile_compared(source, batch, taps))
        return compiled

    def compile_draft_model(source: nn.Module, *, tree_nodes: int = 0) -> CompiledModel:
        check_model(source)
        if all(source is not held for held in drafter.modules()):  # what it holds is checked with it
            check_weights(source)
        most = min(batch.capacity, length_limit(source) or batch.capacity)
        return as_far(source, BatchShape(batch.rows, most, tree_nodes))

    def as_far(source: nn.Module, batch: BatchShape) -> CompiledModel:
        """For rows of C tokens, or of fewer where a draft model cannot be right for so many."""
        try:
            return compiled_one(source, batch)
        except UnsupportedModelError as error:
            if error.longest is None or not 0 < error.longest < batch.capacity:
                raise
            shorter = replace(batch, capacity=error.longest)
        return as_far(source, shorter)

    compiled = compiled_one(model, batch, drafter.taps)

    def with_layers(layers: tuple[int, ...]) -> CompiledModel:
        captured.append(thinned := compiled.with_layers(layers))
        return thinned

    drafter.prepare(replace(compiled.target(compile_draft_model), with_layers=with_layers))
    policy = LAYOUTS[options.layout].policy()
    few = device_of(model).type == "cpu"  # elsewhere steps are captured, for all rows
    step = compile_step(compiled, rule, drafter, policy, processors, probes, drafts_for_few=few)
    parts = (rule, drafter, policy, *processors)
    merge_options(parts, ProcessorError)
    _check_names(merge_options((*parts, *probes), ProbeError))
    sizes = step.signature(step.graph_module.graph).sizes
    merge_readings(check_readings(probe, probe.readings(sizes)) for probe in probes)
    return step, tuple(captured)


def _check_names(options: Collection[str]) -> None:
    """Raises PartError if `generate` takes something else by the name of an option."""
    taken = sorted({*options} & (keywords.NO_OPTIONS | inspect.signature(Decoder.generate).parameters.keys()))
    if taken:
        raise PartError(f"a part declares the option {taken[0]!r}, which `generate` knows as something else; rename it")
