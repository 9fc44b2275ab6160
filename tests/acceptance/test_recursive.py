"""`RecursiveRejection` keeps the target's distribution on trees, drawn with and without replacement."""

from dataclasses import replace

import pytest
import torch

from emssd_compile.acceptance import RecursiveRejection, TokenLevel
from emssd_compile.acceptance.sampling import Decision, Odds
from emssd_compile.step.proposals import SAMPLED, WITHOUT_REPLACEMENT
from tests.acceptance.draws import FALSE_ALARM, drawn_by
from tests.acceptance.laws import (
    KINDS,
    TREES,
    VOCABULARIES,
    Shape,
    World,
    assert_lossless,
    bonus_from_q,
    chain,
    law,
    taken_for_independent,
    with_weights,
    worst,
)

RULE = RecursiveRejection()
SIBLINGS = TREES["siblings"]


@pytest.mark.parametrize("drawn", [SAMPLED, WITHOUT_REPLACEMENT])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TREES)
def test_the_law_is_the_targets(name, kind, drawn):
    """`zeros` and `certain`: q has fewer tokens than there are siblings."""
    assert_lossless(RULE.decide, TREES[name], VOCABULARIES[name], kind, drawn)


def test_a_tree_of_three_tokens_keeps_the_law():
    world = World.of("random", 3, 2)
    assert law(RULE.decide, TREES["two levels"], world, WITHOUT_REPLACEMENT).error < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_chain_it_is_the_token_level_rule(kind):
    world = World.of(kind, 3, 3)
    own, as_tree, other = (
        law(rule.decide, chain(3, as_tree=is_tree), world, SAMPLED).mean_tokens
        for rule, is_tree in ((RULE, False), (RULE, True), (TokenLevel(), False))
    )
    assert own == pytest.approx(as_tree) == pytest.approx(other)


def test_all_siblings_without_replacement_make_sure_that_one_is_kept():
    """With all V of them the token is always among them; who forfeits the bonus token would emit one."""
    world = World.of("random", 3, 1)
    assert law(RULE.decide, SIBLINGS, world, WITHOUT_REPLACEMENT).mean_tokens == pytest.approx(2)


def test_mistakes_show():
    assert worst(taken_for_independent(RULE.decide), SIBLINGS, 4, WITHOUT_REPLACEMENT) > 1e-2, "Q is not updated"
    bonus = with_weights(RULE.decide, bonus_from_q)
    assert worst(bonus, TREES["two levels"], 2, SAMPLED) > 1e-2, "the bonus from the draft"
    assert worst(RULE.decide, TREES["two levels"], 2, SAMPLED, mixes_up=True) > 1e-2, "rows share what was drafted"


@pytest.mark.parametrize("drawn", [SAMPLED, WITHOUT_REPLACEMENT])
def test_the_likeliest_tokens_are_not_taken_for_drawn_ones(drawn):
    """The same two tokens are drafted in all rows, and q, which they are weighed by, says that others might have been.

    The law is that of rows in which these two are what was drawn.
    """
    world, shape = World.of("random", 4, 1), Shape((0, 0), is_tree=True)
    best = world.q[0].topk(2).indices

    def mistaken(odds: Odds) -> Decision:
        proposal = world.q[0].expand(len(odds.numbers), 3, 4)
        return RULE.decide(replace(odds, draft=replace(odds.draft, proposal=proposal)))

    surely = torch.nn.functional.one_hot(best[0], 4).double()
    first = replace(world, q=surely.expand_as(world.q))  # without replacement, then the first other one
    assert law(mistaken, shape, first, drawn).error > 1e-2


@pytest.mark.parametrize("drawn", [SAMPLED, WITHOUT_REPLACEMENT])
@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_what_is_drawn_follows_the_law(kind, drawn):
    assert drawn_by(RULE, TREES["uneven"], World.of(kind, 3, 3), drawn) > FALSE_ALARM
