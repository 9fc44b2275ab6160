"""Compiled by Inductor: the same tokens, one compilation for all sizes, and nothing that waits for the host."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import emssd_compile
from emssd_compile.drafters import DraftModel, PromptLookup
from emssd_compile.runtime.buckets import StepSizes
from tests.exactness.compiled import DRAFTERS, target
from tests.exactness.models import Reference, build, prompt
from tests.exactness.trained_heads import make_head

BATCHES = ((70,), (1, 70), (3, 17, 40), (5, 61, 2, 33, 7))
HOST_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.nonzero.default}


def _noisy(model: torch.nn.Module) -> torch.nn.Module:
    """A draft model that is right now and then."""
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * 0.05)
    return noisy


@pytest.mark.parametrize("drafter", ["prompt-lookup", pytest.param("draft-model", marks=pytest.mark.long)])
def test_inductor_compiles_once_and_is_exact_at_every_size(drafter):
    model = build("llama")
    reference = Reference(model)
    drafts = PromptLookup(3) if drafter == "prompt-lookup" else DraftModel(_noisy(model), 2)
    fast = emssd_compile.optimize(model, drafts, max_batch=3, max_length=96, backend="inductor", prefill_chunk=24)
    _, compiled = torch._inductor.utils.run_and_get_code(fast.warmup)
    assert len(compiled) == 1 + drafts.is_costly  # a step without a costly drafter, too

    def decode_every_size() -> None:
        for lengths, new_tokens in itertools.product(BATCHES, (1, 12)):
            prompts = [prompt(n) for n in lengths]
            expected = [[*ids, *reference(ids, new_tokens)] for ids in prompts]
            assert fast.generate(prompts, max_new_tokens=new_tokens) == expected

    _, compiled = torch._inductor.utils.run_and_get_code(decode_every_size)
    assert not compiled
    assert fast.stats.num_accepted_draft_tokens > 0


def test_steps_without_a_costly_drafter_are_there():
    model = build("llama")
    fast = emssd_compile.optimize(
        model, DraftModel(_noisy(model), 2), max_batch=2, max_length=64, backend="eager", prefix_cache=True
    )
    variant = fast._engine.variant
    assert variant.plain is not None
    assert not variant.drafter_remembers


@pytest.mark.parametrize("keeps_prefixes", [False, True])
def test_steps_without_a_head_that_remembers_are_there_unless_prefixes_would_lack_what_it_missed(keeps_prefixes):
    head = make_head("llama", "eagle3")
    fast = emssd_compile.optimize(
        build("llama"), head, max_batch=2, max_length=64, backend="eager", prefix_cache=keeps_prefixes
    )
    variant = fast._engine.variant
    assert (variant.plain is None) == keeps_prefixes
    assert variant.drafter_remembers


def test_the_compiled_code_reads_nothing_back(monkeypatch):
    fast = emssd_compile.optimize(build("own-positions"), PromptLookup(2), max_batch=2, max_length=64)
    _, sources = torch._inductor.utils.run_and_get_code(fast.warmup)
    assert len(sources) == 1
    assert "ragged_attention" in sources[0]
    for host_read in (".item()", ".tolist()", "_local_scalar_dense", ".cpu()"):
        assert host_read not in sources[0]


class _RecordOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: set[object] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.add(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_step_reads_nothing_back(drafter):
    compiled = target("llama")
    fast = compiled.optimize(compiled.drafter(drafter))
    launcher, record = fast._engine.launcher, _RecordOps()
    run = launcher._run

    def recorded(sizes: StepSizes):
        with record:
            return run(sizes)

    launcher._run = recorded  # type: ignore[method-assign]
    fast.generate([prompt(40), prompt(3)], max_new_tokens=4)
    assert torch.ops.emssd.ragged_attention.default in record.ops
    assert not record.ops & HOST_READS
