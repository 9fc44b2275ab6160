"""From a model and the parts of a step to the step: captured, compared, fused."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import replace

from torch import nn

from emssd_compile import keywords
from emssd_compile.capture import check_model, check_weights, device_of
from emssd_compile.compiler import CompiledModel, CompiledStep, compile_model, compile_step
from emssd_compile.decoder import Decoder
from emssd_compile.errors import PartError, ProbeError, ProcessorError, UnsupportedModelError
from emssd_compile.layouts import LAYOUTS
from emssd_compile.length import length_limit
from emssd_compile.logits import LogitsProcessor
from emssd_compile.options import CompileOptions
from emssd_compile.selfcheck import check_against
from emssd_compile.step.acceptance import Rule
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.drafting import Drafter, tree_nodes
from emssd_compile.step.parts import merge_options
from emssd_compile.step.probe import Probe, check_readings, merge_readings


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

    def checked(source: nn.Module, compiled: CompiledModel) -> CompiledModel:
        check_against(source, compiled)
        captured.append(compiled)
        return compiled

    def compile_draft_model(source: nn.Module, *, tree_nodes: int = 0) -> CompiledModel:
        check_model(source)
        if all(source is not held for held in drafter.modules()):  # what it holds is checked with it
            check_weights(source)
        most = min(batch.capacity, length_limit(source) or batch.capacity)
        return checked(source, _compile_as_far(source, BatchShape(batch.rows, most, tree_nodes)))

    compiled = checked(model, compile_model(model, batch, drafter.taps))

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


def _compile_as_far(model: nn.Module, batch: BatchShape) -> CompiledModel:
    """A draft model for rows of C tokens, or of fewer where it cannot be right for so many."""
    try:
        return compile_model(model, batch)
    except UnsupportedModelError as error:
        if error.longest is None or not 0 < error.longest < batch.capacity:
            raise
        shorter = replace(batch, capacity=error.longest)
    return _compile_as_far(model, shorter)
