"""`TreeShape`: nodes breadth first, and shapes that make no sense refused."""

import pytest
import torch

from emssd_compile.drafters.tree_shape import MOST_NODES, TreeShape
from emssd_compile.errors import OptionError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("branching", "levels", "parents", "depths"),
    [
        ((3,), (3,), [0, 0, 0], [1, 1, 1]),
        ((1, 1, 1), (1, 1, 1), [0, 1, 2], [1, 2, 3]),
        ((2, 2), (2, 4), [0, 0, 1, 1, 2, 2], [1, 1, 2, 2, 2, 2]),
        ((3, 1, 2), (3, 3, 6), [0, 0, 0, 1, 2, 3, 4, 4, 5, 5, 6, 6], [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]),
    ],
)
def test_nodes_are_numbered_breadth_first(branching, levels, parents, depths):
    shape = TreeShape.of("tree", branching)
    assert (shape.levels, shape.depth, shape.num_nodes) == (levels, len(branching), len(parents))
    assert shape.parents(CPU).tolist() == parents
    assert shape.depths(CPU).tolist() == depths


def test_the_branching_may_be_any_sequence_of_integers():
    assert TreeShape.of("tree", torch.tensor([4, 2, 2])) == TreeShape.of("tree", [4, 2, 2]) == TreeShape((4, 2, 2))


@pytest.mark.parametrize(
    ("branching", "message"),
    [
        (4, r"tree=4 is not a sequence of integers"),
        ("422", r"tree='422' is not a sequence of integers"),
        ((), r"tree=\(\) has 0 drafts; use 1 to 512"),
        ((4, 0), r"tree\[1\]=0 is out of range; pass at least 1"),
        ((4, 2.5), r"tree\[1\]=2.5 is not an integer"),
        ((True,), r"tree\[0\]=True is a bool"),
        ((MOST_NODES + 1,), r"tree=\(513,\) has 513 drafts; use 1 to 512"),
        ((2,) * 9, r"has 1022 drafts; use 1 to 512"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(branching, message):
    with pytest.raises(OptionError, match=message):
        TreeShape.of("tree", branching)
