"""No row sees another: whatever other rows and the inert tail hold, a row's logits keep every bit (at one size)."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emssd_compile.compiler import CompiledModel, compile_model
from emssd_compile.runtime.memory import allocate
from emssd_compile.step.batch import BatchShape
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.pack import Packed, as_trees, pack
from tests.exactness.models import build
from tests.step.forests import Forest, forests
from tests.zoo import VOCABULARY

ROWS, CAPACITY, SIZE = 4, 48, 32
ARCHITECTURES = ("llama", "bloom", "gemma", "own-positions")
DRAFTS, DEPTH = 6, 3


@functools.cache
def _compiled(architecture: str, tree_nodes: int = 0) -> CompiledModel:
    return compile_model(build(architecture), BatchShape(ROWS, CAPACITY, tree_nodes))


def _step(history: Tensor, known: Tensor, lengths: Tensor, draft: Nodes | None = None) -> Packed:
    active, slots = torch.ones(ROWS, dtype=torch.bool), torch.arange(SIZE)
    return pack(history, known, lengths, active, slots, slots, share=SIZE, draft=draft)


def _row_results(compiled: CompiledModel, packed: Packed, lengths: Tensor, caches: dict[str, Tensor]) -> list[Tensor]:
    """Hidden states and logits of row 0, and what its KV slots hold afterwards."""
    caches = {name: cache.clone() for name, cache in caches.items()}
    with torch.inference_mode():
        hidden, logits = compiled(packed, lengths, torch.arange(SIZE), caches)
    end = int(packed.offsets[1])
    return [hidden[:end], logits[:end], *(cache[0] for cache in caches.values())]


def _random_caches(compiled: CompiledModel, generator: torch.Generator) -> dict[str, Tensor]:
    caches = allocate(compiled.cache_shapes, torch.device("cpu"))
    return {name: torch.randn(cache.shape, generator=generator) for name, cache in caches.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=30)
@given(
    own=st.tuples(st.integers(0, 20), st.integers(1, 8)),
    others=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)), min_size=ROWS - 1, max_size=ROWS - 1),
    poison=st.sampled_from([0.0, 1e30, torch.nan]),
    seed=st.integers(0, 99),
)
def test_other_rows_and_the_tail_do_not_reach_a_row(architecture, own, others, poison, seed):
    """Row 0 among three empty rows, then among rows with text, with poison wherever it must not look."""
    compiled = _compiled(architecture)
    generator = torch.Generator().manual_seed(seed)
    caches = _random_caches(compiled, generator)
    history = torch.randint(VOCABULARY, (ROWS, CAPACITY), generator=generator)

    alone = torch.tensor([own[0], 0, 0, 0])
    packed = _step(history, alone + torch.tensor([own[1], 0, 0, 0]), alone)
    expected = _row_results(compiled, packed, alone, caches)

    lengths = torch.tensor([own[0], *(length for length, _ in others)])
    fed = torch.tensor([own[1], *(count for _, count in others)])
    history[1:] = torch.randint(VOCABULARY, history[1:].shape, generator=generator)
    packed = _step(history, lengths + fed, lengths)
    tail = packed.row_ids == ROWS
    packed.input_ids[tail] = torch.randint(VOCABULARY, (int(tail.sum()),), generator=generator)
    for cache in caches.values():
        cache[1:] = poison
        cache[0, own[0] + own[1] :] = poison
    actual = _row_results(compiled, packed, lengths, caches)

    written = own[0] + own[1]
    for before, after in zip(expected[:2], actual[:2], strict=True):
        assert torch.equal(before, after)
    for before, after in zip(expected[2:], actual[2:], strict=True):
        assert torch.equal(before[:written], after[:written])
        untouched = torch.full_like(after[written:], poison)
        torch.testing.assert_close(after[written:], untouched, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("architecture", ["llama", "bloom"])
@settings(max_examples=15)
@given(
    forest=forests(ROWS, DRAFTS, DEPTH, num_tokens=VOCABULARY),
    known=st.lists(st.integers(1, 20), min_size=ROWS, max_size=ROWS),
    poison=st.sampled_from([0.0, 1e30, torch.nan]),
    seed=st.integers(0, 99),
)
def test_the_trees_of_other_rows_do_not_reach_a_row(architecture, forest: Forest, known, poison, seed):
    """The tree of row 0 beside rows that draft nothing, then beside their trees."""
    compiled = _compiled(architecture, DRAFTS + 1)
    generator = torch.Generator().manual_seed(seed)
    caches = _random_caches(compiled, generator)
    history = torch.randint(VOCABULARY, (ROWS, CAPACITY), generator=generator)
    words, text = compiled.ancestor_words, torch.tensor(known)
    lengths = text - 1

    def results() -> list[Tensor]:
        packed = as_trees(_step(history, text, lengths, draft), lengths, words, draft)
        return _row_results(compiled, packed, lengths, caches)

    is_first = torch.arange(ROWS) == 0
    draft = replace(forest.nodes, lengths=torch.where(is_first, forest.nodes.lengths, 0))
    expected = results()
    history[1:] = torch.randint(VOCABULARY, history[1:].shape, generator=generator)
    for cache in caches.values():
        cache[1:] = poison
        cache[0, known[0] + int(draft.lengths[0]) :] = poison
    draft = forest.nodes
    for before, after in zip(expected[:2], results()[:2], strict=True):
        assert torch.equal(before, after)
