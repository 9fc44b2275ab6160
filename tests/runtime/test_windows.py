"""`windows`: a row is a source of its prompt as long as its rings have what is seen from there on."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from emssd_compile.runtime.kv_memory import Beginning, KVMemory
from emssd_compile.runtime.launch import DirectLauncher, Variant
from emssd_compile.runtime.requests import Request
from emssd_compile.runtime.windows import Windows
from emssd_compile.step.rings import Rings
from emssd_compile.step.signature import Signature

RINGS = Rings({"k_cache_0": 3}, 6, block_size=4)  # two blocks, 8 slots, for each of 3 rows


class _Others:
    """Another kind of memory, which does what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[object, ...]] = []

    def plan(self, request: Request, sources: list[int]) -> Beginning:
        return Beginning(request, 0, next(iter(sources), None))

    def __getattr__(self, name: str):
        return lambda *arguments: self.heard.append((name, *arguments))


@pytest.fixture
def launcher() -> DirectLauncher:
    tensors = {"history": torch.zeros(3, 1), "k_cache_0": torch.arange(24.0).view(6, 4, 1, 1)}
    return DirectLauncher(Variant(lambda *_: {}, Signature((), ())), tensors)


def _request(tokens: int) -> Request:
    return Request(0, torch.arange(tokens), 5)


@pytest.mark.parametrize(("tokens", "written", "is_source"), [(10, 15, True), (10, 16, False), (2, 8, True)])
def test_a_row_that_has_gone_too_far_is_no_source(launcher: DirectLauncher, tokens, written, is_source):
    """Of a prompt of 10 tokens, 9 are read by others; what follows sees 7 and 8, and slot 15 lies where 7 did."""
    windows: Any = Windows(cast(KVMemory, _Others()), RINGS)
    windows.prepare(launcher, {1: written})
    assert windows.plan(_request(tokens), [1]).source == (1 if is_source else None)
    assert windows.plan(_request(tokens), [1, 2]).source == (1 if is_source else 2), "another may still have it"
    windows.release(1)
    windows.prepare(launcher, {1: 8})
    assert windows.plan(_request(tokens), [1]).source == 1


def test_rings_are_copied_whole(launcher: DirectLauncher):
    others = _Others()
    windows = Windows(cast(KVMemory, others), RINGS)
    beginning = Beginning(_request(10), 9, source=0)
    windows.start(launcher, 2, beginning)
    assert launcher.tensors["k_cache_0"].flatten().tolist() == [*range(16), *range(8)]
    assert others.heard == [("start", launcher, 2, beginning)]
    windows.start(launcher, 1, Beginning(_request(10), 0))
    assert launcher.tensors["k_cache_0"].flatten().tolist() == [*range(16), *range(8)]
