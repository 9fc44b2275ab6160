"""What a row that samples draws is a draw from its distribution, and the same draw whatever was drafted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emssd_compile.acceptance import GreedyMatch, TargetMatch, make_rule
from emssd_compile.step.acceptance import Verdict, Verification
from emssd_compile.step.nodes import Nodes
from emssd_compile.step.randomness import gumbels
from tests.step.forests import Forest, forests

VOCABULARY = 3
EXTREME = 1e-30


def _verification(
    logits: torch.Tensor,
    draft: Nodes,
    counts: list[int],
    seeds: torch.Tensor,
    positions: torch.Tensor,
    **options: torch.Tensor,
) -> Verification:
    """`counts[b]` entries of row b; seeds and options are those of rows, positions those of the root's prediction."""
    rows = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    return Verification(logits, offsets, draft, rows, seeds[rows], positions, options)


def _draws(logits: torch.Tensor, samples: list[bool], seeds: torch.Tensor, position: int = 9) -> torch.Tensor:
    """What rows without drafts emit."""
    rows, none = len(logits), torch.zeros(len(logits), 0, dtype=torch.int64)
    draft = Nodes(none, torch.zeros(rows, dtype=torch.int64), none, None, 0)
    positions = torch.full((rows,), position)
    verification = _verification(logits, draft, [1] * rows, seeds, positions, do_sample=torch.tensor(samples))
    return TargetMatch()(verification).next_tokens


@pytest.mark.parametrize("direction", ["seed", "position"])
def test_tokens_follow_the_distribution(direction):
    """Chi-square over 40,000 draws, with neighbouring seeds or positions; a fair draw fails once in 3.5 million."""
    count, p = 40_000, torch.tensor([0.5, 0.25, 0.15, 0.07, 0.02, 0.009, 0.001, 0.0])
    logits, ids = p.log() - 3, torch.arange(len(p))  # not normalised
    counter, seven = torch.arange(count), torch.tensor(7)
    if direction == "seed":
        tokens = _draws(logits.expand(count, -1), [True] * count, counter)
    else:
        tokens = (logits + gumbels(seven, counter[:, None], ids)).argmax(1)
    found, expected = torch.bincount(tokens, minlength=len(p))[:7], p[:7] * count
    assert found.sum() == count, "what has no probability is never drawn"
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 42.0  # 6 degrees of freedom


def test_noise_is_fine_grained_where_it_is_large():
    """Next to a token of probability 1 one of 1e-6 is drawn once in a million; ties of the noise would decide it."""
    noise = gumbels(torch.arange(4000)[:, None], torch.tensor(5), torch.arange(1000))
    top = noise.flatten().topk(2000).values
    assert torch.isfinite(noise).all()
    assert len(top.unique()) > 1990
    # the largest of n standard Gumbels less log n is a standard Gumbel
    assert -3 < float(noise.max()) - math.log(noise.numel()) < 17


@given(forest=forests(rows=3, num_drafts=5, max_depth=3), data=st.data())
@settings(max_examples=100)
def test_the_path_of_the_draws_is_accepted_and_rows_that_do_not_sample_are_greedy(forest: Forest, data):
    counts = [len(tree.parents) + 1 for tree in forest.trees]
    samples = torch.tensor(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    logits = torch.randn(sum(counts) + 2, VOCABULARY, generator=generator)
    seeds = torch.randint(2**62, (3,), generator=generator)
    starts = torch.randint(900, (3,), generator=generator)
    depths = [tree.depth(node) for tree in forest.trees for node in range(len(tree.parents) + 1)]
    rows = torch.arange(3).repeat_interleave(torch.tensor(counts))
    positions = torch.cat([starts[rows] + torch.tensor(depths), torch.zeros(2, dtype=torch.int64)])
    given_ = _verification(logits, forest.nodes, counts, seeds, positions, do_sample=samples)
    given_.row_ids, given_.seeds = (torch.nn.functional.pad(v, (0, 2)) for v in (given_.row_ids, given_.seeds))
    verdict = TargetMatch()(given_)
    assert verdict.path is not None
    noise = gumbels(seeds[rows, None], positions[:-2, None], torch.arange(VOCABULARY))
    chosen = (logits[:-2] + noise * samples[rows, None]).argmax(1).split(counts)
    for row, tree in enumerate(forest.trees):
        wanted = chosen[row].tolist()
        path = tree.walk(wanted)
        assert verdict.path[row, : len(path)].tolist() == path
        assert verdict.accept_lengths[row] == len(path) - 1
        assert verdict.next_tokens[row] == wanted[path[-1]]


def test_what_other_rows_ask_for_does_not_matter():
    logits, seeds = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2, 3, 4])
    all_draw = _draws(logits, [True] * 4, seeds)
    mixed = _draws(logits, [True, False, True, False], seeds)
    assert mixed[[0, 2]].equal(all_draw[[0, 2]])
    assert mixed[[1, 3]].equal(logits[[1, 3]].argmax(1))
    assert _draws(logits[2:3], [True], seeds[2:3]).equal(all_draw[2:3])


def test_where_nobody_samples_it_is_greedy_and_reads_no_option():
    rule = TargetMatch().suited(())
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    draft = Nodes(
        torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), logits[:, :0].long(), None, 0
    )
    verification = _verification(logits, draft, [1], torch.tensor([3]), torch.tensor([1]))
    verdicts: list[Verdict] = [one(verification) for one in (rule, GreedyMatch())]
    assert [int(v.next_tokens) for v in verdicts] == [1, 1]


def test_it_is_lossless_and_the_default():
    assert TargetMatch.guarantees == "tokens"
    assert isinstance(make_rule("auto"), TargetMatch)
    assert isinstance(make_rule("match"), TargetMatch)
