"""Forms of one step, as a backend runs them: with the options that are in use, whole or in two halves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from emssd_compile.drafters import without
from emssd_compile.layouts import LAYOUTS
from emssd_compile.lowering import BACKENDS, StepFunction
from emssd_compile.options import CompileOptions
from emssd_compile.placement import Placement
from emssd_compile.runtime.assembly import make_variant
from emssd_compile.runtime.launch import Variant
from emssd_compile.step.logits import LogitContext

if TYPE_CHECKING:
    from emssd_compile.compiler import CompiledStep
    from emssd_compile.lowering.halves import HalvedStep
    from emssd_compile.passes import PassRecord


@dataclass(frozen=True)
class Form:
    """One form of the step.

    Attributes:
        variant: what runs.
        graphs: what holds weights: the graphs as the backend's passes left them, and as they were before.
        records: what each pass did.
        halves: the step, if it is run in two halves.
    """

    variant: Variant
    graphs: tuple[fx.GraphModule, ...]
    records: list[PassRecord]
    halves: HalvedStep | None = None


@dataclass(frozen=True)
class Forms:
    """Makes forms.

    Attributes:
        options: the backend, and what it is told.
        device: that they run on.
        placement: of keys and values.
    """

    options: CompileOptions
    device: torch.device
    placement: Placement

    def whole(self, slabs: CompiledStep) -> Form:
        """A step in the form that the backend runs."""
        step = self.placement.of(slabs)
        records = [*step.records]
        graph_module, function = self._lower(step, step.graph_module, records)
        deterministic, plain = self.options.deterministic, None
        remembers = step.drafter.remembers_features
        # What is cached of a prompt serves for long: a drafter that remembers has to have seen it.
        can_be_left_out = step.drafter.is_costly and not (remembers and self.options.prefix_cache)
        if can_be_left_out and LAYOUTS[self.options.layout].is_measured and not deterministic:
            cheaper = without(step.drafter)
            beside = (
                slabs.drafting_by(cheaper)
                if cheaper.num_draft_tokens
                else slabs.without_drafts(cheaper, LAYOUTS["packed"].policy())
            )
            plain = self.whole(beside) if beside else None
        variant = make_variant(
            function,
            step.signature(graph_module.graph),
            deterministic=deterministic,
            plain=plain.variant if plain else None,
            drafts=step.drafter.num_draft_tokens > 0,
            drafter_remembers=remembers,
        )
        graphs = (graph_module, step.graph_module, slabs.graph_module, *(plain.graphs if plain else ()))
        return Form(variant, tuple(dict.fromkeys(graphs)), records)

    def halved(self, slabs: CompiledStep) -> Form:
        """A step that shows its logits, in two parts."""
        from emssd_compile.lowering.halves import HalvedStep  # brings sympy: not needed to import us

        step = self.placement.of(slabs)
        records, signature = [*step.records], step.signature(step.graph_module.graph)
        halves = step.halves()
        (forward, run), (decide, finish) = (
            self._lower(step, half, records) for half in (halves.forward, halves.decide)
        )
        function = HalvedStep(
            [binding.name for binding in signature.inputs],
            (run, _inputs(halves.forward)),
            (finish, _inputs(halves.decide)),
            LogitContext.form(signature.sizes),
        )
        variant = make_variant(function, signature, deterministic=self.options.deterministic, is_capturable=False)
        return Form(variant, (forward, decide, step.graph_module), records, function)

    def _lower(
        self, step: CompiledStep, graph_module: fx.GraphModule, records: list[PassRecord]
    ) -> tuple[fx.GraphModule, StepFunction]:
        backend = BACKENDS[self.options.backend]
        suited = step.for_target(backend.passes(self.device), records, graph_module)
        return suited, backend.lower(suited, self.options.deterministic)


def _inputs(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
