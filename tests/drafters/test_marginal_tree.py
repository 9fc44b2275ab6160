"""`MarginalTree`: the likeliest of all paths, found without looking at all of them."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from emssd_compile.drafters import MarginalTree
from emssd_compile.errors import OptionError
from tests.drafters.watched import paths_of


def test_the_example():
    log_q = torch.tensor([[[0.6, 0.3], [0.8, 0.1]]]).log()
    kept = MarginalTree(nodes=4, width=2).grow(torch.tensor([[[7, 8], [5, 9]]]), log_q, torch.tensor([2]))
    assert paths_of(kept.tokens[0].tolist(), kept.parents[0].tolist()) == [[7], [8], [7, 5], [8, 5]]
    torch.testing.assert_close(kept.probabilities, torch.tensor([[0.6, 0.3, 0.8, 0.8]]))
    assert kept.lengths.tolist() == [4]


@pytest.mark.parametrize(
    ("nodes", "width", "depth"), [(1, 1, 1), (5, 1, 5), (12, 3, 4), (39, 3, 3), (30, 5, 6), (6, 9, 2)]
)
def test_the_tree_is_made_of_the_likeliest_paths(nodes, width, depth):
    """Of several rows, with as many drafts on a path as each may have, and tokens that cannot be among them."""
    generator = torch.Generator().manual_seed(nodes)
    log_q = (torch.randn(8, depth, 20, generator=generator, dtype=torch.float64) * 2).log_softmax(-1)
    log_q[6, :, 2:] = -torch.inf
    log_q, tokens = log_q.topk(width, -1)
    most = torch.arange(8).clamp(max=depth)
    kept = MarginalTree(nodes, width).grow(tokens, log_q, most)
    for row in range(8):
        ranked = [list(zip(log_q[row, d].tolist(), tokens[row, d].tolist(), strict=True)) for d in range(depth)]
        paths = [path for length in range(1, int(most[row]) + 1) for path in product(*ranked[:length])]
        scored = {tuple(token for _, token in path): sum(value for value, _ in path) for path in paths}
        wanted = sorted((path for path in scored if scored[path] > -torch.inf), key=lambda path: -scored[path])[:nodes]
        count = int(kept.lengths[row])
        found = [
            tuple(path) for path in paths_of(kept.tokens[row, :count].tolist(), kept.parents[row, :count].tolist())
        ]
        assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"nodes": 0}, "MarginalTree nodes=0 is out of range"),
        ({"nodes": 513}, "MarginalTree nodes=513 is out of range"),
        ({"width": 1.5}, "MarginalTree width=1.5 is not an integer"),
    ],
)
def test_numbers_out_of_range_are_refused(sizes, message):
    with pytest.raises(OptionError, match=message):
        MarginalTree(**sizes)
