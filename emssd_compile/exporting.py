"""From a compiled step to an artifact: the order in which it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import emssd_compile
from emssd_compile.compiler import CompiledModel, CompiledStep, apply_target_passes
from emssd_compile.errors import ArtifactError
from emssd_compile.export import Target, find_target
from emssd_compile.export.folder import Files, fingerprints, new_folder, seal
from emssd_compile.export.manifest import Manifest
from emssd_compile.export.tokenizer import check_tokenizer, save_tokenizer
from emssd_compile.generation import saved_options
from emssd_compile.layouts import LAYOUTS
from emssd_compile.lowering import StepFunction
from emssd_compile.options import CompileOptions
from emssd_compile.report import Explanation
from emssd_compile.runtime.assembly import assemble, make_variant
from emssd_compile.runtime.buckets import StepSizes, decode_buckets
from emssd_compile.runtime.memory import describe
from emssd_compile.runtime.requests import Request
from emssd_compile.step.parts import in_use
from emssd_compile.step.signature import SIZE_NAMES, Signature

STAGES = ("rewriting", "building", "checking", "hashing")

_PROMPT_LENGTHS, _NEW_TOKENS = (1, 6, 19), 8


@dataclass(frozen=True)
class Exportable:
    """What an artifact is made from.

    Attributes:
        step: the compiled step.
        options: sizes and choices.
        chunk: most packed tokens of a step.
        device: where the weights are.
        dtype: their element type.
        generation_config: the model's defaults for the options of `generate`.
    """

    step: CompiledStep
    options: CompileOptions
    chunk: int
    device: torch.device
    dtype: torch.dtype
    generation_config: object

    @property
    def sizes(self) -> tuple[StepSizes, ...]:
        """Sizes of the steps that will run: those of decoding, ascending, and last a chunk of prompts."""
        rows, drafts = self.options.max_batch, self.step.drafter.num_draft_tokens
        chunk = StepSizes(self.chunk, min(self.chunk, rows * (drafts + 1)), self.chunk + rows, self.chunk)
        return (*decode_buckets(rows, drafts, self.step.drafter.max_depth), chunk)


def prepare(
    target_name: str,
    options: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    verify_only: bool,
    check: bool,
) -> tuple[Target, Any, bool]:
    """What can be refused before any work.

    Args:
        target_name, verify_only, check, options: as for `export`.
        device: where the weights are.
        dtype: their element type.

    Returns:
        The target, its options, and whether the artifact will be checked.

    Raises:
        OptionError: an option is unknown or out of range, or what builds the artifact cannot do it.
        ArtifactError: what builds it, or runs it for the check, is not installed.
    """
    target = find_target(target_name)
    chosen = target.choose(options)
    is_checked = check and not verify_only and dtype == torch.float32 and device.type in target.devices
    target.require(chosen, device, is_checked)
    return target, chosen, is_checked


def export(
    what: Exportable,
    target_name: str,
    folder: Path,
    *,
    verify_only: bool,
    check: bool,
    tokenizer: Any,
    advance: Callable[[int], None],
    **options: Any,
) -> None:
    """Write an artifact.

    Args:
        what: what to export.
        target_name: which target.
        folder: the artifact; must not exist, or be empty.
        verify_only: the model on packed rows alone, for a loop of one's own.
        check: decode a few random prompts with the artifact, if it runs on the kind of device that the weights are on,
            and compare the tokens; in float32, where rounding decides between two tokens only if their logits are
            nearly the same. It takes the memory of another set of KV caches.
        tokenizer: of transformers, to lie in the artifact; None for no tokenizer.
        advance: called with 1 after each of `STAGES`.
        **options: the target's own.

    Raises:
        OptionError, ArtifactError: as `prepare`, before any work; or what is no tokenizer.
        UnsupportedModelError: the target cannot express an op of the step; says which, and where it comes from.
        ArtifactError: the folder cannot be written, or the artifact decodes other tokens. Nothing is left behind.
        CapacityError: the KV caches of the check do not fit into memory.
    """
    target, chosen, is_checked = prepare(
        target_name, options, what.device, what.dtype, verify_only=verify_only, check=check
    )
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    compiled = what.step.compiled
    with new_folder(folder) as draft:
        if tokenizer is not None:
            save_tokenizer(tokenizer, draft)
        records = [*(compiled if verify_only else what.step).records]
        source = compiled.named() if verify_only else what.step.graph_module
        graph_module = apply_target_passes(source, compiled, target.passes(what.sizes, chosen), records)
        advance(1)
        graph = graph_module.graph
        signature = Signature.of(graph, _verify_roles(compiled)) if verify_only else what.step.signature(graph)
        details = target.write(graph_module, draft, what.sizes, chosen, signature)
        advance(1)
        if is_checked:
            with Files(draft, fingerprints(draft)) as files:
                step = target.open(files, details, signature, what.device)
            _compare(what, signature, step)
        advance(1)
        memory = "" if verify_only else f"{describe(signature)} (artifacts have no pool of blocks and no rings)"
        explanation = Explanation.of(records, graph_module, memory)
        unsealed = _manifest(what, target, verify_only, details, explanation).with_signature(signature)
        seal(draft, lambda files: replace(unsealed, files=files))
        advance(1)


def _compare(what: Exportable, signature: Signature, step: StepFunction) -> None:
    """Decode random prompts with the graph before any target's passes, then with `step`.

    Raises:
        ArtifactError: the tokens differ.
        CapacityError: there is no memory for another set of KV caches.
    """
    own = what.step.graph_module
    expected = _decode(what, own, what.step.signature(own.graph))
    found = _decode(what, step, signature)
    if found != expected:
        raise ArtifactError(
            f"the artifact decodes other tokens than the step that it was made of: {found} instead of {expected}; "
            "report this model, and use another target until then"
        )


def _decode(what: Exportable, step: StepFunction, signature: Signature) -> list[list[int]]:
    """A few new tokens for random prompts, in KV caches of their own that are given back at the end."""
    vocabulary, capacity = what.step.compiled.vocabulary, what.options.max_length
    count = min(_NEW_TOKENS, capacity - 1)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocabulary, (min(n, capacity - count),), generator=generator) for n in _PROMPT_LENGTHS]
    variant = make_variant(step, signature, deterministic=False)
    engine = assemble(variant, what.device, LAYOUTS["packed"], prefill_chunk=what.chunk)
    requests = [Request(i, p, count) for i, p in enumerate(prompts)]
    for _ in engine.run(requests):
        pass
    return [request.output for request in requests]


def _verify_roles(compiled: CompiledModel) -> dict[str, str]:
    """Roles of the inputs of a verify-only graph."""
    names = [str(n.target) for n in compiled.graph_module.graph.nodes if n.op == "placeholder"]
    return (
        dict.fromkeys(names, "input")
        | dict.fromkeys(SIZE_NAMES, "size")
        | dict.fromkeys(compiled.cache_shapes, "cache")
    )


def _manifest(
    what: Exportable, target: Target, verify_only: bool, details: dict[str, Any], explanation: Explanation
) -> Manifest:
    applied, probes = (in_use(parts, what.step.used) for parts in (what.step.processors, what.step.probes))
    return Manifest(
        target=target.name,
        kind="verify" if verify_only else "step",
        emssd_compile=emssd_compile.__version__,
        device=what.device.type if what.device.type in target.devices else target.devices[0],
        dtype=str(what.dtype).removeprefix("torch."),
        environment=target.environment(details, what.device),
        layout="" if verify_only else what.options.layout,
        drafter="" if verify_only else type(what.step.drafter).__name__,
        acceptance="" if verify_only else type(what.step.rule).__name__,
        processors=[] if verify_only else [type(p).__name__ for p in applied.values()],
        probes=[] if verify_only else [type(p).__name__ for p in probes.values()],
        guarantee="" if verify_only else what.step.rule.guarantees,
        chunk=what.chunk,
        deterministic=what.options.deterministic,
        buckets=[] if verify_only else [list(sizes) for sizes in what.sizes[:-1]],
        generation_config=saved_options(what.generation_config, sorted(what.step.used)),
        explanation=explanation.to_dict(),
        details=details,
    )
