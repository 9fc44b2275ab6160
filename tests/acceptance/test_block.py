"""`BlockVerification` keeps the target's distribution, and more drafts than the token-level rule."""

import pytest

from emssd_compile.acceptance import BlockVerification, TokenLevel
from emssd_compile.step.proposals import SAMPLED
from tests.acceptance.draws import FALSE_ALARM, drawn_by
from tests.acceptance.laws import (
    KINDS,
    World,
    assert_lossless,
    bonus_from_q,
    chain,
    law,
    old_residual,
    with_weights,
    worst,
)

RULE = BlockVerification()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "length"), [(4, 1), (3, 3), (4, 2)])
def test_the_law_is_the_targets(kind, vocabulary, length):
    assert_lossless(RULE.decide, chain(length), vocabulary, kind, SAMPLED, seeds=(0, 1, 2, 3), left=length)


@pytest.mark.parametrize("kind", KINDS)
def test_no_fewer_tokens_are_emitted_than_by_the_token_level_rule(kind):
    more = 0.0
    for seed in range(4):
        world = World.of(kind, 3, 3, seed)
        own, other = (law(rule.decide, chain(3), world, SAMPLED).mean_tokens for rule in (RULE, TokenLevel()))
        assert own > other - 1e-12
        more += own - other
    assert more > 1e-3 or kind in ("disjoint", "the same", "certain")


def test_all_that_is_drawn_from_the_target_itself_is_kept_and_one_more():
    assert law(RULE.decide, chain(3), World.of("the same", 3, 3), SAMPLED).mean_tokens == pytest.approx(4)


@pytest.mark.parametrize("change", [old_residual, bonus_from_q])
def test_mistakes_show(change):
    assert worst(with_weights(RULE.decide, change), chain(3), 3, SAMPLED) > 1e-3


def test_rows_that_share_what_was_drafted_show():
    assert worst(RULE.decide, chain(2), 3, SAMPLED, mixes_up=True) > 1e-2


@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_what_is_drawn_follows_the_law(kind):
    assert drawn_by(RULE, chain(3), World.of(kind, 4, 3), SAMPLED) > FALSE_ALARM
