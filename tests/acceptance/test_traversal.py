"""`TraversalVerification` keeps the target's distribution on trees, and more drafts than recursive rejection."""

from dataclasses import replace

import pytest
import torch

from emssd_compile.acceptance import BlockVerification, RecursiveRejection, TraversalVerification
from emssd_compile.acceptance.sampling import Decision, Odds
from emssd_compile.step.proposals import SAMPLED, WITHOUT_REPLACEMENT
from tests.acceptance.draws import FALSE_ALARM, decoded_by, drawn_by
from tests.acceptance.laws import TREES, World, chain, law, with_weights, worst

KINDS = ("random", "zeros", "ties", "disjoint", "the same", "certain")
RULE = TraversalVerification()


@pytest.mark.parametrize("drawn", [SAMPLED, WITHOUT_REPLACEMENT])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TREES)
def test_the_law_is_the_targets(name, kind, drawn):
    shape, vocabulary = TREES[name], 4 if name == "siblings" else 3 if name == "a branch late" else 2
    for verified in (len(shape.parents), len(shape.parents) - 1):
        world = World.of(kind, vocabulary, shape.depth, 2)
        assert law(RULE.decide, shape, world, drawn, lengths=verified).error < 1e-9


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


def _q_stays(odds: Odds) -> Decision:
    return RULE.decide(replace(odds, drawn=SAMPLED))


def _from_q(odds: Odds, decision: Decision) -> torch.Tensor:
    leaves = torch.tensor([node not in TREES["two levels"].parents for node in range(7)])
    return torch.where(leaves[decision.node][:, None], odds.q(decision.node), decision.weights)


def _old_residual(odds: Odds, decision: Decision) -> torch.Tensor:
    left = (odds.p(decision.node) - odds.q(decision.node)).clamp(min=0)
    return torch.where(left.sum(1, keepdim=True) > 0, left, odds.p(decision.node))


def test_mistakes_show():
    assert worst(_q_stays, TREES["siblings"], 4, WITHOUT_REPLACEMENT) > 1e-2, "Q is not updated"
    for mistake in (_from_q, _old_residual):
        assert worst(with_weights(RULE.decide, mistake), TREES["two levels"], 2, SAMPLED) > 1e-2
    assert worst(RULE.decide, TREES["two levels"], 2, SAMPLED, mixes_up=True) > 1e-2


@pytest.mark.parametrize("drawn", [SAMPLED, WITHOUT_REPLACEMENT])
@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_what_is_drawn_follows_the_law(kind, drawn):
    assert drawn_by(RULE, TREES["uneven"], World.of(kind, 3, 3), drawn) > FALSE_ALARM


def test_tokens_decoded_with_a_draft_model_follow_the_law():
    likely, stats = decoded_by("traversal", tree=(2, 2))
    assert likely > FALSE_ALARM
    assert stats.num_accepted_draft_tokens > 1000
