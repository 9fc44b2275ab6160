"""CUDA graphs on a GPU: the model's own tokens, and a host that waits for nothing but reports."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import emssd_compile
from emssd_compile.drafters import Drafter, DraftModel, NoDrafter, PromptLookup
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.buckets import decode_buckets
from emssd_compile.runtime.cuda import CudaDevice
from emssd_compile.runtime.launch import GraphLauncher
from emssd_compile.runtime.requests import Request
from tests.exactness.models import Reference, build, prompt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CUDA = torch.device("cuda")
ROWS, NEW = 3, 20
LENGTHS = (5, 33, 1, 70, 17, 2, 40)
DRAFTERS = ("none", "prompt-lookup", "draft-model")
BUSY = 50_000_000
"""Cycles; some 30 ms."""


class _OnGpu(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> object:
        return self.model(ids.to(CUDA))


def _drafter(name: str, model: nn.Module) -> Drafter:
    if name != "draft-model":
        return NoDrafter() if name == "none" else PromptLookup(4)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.abs().mean() * 0.05)
    return DraftModel(noisy, 4)


def _compile(drafter: str, backend: str) -> tuple[OptimizedModel, Reference]:
    """A warmed-up model; also with the eager backend every decode step is captured."""
    model = build("llama").to(CUDA)
    fast = emssd_compile.optimize(
        model, _drafter(drafter, model), max_batch=ROWS, max_length=96, backend=backend, prefill_chunk=24
    )
    if backend == "eager":
        assert fast._engine.launcher.buckets == ()
        fast._engine.launcher.buckets = decode_buckets(ROWS, fast._engine.num_draft_tokens)
    fast.warmup()
    return fast, Reference(_OnGpu(model))


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Anything that makes the host wait for the device is an error (waiting for an event is not)."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_tokens_are_the_models_own_and_the_host_waits_for_nothing_but_reports(drafter, backend):
    fast, reference = _compile(drafter, backend)
    launcher = fast._engine.launcher
    assert isinstance(launcher, GraphLauncher)
    assert {bucket for _, bucket in launcher._replays} == set(launcher.buckets)
    for lengths in (LENGTHS, (64,)):
        requests = [Request(index, torch.tensor(prompt(n)), NEW) for index, n in enumerate(lengths)]
        with _no_waiting():
            for _ in fast._engine.run(requests):
                pass
        assert [r.output for r in requests] == [reference(prompt(n), NEW) for n in lengths]
    assert {bucket for _, bucket in launcher._replays} == set(launcher.buckets)


def test_graphs_captured_while_rows_decode_give_the_same_tokens():
    fast, reference = _compile("prompt-lookup", "eager")
    launcher = fast._engine.launcher
    assert isinstance(launcher, GraphLauncher)
    launcher._replays.clear()
    prompts = [prompt(n) for n in LENGTHS]
    assert fast.generate(prompts, max_new_tokens=NEW) == [[*ids, *reference(ids, NEW)] for ids in prompts]
    assert launcher._replays


def test_a_capture_runs_once_and_then_only_when_it_is_replayed():
    count = torch.zeros((), device=CUDA)
    replay = CudaDevice(CUDA).capture(lambda: count.add_(1))
    assert count.item() == 1
    replay()
    replay()
    assert count.item() == 3


def test_an_upload_waits_for_nothing_and_keeps_its_place_in_the_stream():
    device, value = CudaDevice(CUDA), torch.arange(1000)
    device.upload(value)  # pinning new memory may wait; from here on it is there
    torch.cuda.synchronize()
    with _no_waiting():
        torch.cuda._sleep(20 * BUSY)
        there = device.upload(value)
        value.zero_()
        assert not torch.cuda.current_stream().query()
    assert there.tolist() == list(range(1000))


def test_a_download_waits_for_what_came_before_it_and_for_nothing_after():
    device, value = CudaDevice(CUDA), torch.zeros(1000, device=CUDA)
    device.download(value)[1]()  # pinning new memory may wait; from here on it is there
    torch.cuda.synchronize()
    with _no_waiting():
        torch.cuda._sleep(BUSY)
        value.add_(7)
        host, wait = device.download(value)
        torch.cuda._sleep(20 * BUSY)
        wait()
        assert not torch.cuda.current_stream().query()
    assert host.tolist() == [7] * 1000


def test_memory_of_a_download_is_not_used_again_before_it_is_copied():
    device = CudaDevice(CUDA)
    with _no_waiting():
        pending = []
        for step in range(50):
            value = torch.full((1000,), step, device=CUDA)
            torch.cuda._sleep(BUSY // 50)
            pending.append(device.download(value))
            del value
        for step, (host, wait) in enumerate(pending):
            wait()
            assert host.tolist() == [step] * 1000
