"""Options of block drafters, and what follows from them."""

from __future__ import annotations

from emssd_compile.drafters.block_config import BlockConfig
from emssd_compile.drafters.marginal_tree import MarginalTree
from emssd_compile.errors import OptionError
from emssd_compile.numeric import integer, number, shown


def read_shape(config: BlockConfig, num_draft_tokens: object, tree: object) -> tuple[int, int]:
    """K, drafts of a row, and D, the most on a path. Raises OptionError if the head cannot draft as it is asked to."""
    if tree is None:
        most = config.depth
        chosen = most if num_draft_tokens is None else num_draft_tokens
        count = integer("BlockDrafter num_draft_tokens", chosen, least=1, most=most)
        return count, count
    if not isinstance(tree, MarginalTree):
        raise OptionError(f"BlockDrafter tree={shown(tree)} is no MarginalTree; pass tree=MarginalTree(nodes=32)")
    if num_draft_tokens is not None:
        raise OptionError(
            f"BlockDrafter num_draft_tokens={shown(num_draft_tokens)} is for chains, and the tree says how many drafts "
            "there are; pass one of them"
        )
    if config.markov_rank:
        raise OptionError(
            "a tree is made of what is likely at each place by itself, and this BlockDrafter has a Markov head, which "
            "looks at the token before; leave the tree out"
        )
    if tree.width > config.draft_vocabulary:
        raise OptionError(
            f"BlockDrafter tree={tree} takes {tree.width} tokens of each depth, and {config.draft_vocabulary} can be "
            "drafted"
        )
    depth = min(config.depth, tree.nodes)
    tree.check(depth)
    return tree.nodes, depth


def read_threshold(config: BlockConfig, threshold: object) -> float | None:
    """The least confidence of a draft, 0 to 1; None for any. Raises OptionError."""
    if threshold is None:
        return None
    if not config.has_confidence:
        raise OptionError(
            f"BlockDrafter confidence_threshold={shown(threshold)} asks for a confidence head, and this one has none; "
            "leave it out"
        )
    value = float(number("BlockDrafter confidence_threshold", threshold))
    if not 0 <= value <= 1:
        raise OptionError(f"BlockDrafter confidence_threshold={value} is out of range; pass 0 to 1")
    return value
