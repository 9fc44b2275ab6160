"""`TokenLevel` keeps the target's distribution: by enumeration, by drawing, by decoding."""

from dataclasses import replace

import pytest
import torch

from emssd_compile.acceptance import TokenLevel
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED
from tests.acceptance.draws import FALSE_ALARM, decoded_by, drawn_by
from tests.acceptance.laws import (
    KINDS,
    World,
    assert_lossless,
    bonus_from_q,
    chain,
    from_p,
    law,
    with_weights,
    worst,
)

RULE = TokenLevel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "length"), [(4, 1), (3, 3), (4, 2)])
def test_the_law_is_the_targets(kind, vocabulary, length):
    assert_lossless(RULE.decide, chain(length), vocabulary, kind, SAMPLED, seeds=(0, 1, 2, 3), left=length)


@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_a_draft_that_was_not_drawn_is_accepted_as_often_as_the_target_says_it(kind):
    world = World.of(kind, 4, 2, 1)
    always = replace(world, q=torch.nn.functional.one_hot(world.q.argmax(1), 4).double())
    emitted = law(RULE.decide, chain(2), always, DETERMINISTIC)
    assert emitted.error < 1e-9
    assert emitted.mean_tokens == pytest.approx(law(RULE.decide, chain(2), always, SAMPLED).mean_tokens)


def test_all_that_is_drawn_from_the_target_itself_is_kept_and_one_more():
    """Who forfeits the bonus token would emit three."""
    assert law(RULE.decide, chain(3), World.of("the same", 3, 3), SAMPLED).mean_tokens == pytest.approx(4)


@pytest.mark.parametrize("change", [bonus_from_q, from_p])
def test_mistakes_show(change):
    assert worst(with_weights(RULE.decide, change), chain(3), 3, SAMPLED) > 1e-2


def test_rows_that_share_what_was_drafted_show():
    assert worst(RULE.decide, chain(2), 3, SAMPLED, mixes_up=True) > 1e-2


@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_what_is_drawn_follows_the_law(kind):
    assert drawn_by(RULE, chain(3), World.of(kind, 4, 3), SAMPLED) > FALSE_ALARM


def test_tokens_decoded_with_a_draft_model_follow_the_law():
    """Drafts are chosen among, and steps without the drafter take turns with those with it."""
    likely, stats = decoded_by("token-level", layout="auto", num_draft_tokens=3)
    assert likely > FALSE_ALARM
    # Some are accepted and some are not; of how many drafts, is chosen by measured times: of all it is 24 %.
    assert 500 < stats.num_accepted_draft_tokens < stats.num_draft_tokens - 500
    assert stats.guarantee == "distribution"
