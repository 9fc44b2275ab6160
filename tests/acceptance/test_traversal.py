"""`TraversalVerification` keeps the target's distribution on trees, and more drafts than recursive rejection."""

import pytest

from emssd_compile.acceptance import BlockVerification, RecursiveRejection, TraversalVerification
from emssd_compile.step.proposals import SAMPLED, WITHOUT_REPLACEMENT
from tests.acceptance.draws import FALSE_ALARM, drawn_by
from tests.acceptance.laws import (
    KINDS,
    TREES,
    VOCABULARIES,
    World,
    assert_lossless,
    bonus_from_q,
    chain,
    law,
    old_residual,
    taken_for_independent,
    with_weights,
    worst,
)

RULE = TraversalVerification()


@pytest.mark.parametrize("drawn", [SAMPLED, WITHOUT_REPLACEMENT])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TREES)
def test_the_law_is_the_targets(name, kind, drawn):
    assert_lossless(RULE.decide, TREES[name], VOCABULARIES[name], kind, drawn)


def test_a_tree_of_three_tokens_keeps_the_law():
    world = World.of("random", 3, 2)
    assert law(RULE.decide, TREES["two levels"], world, WITHOUT_REPLACEMENT).error < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_tree", [False, True])
def test_of_a_chain_it_is_block_verification(kind, as_tree):
    world = World.of(kind, 3, 3)
    own = law(RULE.decide, chain(3, as_tree=as_tree), world, SAMPLED)
    other = law(BlockVerification().decide, chain(3), world, SAMPLED)
    assert own.error < 1e-9
    assert own.mean_tokens == pytest.approx(other.mean_tokens)


@pytest.mark.parametrize("drawn", [SAMPLED, WITHOUT_REPLACEMENT])
def test_more_tokens_are_emitted_than_by_recursive_rejection(drawn):
    world, shape = World.of("random", 3, 2), TREES["two levels"]
    own, other = (law(rule.decide, shape, world, drawn).mean_tokens for rule in (RULE, RecursiveRejection()))
    assert own > other + 1e-3


def test_mistakes_show():
    assert worst(taken_for_independent(RULE.decide), TREES["siblings"], 4, WITHOUT_REPLACEMENT) > 1e-2, (
        "Q is not updated"
    )
    for mistake in (bonus_from_q, old_residual):
        assert worst(with_weights(RULE.decide, mistake), TREES["a branch late"], 3, SAMPLED) > 1e-2
    assert worst(RULE.decide, TREES["two levels"], 2, SAMPLED, mixes_up=True) > 1e-2


@pytest.mark.parametrize("drawn", [SAMPLED, WITHOUT_REPLACEMENT])
@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_what_is_drawn_follows_the_law(kind, drawn):
    assert drawn_by(RULE, TREES["uneven"], World.of(kind, 3, 3), drawn) > FALSE_ALARM
