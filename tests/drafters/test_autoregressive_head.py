"""What heads with caches have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from emssd_compile.drafters import MTP
from emssd_compile.drafters.autoregressive_head import AutoregressiveHead
from tests.drafters import test_eagle3, test_mtp, test_parallel_eagle
from tests.drafters.llama_heads import PROMPTS, TREE, optimized, plainly
from tests.exactness.compiled import rechunked

HEADS: dict[str, Callable[[], AutoregressiveHead]] = {
    "eagle3": lambda: test_eagle3.head_of("eagle-3"),
    "two layers and a tree": lambda: test_eagle3.head_of("eagle-3.1", tree=TREE),
    "masks": lambda: test_parallel_eagle.head_of("owns"),
    "one module": lambda: test_mtp.head_of(test_mtp.CONFIG),
    "three modules": lambda: test_mtp.head_of(test_mtp.THREE),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_chunk_at_a_time_a_prompt_leaves_what_it_leaves_at_once(name):
    """Keys and values of the whole text, in every layer or module, whatever was drafted meanwhile."""
    found = []
    head = HEADS[name]()
    in_chunks = optimized(head)
    for fast in (in_chunks, rechunked(in_chunks, 96)):
        assert fast.generate(PROMPTS[3:], max_new_tokens=4) == [row[:49] for row in plainly()[3:]]
        tensors = {name: value for name, value in fast._engine.tensors.items() if name.startswith("drafter_")}
        own = {name: value for name, value in tensors.items() if "_cache_" in name}
        assert len(own) == 2 * head.num_layers
        unsettled = head.num_draft_tokens - 1 if isinstance(head, MTP) and head.config.num_modules > 1 else 0
        found.append({name: value[0, : 47 - unsettled] for name, value in own.items()})
    for cache, value in found[0].items():
        assert (value.abs().amax((1, 2)) > 0).all(), "each token is read"
        torch.testing.assert_close(value, found[1][cache], rtol=1e-4, atol=1e-4)
