"""`BlockVerification` keeps the target's distribution, and more drafts than the token-level rule."""

import pytest
import torch

from emssd_compile.acceptance import BlockVerification, TokenLevel
from emssd_compile.acceptance.sampling import Decision, Odds
from emssd_compile.step.proposals import SAMPLED
from tests.acceptance.draws import FALSE_ALARM, decoded_by, drawn_by
from tests.acceptance.laws import World, chain, law, with_weights, worst

KINDS = ("random", "zeros", "ties", "disjoint", "the same", "certain")
RULE = BlockVerification()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocabulary", "length"), [(4, 1), (3, 3), (4, 2)])
def test_the_law_is_the_targets(kind, vocabulary, length):
    for seed in range(4):
        world = World.of(kind, vocabulary, length, seed)
        for verified in range(length + 1):
            assert law(RULE.decide, chain(length), world, SAMPLED, lengths=verified).error < 1e-9


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


def _old_residual(odds: Odds, decision: Decision) -> torch.Tensor:
    """That of the token-level rule, without the share of the node."""
    p, is_whole = odds.p(decision.node), (decision.node == odds.draft.lengths)[:, None]
    left = (p - odds.q(decision.node)).clamp(min=0)
    return torch.where(is_whole | (left.sum(1, keepdim=True) == 0), p, left)


def _from_q(odds: Odds, decision: Decision) -> torch.Tensor:
    return torch.where((decision.node == odds.draft.lengths)[:, None], odds.q(decision.node), decision.weights)


@pytest.mark.parametrize("change", [_old_residual, _from_q], ids=["the old residual", "the bonus from the draft"])
def test_mistakes_show(change):
    assert worst(with_weights(RULE.decide, change), chain(3), 3, SAMPLED) > 1e-3


def test_rows_that_share_what_was_drafted_show():
    assert worst(RULE.decide, chain(2), 3, SAMPLED, mixes_up=True) > 1e-2


@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_what_is_drawn_follows_the_law(kind):
    assert drawn_by(RULE, chain(3), World.of(kind, 4, 3), SAMPLED) > FALSE_ALARM


def test_tokens_decoded_with_a_draft_model_follow_the_law():
    """Tests behind one that fails count, too: were their numbers met again in the next step, so many tokens show it."""
    likely, stats = decoded_by("block", rows=16384, tokens=4, num_draft_tokens=3)
    assert likely > FALSE_ALARM
    assert 0.1 < stats.draft_acceptance_rate < 0.9
