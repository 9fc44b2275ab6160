"""Trees of drafts give, in fp32, the tokens of the model's own greedy decoding of each prompt alone."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.drafters import Drafter, PromptLookup
from emssd_compile.optimized_model import OptimizedModel
from emssd_compile.runtime.requests import Request
from tests.exactness.compiled import CAPACITY, LENGTHS, NEW_TOKENS, TREES, K, assert_exact, rechunked, target
from tests.exactness.drafters import Oracle, OracleTree
from tests.exactness.models import prompt
from tests.runtime.engines import graph_engine
from tests.runtime.tape import TapeDevice

ROWS = 4
PROMPTS = [prompt(n) for n in (7, 61, 1, 23, 70, 3, 40)]


@functools.cache
def _fast(tree: str, layout: str) -> OptimizedModel:
    compiled = target("llama", ROWS)
    return compiled.optimize(compiled.drafter(tree), layout=layout)


@pytest.mark.parametrize("architecture", ["bloom", "gemma", "gpt2", "mistral", "own-positions"])
def test_the_tokens_are_the_models_own(architecture):
    compiled = target(architecture, ROWS)
    reference = compiled.reference
    fast = compiled.optimize(compiled.drafter("random-tree"))
    assert_exact(fast, reference, PROMPTS, NEW_TOKENS)
    eos = [reference(ids, NEW_TOKENS)[place] for ids, place in zip(PROMPTS, (1, 5, 9, 12, 14, 3, 7), strict=True)]
    assert_exact(fast, reference, PROMPTS, NEW_TOKENS, eos_token_id=eos)
    assert_exact(fast, reference, PROMPTS, NEW_TOKENS, eos_token_id=eos, min_new_tokens=3)
    assert 0 < fast.stats.num_accepted_draft_tokens < fast.stats.num_draft_tokens


@pytest.mark.parametrize(
    ("tree", "layout"), [*((tree, "packed") for tree in TREES), ("random-tree", "padded"), ("random-tree", "auto")]
)
def test_whatever_the_trees_and_the_layout_the_tokens_are_right(tree, layout):
    """Captured steps and a host that is one step behind, too."""
    fast, reference = _fast(tree, layout), target("llama", ROWS).reference
    assert_exact(fast, reference, PROMPTS, NEW_TOKENS)
    assert_exact(rechunked(fast, 512), reference, PROMPTS, NEW_TOKENS)
    engine = graph_engine(fast, 64, TapeDevice())
    requests = [Request(index, torch.tensor(ids), NEW_TOKENS) for index, ids in enumerate(PROMPTS)]
    list(engine.run(requests))
    assert [r.output for r in requests] == [reference(ids, NEW_TOKENS) for ids in PROMPTS]


def test_trees_that_are_always_right_are_accepted_to_their_depth():
    fast = target("llama", ROWS).optimize(target("llama", ROWS).drafter("always-right-tree"))
    assert_exact(fast, target("llama", ROWS).reference, PROMPTS, NEW_TOKENS)
    assert fast.stats.acceptance_histogram[K] > 0


def test_a_chain_given_as_a_tree_takes_the_same_steps_as_a_chain():
    compiled = target("llama", ROWS)
    oracle = Oracle(compiled.texts(), CAPACITY, K, wrong_of_seven=2)

    class Stretched(OracleTree):
        """Every draft follows the one before it."""

        def forward(self, context):
            draft = self.chain(context)
            parents = torch.arange(K).expand_as(draft.tokens)
            return type(draft)(draft.tokens, draft.lengths, parents=parents)

    chain, tree = compiled.optimize(oracle), compiled.optimize(Stretched(oracle, K))
    for fast in (chain, tree):
        assert_exact(fast, compiled.reference, PROMPTS, NEW_TOKENS)
    assert tree.stats == chain.stats
    assert tree.stats.num_accepted_draft_tokens > 0


SHAPES = st.tuples(*(st.integers(0, index) for index in range(9)))
"""Parents of nine drafts: all of one size, for which a model is compiled once."""


def _depth(shape: tuple[int, ...]) -> int:
    depths = [0]
    for parent in shape:
        depths.append(depths[parent] + 1)
    return max(depths)


@settings(max_examples=8)
@given(
    shape=SHAPES,
    wrong=st.sampled_from([0, 2, 4]),
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=6),
    news=st.lists(st.integers(1, NEW_TOKENS), min_size=6, max_size=6),
    chunk=st.sampled_from([1, 48, 512]),
    lag=st.integers(0, 1),
)
def test_any_shape_and_schedule(shape, wrong, lengths, news, chunk, lag):
    """In memory that is full of NaN, with histories full of other text."""
    compiled = target("llama", ROWS)
    chain: Drafter = Oracle(compiled.texts(), CAPACITY, _depth(shape), wrong_of_seven=wrong)
    engine = rechunked(compiled.optimize(OracleTree(chain, len(shape), shape)), chunk)._engine
    for name, value in engine.tensors.items():
        if "_cache_" in name:
            value.fill_(torch.nan)
    engine.tensors["history"].fill_(7)
    engine.lag = lag
    requests = [Request(i, torch.tensor(prompt(n)), news[i]) for i, n in enumerate(lengths)]
    list(engine.run(requests))
    assert [r.output for r in requests] == [compiled.reference(prompt(n), news[i]) for i, n in enumerate(lengths)]


def test_chains_and_trees_may_be_mixed_row_by_row():
    """A drafter whose rows sometimes have nothing to draft, sometimes a chain, sometimes a tree."""
    compiled = target("llama", ROWS)
    fast = compiled.optimize(OracleTree(PromptLookup(K), 9))
    assert_exact(fast, compiled.reference, [[5, 6, 7, 8] * 9, *PROMPTS], NEW_TOKENS)
