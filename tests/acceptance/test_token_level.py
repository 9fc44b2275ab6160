"""`TokenLevel` keeps the target's distribution: by enumeration, by drawing, by decoding."""

from dataclasses import replace

import pytest
import torch

from emssd_compile.acceptance import TokenLevel
from emssd_compile.acceptance.sampling import Decision, Odds
from emssd_compile.step.proposals import DETERMINISTIC, SAMPLED
from tests.acceptance.draws import FALSE_ALARM, decoded_by, drawn_by
from tests.acceptance.laws import World, chain, law, with_weights, worst

KINDS = ("random", "zeros", "ties", "disjoint", "the same", "certain")
RULE = TokenLevel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "length"), [(4, 1), (3, 3), (4, 2)])
def test_the_law_is_the_targets(kind, vocabulary, length):
    for seed in range(4):
        world = World.of(kind, vocabulary, length, seed)
        for verified in range(length + 1):
            assert law(RULE.decide, chain(length), world, SAMPLED, lengths=verified).error < 1e-9


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


def _from_q(odds: Odds, decision: Decision) -> torch.Tensor:
    return torch.where((decision.node == odds.draft.lengths)[:, None], odds.q(decision.node), decision.weights)


def _from_p(odds: Odds, decision: Decision) -> torch.Tensor:
    return odds.p(decision.node)


@pytest.mark.parametrize("change", [_from_q, _from_p], ids=["the bonus from the draft", "no residual"])
def test_mistakes_show(change):
    assert worst(with_weights(RULE.decide, change), chain(3), 3, SAMPLED) > 1e-2


def test_rows_that_share_what_was_drafted_show():
    assert worst(RULE.decide, chain(2), 3, SAMPLED, mixes_up=True) > 1e-2


@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_what_is_drawn_follows_the_law(kind):
    assert drawn_by(RULE, chain(3), World.of(kind, 4, 3), SAMPLED) > FALSE_ALARM


@pytest.mark.parametrize("layout", ["packed", "auto"])
def test_tokens_decoded_with_a_draft_model_follow_the_law(layout):
    """`auto`: drafts are chosen among, and steps without the drafter take turns with those with it."""
    likely, stats = decoded_by("token-level", layout=layout, num_draft_tokens=3)
    assert likely > FALSE_ALARM
    assert 0.2 < stats.draft_acceptance_rate < 0.9
    assert stats.guarantee == "distribution"
