"""Rules for independent drafts of the same token: all keep the target's law, none keeps more than any rule can."""

import pytest
import torch
from torch import Tensor

from emssd_compile.acceptance import KSeq, LargestRatio, RecursiveRejection
from emssd_compile.acceptance.multi_draft import Candidates, MultiDraftRule
from emssd_compile.acceptance.sampling import Decision, Odds, SamplingRule, ratio
from emssd_compile.step.proposals import SAMPLED, WITHOUT_REPLACEMENT
from tests.acceptance.draws import FALSE_ALARM, decoded_by, drawn_by
from tests.acceptance.laws import (
    KINDS,
    TREES,
    VOCABULARIES,
    Shape,
    World,
    assert_lossless,
    bonus_from_q,
    chain,
    from_p,
    law,
    old_residual,
    with_weights,
    worst,
)
from tests.acceptance.optimum import optimum, optimum_of_flow

RULES: dict[str, MultiDraftRule] = {"k-seq": KSeq(), "largest-ratio": LargestRatio()}
SIBLINGS = TREES["siblings"]


def _kept(rule: SamplingRule, world: World, count: int) -> float:
    """How likely it is that one of so many candidates is kept."""
    return law(rule.decide, Shape((0,) * count, is_tree=True), world, SAMPLED).mean_tokens - 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TREES)
def test_the_law_is_the_targets(rule, name, kind):
    """In each tree there are nodes with several numbers of candidates, some none."""
    assert_lossless(RULES[rule].decide, TREES[name], VOCABULARIES[name], kind, SAMPLED, seeds=(0, 1, 2), left=2)


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_of_three_tokens_and_one_of_three_levels_keep_the_law(rule):
    deep = Shape((0, 0, 1, 1, 3, 3), is_tree=True)
    for shape, vocabulary in ((TREES["two levels"], 3), (deep, 3)):
        assert law(RULES[rule].decide, shape, World.of("zeros", vocabulary, shape.depth), SAMPLED).error < 1e-9


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_candidate_for_each_token_is_tested_as_by_the_token_level_rule(rule, kind):
    world = World.of(kind, 3, 3)
    own, other = (law(r.decide, chain(3, as_tree=True), world, SAMPLED) for r in (RULES[rule], RecursiveRejection()))
    assert own.error < 1e-9
    assert own.mean_tokens == pytest.approx(other.mean_tokens)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rule_keeps_more_than_any_can_and_k_seq_what_spectr_promises(kind, count):
    for seed in range(8):
        world = World.of(kind, 4, 1, seed)
        most = optimum(world.p[0], world.q[0], count)
        for rule in (*RULES.values(), RecursiveRejection()):
            assert _kept(rule, world, count) < most + 1e-12
        assert _kept(RULES["k-seq"], world, count) > (1 - (1 - 1 / count) ** count) * most - 1e-9


def test_the_optimum_is_that_of_the_linear_program():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = (torch.bincount(torch.randint(4, (12,), generator=generator), minlength=4) for _ in range(2))
        assert optimum_of_flow(p.tolist(), q.tolist()) == pytest.approx(optimum(p.double() / 12, q.double() / 12, 2))


def test_of_two_candidates_the_rules_keep_on_average_what_they_are_known_for():
    """Least by recursive rejection; by the largest ratio within 3 % of the optimum, where p and q are far apart."""
    torch.manual_seed(0)
    p, q = torch.distributions.Dirichlet(torch.full((4,), 0.7, dtype=torch.float64)).sample((2, 100))
    worlds = [World(*(w.expand(5, 4) for w in pair)) for pair in zip(p, q, strict=True)]
    rules: tuple[SamplingRule, ...] = (RecursiveRejection(), *RULES.values())
    recursive, k_seq, largest = (sum(_kept(rule, world, 2) for world in worlds) for rule in rules)
    most = sum(optimum(world.p[0], world.q[0], 2) for world in worlds)
    assert recursive < k_seq < largest < most
    assert largest > 0.97 * most


def test_of_equals_k_seq_keeps_all_and_the_largest_ratio_what_its_docstring_says():
    """Where q is p, the largest of k numbers is what is tested: 1 - k^(-1 / (k - 1)) (1 - 1 / k) pass at the least."""
    same = torch.full((101, 100), 0.01, dtype=torch.float64)
    for count, passes in ((2, 0.75), (3, 0.615)):
        tokens = torch.zeros((1, count), dtype=torch.int64)
        candidates = Candidates(tokens, torch.ones_like(tokens, dtype=torch.bool), same[:1], same[:1])
        left = {name: float(rule.choose(candidates)[1].sum()) for name, rule in RULES.items()}
        assert left["k-seq"] < 1e-4
        assert 1 - left["largest-ratio"] == pytest.approx(passes, abs=5e-3)


class _TestedAsIfAlone(KSeq):
    """Each candidate passes with p / q, and what is left is what should be."""

    def scale(self, candidates: Candidates) -> Tensor:
        return torch.ones_like(candidates.p[:, :1])


class _AsIfItWereTheOnlyOne(LargestRatio):
    """The candidate that is selected is tested as a draw from q."""

    def choose(self, candidates: Candidates) -> tuple[Tensor, Tensor]:
        p, q, tokens = candidates.p, candidates.q, candidates.tokens
        chances, _ = super().choose(candidates)
        alone = ratio(p.gather(1, tokens), q.gather(1, tokens)).clamp(max=1)
        return torch.where(chances > 0, alone, 0), (p - q).clamp(min=0)


def _one_test(odds: Odds, decision: Decision) -> Tensor:
    """The residual of one test, p - min(p / r, q), whatever the number of candidates."""
    p, q = odds.p(decision.node), odds.q(decision.node)
    candidates = Candidates(odds.draft.tokens, odds.draft.exist & (odds.parents == 0), p, q)
    kept = torch.minimum(p / KSeq().scale(candidates), q)
    return torch.where((decision.node == 0)[:, None], p - kept, decision.weights)


@pytest.mark.parametrize(
    "mistake",
    [
        _TestedAsIfAlone().decide,
        _AsIfItWereTheOnlyOne().decide,
        with_weights(KSeq().decide, _one_test),
        *(with_weights(rule.decide, change) for rule in RULES.values() for change in (old_residual, from_p)),
    ],
)
def test_mistakes_show(mistake):
    assert worst(mistake, SIBLINGS, 4, SAMPLED) > 3e-3


@pytest.mark.parametrize("rule", RULES)
def test_mistakes_of_drafting_show(rule):
    decide = RULES[rule].decide
    assert worst(with_weights(decide, bonus_from_q), TREES["two levels"], 2, SAMPLED) > 1e-2
    assert worst(decide, TREES["two levels"], 2, SAMPLED, mixes_up=True) > 1e-2, "rows share what was drafted"
    assert worst(decide, SIBLINGS, 4, WITHOUT_REPLACEMENT) > 1e-2, "drafts that are not independent"


def _longest_path(odds: Odds) -> Decision:
    """Two paths of two drafts, each tested by itself as a chain; the longer of what passes is kept."""
    q, p = odds.q_of_drafts, odds.p_of_drafts
    chances = ratio(p, q).clamp(max=1)
    passed = odds.numbers < chances
    first, second = (passed[:, [a, b]].long().cumprod(1).sum(1) for a, b in ((0, 2), (1, 3)))  # [B] each
    node = torch.where(second > first, 2 * second, (2 * first - 1).clamp(min=0))
    left = (odds.p(node) - odds.q(node)).clamp(min=0)
    return Decision(node, torch.where((node > 2)[:, None], odds.p(node), left), chances)


def test_the_longest_of_paths_that_are_tested_by_themselves_is_not_the_targets():
    """As ReDrafter and Improving-MCSD do where they sample."""
    assert worst(_longest_path, Shape((0, 0, 1, 2), is_tree=True), 3, SAMPLED) > 1e-2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["random", "zeros"])
def test_what_is_drawn_follows_the_law(rule, kind):
    assert drawn_by(RULES[rule], TREES["uneven"], World.of(kind, 3, 3), SAMPLED) > FALSE_ALARM


def test_tokens_decoded_with_a_draft_model_follow_the_law():
    likely, stats = decoded_by("rrs-with-replacement", rows=2048, tree=(2, 2))
    assert likely > FALSE_ALARM
    assert stats.num_accepted_draft_tokens > 1000
    assert stats.guarantee == "distribution"
